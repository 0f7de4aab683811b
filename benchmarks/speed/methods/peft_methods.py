"""Adapters of the library peft, as it applies them to a layer."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.methods.adapted_layer import AdaptedLayer, Parameters, draw, with_increment
from benchmarks.speed.provider import UnavailableError

_BASE = "base_layer."
_LORA_A, _LORA_B = "lora_A.default.weight", "lora_B.default.weight"
_MAGNITUDE = "lora_magnitude_vector.default.weight"


def required(package: str) -> Any:
    """Import a package.

    Raises:
        UnavailableError: it cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UnavailableError(f"{package}: {error}") from error


def lora(
    base: nn.Linear, generator: torch.Generator, *, rank: int, sixteen_bit: bool = False
) -> AdaptedLayer:
    """`LoraConfig(r=rank)`; factors in float32, peft's default, or in a 16-bit base's dtype."""
    if sixteen_bit and base.weight.dtype.itemsize != 2:
        raise UnavailableError(f"16-bit factors need a 16-bit base, not {base.weight.dtype}")
    config = required("peft").LoraConfig(r=rank, target_modules=["layer"])
    scaling = config.lora_alpha / rank

    def increment(p: Parameters) -> Tensor:
        return scaling * (p[_LORA_B] @ p[_LORA_A])

    return with_increment(_wrapped(base, config, not sixteen_bit), _BASE, increment, generator)


def dora(base: nn.Linear, generator: torch.Generator, *, rank: int) -> AdaptedLayer:
    """`LoraConfig(r=rank, use_dora=True)`: rows of `W + s B A` scaled to trained magnitudes.

    The norm that they are divided by is a constant in the backward pass, as in DoRA's paper.
    """
    config = required("peft").LoraConfig(r=rank, target_modules=["layer"], use_dora=True)
    layer = _wrapped(base, config)
    scaling = config.lora_alpha / rank

    def directions(p: Parameters) -> Tensor:
        return p[f"{_BASE}weight"] + scaling * (p[_LORA_B] @ p[_LORA_A])

    def weight(p: Parameters) -> Tensor:
        rows = directions(p)
        return (p[_MAGNITUDE] / rows.detach().norm(dim=1))[:, None] * rows

    parameters = dict(layer.named_parameters())
    draw(
        [parameters[_LORA_A], parameters[_LORA_B]],
        lambda: directions(parameters) - base.weight,
        base.weight,
        generator,
    )
    with torch.no_grad():
        norms = directions(parameters).norm(dim=1)
        factor = torch.rand(norms.shape, generator=generator) + 0.5
        parameters[_MAGNITUDE].copy_(norms * factor.to(norms.device))
    # The norm is of a weight that is built in the base's dtype, and the quotient multiplies two
    # products that are then added: seven roundings before the sum.
    return AdaptedLayer(layer, _BASE, weight, roundings=8, dense_gradient=True)


def lokr(
    base: nn.Linear, generator: torch.Generator, *, rank: int, kernel_size: int
) -> AdaptedLayer:
    """`LoKrConfig` with the factors that DCFT has: on square layers `kron(B A, C)` itself.

    peft keeps the second factor whole, as `C` is, if `rank >= kernel_size / 2`.
    """
    config = required("peft").LoKrConfig(
        r=rank,
        alpha=rank,
        decompose_both=True,
        decompose_factor=min(base.in_features, base.out_features) // kernel_size,
        target_modules=["layer"],
    )

    def factor(p: Parameters, name: str) -> Tensor:
        whole = f"{name}.default"
        return p[whole] if whole in p else p[f"{name}_a.default"] @ p[f"{name}_b.default"]

    def increment(p: Parameters) -> Tensor:
        return torch.kron(factor(p, "lokr_w1"), factor(p, "lokr_w2"))

    return with_increment(_wrapped(base, config), _BASE, increment, generator, dense_gradient=True)


def miss(base: nn.Linear, generator: torch.Generator, *, rank: int) -> AdaptedLayer:
    """`MissConfig(r=rank)`: one `[rank, m]` block, repeated along the input features."""
    if base.in_features % rank:
        raise UnavailableError(f"MiSS: {base.in_features} is not a multiple of r={rank}")
    config = required("peft").MissConfig(r=rank, target_modules=["layer"])

    def increment(p: Parameters) -> Tensor:
        return p["miss_block.default"].t().repeat(1, base.in_features // rank)

    return with_increment(_wrapped(base, config), _BASE, increment, generator)


def _wrapped(base: nn.Linear, config: object, float32: bool = True) -> nn.Module:
    """The layer that `get_peft_model` puts in place of `base`."""
    model = nn.Sequential()
    model.add_module("layer", base)
    wrapped = required("peft").get_peft_model(model, config, autocast_adapter_dtype=float32)
    layer: nn.Module = wrapped.base_model.model.layer
    return layer
