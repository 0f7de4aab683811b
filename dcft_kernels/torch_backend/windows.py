"""The three primitives that the factored identity is made of, on one side of `DW`.

A side has `L` windows of width `w` (see `geometry.Side`), a factor `f [k, L]` (`A` on the input
side, `B^T` on the output side) and a token tensor `z [T, size]`. Written for window `l` and its
offset `r`, so that feature `l*s + r` is the r-th of window `l`:

    shrink       v[t, κ, r]    = sum_l f[κ, l] z[t, l*s + r]
    expand_      z[t, l*s + r] += sum_κ f[κ, l] v[t, κ, r]        (in place)
    factor_grad  g[κ, l]       = sum_{t, r} z[t, l*s + r] v[t, κ, r]

They are computed in one of two forms:

- *spread*: one matrix product with `spread(f) [k*w, size]`, the matrix form of a factor (for
  tiling windows, `kron(f, I_w)`), as large as a LoRA factor of rank `k*w`. It costs
  `T * size * k * w` and takes every geometry: overlap and ragged ends are in `spread` alone.
- *batched*: one small product a token, on `z` read as `[T, L, w]`. It costs `T * size * k`, what
  the sums say, but takes tiling windows only, and T tiny products suit a CPU, not a GPU.

On the CPU, 16-bit inputs are computed in float32, a block of rows at a time: as exact as a GPU's
accumulators, and far quicker than 16-bit products on processors without the instructions for them.
All functions are differentiable with respect to their tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcft_kernels.geometry import Side

# Elements of the float32 copy of a block of rows: 1 MiB, small enough to stay in a core's cache.
_BLOCK_ELEMENTS = 1 << 18

# On a CPU, `expand_` with at most this many spread rows (k*w) is quicker than in the batched form;
# `shrink` and `factor_grad` never are.
_EXPAND_SPREAD_ROWS = 8


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which the primitives compute for tokens `like`."""
    return torch.float32 if like.is_cpu and like.dtype.itemsize == 2 else like.dtype


def spread(factor: Tensor, side: Side) -> Tensor:
    """The matrix `[k*w, size]` with `spread(f)[κ*w + r, l*s + r] = f[κ, l]` and zeros elsewhere."""
    rank, span = factor.shape[0], side.span
    matrix = factor.new_zeros(rank * side.width, span)
    _entries(matrix, rank, side).copy_(factor.unsqueeze(1))
    return matrix if span == side.size else matrix[:, : side.size]


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
    row_blocks = _row_blocks(z, _block_length(z, dtype))
    if _can_batch(z, side):
        blocks = [
            torch.bmm(factor.expand(len(rows), -1, -1), _in_windows(rows.to(dtype), side))
            for rows in row_blocks
        ]
    else:
        matrix, rank = spread(factor, side).t(), factor.shape[0]
        blocks = [
            (rows.to(dtype) @ matrix).view(len(rows), rank, side.width) for rows in row_blocks
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
    v, factor = v.to(dtype), factor.to(dtype)
    batched = _can_batch(z, side) and v.shape[1] * v.shape[2] > _EXPAND_SPREAD_ROWS
    matrix = factor.t() if batched else spread(factor, side)  # [L, k] or [k*w, size]
    length = _block_length(z, dtype)
    for rows, v_rows in zip(_row_blocks(z, length), _row_blocks(v, length), strict=True):
        if batched:
            target, left, right = _in_windows(rows, side), matrix.expand(len(rows), -1, -1), v_rows
        else:
            target, left, right = rows, v_rows.flatten(1), matrix
        if dtype != z.dtype:
            target.add_(left @ right)
        elif batched:
            target.baddbmm_(left, right)
        else:
            target.addmm_(left, right)
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
    length = _block_length(z, dtype)
    blocks = list(zip(_row_blocks(z, length), _row_blocks(v.to(dtype), length), strict=True))
    if _can_batch(z, side):
        return _total(
            [
                torch.bmm(v_rows, _in_windows(rows.to(dtype), side).transpose(1, 2)).sum(0)
                for rows, v_rows in blocks
            ]
        )
    matrix = _total([v_rows.flatten(1).t() @ rows.to(dtype) for rows, v_rows in blocks])
    matrix = F.pad(matrix, (0, side.span - side.size))
    return _entries(matrix, v.shape[1], side).sum(1)


def _entries(matrix: Tensor, rank: int, side: Side) -> Tensor:
    """The non-zero entries of a contiguous spread matrix, as a view `[k, w, L]`."""
    span = side.span
    return matrix.as_strided(
        (rank, side.width, side.windows), (side.width * span, span + 1, side.stride)
    )


def _can_batch(z: Tensor, side: Side) -> bool:
    """Whether the batched form applies: tiling windows, on a CPU."""
    return z.is_cpu and side.tile


def _in_windows(z: Tensor, side: Side) -> Tensor:
    """Tokens `[T, size]` viewed as `[T, L, w]`, for tiling windows."""
    return z.view(z.shape[0], side.windows, side.width)


def _total(terms: list[Tensor]) -> Tensor:
    """The sum of the blocks' contributions."""
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


def _block_length(z: Tensor, dtype: torch.dtype) -> int:
    """Tokens in a block of rows, to be computed in `dtype`: all of them where that is no copy."""
    if dtype == z.dtype:
        return max(1, z.shape[0])
    return max(1, _BLOCK_ELEMENTS // max(1, z.shape[1]))


def _row_blocks(z: Tensor, length: int) -> list[Tensor]:
    """`z` in blocks of `length` rows; a single empty block when there are no tokens."""
    if length >= z.shape[0]:
        return [z]
    # Slices, not split(): autograd forbids in-place changes of views that come several at a time.
    return [z[start : start + length] for start in range(0, z.shape[0], length)]
