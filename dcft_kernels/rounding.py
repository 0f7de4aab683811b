"""Rounding of a wide result into a narrower tensor: to nearest, or stochastically.

Round-to-nearest drops every update below half a unit in the last place, however often it comes.
Rounded up with a probability equal to the distance from the value below, the mean is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bits of a float32 that a 16-bit value lacks.
_SURPLUS_BITS = {torch.bfloat16: 16, torch.float16: 13}

# Below its least normal number, float16 counts in steps of its least positive one.
_LEAST_NORMAL_16 = 2.0**-14
_LEAST_POSITIVE_16 = 2.0**-24


def store(values: Tensor, out: Tensor, seed: Tensor | None = None) -> None:
    """Round `values` to `out`'s dtype and store them there.

    Args:
        values: float32 or wider.
        out: of the same shape.
        seed: int64 scalar, to round stochastically to a 16-bit `out`; None: to nearest.
    """
    if seed is not None:
        values = _rounded_stochastically(values.float(), out.dtype, seed)
    out.copy_(values)


def _rounded_stochastically(values: Tensor, dtype: torch.dtype, seed: Tensor) -> Tensor:
    """Float32 values that are representable in `dtype`, a neighbour of each of `values`."""
    generator = torch.Generator(device=values.device)
    generator.manual_seed(int(seed))
    surplus = _SURPLUS_BITS[dtype]
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    noise.random_(0, 1 << surplus, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) & -(1 << surplus)
    rounded = bits.view(torch.float32)
    if dtype == torch.float16:
        steps = torch.floor(values / _LEAST_POSITIVE_16 + noise / (1 << surplus))
        rounded = torch.where(values.abs() < _LEAST_NORMAL_16, steps * _LEAST_POSITIVE_16, rounded)
    # From the largest finite value on, and for what is not a number, it is rounding to nearest.
    return torch.where(values.abs() < torch.finfo(dtype).max, rounded, values)
