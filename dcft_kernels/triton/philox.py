"""The dropout mask, drawn inside of kernels: counter-based, so that it never needs to be stored.

Whether element `(t, f)` of `x` is kept is a pure function of the seed: of the four words of
`Philox4x32-10(key = seed, counter = (f // 4, 0, t mod 2^32, t div 2^32))` it takes word `f mod 4`
and compares its upper 24 bits, as a fraction, with `p`. `dcft_kernels.dropout.philox_mask` computes
the same mask with PyTorch operators.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep(
    seed, p, t, features, CONTIGUOUS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Whether dropout keeps the elements of a tile, `[BLOCK_T, BLOCK_F]`.

    Args:
        seed: int64 scalar.
        p: probability of dropping an element.
        t: `[BLOCK_T]`, int64 token numbers.
        features: `[BLOCK_F]`.
        CONTIGUOUS: whether `features` counts up by one from a multiple of four: each Philox call
            then serves four elements, else one.
    """
    low = (t & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (t >> 32).to(tl.uint32)[:, None]
    if CONTIGUOUS:
        quad = (tl.min(features, axis=0) // 4 + tl.arange(0, BLOCK_F // 4)).to(tl.uint32)[None, :]
    else:
        quad = (features // 4).to(tl.uint32)[None, :]
    quad, low = tl.broadcast(quad, low)
    high, low = tl.broadcast(high, low)
    w0, w1, w2, w3 = tl.philox(seed, quad, quad * 0, low, high)
    if CONTIGUOUS:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_T, BLOCK_F // 4, 2, 2]
        word = tl.reshape(words, [BLOCK_T, BLOCK_F])
    else:
        which = (features % 4)[None, :]
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return (word >> 8).to(tl.float32) * (1.0 / 16777216.0) >= p
