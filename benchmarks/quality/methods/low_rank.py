"""LoRA's relatives: `y += s x DW^T` with a `DW` of low rank, `s = alpha / r`.

All start at the base model, and draw what is random as their published code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.methods import option_checks
from benchmarks.quality.methods.adapted import Adapted
from benchmarks.quality.methods.linear_layers import AdaptedLinear, replace_each

_SMALL_STD = 0.02


class LowRankLinear(AdaptedLinear):
    """`y = x W^T + b + s core(x A^T) B^T` with `A` `[r, n]` and `B` `[m, r]`.

    These are the transposes of a paper's `A` `[n, r]` and `B` `[r, m]` in `x A B`.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(base)
        self.scaling = alpha / r
        self.A = self.zeros(r, base.in_features)
        self.B = self.zeros(base.out_features, r)
        _draw_uniform(self.A)

    def core(self, h: Tensor) -> Tensor:
        """What happens between the factors, `[..., r]` to `[..., r]`."""
        return h

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_output(x)
        increment = F.linear(self.core(F.linear(x, self.A)), self.B)
        return y + (self.scaling * increment).to(y.dtype)


class LoRAFALinear(LowRankLinear):
    """LoRA-FA: `A` keeps the values that it was drawn with."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(base, r, alpha)
        self.A.requires_grad_(False)


class SoRALinear(LowRankLinear):
    """SoRA: `DW = B diag(g) A`, the gate `g` drawn from N(0, 1), `B` zero."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(base, r, alpha)
        self.g = self.zeros(r)
        nn.init.normal_(self.g)

    def core(self, h: Tensor) -> Tensor:
        return h * self.g

    @torch.no_grad()
    def shrink(self, threshold: float) -> None:
        """The proximal step of `threshold ||g||_1`: `sign(g) max(|g| - threshold, 0)`."""
        self.g.copy_(F.softshrink(self.g, threshold))


class TriLoRALinear(LowRankLinear):
    """TriLoRA: `DW = A D B` with a diagonal `D`, here `B diag(D) A`. `D` is zero at the start."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(base, r, alpha)
        self.D = self.zeros(r)
        _draw_uniform(self.B)

    def core(self, h: Tensor) -> Tensor:
        return h * self.D


class FLoRALinear(LowRankLinear):
    """FLoRA: `DW = A G B` with an arbitrary `G`, here `B G^T A`. `G` is zero at the start."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(base, r, alpha)
        self.G = self.zeros(r, r)
        for factor in (self.A, self.B):
            nn.init.normal_(factor, std=_SMALL_STD)

    def core(self, h: Tensor) -> Tensor:
        return h @ self.G


def lora_fa(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 1, alpha: float | None = None
) -> Adapted:
    """LoRA-FA (arXiv 2308.03303)."""
    return _low_rank(LoRAFALinear, model, layers, r, alpha)


def sora(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    r: int = 8,
    alpha: float | None = None,
    threshold: float = 3e-4,
) -> Adapted:
    """SoRA (Ding et al. 2023): the gates are soft-thresholded by `threshold` after every step.

    `threshold` is all of the step's size, whatever the learning rate is.
    """
    threshold = option_checks.weight("threshold", threshold)
    adapted = _low_rank(SoRALinear, model, layers, r, alpha)
    gated = [module for module in model.modules() if isinstance(module, SoRALinear)]

    def shrink_gates(step: int) -> None:
        for layer in gated:
            layer.shrink(threshold)

    adapted.after_step = shrink_gates
    return adapted


def trilora(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 2, alpha: float | None = None
) -> Adapted:
    """TriLoRA (Feng et al. 2024); section 4.1 and equation 12 of arXiv 2407.05417."""
    return _low_rank(TriLoRALinear, model, layers, r, alpha)


def flora(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 2, alpha: float | None = None
) -> Adapted:
    """FLoRA (Si et al. 2024); section 4.1 and equation 12 of arXiv 2407.05417.

    At `r=1`, where `G` is one number, it is TriLoRA.
    """
    return _low_rank(FLoRALinear, model, layers, r, alpha)


def _low_rank(
    kind: type[LowRankLinear],
    model: nn.Module,
    layers: Sequence[str],
    r: int,
    alpha: float | None,
) -> Adapted:
    rank, alpha = option_checks.rank_and_alpha(r, alpha)
    replace_each(model, layers, lambda layer: kind(layer, rank, alpha))
    return Adapted(model)


def _draw_uniform(factor: nn.Parameter) -> None:
    """Draw from U(-1/sqrt(columns), 1/sqrt(columns)), as LoRA draws `A`."""
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
