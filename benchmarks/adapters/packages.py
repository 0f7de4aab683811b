"""Adapters of other libraries, as those apply them to a layer.

A library that is not installed, or does not run here, is `UnavailableError` and says why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adapters.candidate import Candidate, Parameters, added_to, draw
from benchmarks.entries import UnavailableError

_BASE = "base_layer."
_LORA_A, _LORA_B = "lora_A.default.weight", "lora_B.default.weight"
_MAGNITUDE = "lora_magnitude_vector.default.weight"


def required(package: str) -> Any:
    """Import a package; UnavailableError says why it cannot be."""
    try:
        return importlib.import_module(package)
    except Exception as error:  # some look for a GPU, and raise what they like
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnavailableError(f"{package}: {reason[0]}") from error


def peft_lora(
    base: nn.Linear, generator: torch.Generator, *, rank: int, float32: bool = True
) -> Candidate:
    """`LoraConfig(r=rank)`, else defaults; factors in float32, peft's default, or as the base."""
    peft = required("peft")
    config = peft.LoraConfig(r=rank, target_modules=["layer"])
    layer = _with_peft(base, config, float32)
    scaling = config.lora_alpha / rank

    def increment(p: Parameters) -> Tensor:
        return scaling * (p[_LORA_B] @ p[_LORA_A])

    candidate = Candidate(
        layer, _BASE + "weight", _BASE + "bias", added_to(_BASE + "weight", increment)
    )
    _draw(candidate, increment, base, generator)
    return candidate


def peft_dora(base: nn.Linear, generator: torch.Generator, *, rank: int) -> Candidate:
    """`LoraConfig(r=rank, use_dora=True)`: columns of `W + s B A` scaled to trained magnitudes.

    The norm that they are divided by counts as a constant in the backward pass, as in its paper.
    """
    peft = required("peft")
    config = peft.LoraConfig(r=rank, target_modules=["layer"], use_dora=True)
    layer = _with_peft(base, config, True)
    scaling = config.lora_alpha / rank

    def increment(p: Parameters) -> Tensor:
        return scaling * (p[_LORA_B] @ p[_LORA_A])

    def weight(p: Parameters) -> Tensor:
        directions = p[_BASE + "weight"] + increment(p)
        norms = directions.detach().norm(dim=1)
        return (p[_MAGNITUDE] / norms)[:, None] * directions

    # The norm is of a weight that is built in the base's dtype, and the quotient multiplies two
    # products that are then added: seven roundings before the sum.
    candidate = Candidate(
        layer, _BASE + "weight", _BASE + "bias", weight, roundings=8, dense_gradient=True
    )
    parameters = dict(layer.named_parameters())
    draw(
        [candidate.trained()[name] for name in (_LORA_A, _LORA_B)],
        lambda: increment(parameters),
        base.weight,
        generator,
    )
    with torch.no_grad():
        norms = (base.weight + increment(parameters)).norm(dim=1)
        factor = torch.rand(norms.shape, generator=generator) + 0.5
        parameters[_MAGNITUDE].copy_(norms * factor.to(norms.device))
    return candidate


def peft_lokr(
    base: nn.Linear, generator: torch.Generator, *, rank: int, kernel_size: int
) -> Candidate:
    """`LoKrConfig` with the factors that DCFT has: for square layers, `kron(B A, C)` itself.

    peft leaves the second factor whole, as `C` is, from `rank = kernel_size / 2` on.
    """
    peft = required("peft")
    config = peft.LoKrConfig(
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

    candidate = Candidate(
        _with_peft(base, config, True),
        _BASE + "weight",
        _BASE + "bias",
        added_to(_BASE + "weight", increment),
        dense_gradient=True,
    )
    _draw(candidate, increment, base, generator)
    return candidate


class _WithLycoris(nn.Module):
    """A base layer whose forward pass a LyCORIS module computes."""

    def __init__(self, base: nn.Linear, module: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapter = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.adapter(x)
        return y


def lycoris_lokr(
    base: nn.Linear, generator: torch.Generator, *, rank: int, kernel_size: int
) -> Candidate:
    """`LokrModule` of LyCORIS: `kron` of a small whole factor and a large one of rank `rank`.

    It has as many parameters as DCFT of that rank, the two factors the other way round.
    """
    lokr = required("lycoris.modules.lokr")
    module = lokr.LokrModule(
        "layer",
        base,
        lora_dim=rank,
        alpha=rank,
        factor=kernel_size,
    ).to(base.weight.device)

    def factor(p: Parameters, name: str) -> Tensor:
        whole = f"adapter.{name}"
        return p[whole] if whole in p else p[f"{whole}_a"] @ p[f"{whole}_b"]

    def increment(p: Parameters) -> Tensor:
        return torch.kron(factor(p, "lokr_w1"), factor(p, "lokr_w2"))

    candidate = Candidate(
        _WithLycoris(base, module),
        "base.weight",
        "base.bias",
        added_to("base.weight", increment),
        dense_gradient=True,
    )
    _draw(candidate, increment, base, generator)
    return candidate


class _UnslothLoRA(nn.Module):
    """A base layer and LoRA factors, computed by Unsloth's autograd function."""

    def __init__(self, base: nn.Linear, rank: int, function: Any) -> None:
        super().__init__()
        self.base = base
        self._function = function
        weight = base.weight
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=weight.device))
        self.B = nn.Parameter(torch.empty(base.out_features, rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(0) if x.dim() == 2 else x
        y = self._function.apply(tokens, self.base.weight, None, self.A, self.B, 1.0)
        y = y.view(*x.shape[:-1], -1)
        bias: Tensor | None = self.base.bias
        return y if bias is None else y + bias


def unsloth_lora(base: nn.Linear, generator: torch.Generator, *, rank: int) -> Candidate:
    """`LoRA_W`, the function that Unsloth computes a single projection with."""
    required("unsloth")
    function = required("unsloth.kernels.fast_lora").LoRA_W
    layer = _UnslothLoRA(base, rank, function)

    def increment(p: Parameters) -> Tensor:
        return p["B"] @ p["A"]

    candidate = Candidate(layer, "base.weight", "base.bias", added_to("base.weight", increment))
    _draw(candidate, increment, base, generator)
    return candidate


def liger(base: nn.Linear, generator: torch.Generator) -> Candidate:
    """Liger's kernels fuse norms, activations and losses; an adapter is not among them."""
    package = required("liger_kernel.transformers")
    version = importlib.metadata.version("liger_kernel")
    found = [name for name in dir(package) if "lora" in name.lower()]
    if found:
        raise UnavailableError(
            f"liger_kernel {version} has {', '.join(found)}, unknown to this suite"
        )
    raise UnavailableError(f"liger_kernel {version} has no adapter layer")


def _with_peft(base: nn.Linear, config: object, float32: bool) -> nn.Module:
    """The layer that `get_peft_model` puts in place of the base in a model of that one layer."""
    peft = required("peft")
    model = nn.Sequential()
    model.add_module("layer", base)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=float32)
    layer: nn.Module = wrapped.base_model.model.layer
    return layer


def _draw(candidate: Candidate, increment: Any, base: nn.Linear, g: torch.Generator) -> None:
    parameters = dict(candidate.layer.named_parameters())
    draw(candidate.trained().values(), lambda: increment(parameters), base.weight, g)
