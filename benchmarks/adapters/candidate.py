"""A layer that some provider made of a frozen linear layer, and what it should compute.

Adapters are drawn at random with an increment as large as the base weight. Their usual starting
points (zero, or products of tiny numbers) would hide a missing or wrong adapter behind the rounding
of the base layer's output; the values have no influence on the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# By name, as the layer's `named_parameters` has them.
Parameters = Mapping[str, Tensor]

# Dense `[m, n]` weight from a layer's parameters, in their dtype.
DenseWeight = Callable[[Parameters], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A provider's layer over one base, and the plain linear layer that it is equal to."""

    layer: nn.Module
    weight: str  # names of the base's parameters in the layer
    bias: str
    dense_weight: DenseWeight | None = None  # None: the layer is its base
    # Values on the way to an output that are rounded to the layer's dtype: the base's output, the
    # increment's, a weight that is built, the sum.
    roundings: int = 4
    # Whether a gradient of `[m, n]` is reduced to the parameters', in sums of as many terms.
    dense_gradient: bool = False

    def dense(self, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of the plain linear layer that `layer` is equal to."""
        bias = parameters.get(self.bias)
        if self.dense_weight is None:
            return parameters[self.weight], bias
        return self.dense_weight(parameters), bias

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradient a step computes."""
        return {name: p for name, p in self.layer.named_parameters() if p.requires_grad}


def added_to(base: str, increment: DenseWeight) -> DenseWeight:
    """The sum of the base weight of that name and an increment."""
    return lambda p: p[base] + increment(p)


def draw(
    factors: Iterable[nn.Parameter],
    increment: Callable[[], Tensor],
    base: Tensor,
    generator: torch.Generator,
) -> None:
    """Give `factors` random values such that the increment, linear in each, is as large as `base`.

    The generator is the CPU's, so that a seed gives the same values on every device.
    """
    factors = list(factors)
    with torch.no_grad():
        for factor in factors:
            # Away from zero, so that no product of several has a few entries that rule the rest.
            sign = torch.randint(0, 2, factor.shape, generator=generator) * 2 - 1
            size = torch.rand(factor.shape, generator=generator) + 0.5
            factor.copy_(sign * size)
        ratio = (base.float().std() / increment().float().std()).item()
        for factor in factors:
            factor.mul_(ratio ** (1 / len(factors)))
