"""The dense `DW [m, n]`: written, or added to a weight, in one pass, and differentiated in one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcft_kernels.adapter import Adapter, Geometry
from dcft_kernels.triton.launch import PER_CALL, Launch, Signature, signatures, strides
from dcft_kernels.triton.partials import Grads, Sums, prepare_sums
from dcft_kernels.triton.tiles import Tile, architecture, lookup, multiprocessors, prepared
from dcft_kernels.triton.windows import layout_of, window_features


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
def _expand_kernel(
    weight_ptr, stride_wm, stride_wn,
    out_ptr, stride_om, stride_on,
    A_ptr, stride_ak, stride_ai,
    B_ptr, stride_bj, stride_bk,
    C_ptr, stride_cq, stride_cp,
    seed_ptr, scaling,
    m, n, J, I,
    K: tl.constexpr,
    W_OUT: tl.constexpr, S_OUT: tl.constexpr, W_IN: tl.constexpr, S_IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SEED: tl.constexpr,
):  # fmt: skip
    """`out[r, c] = weight[r, c] + scaling * sum over windows (j, i) of F[j, i] C[q, p]`.

    `F = B A`, and `q = r - j S_OUT`, `p = c - i S_IN` run over the windows that cover `(r, c)`: one
    pair where windows tile both sides.

    | tensor | shape | |
    | --- | --- | --- |
    | `weight` | `[m, n]` | read once (`HAS_WEIGHT`); may be `out` |
    | `out` | `[m, n]` | written once |
    | `A`, `B`, `C` | `[K, I]`, `[J, K]`, `[W_OUT, W_IN]` | any float dtype |

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

    for shift_out in range((W_OUT + S_OUT - 1) // S_OUT):
        j = r // S_OUT - shift_out
        q = r % S_OUT + shift_out * S_OUT
        covers_row = (j >= 0) & (j < J) & (q < W_OUT)
        for shift_in in range((W_IN + S_IN - 1) // S_IN):
            i = c // S_IN - shift_in
            p = c % S_IN + shift_in * S_IN
            covers_column = (i >= 0) & (i < I) & (p < W_IN)
            f = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for kappa in range(K):
                where_b = B_ptr + j.to(tl.int64) * stride_bj + kappa * stride_bk
                where_a = A_ptr + i.to(tl.int64) * stride_ai + kappa * stride_ak
                b = tl.load(where_b, mask=covers_row, other=0.0).to(tl.float32) * scaling
                a = tl.load(where_a, mask=covers_column, other=0.0).to(tl.float32)
                f += b[:, None] * a[None, :]
            where = C_ptr + q[:, None] * stride_cq + p[None, :] * stride_cp
            if S_OUT == W_OUT and S_IN == W_IN:  # always inside, which wide loads need to see
                C = tl.load(where)
            else:
                covers = covers_row[:, None] & covers_column[None, :]
                C = tl.load(where, mask=covers, other=0.0)
            weight += f * C.to(tl.float32)

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
            PER_CALL, *strides(C, 2),
            PER_CALL, PER_CALL,
            outputs.size, inputs.size, outputs.windows, inputs.windows,
        ],
        tile,
        K=geometry.rank,
        W_OUT=outputs.width, S_OUT=outputs.stride, W_IN=inputs.width, S_IN=inputs.stride,
        BLOCK_M=tile.tokens, BLOCK_N=tile.outputs,
        HAS_WEIGHT=weight is not None, HAS_SEED=seed is not None and itemsize == 2,
    )  # fmt: skip
    blocks = triton.cdiv(outputs.size, tile.tokens) * triton.cdiv(inputs.size, tile.outputs)
    return _Plan(launch, blocks)


@triton.jit
def _products(x, y):
    """Every product of which `x [R, S] @ y [S, C]` is the sum along the last axis, `[R, C, S]`."""
    return x[:, None, :] * tl.trans(y)[None, :, :]


@triton.jit
def _product(x, y, AS_DOT: tl.constexpr):
    """`x [R, S] @ y [S, C]`, all of it in float32."""
    if AS_DOT:
        return tl.dot(x, y, input_precision="ieee")
    # Along the last axis: Triton makes of a sum along the middle one a product in tf32.
    return tl.sum(_products(x, y), axis=2)


@triton.jit
def _spread_over_windows(
    values, WP_OUT: tl.constexpr, WP_IN: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr
):
    """`[BLOCK_J, BLOCK_I]` to `[BLOCK_J*WP_OUT, BLOCK_I*WP_IN]`: each value over its window."""
    spread = tl.broadcast_to(values[:, None, :, None], [BLOCK_J, WP_OUT, BLOCK_I, WP_IN])
    return tl.reshape(spread, [BLOCK_J * WP_OUT, BLOCK_I * WP_IN])


@triton.jit
def _expand_backward_kernel(
    g_ptr, stride_gm, stride_gn,
    A_ptr, stride_ak, stride_ai,
    B_ptr, stride_bj, stride_bk,
    C_ptr, stride_cq, stride_cp,
    gB_ptr,
    partial_ptr, stride_partial, offset_c,
    scaling,
    m, n, J, I,
    K: tl.constexpr, KP: tl.constexpr,
    W_OUT: tl.constexpr, S_OUT: tl.constexpr, WP_OUT: tl.constexpr, BLOCK_J: tl.constexpr,
    W_IN: tl.constexpr, S_IN: tl.constexpr, WP_IN: tl.constexpr, BLOCK_I: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_C: tl.constexpr,
    AS_DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of `A`, `B` and `C` from `g`, the gradient of `scaling * DW`.

        gF[j, i] = scaling * sum over q, p of g[j S_OUT + q, i S_IN + p] C[q, p]
        gB = gF A^T    gA = B^T gF
        gC[q, p] = scaling * sum over j, i of g[j S_OUT + q, i S_IN + p] F[j, i],  F = B A

    | tensor | shape | |
    | --- | --- | --- |
    | `g` | `[m, n]` | read once, except for features that windows share |
    | `A`, `B`, `C` | `[K, I]`, `[J, K]`, `[W_OUT, W_IN]` | any float dtype |
    | `gB` | `[J, K]`, contiguous | written once (`NEED_B`) |
    | `partial` | `[programs, ...]` | gradients of A `[K, I]` and C `[W_OUT, W_IN]`, float32 |

    Grid: `(programs,)`, each owning every programs-th block of `BLOCK_J` windows of whole rows, and
    walking over them by `BLOCK_I` windows. All sums are in float32.

    `AS_DOT`: products of factors are matrix products; `BLOCK_J`, `BLOCK_I` and `KP` are 16 or more.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    partial_ptr += program.to(tl.int64) * stride_partial
    kappa = tl.arange(0, KP)
    q = tl.arange(0, BLOCK_J * WP_OUT) % WP_OUT
    p = tl.arange(0, BLOCK_I * WP_IN) % WP_IN
    if NEED_A or NEED_B:
        C = tl.load(
            C_ptr + q[:, None] * stride_cq + p[None, :] * stride_cp,
            mask=(q < W_OUT)[:, None] & (p < W_IN)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
    grad_C = tl.zeros([BLOCK_J * WP_OUT, BLOCK_I * WP_IN], tl.float32)

    for block in range(program, tl.cdiv(J, BLOCK_J), programs):
        r, valid_r = window_features(block, J, m, W_OUT, S_OUT, WP_OUT, BLOCK_J)
        j = block * BLOCK_J + tl.arange(0, BLOCK_J)
        b = tl.load(
            B_ptr + j[:, None].to(tl.int64) * stride_bj + kappa[None, :] * stride_bk,
            mask=(j < J)[:, None] & (kappa < K)[None, :], other=0.0,
        ).to(tl.float32) * scaling  # fmt: skip
        if AS_DOT:
            grad_B = tl.zeros([BLOCK_J, KP], tl.float32)
        else:
            grad_B = tl.zeros([BLOCK_J, KP, BLOCK_I], tl.float32)

        for tile in tl.range(0, tl.cdiv(I, BLOCK_I), num_stages=STAGES):
            c, valid_c = window_features(tile, I, n, W_IN, S_IN, WP_IN, BLOCK_I)
            g = tl.load(
                g_ptr + r[:, None].to(tl.int64) * stride_gm + c[None, :].to(tl.int64) * stride_gn,
                mask=valid_r[:, None] & valid_c[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
            if NEED_B or NEED_C:
                a = tl.load(
                    A_ptr + i[:, None].to(tl.int64) * stride_ai + kappa[None, :] * stride_ak,
                    mask=(i < I)[:, None] & (kappa < K)[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
            if NEED_A or NEED_B:
                products = tl.reshape(g * C, [BLOCK_J, WP_OUT, BLOCK_I, WP_IN])
                gf = tl.sum(tl.sum(products, axis=3), axis=1)  # [BLOCK_J, BLOCK_I]
                if NEED_B:
                    grad_B += _product(gf, a, True) if AS_DOT else _products(gf, a)
                if NEED_A:
                    values = _product(tl.trans(gf), b, AS_DOT)
                    where = partial_ptr + kappa[None, :] * I + i[:, None]
                    mask = (i < I)[:, None] & (kappa < K)[None, :]
                    # The buffer starts uninitialised: the first block sets what later ones add to.
                    values += tl.load(where, mask=mask & (block > program), other=0.0)
                    tl.store(where, values, mask=mask)
            if NEED_C:
                f = _product(b, tl.trans(a), AS_DOT)
                grad_C += g * _spread_over_windows(f, WP_OUT, WP_IN, BLOCK_J, BLOCK_I)

        if NEED_B:
            if not AS_DOT:
                grad_B = tl.sum(grad_B, axis=2)
            tl.store(
                gB_ptr + j[:, None].to(tl.int64) * K + kappa[None, :],
                (grad_B * scaling).to(gB_ptr.dtype.element_ty),
                mask=(j < J)[:, None] & (kappa < K)[None, :],
            )
        # What this program's threads have added to the buffer, all of them read in the next block.
        tl.debug_barrier()

    if NEED_C:
        windows = tl.reshape(grad_C, [BLOCK_J, WP_OUT, BLOCK_I, WP_IN])
        total = tl.sum(tl.sum(windows, axis=2), axis=0)  # [WP_OUT, WP_IN]
        row = tl.arange(0, WP_OUT)[:, None]
        column = tl.arange(0, WP_IN)[None, :]
        tl.store(
            partial_ptr + offset_c + row * W_IN + column, total,
            mask=(row < W_OUT) & (column < W_IN),
        )  # fmt: skip


def expand_backward(grad: Tensor, adapter: Adapter, needs: tuple[bool, bool, bool]) -> Grads:
    """The gradients of the factors from that of `scaling * DW`.

    Args:
        grad: `[m, n]`, any float dtype.
        adapter: as in the forward.
        needs: whether the gradients of `A`, `B` and `C` are needed.

    Returns:
        The gradients of `A`, `B` and `C`, contiguous, in their dtypes; None where not needed.
    """
    if not any(needs):
        return None, None, None
    needs_A, needs_B, needs_C = needs
    grad_B = adapter.B.new_empty(adapter.B.shape) if needs_B else None
    tensors = (grad, adapter.A, adapter.B, adapter.C, grad_B)
    plan = _prepare_backward(adapter.geometry, needs_A, needs_C, grad.device, signatures(tensors))
    partial = grad.new_empty((plan.programs, plan.sums.columns), dtype=torch.float32)
    plan.launch(plan.programs, *tensors, partial, adapter.scaling)
    grad_A, _, grad_C = plan.sums.total(partial, adapter)
    return grad_A, grad_B, grad_C


class _Block(NamedTuple):
    """What a program of the backward kernel holds at once; sizes are powers of two."""

    windows_out: int
    windows_in: int
    ranks: int
    as_dot: bool  # whether products of factors are too large to be formed before they are summed


# Products of two elements that a program can hold on top of what else it does.
_MOST_PRODUCTS = 4096


def _backward_block(tile: Tile, geometry: Geometry) -> _Block:
    """A block of about `tile.tokens * tile.features` elements, and factors no larger than it."""
    ranks = triton.next_power_of_2(geometry.rank)
    width_out = triton.next_power_of_2(geometry.outputs.width)
    width_in = triton.next_power_of_2(geometry.inputs.width)
    elements = tile.tokens * tile.features
    as_dot = elements // (width_out * width_in) * ranks > _MOST_PRODUCTS
    least = 16 if as_dot else 1  # what `tl.dot` takes
    ranks = max(least, ranks)
    windows_out = max(least, tile.tokens // width_out)
    windows_in = min(elements // (windows_out * width_out * width_in), elements // ranks)
    return _Block(windows_out, max(least, windows_in), ranks, as_dot)


class _BackwardPlan(NamedTuple):
    """The launches of `expand_backward`."""

    launch: Launch
    programs: int
    sums: Sums


@prepared
def _prepare_backward(
    geometry: Geometry,
    needs_A: bool,
    needs_C: bool,
    device: torch.device,
    tensors: tuple[Signature, ...],
) -> _BackwardPlan:
    """The launches for `grad`, `A`, `B`, `C` and the gradient of `B` with these signatures."""
    grad, A, B, C, grad_B = tensors
    inputs, outputs = geometry.inputs, geometry.outputs
    columns = layout_of(geometry).columns
    tile = lookup(architecture(device), "expand_backward", grad[0].itemsize, columns)
    block = _backward_block(tile, geometry)
    blocks = triton.cdiv(outputs.windows, block.windows_out)
    programs = min(blocks, tile.programs * multiprocessors(device))
    # That of B is complete in one program.
    sums = prepare_sums(geometry, (needs_A, False, needs_C), device)
    launch = Launch(
        _expand_backward_kernel,
        device,
        [
            PER_CALL, *strides(grad, 2),
            PER_CALL, *strides(A, 2),
            PER_CALL, *strides(B, 2),
            PER_CALL, *strides(C, 2),
            PER_CALL,
            PER_CALL, max(1, sums.columns), sums.offset_c,
            PER_CALL,
            outputs.size, inputs.size, outputs.windows, inputs.windows,
        ],
        tile,
        K=geometry.rank, KP=block.ranks,
        W_OUT=outputs.width, S_OUT=outputs.stride,
        WP_OUT=triton.next_power_of_2(outputs.width), BLOCK_J=block.windows_out,
        W_IN=inputs.width, S_IN=inputs.stride,
        WP_IN=triton.next_power_of_2(inputs.width), BLOCK_I=block.windows_in,
        NEED_A=needs_A, NEED_B=grad_B is not None, NEED_C=needs_C,
        AS_DOT=block.as_dot, STAGES=tile.stages,
    )  # fmt: skip
    return _BackwardPlan(launch, programs, sums)
