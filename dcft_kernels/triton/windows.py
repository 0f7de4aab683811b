"""Building blocks that apply a factor to a tile of tokens, on one side of `DW`.

A side has `L` windows of `WIDTH` features every `STRIDE` (`dcft_kernels.adapter.Side`) and a factor
`f [K, L]`: `A` on the input side, `B^T` on the output side. Kernels walk over a side in tiles of
`BLOCK_L` windows. A tile's feature axis has `BLOCK_L * WP` columns, column `l*WP + r` being the
r-th feature of the tile's l-th window, where `WP` is `WIDTH` padded to a power of two. What is
shrunk to the factor's columns has `KP * WP` of them, column `κ*WP + r`, where `KP` pads `K`. A
padded entry holds zero on every side of every product, so it changes nothing.

The product with a factor is a matrix product with `spread(f) [BLOCK_L*WP, KP*WP]`, which is
`kron(f^T, I)`: `KP * WP >= 16` columns, what a matrix unit takes at once, so it costs about as
much as reading the tokens does. It is built in registers out of `BLOCK_L * KP` loaded values.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from dcft_kernels.adapter import Geometry

# Fewest columns that the matrix units take along each dimension of a product.
_MIN_COLUMNS = 16


class Layout(NamedTuple):
    """Padded sizes of an adapter, all powers of two."""

    KP: int  # ranks
    WP_IN: int  # features of an input window
    WP_OUT: int  # features of an output window
    GROUP: int  # ranks that are mixed by C in one product; with a kernel per rank all of them

    @property
    def columns(self) -> int:
        """What a token is shrunk to, on the wider side."""
        return self.KP * max(self.WP_IN, self.WP_OUT)


@functools.cache
def layout_of(geometry: Geometry) -> Layout:
    """Pad so that both sides have 16 columns or more: ranks first, then the narrower window."""
    rank = _power_of_two(geometry.rank)
    width_in = _power_of_two(geometry.inputs.width)
    width_out = _power_of_two(geometry.outputs.width)
    rank = max(rank, _MIN_COLUMNS // max(width_in, width_out))
    width_in = max(width_in, _MIN_COLUMNS // rank)
    width_out = max(width_out, _MIN_COLUMNS // rank)
    group = rank if geometry.per_rank else max(1, _MIN_COLUMNS // min(width_in, width_out))
    return Layout(rank, width_in, width_out, group)


def windows_per_tile(features: int, padded_width: int) -> int:
    """Windows in a tile of about `features` columns: at least one, and 16 columns or more."""
    return max(1, max(features, _MIN_COLUMNS) // padded_width)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@triton.jit
def window_features(
    tile, L, size,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, WP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Features of the tile's columns and which of them exist, both `[BLOCK_L*WP]`.

    Overlapping windows share features: such a side is read more than once, from the caches.
    """
    column = tl.arange(0, BLOCK_L * WP)
    if STRIDE == WIDTH and WIDTH == WP:  # contiguous, which wide loads need to see
        features = tile * (BLOCK_L * WP) + column
        return features, features < size
    window = tile * BLOCK_L + column // WP
    offset = column % WP
    features = window * STRIDE + offset
    return features, (features < size) & (offset < WIDTH) & (window < L)


@triton.jit
def factor_tile(
    f_ptr, stride_fk, stride_fl,
    tile, L,
    K: tl.constexpr, KP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The factor's values for a tile of windows, `[BLOCK_L, KP]`, in the factor's dtype."""
    window = tile * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    kappa = tl.arange(0, KP)[None, :]
    where = f_ptr + window.to(tl.int64) * stride_fl + kappa * stride_fk
    return tl.load(where, mask=(window < L) & (kappa < K), other=0.0)


@triton.jit
def spread(values, WP: tl.constexpr, KP: tl.constexpr, BLOCK_L: tl.constexpr):
    """`[BLOCK_L, KP]` to `[BLOCK_L*WP, KP*WP]`: `f[κ, l]` at `(l*WP+r, κ*WP+r)`, elsewhere zero."""
    offset = tl.arange(0, WP)
    same = offset[None, :, None, None] == offset[None, None, None, :]
    entries = tl.where(same, values[:, None, :, None], 0.0)
    return tl.reshape(entries, [BLOCK_L * WP, KP * WP])


@triton.jit
def collapse(matrix, WP: tl.constexpr, KP: tl.constexpr, BLOCK_L: tl.constexpr):
    """`[BLOCK_L*WP, KP*WP]` to `[BLOCK_L, KP]`: the sum over `r` of the entries `(l*WP+r, κ*WP+r)`.

    The adjoint of `spread`: from the dense `z^T v` to the gradient of the factor.
    """
    offset = tl.arange(0, WP)
    same = offset[None, :, None, None] == offset[None, None, None, :]
    entries = tl.reshape(matrix, [BLOCK_L, WP, KP, WP])
    return tl.sum(tl.sum(tl.where(same, entries, 0.0), axis=3), axis=1)


@triton.jit
def expand_tiles(
    L, size, WIDTH: tl.constexpr, STRIDE: tl.constexpr, WP: tl.constexpr, BLOCK_L: tl.constexpr
):
    """How many tiles it takes to write a whole side with `expand_matrix`."""
    if STRIDE == WIDTH:
        return tl.cdiv(L, BLOCK_L)
    return tl.cdiv(size, BLOCK_L * WP)


@triton.jit
def expand_matrix(
    f_ptr, stride_fk, stride_fl,
    tile, L, size,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr,
    WP: tl.constexpr, KP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Features of a tile to write, which exist, and the matrix `[KP*WP, BLOCK_L*WP]` that expands.

    Windows that tile the side are written window by window, with the transposed `spread`. Where
    windows overlap, a tile is a range of features, so that no two programs write to one place, and
    every feature gathers from all the windows over it.
    """
    if STRIDE == WIDTH:
        features, valid = window_features(tile, L, size, WIDTH, STRIDE, WP, BLOCK_L)
        values = factor_tile(f_ptr, stride_fk, stride_fl, tile, L, K, KP, BLOCK_L)
        return features, valid, tl.trans(spread(values, WP, KP, BLOCK_L).to(dtype))
    features = tile * (BLOCK_L * WP) + tl.arange(0, BLOCK_L * WP)
    column = tl.arange(0, KP * WP)
    kappa = column // WP
    offset = column % WP
    start = features[None, :] - offset[:, None]
    window = start // STRIDE
    covers = (start >= 0) & (start % STRIDE == 0) & (window < L)
    covers = covers & (offset < WIDTH)[:, None] & (kappa < K)[:, None]
    where = f_ptr + window.to(tl.int64) * stride_fl + kappa[:, None] * stride_fk
    return features, features < size, tl.load(where, mask=covers, other=0.0).to(dtype)


@triton.jit
def mixing_matrix(
    C_ptr, stride_ck, stride_from, stride_to,
    scaling,
    WIDTH_FROM: tl.constexpr, WIDTH_TO: tl.constexpr,
    WP_FROM: tl.constexpr, WP_TO: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, PER_RANK: tl.constexpr,
):  # fmt: skip
    """`scaling * kron(I, C)` over `GROUP` ranks, `[GROUP*WP_FROM, GROUP*WP_TO]`, in float32.

    `GROUP` ranks together have the 16 columns that a matrix product takes; see `mix`. With a
    kernel per rank the blocks on the diagonal are `C_κ`, of all ranks.
    """
    row = tl.arange(0, GROUP * WP_FROM)[:, None]
    column = tl.arange(0, GROUP * WP_TO)[None, :]
    source = row % WP_FROM
    target = column % WP_TO
    same = (row // WP_FROM == column // WP_TO) & (source < WIDTH_FROM) & (target < WIDTH_TO)
    where = C_ptr + source * stride_from + target * stride_to
    if PER_RANK:
        kappa = row // WP_FROM
        where += kappa * stride_ck
        same = same & (kappa < K)
    C = tl.load(where, mask=same, other=0.0)
    return C.to(tl.float32) * scaling


@triton.jit
def mix(
    v, matrix,
    WP_FROM: tl.constexpr, WP_TO: tl.constexpr,
    KP: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Apply `C` to every rank: `[BLOCK_T, KP*WP_FROM]` to `[BLOCK_T, KP*WP_TO]`, in float32."""
    ranks = tl.reshape(v, [BLOCK_T * KP // GROUP, GROUP * WP_FROM])
    mixed = tl.dot(ranks, matrix, input_precision=PRECISION)
    return tl.reshape(mixed, [BLOCK_T, KP * WP_TO])


@triton.jit
def rank_columns(
    t, stride_t, WIDTH: tl.constexpr, K: tl.constexpr, WP: tl.constexpr, KP: tl.constexpr
):
    """Offsets and existence of the columns `κ*WIDTH + r` of a `[T, K*WIDTH]` tensor, for a tile.

    Args:
        t: `[BLOCK_T]`, int64 token numbers.
        stride_t: of the tensor, whose columns are contiguous.
    """
    column = tl.arange(0, KP * WP)
    kappa = column // WP
    offset = column % WP
    offsets = t[:, None] * stride_t + (kappa * WIDTH + offset)[None, :]
    return offsets, ((kappa < K) & (offset < WIDTH))[None, :]
