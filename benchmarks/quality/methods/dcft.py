"""DCFT, and DCFT on a base that SSB scales."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.methods import Adapted
from benchmarks.quality.methods.layerwise import scaled_both_sides
from dcft_kernels import DCFTLinear, constraint_loss, dcft_update, swap_linear


def dcft(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    exclude: str | Sequence[str] = (),
    adapter_dtype: str | None = None,
    orthogonality: float = 0.0,
    orthogonality_form: str = "published_code",
    constraint: str = "orthogonal",
    scaling_gain: float = 1.0,
    **options: Any,
) -> Adapted:
    """DCFT (arXiv 2503.01419, equations 5 and 6): `dcft_kernels.swap_linear` on `layers`.

    `options` are those of `DCFTLinear`, with the name of a dtype.
    `orthogonality` is the weight of `dcft_kernels.constraint_loss(constraint,
    form=orthogonality_form)` in the loss: equation 4, or with `constraint="diagonal"` MPC_d.
    `scaling_gain` multiplies the scaling.
    """
    if constraint != "orthogonal" and not orthogonality:
        raise ValueError(f"constraint: {constraint!r} needs a weight, the option orthogonality")
    pattern = f"({'|'.join(map(re.escape, layers))})"  # bare names would match as endings
    dtype = getattr(torch, adapter_dtype, adapter_dtype) if adapter_dtype else None
    for name in swap_linear(model, pattern, exclude=exclude, adapter_dtype=dtype, **options):
        layer = model.get_submodule(name)
        if isinstance(layer, DCFTLinear) and scaling_gain != 1.0:
            layer.alpha = scaling_gain * layer.scaling * layer.rank

    def penalty() -> Tensor:
        return orthogonality * constraint_loss(model, constraint, orthogonality_form)  # type: ignore[arg-type]

    if not orthogonality:
        return Adapted(model)
    penalty()  # raises for an unknown constraint or form
    return Adapted(model, penalty)


class ScaledDCFT(nn.Module):
    """SSB on the base and DCFT next to it: `y = ((x * d1) W^T) * d2 + b + s x DW^T`.

    A combination as in section 5 of arXiv 2407.05417: the base's subspaces are rescaled
    (equation 7) and others added. The increment sees the unscaled input.
    """

    def __init__(self, dcft: DCFTLinear) -> None:
        super().__init__()
        self.dcft = dcft
        weight = dcft.weight.detach()
        self.d1 = nn.Parameter(weight.new_ones(dcft.in_features))
        self.d2 = nn.Parameter(weight.new_ones(dcft.out_features))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.dcft
        y = scaled_both_sides(layer.weight, layer.bias, x, self.d1, self.d2)
        factors = (layer.dcft_A, layer.dcft_B, layer.dcft_C)
        options: dict[str, Any] = {"scaling": layer.scaling, "stride": layer.stride}
        options |= {"dropout_p": layer.dropout, "training": self.training}
        options |= {"backend": layer.backend, "nonlinearity": layer.nonlinearity}
        return dcft_update(y, x, *factors, **options)


def ssb_dcft(model: nn.Module, layers: Sequence[str], steps: int, **options: Any) -> Adapted:
    """SSB together with DCFT, see `ScaledDCFT`; the options are those of `dcft`."""
    adapted = dcft(model, layers, steps, **options)
    for name in layers:
        layer = model.get_submodule(name)
        if isinstance(layer, DCFTLinear):  # not if excluded
            model.set_submodule(name, ScaledDCFT(layer).train(layer.training))
    return adapted
