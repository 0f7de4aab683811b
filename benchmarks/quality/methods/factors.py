"""Methods with two new factors per layer: LoRA's relatives, and adapters with a nonlinearity.

`A` `[r, n]` and `B` `[m, r]` are the transposes of the factors in a paper's `x A B`; equations are
those of arXiv 2407.05417. All methods start at the base model and initialize as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.layers import with_role
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
    """LoRA-FA (arXiv 2308.03303): LoRA with `A` frozen as it was drawn.

    `peft.optimizers.create_lorafa_optimizer` also preconditions the gradient of `B`; here AdamW
    trains it, like the factors of all other methods.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float | None) -> None:
        super().__init__(base, r, alpha)
        self.A.requires_grad_(False)


class SoRALinear(LowRankLinear):
    """SoRA (Ding et al. 2023): `DW = B diag(g) A` with the gate `g` drawn from N(0, 1)."""

    def __init__(self, base: nn.Linear, r: int, alpha: float | None) -> None:
        super().__init__(base, r, alpha)
        self.g = self.zeros(r)
        nn.init.normal_(self.g)

    def core(self, h: Tensor) -> Tensor:
        return h * self.g


class TriLoRALinear(LowRankLinear):
    """TriLoRA (Feng et al. 2024), `A D B` with a diagonal `D` (equation 12), zero at the start."""

    def __init__(self, base: nn.Linear, r: int, alpha: float | None) -> None:
        super().__init__(base, r, alpha)
        self.D = self.zeros(r)
        _draw_uniform(self.B)

    def core(self, h: Tensor) -> Tensor:
        return h * self.D


class FLoRALinear(LowRankLinear):
    """FLoRA (Si et al. 2024), `A G B` with any square `G` (equation 12), zero at the start."""

    def __init__(self, base: nn.Linear, r: int, alpha: float | None) -> None:
        super().__init__(base, r, alpha)
        self.G = self.zeros(r, r)
        for factor in (self.A, self.B):
            nn.init.normal_(factor, std=0.02)

    def core(self, h: Tensor) -> Tensor:
        return h @ self.G


class Bottleneck(Factored):
    """A nonlinearity between the factors: `z -> h(z A^T) B^T`, without biases."""

    def __init__(self, base: nn.Linear, features: int, r: int, activation: str) -> None:
        super().__init__(base, features, r)
        self.h = function_of(activation)

    def increment(self, z: Tensor) -> Tensor:
        """`h(z A^T) B^T`."""
        return F.linear(self.h(F.linear(z, self.A)), self.B)


class SerialAdapter(Bottleneck):
    """`z + h(z A^T) B^T` of the output `z = x W^T + b` (equation 22)."""

    def __init__(self, base: nn.Linear, r: int, activation: str) -> None:
        super().__init__(base, base.out_features, r, activation)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.base(x)
        return z + self.increment(z).to(z.dtype)


class ParallelAdapter(Bottleneck):
    """`x W^T + b + h(x A^T) B^T` (equation 25)."""

    def __init__(self, base: nn.Linear, r: int, activation: str) -> None:
        super().__init__(base, base.in_features, r, activation)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.increment(x).to(y.dtype)


def low_rank(kind: type[LowRankLinear], default_r: int) -> Callable[..., Adapted]:
    """The method that replaces every layer by one of this kind."""

    def adapt(
        model: nn.Module,
        layers: Sequence[str],
        steps: int,
        *,
        r: int = default_r,
        alpha: float | None = None,
    ) -> Adapted:
        return replace_each(model, layers, lambda layer: kind(layer, r, alpha))

    return adapt


def sora(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    r: int = 8,
    alpha: float | None = None,
    threshold: float = 3e-4,
) -> Adapted:
    """SoRA, whose gates are soft-thresholded by `threshold` after every step."""
    if validation.finite_number("threshold", threshold) < 0:
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold}")
    adapted = replace_each(model, layers, lambda layer: SoRALinear(layer, r, alpha))
    gates = [module.g for module in model.modules() if isinstance(module, SoRALinear)]

    def shrink_gates(step: int) -> None:
        for gate in gates:
            gate.data.copy_(F.softshrink(gate.data, threshold))

    adapted.after_step = shrink_gates
    return adapted


def bottleneck(
    kind: type[SerialAdapter] | type[ParallelAdapter],
    default_r: int,
    default_activation: str,
    *roles: str,
) -> Callable[..., Adapted]:
    """The method that replaces the layers with these roles, or else every layer.

    As in section 4.3 of arXiv 2407.05417 layer norms stay frozen, and serial adapters come before
    dropout and the residual sum.
    """

    def adapt(
        model: nn.Module,
        layers: Sequence[str],
        steps: int,
        *,
        r: int = default_r,
        activation: str = default_activation,
    ) -> Adapted:
        names = with_role(layers, *roles) if roles else layers
        return replace_each(model, names, lambda layer: kind(layer, r, activation))

    return adapt
