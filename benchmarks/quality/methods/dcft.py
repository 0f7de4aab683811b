"""DCFT itself, and DCFT over a base that SSB scales."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks.quality.methods import option_checks
from benchmarks.quality.methods.adapted import Adapted
from benchmarks.quality.methods.linear_layers import linear_layers
from benchmarks.quality.methods.scaling import scaled_both_sides
from dcft_kernels import DCFTLinear, constraint_loss, swap_linear, validation
from dcft_kernels.constraints import ConstraintForm, ConstraintName
from dcft_kernels.functional import dcft_update

_Pair = int | Sequence[int]

FORMS: tuple[str, ...] = get_args(ConstraintForm)
"""The forms of the terms that `dcft_kernels.constraint_loss` has."""
CONSTRAINTS: tuple[str, ...] = get_args(ConstraintName)
"""The patterns of the factors that it has."""


def dcft(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    kernel_size: _Pair = 8,
    stride: _Pair | None = None,
    rank: int = 1,
    init: str | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
    strategy: str = "auto",
    nonlinearity: str | None = None,
    adapter_dtype: str | torch.dtype | None = None,
    exclude: str | Sequence[str] = (),
    orthogonality: float = 0.0,
    orthogonality_form: str = "published_code",
    constraint: str = "orthogonal",
    A_gain: float = 1.0,
    B_gain: float = 1.0,
    C_gain: float = 1.0,
    scaling_gain: float = 1.0,
) -> Adapted:
    """DCFT (arXiv 2503.01419), equations 5 and 6: `dcft_kernels.swap_linear` on `layers`.

    Options that are None are left to the library. `adapter_dtype` may be a name, like "float32".
    `orthogonality` weighs `dcft_kernels.constraint_loss(constraint, form=orthogonality_form)` in
    the loss: equation 4, or with `constraint="diagonal"` MPC_d. The gains multiply the factors as
    `init` has drawn them and the layer's scaling, to study other scales; under Adam they also stand
    for a learning rate of a factor's own.

    The start is the base model, but for `init="paper"`, which draws all factors small, not zero.
    The orthogonality term goes with that one: see `dcft_kernels.constraints`.
    """
    names = list(linear_layers(model, layers))
    form = option_checks.choice("orthogonality_form", orthogonality_form, FORMS)
    pattern = option_checks.choice("constraint", constraint, CONSTRAINTS)
    weight = option_checks.weight("orthogonality", orthogonality)
    gains = {
        "dcft_A": validation.finite_number("A_gain", A_gain),
        "dcft_B": validation.finite_number("B_gain", B_gain),
        "dcft_C": validation.finite_number("C_gain", C_gain),
    }
    scaling_gain = validation.finite_number("scaling_gain", scaling_gain)
    if scaling_gain == 0:
        raise ValueError("scaling_gain: expected a number other than 0, which would train nothing")
    if constraint != "orthogonal" and not weight:
        raise ValueError(
            f"constraint: {constraint!r} has no weight; expected orthogonality above 0 beside it"
        )
    options: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride,
        "rank": rank,
        "init": init,
        "alpha": alpha,
        "dropout": dropout,
        "backend": backend,
        "strategy": strategy,
        "nonlinearity": nonlinearity,
        "adapter_dtype": _dtype(adapter_dtype),
    }
    passed = {name: value for name, value in options.items() if value is not None}
    # Names in a list would match as endings too.
    exactly = "|".join(map(re.escape, names))
    for name in swap_linear(model, exactly, exclude=exclude, **passed):
        layer = model.get_submodule(name)
        for factor, gain in gains.items():
            layer.get_parameter(factor).data.mul_(gain)
        if isinstance(layer, DCFTLinear) and scaling_gain != 1.0:
            layer.alpha = scaling_gain * layer.scaling * layer.rank

    def penalty() -> Tensor:
        return weight * constraint_loss(model, pattern, form)  # type: ignore[arg-type]

    return Adapted(model, penalty if weight else None)


class ScaledDCFT(nn.Module):
    """SSB on the base and DCFT beside it: `y = ((x * d1) W^T) * d2 + b + s x DW^T`.

    A subspace combination in the sense of section 5 of arXiv 2407.05417: the base's subspaces are
    rescaled (equation 7 there) and others added. The increment meets `x` as it is, and its output
    is not scaled.
    """

    def __init__(self, dcft: DCFTLinear) -> None:
        super().__init__()
        self.dcft = dcft
        weight = dcft.weight.detach()
        self.d1 = nn.Parameter(weight.new_ones(dcft.in_features))
        self.d2 = nn.Parameter(weight.new_ones(dcft.out_features))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.dcft
        if layer.merged:
            raise RuntimeError("ScaledDCFT: the scales are no part of a merged weight; unmerge it")
        y = scaled_both_sides(layer.weight, layer.bias, x, self.d1, self.d2)
        return dcft_update(
            y,
            x,
            layer.dcft_A,
            layer.dcft_B,
            layer.dcft_C,
            scaling=layer.scaling,
            stride=layer.stride,
            dropout_p=layer.dropout,
            training=self.training,
            backend=layer.backend,
            nonlinearity=layer.nonlinearity,
        )


def ssb_dcft(model: nn.Module, layers: Sequence[str], steps: int, **options: Any) -> Adapted:
    """SSB together with DCFT, see `ScaledDCFT`; the options are those of `dcft`.

    `strategy` has no say here: it is how whole layers are computed, and this is an increment.
    """
    adapted = dcft(model, layers, steps, **options)
    for name in layers:
        layer = model.get_submodule(name)
        if isinstance(layer, DCFTLinear):  # `exclude` leaves some as they are
            model.set_submodule(name, ScaledDCFT(layer).train(layer.training))
    return adapted


def _dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype, or what its name stands for."""
    if isinstance(value, str):
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"adapter_dtype: expected a dtype's name like 'float32', got {value!r}"
            )
        return dtype
    return value
