"""Gradients of the factors as sums over programs, without atomics.

The factors' gradients are sums over all tokens. Every program sums its own share into its own slice
of a buffer, and a second, small launch adds the slices in a fixed order, so results are bitwise
repeatable. The number of programs is bounded by the GPU's size, and the buffer with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcft_kernels.adapter import Adapter, Geometry
from dcft_kernels.triton.launch import PER_CALL, Launch
from dcft_kernels.triton.tiles import Tile


@triton.jit(do_not_specialize=["programs"])
def _sum_partials_kernel(
    partial_ptr, stride_partial, programs,
    a_ptr, b_ptr, c_ptr,
    offset_b, offset_c, total,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_C: tl.constexpr,
):  # fmt: skip
    """`out[c] = sum over programs of partial[program, c]`, cut into the gradients of A, B and C.

    | tensor | shape | |
    | --- | --- | --- |
    | `partial` | `[programs, total]` | read once |
    | `a`, `b`, `c` | `[offset_b]`, `[offset_c - offset_b]`, `[total - offset_c]` | written once |

    Grid: `(cdiv(total, BLOCK),)`. The sum is in float32 and in a fixed order.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for start in range(0, programs, BLOCK_P):
        where = (start + row)[:, None].to(tl.int64) * stride_partial + column[None, :]
        mask = (start + row < programs)[:, None] & (column < total)[None, :]
        sums += tl.load(partial_ptr + where, mask=mask, other=0.0)
    result = tl.sum(sums, axis=0)
    if NEED_A:
        tl.store(a_ptr + column, result.to(a_ptr.dtype.element_ty), mask=column < offset_b)
    if NEED_B:
        mask = (column >= offset_b) & (column < offset_c)
        tl.store(b_ptr + column - offset_b, result.to(b_ptr.dtype.element_ty), mask=mask)
    if NEED_C:
        mask = (column >= offset_c) & (column < total)
        tl.store(c_ptr + column - offset_c, result.to(c_ptr.dtype.element_ty), mask=mask)


# Columns and programs that a program of the reduction takes at a time.
_TILE = Tile(tokens=32, features=0, outputs=32, programs=0, warps=4, stages=1)

# Gradients of `A`, `B` and `C`; None where not asked for.
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Sums(NamedTuple):
    """How the programs' shares become the factors' gradients."""

    columns: int  # that a program writes: the needed gradients of A, B and C, flattened
    offset_b: int  # where that of B begins, and that of C
    offset_c: int
    needs: tuple[bool, bool, bool]
    launch: Launch | None  # None where nothing is needed

    def total(self, partial: Tensor, adapter: Adapter) -> Grads:
        """The gradients, contiguous, in their factors' dtypes.

        Args:
            partial: `[programs, columns]`, float32, contiguous.
            adapter: for the factors' shapes and dtypes.
        """
        if self.launch is None:
            return None, None, None
        grads = tuple(
            [
                factor.new_empty(factor.shape) if needed else None
                for factor, needed in zip(adapter[:3], self.needs, strict=True)
            ]
        )
        self.launch(-(-self.columns // _TILE.outputs), partial, partial.shape[0], *grads)
        return grads


def prepare_sums(geometry: Geometry, needs: tuple[bool, bool, bool], device: torch.device) -> Sums:
    """How to sum the gradients of those of `A`, `B` and `C` that are needed."""
    needs_A, needs_B, needs_C = needs
    offset_b = geometry.rank * geometry.inputs.windows if needs_A else 0
    offset_c = offset_b + (geometry.rank * geometry.outputs.windows if needs_B else 0)
    columns = offset_c + (geometry.inputs.width * geometry.outputs.width if needs_C else 0)
    if columns == 0:
        return Sums(columns, offset_b, offset_c, needs, None)
    launch = Launch(
        _sum_partials_kernel,
        device,
        [
            PER_CALL, columns, PER_CALL,
            PER_CALL, PER_CALL, PER_CALL,
            offset_b, offset_c, columns,
        ],
        _TILE,
        BLOCK=_TILE.outputs, BLOCK_P=_TILE.tokens,
        NEED_A=needs_A, NEED_B=needs_B, NEED_C=needs_C,
    )  # fmt: skip
    return Sums(columns, offset_b, offset_c, needs, launch)
