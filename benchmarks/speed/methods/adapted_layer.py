"""A frozen linear layer with an adapter, and the dense layer that it is equal to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# By the names of the layer's `named_parameters`.
Parameters = Mapping[str, Tensor]

# The dense `[m, n]` weight, or the increment of it, from a layer's parameters, in their dtype.
DenseWeight = Callable[[Parameters], Tensor]


@dataclass(frozen=True)
class AdaptedLayer:
    """A method's layer over one base.

    Adapters are drawn at random with an increment as large as the base weight (`draw`). Their usual
    starting points, zeros or tiny numbers, would hide a missing or wrong adapter behind the
    rounding of the base layer's output; the values do not affect the time.
    """

    layer: nn.Module
    base: str = ""  # prefix of the base's parameters in the layer
    dense_weight: DenseWeight | None = None  # None: the base's weight
    # Values on the way to an output that are rounded to the layer's dtype: the base's output, the
    # increment's, a weight that is built, the sum.
    roundings: int = 4
    # Whether a gradient of `[m, n]` is reduced to those of the parameters.
    dense_gradient: bool = False

    def dense(self, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the dense layer."""
        bias = parameters.get(f"{self.base}bias")
        if self.dense_weight is None:
            return parameters[f"{self.base}weight"], bias
        return self.dense_weight(parameters), bias

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradient a step computes."""
        return {name: p for name, p in self.layer.named_parameters() if p.requires_grad}


def with_increment(
    layer: nn.Module,
    base: str,
    increment: DenseWeight,
    generator: torch.Generator,
    *,
    dense_gradient: bool = False,
) -> AdaptedLayer:
    """An adapted layer with the weight `W + increment`, its trained parameters drawn."""
    adapted = AdaptedLayer(
        layer, base, lambda p: p[f"{base}weight"] + increment(p), dense_gradient=dense_gradient
    )
    parameters = dict(layer.named_parameters())
    weight = parameters[f"{base}weight"]
    draw(adapted.trained().values(), lambda: increment(parameters), weight, generator)
    return adapted


def draw(
    factors: Iterable[nn.Parameter],
    increment: Callable[[], Tensor],
    base: Tensor,
    generator: torch.Generator,
) -> None:
    """Give `factors` random values such that the increment, linear in each, is as large as `base`.

    The generator is a CPU generator, so a seed gives the same values on every device.
    """
    factors = list(factors)
    with torch.no_grad():
        for factor in factors:
            # Away from zero, or a few entries would dominate the product of several factors.
            sign = torch.randint(0, 2, factor.shape, generator=generator) * 2 - 1
            size = torch.rand(factor.shape, generator=generator) + 0.5
            factor.copy_(sign * size)
        ratio = (base.float().std() / increment().float().std()).item()
        for factor in factors:
            factor.mul_(ratio ** (1 / len(factors)))
