"""Dropout on the adapter's input that is recomputed in the backward pass instead of stored.

A mask is a pure function of a seed, a probability and a shape. The seed is drawn from PyTorch's
CPU generator, so `torch.manual_seed` and activation checkpointing (which rewinds that generator)
reproduce the mask; a backward pass keeps the seed, 8 bytes, in place of a mask as large as `x`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed() -> Tensor:
    """A fresh seed: an int64 scalar tensor on the CPU, so that reading it never waits for a GPU."""
    return torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu")


def keep_scale(
    seed: Tensor, p: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The factor that dropout multiplies with: `0` with probability `p`, else `1 / (1 - p)`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int(seed))
    # Always contiguous: the mask may depend on the shape, never on the strides of the input.
    mask = torch.empty(shape, dtype=dtype, device=device)
    return mask.bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)


def drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Apply the mask of `seed` to `x`; `x` itself when `seed` is None."""
    if seed is None:
        return x
    return x * keep_scale(seed, p, tuple(x.shape), x.dtype, x.device)
