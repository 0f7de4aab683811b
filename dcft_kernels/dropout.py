"""Dropout on the adapter's input that is recomputed in the backward pass instead of stored.

A mask is a pure function of a seed, a probability and a shape, the same for every backend and
strategy (but `composite`, which applies PyTorch's own dropout); the backward pass stores the 8-byte
seed instead of a mask as large as `x`. Seeds come from the generator of `x`'s device, so
`torch.manual_seed`, activation checkpointing (which rewinds it) and CUDA graphs (which advance it
at every replay) work as with PyTorch's own dropout.

Masks are of zeros and ones: the `1 / (1 - p)` of what is kept is part of the adapter's scaling
(`functional`). On a GPU they are drawn by a counter-based generator, which kernels evaluate where
they need it:

    word f mod 4 of Philox4x32-10(key = seed, counter = (f // 4, 0, t mod 2^32, t div 2^32))

for element `(t, f)`; it is kept if the word's upper 24 bits, as a fraction, are `p` or more. On
the CPU, where evaluating that takes as long as a small layer, PyTorch's generator draws them
(unless Triton's interpreter stands in for a GPU).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

_PHILOX_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Rows are drawn a block at a time, this many elements each: the counters are 64-bit integers.
_BLOCK_ELEMENTS = 1 << 24


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed: an int64 scalar on `device`, where a kernel can read it without a transfer."""
    if device.type != "cuda":
        device = torch.device("cpu")
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)


def keep_mask(
    seed: Tensor, p: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What `x [T, n]`, of this `shape`, is multiplied with: 0 with probability `p`, else 1."""
    if device.type != "cuda" and not _PHILOX_ON_CPU:
        generator = torch.Generator(device=device)
        generator.manual_seed(int(seed))
        # Always contiguous: the mask may depend on the shape, never on the strides of the input.
        return torch.empty(shape, dtype=dtype, device=device).bernoulli_(
            1.0 - p, generator=generator
        )
    return philox_mask(seed, p, shape, device).to(dtype)


def philox_mask(seed: Tensor, p: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The mask of the module's docstring, as booleans `[T, n]`: True is kept."""
    tokens, features = shape
    quads = -(-features // 4)
    length = max(1, _BLOCK_ELEMENTS // max(1, features))
    blocks = [
        _philox_rows(seed.to(device), p, start, min(start + length, tokens), quads)[:, :features]
        for start in range(0, tokens, length)
    ]
    return torch.cat(blocks) if blocks else torch.empty(shape, dtype=torch.bool, device=device)


def _philox_rows(seed: Tensor, p: float, first: int, last: int, quads: int) -> Tensor:
    """Rows `first .. last - 1` of the mask, `[rows, 4 * quads]`."""
    t = torch.arange(first, last, device=seed.device).unsqueeze(1).expand(-1, quads)
    c0 = torch.arange(quads, device=seed.device).expand(last - first, -1)
    c1, c2, c3 = torch.zeros_like(c0), t & _WORD, t >> 32
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        # 64-bit products wrap, but none of their bits is lost: the masks undo the sign extension.
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = ((right >> 32) & _WORD) ^ c1 ^ k0, right & _WORD
        c2, c3 = ((left >> 32) & _WORD) ^ c3 ^ k1, left & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    fraction = (torch.stack((c0, c1, c2, c3), dim=2) >> 8).flatten(1).float() / 2**24
    return fraction >= p  # a number, which becomes a float32, as in the kernels, without a copy


def drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Zero what the mask of `seed` drops of `x`; `x` itself when `seed` is None."""
    if seed is None:
        return x
    return x * keep_mask(seed, p, tuple(x.shape), x.dtype, x.device)
