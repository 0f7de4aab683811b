"""The dense `DW [m, n]`: written, or added to a weight, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcft_kernels.adapter import Adapter, Geometry
from dcft_kernels.triton.launch import (
    PER_CALL,
    Launch,
    Signature,
    kernel_strides,
    signatures,
    strides,
)
from dcft_kernels.triton.tiles import architecture, lookup, prepared
from dcft_kernels.triton.windows import layout_of


@triton.jit
def _random_halves(seed, row_block, column_block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sixteen random bits for each element of a tile, `[BLOCK_M, BLOCK_N]`, uint32.

    Element `(r, c)` takes one half of one word of `Philox4x32-10(key = seed, counter = (c // 8, 1,
    r, 0))`, whatever the tile. The 1 sets these draws apart from those of the dropout mask.
    """
    octet = column_block * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    octet, row = tl.broadcast(octet[None, :].to(tl.uint32), row[:, None].to(tl.uint32))
    zero = octet * 0
    w0, w1, w2, w3 = tl.philox(seed, octet, zero + 1, row, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK_N // 8, 2, 2]
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [BLOCK_M, BLOCK_N])


@triton.jit
def _round_stochastically(v, halves, dtype: tl.constexpr):
    """Round float32 to bfloat16 or float16, up as often as `v` is far along to the next value.

    Noise of up to one unit of the last place that is kept, then truncation: towards zero or away
    from it, never past a neighbour, and nothing changes where there is nothing to round. From the
    largest finite value on it is rounding to nearest.

    Args:
        v: float32.
        halves: sixteen random bits an element, uint32.
        dtype: to round to.
    """
    bits = v.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        noise = tl.where(tl.abs(v) < 3.3895313892515355e38, halves, 0x8000)
        # The noise could carry over into the sign of a NaN, and truncation make it an infinity.
        rounded = tl.where(v == v, bits + noise, bits | 0x00400000) >> 16
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    noise = tl.where(tl.abs(v) < 65504.0, halves >> 3, 0x1000)
    normal = ((bits + noise) & 0xFFFFE000).to(tl.float32, bitcast=True)
    # Below the normal numbers the step stays at 2^-24, while that of float32 goes on shrinking.
    steps = tl.abs(v) * 16777216.0
    below = tl.floor(steps)
    fraction = (halves.to(tl.float32) + 0.5) * 1.52587890625e-05  # (halves + 1/2) / 2^16
    subnormal = tl.where(steps - below > fraction, below + 1.0, below) * 5.9604644775390625e-08
    subnormal = tl.where(v < 0, -subnormal, subnormal)
    rounded = tl.where(steps < 1024.0, subnormal, normal)
    return tl.where(v == v, rounded, v).to(dtype)


@triton.jit
def _load_kernel(where, covers, TILE: tl.constexpr):
    """Entries of `C` in float32, zero where no window covers: with tiling ones, nowhere."""
    if TILE:  # without a mask, which would hide that loads can be wide
        return tl.load(where).to(tl.float32)
    return tl.load(where, mask=covers, other=0.0).to(tl.float32)


@triton.jit
def _expand_kernel(
    weight_ptr, stride_wm, stride_wn,
    out_ptr, stride_om, stride_on,
    A_ptr, stride_ak, stride_ai,
    B_ptr, stride_bj, stride_bk,
    C_ptr, stride_ck, stride_cq, stride_cp,
    seed_ptr, scaling,
    m, n, J, I,
    K: tl.constexpr,
    W_OUT: tl.constexpr, S_OUT: tl.constexpr, W_IN: tl.constexpr, S_IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PER_RANK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SEED: tl.constexpr,
):  # fmt: skip
    """`out[r, c] = weight[r, c] + scaling * sum over windows (j, i) of F[j, i] C[q, p]`.

    `F = B A`, and `q = r - j S_OUT`, `p = c - i S_IN` run over the windows that cover `(r, c)`: one
    pair where windows tile both sides. With a kernel per rank (`PER_RANK`), every rank's part of
    `F[j, i]` is multiplied by its own `C_κ[q, p]`.

    | tensor | shape | |
    | --- | --- | --- |
    | `weight` | `[m, n]` | read once (`HAS_WEIGHT`); may be `out` |
    | `out` | `[m, n]` | written once |
    | `A`, `B` | `[K, I]`, `[J, K]` | any float dtype |
    | `C` | `[W_OUT, W_IN]`, or `[K, W_OUT, W_IN]` (`PER_RANK`) | any float dtype |

    Grid: `(cdiv(m, BLOCK_M) * cdiv(n, BLOCK_N),)`, a program for each tile of `out`. All sums are
    in float32, rounded once: to nearest, or stochastically (`HAS_SEED`).
    """
    column_blocks = tl.cdiv(n, BLOCK_N)
    row_block = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    r = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    c = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = r[:, None].to(tl.int64)
    column = c[None, :].to(tl.int64)
    inside = (r < m)[:, None] & (c < n)[None, :]

    if HAS_WEIGHT:
        weight = tl.load(
            weight_ptr + row * stride_wm + column * stride_wn, mask=inside, other=0.0
        ).to(tl.float32)
    else:
        weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    TILE: tl.constexpr = S_OUT == W_OUT and S_IN == W_IN
    for shift_out in range((W_OUT + S_OUT - 1) // S_OUT):
        j = r // S_OUT - shift_out
        q = r % S_OUT + shift_out * S_OUT
        covers_row = (j >= 0) & (j < J) & (q < W_OUT)
        for shift_in in range((W_IN + S_IN - 1) // S_IN):
            i = c // S_IN - shift_in
            p = c % S_IN + shift_in * S_IN
            covers_column = (i >= 0) & (i < I) & (p < W_IN)
            where_c = C_ptr + q[:, None] * stride_cq + p[None, :] * stride_cp
            covers = covers_row[:, None] & covers_column[None, :]
            f = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for kappa in range(K):
                where_b = B_ptr + j.to(tl.int64) * stride_bj + kappa * stride_bk
                where_a = A_ptr + i.to(tl.int64) * stride_ai + kappa * stride_ak
                b = tl.load(where_b, mask=covers_row, other=0.0).to(tl.float32) * scaling
                a = tl.load(where_a, mask=covers_column, other=0.0).to(tl.float32)
                product = b[:, None] * a[None, :]
                if PER_RANK:
                    product *= _load_kernel(where_c + kappa * stride_ck, covers, TILE)
                f += product
            if PER_RANK:
                weight += f
            else:
                weight += f * _load_kernel(where_c, covers, TILE)

    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if HAS_SEED:
        halves = _random_halves(tl.load(seed_ptr), row_block, column_block, BLOCK_M, BLOCK_N)
        result = _round_stochastically(weight, halves, dtype)
    else:
        result = weight.to(dtype)
    tl.store(out_ptr + row * stride_om + column * stride_on, result, mask=inside)


def expand(
    adapter: Adapter, *, out: Tensor, weight: Tensor | None = None, seed: Tensor | None = None
) -> None:
    """Write `scaling * DW`, or `weight + scaling * DW`; see the kernel.

    Args:
        adapter: its dropout plays no part.
        out: `[m, n]`, written.
        weight: `[m, n]`, any float dtype; may be `out` itself, but not overlap it otherwise.
        seed: int64 scalar on `out`'s device, to round stochastically to a 16-bit `out`; the same
            seed draws the same bits on every device and for every tile. None: to nearest.
    """
    tensors = (weight, out, adapter.A, adapter.B, adapter.C, seed)
    plan = _prepare(adapter.geometry, out.device, signatures(tensors))
    plan.launch(plan.programs, *tensors, adapter.scaling)


class _Plan(NamedTuple):
    launch: Launch
    programs: int


@prepared
def _prepare(geometry: Geometry, device: torch.device, tensors: tuple[Signature, ...]) -> _Plan:
    """The launch for weight, out, `A`, `B`, `C` and seed with these signatures."""
    weight, out, A, B, C, seed = tensors
    inputs, outputs = geometry.inputs, geometry.outputs
    itemsize = out[0].itemsize
    tile = lookup(architecture(device), "expand", itemsize, layout_of(geometry).columns)
    launch = Launch(
        _expand_kernel,
        device,
        [
            PER_CALL, *strides(weight, 2),
            PER_CALL, *strides(out, 2),
            PER_CALL, *strides(A, 2),
            PER_CALL, *strides(B, 2),
            PER_CALL, *kernel_strides(C),
            PER_CALL, PER_CALL,
            outputs.size, inputs.size, outputs.windows, inputs.windows,
        ],
        tile,
        K=geometry.rank,
        W_OUT=outputs.width, S_OUT=outputs.stride, W_IN=inputs.width, S_IN=inputs.stride,
        BLOCK_M=tile.tokens, BLOCK_N=tile.outputs, PER_RANK=geometry.per_rank,
        HAS_WEIGHT=weight is not None, HAS_SEED=seed is not None and itemsize == 2,
    )  # fmt: skip
    blocks = triton.cdiv(outputs.size, tile.tokens) * triton.cdiv(inputs.size, tile.outputs)
    return _Plan(launch, blocks)
