"""Gradients of the factors as sums over programs, without atomics.

The factors' gradients are sums over all tokens. Every program sums its own share into its own slice
of a buffer, and a second, small launch adds the slices in a fixed order, so results are bitwise
repeatable. There are at most as many slices as the GPU runs programs at once, or one for each row
of tiles of a product, which keeps the buffer small.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from dcft_kernels.adapter import Adapter, Geometry
from dcft_kernels.triton.launch import PER_CALL, Launch, may_overlap
from dcft_kernels.triton.tiles import Tile, prepared


@triton.jit
def _sum_slices(ptr, stride, slices, column, valid, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """The sum over slices of their `BLOCK` columns, in float32 and in a fixed order."""
    row = tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for start in range(0, slices, BLOCK_P):
        where = (start + row)[:, None].to(tl.int64) * stride + column[None, :]
        mask = (start + row < slices)[:, None] & valid[None, :]
        sums += tl.load(ptr + where, mask=mask, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["programs", "slices"])
def _sum_partials_kernel(
    partial_ptr, programs,
    by_feature_ptr, slices,
    a_ptr, b_ptr, c_ptr,
    offset_b, offset_c, total, n, I,
    RANK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_C: tl.constexpr, BY_FEATURE: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out[c] = sum over programs of partial[program, c]`, cut into the gradients of A, B and C.

    | tensor | shape | |
    | --- | --- | --- |
    | `partial` | `[programs, total]` | read once (`HAS_PARTIAL`) |
    | `by_feature` | `[slices, RANK, n]` | read once (`BY_FEATURE`): the shares of A's gradient |
    | `a`, `b`, `c` | contiguous, as the factors | written once |

    Grid: `(RANK * cdiv(n, BLOCK_F) + cdiv(total, BLOCK),)`, without the first part unless
    `BY_FEATURE`: then the gradient of A is not in `partial`, but the sum over `by_feature`'s slices
    and over the `WIDTH` features of a window.
    """
    if OVERLAP:
        gdc_wait()
    block = tl.program_id(0)
    blocks = 0
    if BY_FEATURE:
        blocks = RANK * tl.cdiv(n, BLOCK_F)
        if block < blocks:
            kappa = block // tl.cdiv(n, BLOCK_F)
            first = block % tl.cdiv(n, BLOCK_F) * BLOCK_F
            feature = first + tl.arange(0, BLOCK_F)
            features = _sum_slices(
                by_feature_ptr, RANK * n, slices, kappa * n + feature, feature < n,
                BLOCK_F, BLOCK_S,
            )  # fmt: skip
            sums = tl.sum(tl.reshape(features, [BLOCK_F // WIDTH, WIDTH]), axis=1)
            window = first // WIDTH + tl.arange(0, BLOCK_F // WIDTH)
            where = a_ptr + kappa * I + window
            tl.store(where, sums.to(a_ptr.dtype.element_ty), mask=window < I)
    if HAS_PARTIAL and block >= blocks:
        column = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
        result = _sum_slices(partial_ptr, total, programs, column, column < total, BLOCK, BLOCK_P)
        if NEED_A and not BY_FEATURE:
            tl.store(a_ptr + column, result.to(a_ptr.dtype.element_ty), mask=column < offset_b)
        if NEED_B:
            mask = (column >= offset_b) & (column < offset_c)
            tl.store(b_ptr + column - offset_b, result.to(b_ptr.dtype.element_ty), mask=mask)
        if NEED_C:
            mask = (column >= offset_c) & (column < total)
            tl.store(c_ptr + column - offset_c, result.to(c_ptr.dtype.element_ty), mask=mask)


# Slices and columns that a program of the reduction takes at a time: few columns, so that there are
# many programs, and few turns, as each waits for memory. The same for shares by feature.
_TILE = Tile(tokens=512, features=0, outputs=16, programs=0, warps=8, stages=1)
_FEATURE_TILE = _TILE._replace(tokens=64, outputs=64)

# Gradients of `A`, `B` and `C`; None where not asked for.
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_GRADS: Grads = (None, None, None)


class Sums(NamedTuple):
    """How the programs' shares become the factors' gradients."""

    columns: int  # of the buffer: the needed gradients that are in it, flattened
    offset_b: int  # where that of B begins, and that of C
    offset_c: int
    needs: tuple[bool, bool, bool]
    blocks: int  # programs of the launch
    launch: Launch | None  # None where nothing is needed

    def total(
        self, partial: Tensor | None, adapter: Adapter, by_feature: Tensor | None = None
    ) -> Grads:
        """The gradients, contiguous, in their factors' dtypes.

        Args:
            partial: `[programs, columns]`, float32, contiguous; None if there are no columns.
            adapter: for the factors' shapes and dtypes.
            by_feature: `[slices, k, n]`, float32, contiguous: the shares of A's gradient, where
                they are not in `partial`.
        """
        if self.launch is None:
            return NO_GRADS
        grads = tuple(
            [
                factor.new_empty(factor.shape) if needed else None
                for factor, needed in zip(adapter[:3], self.needs, strict=True)
            ]
        )
        self.launch(
            self.blocks,
            partial,
            0 if partial is None else partial.shape[0],
            by_feature,
            0 if by_feature is None else by_feature.shape[0],
            *grads,
        )
        return grads


@prepared
def prepare_sums(
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    device: torch.device,
    by_feature: bool = False,
) -> Sums:
    """How to sum the gradients of those of `A`, `B` and `C` that are needed, factors in `dtypes`.

    `by_feature`: whether the partial gradients of `A` are in a separate buffer.
    """
    needs_A, needs_B, needs_C = needs
    rank, outputs, inputs, _ = geometry
    by_feature = by_feature and needs_A
    offset_b = rank * inputs.windows if needs_A and not by_feature else 0
    offset_c = offset_b + (rank * outputs.windows if needs_B else 0)
    columns = offset_c + (math.prod(geometry.shape_C) if needs_C else 0)
    blocks = -(-columns // _TILE.outputs)
    if by_feature:
        blocks += rank * -(-inputs.size // _FEATURE_TILE.outputs)
    if blocks == 0:
        return Sums(columns, offset_b, offset_c, needs, blocks, None)
    overlap = by_feature and may_overlap(device)  # the launch before is `gemm`'s
    launch = Launch(
        _sum_partials_kernel,
        device,
        [
            PER_CALL, PER_CALL, PER_CALL, PER_CALL,
            PER_CALL, PER_CALL, PER_CALL,
            offset_b, offset_c, columns, inputs.size, inputs.windows,
        ],
        _TILE,
        may_overlap=overlap,
        RANK=rank, WIDTH=inputs.width if by_feature else 1,
        BLOCK=_TILE.outputs, BLOCK_P=_TILE.tokens,
        BLOCK_F=_FEATURE_TILE.outputs, BLOCK_S=_FEATURE_TILE.tokens,
        NEED_A=needs_A, NEED_B=needs_B, NEED_C=needs_C, BY_FEATURE=by_feature,
        HAS_PARTIAL=columns > 0, OVERLAP=overlap,
    )  # fmt: skip
    return Sums(columns, offset_b, offset_c, needs, blocks, launch)
