"""Methods with two new factors per layer: LoRA's relatives, and adapters with a nonlinearity.

The factors `A` `[r, n]` and `B` `[m, r]` are the transposes of those in a paper that writes
`x A B`. All methods start at the base model, and initialize as their published code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.layers import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, with_role
from benchmarks.quality.methods.adapted import Adapted, AdaptedLinear, replace_each
from dcft_kernels import validation
from dcft_kernels.nonlinearity import function_of


class Factored(AdaptedLinear):
    """A linear layer with the factors `A`, uniform as LoRA's, and `B`, zero."""

    def __init__(self, base: nn.Linear, features: int, r: int) -> None:
        super().__init__(base)
        self.A = self.zeros(validation.positive_int("r", r), features)
        self.B = self.zeros(base.out_features, r)
        _draw_uniform(self.A)


def _draw_uniform(factor: nn.Parameter) -> None:
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


class LowRankLinear(Factored):
    """`y = x W^T + b + s core(x A^T) B^T` with `s = alpha / r`, where None is `alpha = r`."""

    def __init__(self, base: nn.Linear, r: int, alpha: float | None) -> None:
        super().__init__(base, base.in_features, r)
        self.scaling = 1.0 if alpha is None else validation.finite_number("alpha", alpha) / r

    def core(self, h: Tensor) -> Tensor:
        """What happens between the factors, `[..., r]` to `[..., r]`."""
        return h

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        increment = F.linear(self.core(F.linear(x, self.A)), self.B)
        return y + (self.scaling * increment).to(y.dtype)


class LoRAFALinear(LowRankLinear):
    """LoRA with `A` frozen as it was drawn."""

    def __init__(self, base: nn.Linear, r: int, alpha: float | None) -> None:
        super().__init__(base, r, alpha)
        self.A.requires_grad_(False)


class SoRALinear(LowRankLinear):
    """`DW = B diag(g) A` with the gate `g` drawn from N(0, 1)."""

    def __init__(self, base: nn.Linear, r: int, alpha: float | None) -> None:
        super().__init__(base, r, alpha)
        self.g = self.zeros(r)
        nn.init.normal_(self.g)

    def core(self, h: Tensor) -> Tensor:
        return h * self.g


class TriLoRALinear(LowRankLinear):
    """`DW = B diag(D) A` with `D` zero and `B` random at the start."""

    def __init__(self, base: nn.Linear, r: int, alpha: float | None) -> None:
        super().__init__(base, r, alpha)
        self.D = self.zeros(r)
        _draw_uniform(self.B)

    def core(self, h: Tensor) -> Tensor:
        return h * self.D


class FLoRALinear(LowRankLinear):
    """`DW = B G^T A` with `G` zero and the factors random at the start."""

    def __init__(self, base: nn.Linear, r: int, alpha: float | None) -> None:
        super().__init__(base, r, alpha)
        self.G = self.zeros(r, r)
        for factor in (self.A, self.B):
            nn.init.normal_(factor, std=0.02)

    def core(self, h: Tensor) -> Tensor:
        return h @ self.G


class SerialAdapter(Factored):
    """`z + h(z A^T) B^T` of the output `z = x W^T + b` (equation 22 of arXiv 2407.05417)."""

    def __init__(self, base: nn.Linear, r: int, activation: str) -> None:
        super().__init__(base, base.out_features, r)
        self.h = function_of(activation)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.base(x)
        return z + F.linear(self.h(F.linear(z, self.A)), self.B).to(z.dtype)


class ParallelAdapter(Factored):
    """`x W^T + b + h(x A^T) B^T` (equation 25 of arXiv 2407.05417)."""

    def __init__(self, base: nn.Linear, r: int, activation: str) -> None:
        super().__init__(base, base.in_features, r)
        self.h = function_of(activation)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + F.linear(self.h(F.linear(x, self.A)), self.B).to(y.dtype)


def lora_fa(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 1, alpha: float | None = None
) -> Adapted:
    """LoRA-FA (arXiv 2308.03303): LoRA with `A` frozen.

    Not with `peft.optimizers.create_lorafa_optimizer`, which also preconditions the gradient of
    `B`: the stored runs used AdamW, like those of all other methods.
    """
    return replace_each(model, layers, lambda layer: LoRAFALinear(layer, r, alpha))


def sora(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    r: int = 8,
    alpha: float | None = None,
    threshold: float = 3e-4,
) -> Adapted:
    """SoRA (Ding et al. 2023): gates, soft-thresholded by `threshold` after every step."""
    if validation.finite_number("threshold", threshold) < 0:
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold}")
    adapted = replace_each(model, layers, lambda layer: SoRALinear(layer, r, alpha))
    gates = [module.g for module in model.modules() if isinstance(module, SoRALinear)]

    def shrink_gates(step: int) -> None:
        for gate in gates:
            gate.data.copy_(F.softshrink(gate.data, threshold))

    adapted.after_step = shrink_gates
    return adapted


def trilora(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 2, alpha: float | None = None
) -> Adapted:
    """TriLoRA (Feng et al. 2024), `A D B` with a diagonal `D`: equation 12 of arXiv 2407.05417."""
    return replace_each(model, layers, lambda layer: TriLoRALinear(layer, r, alpha))


def flora(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 2, alpha: float | None = None
) -> Adapted:
    """FLoRA (Si et al. 2024), `A G B` with an arbitrary `G`: equation 12 of arXiv 2407.05417."""
    return replace_each(model, layers, lambda layer: FLoRALinear(layer, r, alpha))


def houlsby(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 8, activation: str = "gelu"
) -> Adapted:
    """Adapters after the outputs of attention and feed-forward (Houlsby et al. 2019), equation 22.

    Of `layers` only those outputs are adapted, before their dropout and the residual sum; without
    biases and with frozen layer norms, as in section 4.3 of arXiv 2407.05417.
    """
    names = with_role(layers, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT)
    return replace_each(model, names, lambda layer: SerialAdapter(layer, r, activation))


def pfeiffer(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 16, activation: str = "relu"
) -> Adapted:
    """Adapters after the feed-forward's output only (Pfeiffer et al. 2020), equation 22."""
    names = with_role(layers, FEED_FORWARD_OUTPUT)
    return replace_each(model, names, lambda layer: SerialAdapter(layer, r, activation))


def parallel_adapter(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 1, activation: str = "gelu"
) -> Adapted:
    """An adapter parallel to every layer (He et al. 2021), equation 25 of arXiv 2407.05417.

    LoRA with a nonlinearity. Not the paper's ReLU: at `r=1`, a unit that is off for all tokens
    would never learn.
    """
    return replace_each(model, layers, lambda layer: ParallelAdapter(layer, r, activation))
