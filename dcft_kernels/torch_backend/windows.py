"""The three primitives that the factored identity is made of, on one side of `DW`.

A side has `L` windows of width `w` (see `geometry.Side`), a factor `f [k, L]` (`A` on the input
side, `B^T` on the output side) and a token tensor `z [T, size]`. Written for window `l` and its
offset `r`, so that feature `l*s + r` is the r-th of window `l`:

    shrink       v[t, κ, r]    = sum_l f[κ, l] z[t, l*s + r]
    expand_      z[t, l*s + r] += sum_κ f[κ, l] v[t, κ, r]        (in place)
    factor_grad  g[κ, l]       = sum_{t, r} z[t, l*s + r] v[t, κ, r]

On every device they are matrix products with `spread(f) [k*w, size]`, the matrix form of a factor
(for tiling windows, `kron(f, I_w)`): as large as a LoRA factor of rank `k*w`, so that products with
it cost `T * size * k * w`. Overlap and ragged ends are in `spread` alone.

On the CPU, 16-bit inputs are computed in float32, a block of rows at a time: as exact as a GPU's
accumulators, and far quicker than 16-bit products on processors without the instructions for them.
All functions are differentiable with respect to their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dcft_kernels.geometry import Side

# Elements of the float32 copy of a block of rows: 1 MiB, small enough to stay in a core's cache.
_BLOCK_ELEMENTS = 1 << 18


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which the primitives compute for tokens `like`."""
    if like.device.type == "cpu" and like.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return like.dtype


def spread(factor: Tensor, side: Side) -> Tensor:
    """The matrix `[k*w, size]` with `spread(f)[κ*w + r, l*s + r] = f[κ, l]` and zeros elsewhere."""
    rank, span = factor.shape[0], side.span
    matrix = factor.new_zeros(rank * side.width, span)
    _entries(matrix, rank, side).copy_(factor[:, None, :].expand(-1, side.width, -1))
    return matrix[:, : side.size]


def shrink(z: Tensor, factor: Tensor, side: Side) -> Tensor:
    """`v[t, κ, r] = sum_l f[κ, l] z[t, l*s + r]`.

    Args:
        z: `[T, size]`.
        factor: `[k, L]`, any float dtype.
        side: the windows.

    Returns:
        `[T, k, w]` in `compute_dtype(z)`.
    """
    dtype = compute_dtype(z)
    factor = factor.to(dtype)
    rank, width = factor.shape[0], side.width
    if side.tile and z.device.type == "cpu":
        # One small product a token reads z once and does no more work than the sum says; on a GPU
        # a single product with the spread factor is quicker than T tiny ones.
        blocks = [
            torch.bmm(
                factor.expand(rows.shape[0], -1, -1),
                rows.to(dtype).unflatten(1, (side.windows, width)),
            )
            for rows in _row_blocks(z)
        ]
    else:
        matrix = spread(factor, side)
        blocks = [
            (rows.to(dtype) @ matrix.t()).unflatten(1, (rank, width)) for rows in _row_blocks(z)
        ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def expand_(z: Tensor, v: Tensor, factor: Tensor, side: Side) -> Tensor:
    """`z[t, l*s + r] += sum_κ f[κ, l] v[t, κ, r]`, in place, with one rounding to `z`'s dtype.

    Args:
        z: `[T, size]`, changed in place.
        v: `[T, k, w]`.
        factor: `[k, L]`, any float dtype.
        side: the windows.

    Returns:
        `z`.
    """
    dtype = compute_dtype(z)
    matrix = spread(factor.to(dtype), side)
    v = v.to(dtype).flatten(1)
    if dtype == z.dtype:
        return z.addmm_(v, matrix)
    for rows, v_rows in zip(_row_blocks(z), v.split(_block_length(z)), strict=True):
        rows.add_(v_rows @ matrix)
    return z


def factor_grad(z: Tensor, v: Tensor, side: Side) -> Tensor:
    """`g[κ, l] = sum_{t, r} z[t, l*s + r] v[t, κ, r]`.

    Args:
        z: `[T, size]`.
        v: `[T, k, w]`.
        side: the windows.

    Returns:
        `[k, L]` in `compute_dtype(z)`.
    """
    dtype = compute_dtype(z)
    rank = v.shape[1]
    v = v.to(dtype).flatten(1)
    products = [
        v_rows.t() @ rows.to(dtype)
        for rows, v_rows in zip(_row_blocks(z), v.split(_block_length(z)), strict=True)
    ]
    matrix = products[0] if len(products) == 1 else torch.stack(products).sum(0)
    matrix = F.pad(matrix, (0, side.span - side.size))
    return _entries(matrix, rank, side).sum(1)


def _entries(matrix: Tensor, rank: int, side: Side) -> Tensor:
    """The non-zero entries of a contiguous spread matrix, as a view `[k, w, L]`."""
    span = side.span
    return matrix.as_strided(
        (rank, side.width, side.windows), (side.width * span, span + 1, side.stride)
    )


def _block_length(z: Tensor) -> int:
    """Tokens in a block of rows: all of them where no copy to another dtype is needed."""
    if compute_dtype(z) == z.dtype:
        return max(1, z.shape[0])
    return max(1, _BLOCK_ELEMENTS // max(1, z.shape[1]))


def _row_blocks(z: Tensor) -> Iterator[Tensor]:
    """`z` in blocks of rows; a single empty block when there are no tokens."""
    return iter(z.split(_block_length(z)))
