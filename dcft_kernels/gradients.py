"""Which gradients of a layer are asked for, and what comes back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """Which gradients the backward pass was asked for."""

    x: bool
    weight: bool
    bias: bool
    A: bool
    B: bool
    C: bool


class Gradients(NamedTuple):
    """The gradients, None where not asked for."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    C: Tensor | None = None


def saved(tensor: Tensor | None) -> Tensor:
    """A tensor that a gradient asked for reads: the forward kept it, or the caller erred."""
    if tensor is None:
        raise RuntimeError("backward: a gradient was asked for whose inputs were not saved")
    return tensor
