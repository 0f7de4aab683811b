"""The passes of the strategy `seeded` over `x` and over `g`: they read it once and write little.

Forward, a pass over `x` writes `U`; backward, a pass over `g` writes `Ub` and the sums of `gB` and
`gC`. The matrix products that follow take `U` and `Ub` as further columns of their operands, with
`Q [m, k*d_in]` and `P [k*d_in, n]` as those of the weight: `y = U Q^T + x W^T`, `gx = Ub P + g W`.
Programs after those of the rows write `Q` and `P`.

A pass does `2 * rank` flops per value that it reads, too few for the matrix unit to be worth the
padding: it multiplies and adds in float32. A thread loads 16 bytes, 8 features of a window (or two
windows of 4), and keeps its own sums over windows until the row ends.

Windows must tile both sides (the last one may stick out), with powers of two from 4 to 64 as
widths; tokens have 16 bits; tokens' columns, `U`, `Ub` and factors are contiguous.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from dcft_kernels.adapter import Adapter, Geometry, Side
from dcft_kernels.triton.launch import (
    PER_CALL,
    Launch,
    Signature,
    may_overlap,
    signatures,
    strides,
)
from dcft_kernels.triton.tiles import (
    Tile,
    TokenBucket,
    architecture,
    entries,
    lookup,
    multiprocessors,
    prepared,
    token_bucket,
)


@triton.jit
def _load_rows(
    ptr, t, T,
    stride_t: tl.constexpr, size: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Whole rows, as `STEPS` tiles `[BLOCK_T, COLUMNS]`: all loads come before the next barrier.

    Strides and sizes that the compiler knows to be multiples of 8 allow loads of 16 bytes, and only
    the last tile needs its columns masked.
    """
    tiles = ()
    for step in tl.static_range(STEPS):
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        mask = (t < T)[:, None] & (column < size)[None, :]
        tiles += (tl.load(ptr + t[:, None] * stride_t + column[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def _write_output_factor(
    q_ptr, B_ptr, C_ptr, block, scaling, m,
    K: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr, PER_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of rows of `Q [m, K*W_IN]`: `Q[j*W_OUT+q, κ*W_IN+p] = scaling * B[j,κ] C[q,p]`."""
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < m
    p = tl.arange(0, W_IN)[None, :]
    where_C = C_ptr + (row % W_OUT)[:, None] * W_IN + p
    C = tl.load(where_C).to(tl.float32) * scaling
    for kappa in tl.static_range(K):
        if PER_RANK and kappa > 0:
            C = tl.load(where_C + kappa * (W_OUT * W_IN)).to(tl.float32) * scaling
        b = tl.load(B_ptr + row // W_OUT * K + kappa, mask=valid, other=0.0).to(tl.float32)
        where = q_ptr + row[:, None] * (K * W_IN) + kappa * W_IN + p
        tl.store(where, (b[:, None] * C).to(q_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _write_input_factor(
    p_ptr, A_ptr, block, n, I,
    K: tl.constexpr, W_IN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of columns of `P [K*W_IN, n]`: `P[κ*W_IN+p, i*W_IN+p] = A[κ,i]`, elsewhere zero."""
    feature = block * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = feature < n
    p = tl.arange(0, W_IN)[:, None]
    same = p == (feature % W_IN)[None, :]
    for kappa in tl.static_range(K):
        a = tl.load(A_ptr + kappa * I + feature // W_IN, mask=valid, other=0.0)
        where = p_ptr + (kappa * W_IN + p) * n + feature[None, :]
        values = tl.where(same, a[None, :], 0.0).to(p_ptr.dtype.element_ty)
        tl.store(where, values, mask=valid[None, :])


@triton.jit(do_not_specialize=["T"])
def _shrink_kernel(
    x_ptr,
    A_ptr, B_ptr, C_ptr,
    u_ptr, q_ptr,
    scaling, T, m,
    stride_xt: tl.constexpr, n: tl.constexpr, I: tl.constexpr,
    K: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr, PER_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, STEPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`U[t,p,κ] = Σ_i x[t,i,p] A[κ,i]`; `Q[j*W_OUT+q, κ*W_IN+p] = scaling * B[j,κ] C[q,p]`.

    | tensor | shape | |
    | --- | --- | --- |
    | `x` | `[T, n]` | read once |
    | `A`, `B` | `[K, I]`, `[J, K]` | any float dtype |
    | `C` | `[W_OUT, W_IN]`, or `[K, W_OUT, W_IN]` (`PER_RANK`) | any float dtype |
    | `U` | `[T, K*W_IN]` | written once, in its own dtype |
    | `Q` | `[m, K*W_IN]` | written once, in its own dtype |

    Grid: `(cdiv(T, BLOCK_T) + cdiv(m, BLOCK_L),)`, the first ones owning whole rows of `x`, the
    others rows of `Q`. All sums and products are in float32.
    """
    if OVERLAP:
        gdc_launch_dependents()
    program = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    p = tl.arange(0, W_IN)
    if program < blocks:
        t = program.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < T)[:, None]
        u = ()
        for _ in tl.static_range(K):
            u += (tl.zeros([BLOCK_T, BLOCK_L, W_IN], tl.float32),)
        tiles = _load_rows(x_ptr, t, T, stride_xt, n, BLOCK_L * W_IN, STEPS)
        for step in tl.static_range(STEPS):
            x = tl.reshape(tiles[step], [BLOCK_T, BLOCK_L, W_IN]).to(tl.float32)
            window = step * BLOCK_L + tl.arange(0, BLOCK_L)
            sums = ()
            for kappa in tl.static_range(K):
                a = tl.load(A_ptr + kappa * I + window, mask=window < I, other=0.0)
                sums += (u[kappa] + x * a.to(tl.float32)[None, :, None],)
            u = sums
        for kappa in tl.static_range(K):
            where = u_ptr + t[:, None] * (K * W_IN) + (kappa * W_IN + p)[None, :]
            tl.store(where, tl.sum(u[kappa], axis=1).to(u_ptr.dtype.element_ty), mask=inside)
    else:
        _write_output_factor(
            q_ptr, B_ptr, C_ptr, program - blocks, scaling, m, K, W_IN, W_OUT, PER_RANK, BLOCK_L
        )


def shrink(x: Tensor, adapter: Adapter, *, u: Tensor, spread: Tensor) -> None:
    """Write `U`, and the output factor spread to `Q`; see the kernel.

    Args:
        x: `[T, n]`, 16-bit, with contiguous columns.
        adapter: its factors contiguous; without dropout.
        u: `[T, K*d_in]`, any float dtype, contiguous; written.
        spread: `[m, K*d_in]`, contiguous; written.
    """
    tokens, device = x.shape[0], x.device
    tensors = (x, adapter.A, adapter.B, adapter.C, u, spread)
    plan = _prepare_forward(
        adapter.geometry, token_bucket(tokens, device), device, signatures(tensors)
    )
    programs = -(-tokens // plan.rows) + plan.spread_programs
    plan.launch(programs, *tensors, adapter.scaling, tokens)


# Columns that a warp loads at once: 16 bytes of 16-bit tokens per thread.
_WARP_COLUMNS = 32 * 8


def _windows_per_step(tile: Tile, side: Side) -> int:
    """Windows that the warps of a row load at once: several warps, if they outnumber the rows."""
    return _WARP_COLUMNS * max(1, tile.warps // tile.tokens) // side.width


class _ForwardPlan(NamedTuple):
    launch: Launch
    rows: int  # of a program
    spread_programs: int


@prepared
def _prepare_forward(
    geometry: Geometry,
    bucket: TokenBucket,
    device: torch.device,
    tensors: tuple[Signature, ...],
) -> _ForwardPlan:
    """The launch for `x`, `A`, `B`, `C`, `U` and `Q` with these signatures."""
    rank, outputs, inputs, _ = geometry
    tile = lookup(architecture(device), "shrink", 2, inputs.size).for_tokens(bucket)
    windows = _windows_per_step(tile, inputs)
    launch = Launch(
        _shrink_kernel,
        device,
        [
            PER_CALL,
            PER_CALL, PER_CALL, PER_CALL,
            PER_CALL, PER_CALL,
            PER_CALL, PER_CALL, outputs.size,
        ],
        tile,
        stride_xt=strides(tensors[0], 2)[0], n=inputs.size, I=inputs.windows,
        K=rank, W_IN=inputs.width, W_OUT=outputs.width, PER_RANK=geometry.per_rank,
        BLOCK_T=tile.tokens, BLOCK_L=windows, STEPS=-(-inputs.windows // windows),
        OVERLAP=may_overlap(device),
    )  # fmt: skip
    return _ForwardPlan(launch, tile.tokens, -(-outputs.size // windows))


@triton.jit(do_not_specialize=["row_programs", "T"])
def _shrink_backward_kernel(
    g_ptr, u_ptr,
    A_ptr, B_ptr, C_ptr,
    ub_ptr, p_ptr,
    partial_ptr, stride_partial, offset_c,
    row_programs, scaling, T, n, I,
    stride_gt: tl.constexpr, m: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr, PER_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr,
    NEED_B: tl.constexpr, NEED_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """All that the adapter's backward pass does with `g`.

        Vb[t,q,κ] = scaling * Σ_j g[t,j,q] B[j,κ]    gC[q,p] = Σ_t,κ Vb[t,q,κ] U[t,p,κ],
                                                     `PER_RANK`: gC_κ[q,p], sums over t
        Ub[t,p,κ] = Σ_q C[q,p] Vb[t,q,κ]
        gB[j,κ] = Σ_t,q g[t,j,q] V[t,q,κ],  V[t,q,κ] = scaling * Σ_p C[q,p] U[t,p,κ]
        P[κ*W_IN+p, i*W_IN+p] = A[κ,i], elsewhere zero

    | tensor | shape | |
    | --- | --- | --- |
    | `g` | `[T, m]` | read once |
    | `U` | `[T, K*W_IN]` | any float dtype; read once (`NEED_B` or `NEED_C`) |
    | `A`, `B` | `[K, I]`, `[J, K]` | any float dtype |
    | `C` | `[W_OUT, W_IN]`, or `[K, W_OUT, W_IN]` (`PER_RANK`) | any float dtype |
    | `Ub` | `[T, K*W_IN]` | written once, in its own dtype |
    | `P` | `[K*W_IN, n]` | written once, in its own dtype |
    | `partial` | `[row_programs, ...]` | float32: of B `[J, K]`, and of C as `C` |

    Grid: `(row_programs + cdiv(n, BLOCK_N),)`, the first ones each owning every row_programs-th
    block of `BLOCK_T` whole rows, the others columns of `P`. All sums and products are in float32.

    A program's sums of gB and gC stay in registers, so that its loop neither reads nor writes
    `partial`. They are summed over the block's rows after it, because rows belong to different
    warps.
    """
    if OVERLAP:
        gdc_launch_dependents()
    program = tl.program_id(0)
    p = tl.arange(0, W_IN)
    if program < row_programs:
        q = tl.arange(0, W_OUT)
        offsets_C = q[:, None] * W_IN + p[None, :]
        KERNELS: tl.constexpr = K if PER_RANK else 1
        C = ()
        for kernel in tl.static_range(KERNELS):
            where_C = C_ptr + kernel * (W_OUT * W_IN) + offsets_C
            C += (tl.load(where_C).to(tl.float32) * scaling,)
        if NEED_B:
            grad_B = ()
            for _ in tl.static_range(STEPS * K):
                grad_B += (tl.zeros([BLOCK_T, BLOCK_L], tl.float32),)
        if NEED_C:
            grad_C = ()
            for _ in tl.static_range(KERNELS):
                grad_C += (tl.zeros([BLOCK_T, W_OUT, W_IN], tl.float32),)
        for block in range(program, tl.cdiv(T, BLOCK_T), row_programs):
            t = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
            inside = (t < T)[:, None]
            tiles = _load_rows(g_ptr, t, T, stride_gt, m, BLOCK_L * W_OUT, STEPS)
            column = t[:, None] * (K * W_IN) + p[None, :]
            u = ()
            v = ()
            vb = ()
            for kappa in tl.static_range(K):
                if NEED_B or NEED_C:
                    values = tl.load(u_ptr + column + kappa * W_IN, mask=inside, other=0.0)
                    u += (values.to(tl.float32)[:, None, :],)
                if NEED_B:
                    v += (tl.sum(C[kappa % KERNELS][None, :, :] * u[kappa], axis=2)[:, None, :],)
                vb += (tl.zeros([BLOCK_T, BLOCK_L, W_OUT], tl.float32),)
            sums_B = ()
            for step in tl.static_range(STEPS):
                g = tl.reshape(tiles[step], [BLOCK_T, BLOCK_L, W_OUT]).to(tl.float32)
                window = step * BLOCK_L + tl.arange(0, BLOCK_L)
                sums = ()
                for kappa in tl.static_range(K):
                    b = tl.load(B_ptr + window * K + kappa, mask=window < J, other=0.0)
                    sums += (vb[kappa] + g * b.to(tl.float32)[None, :, None],)
                    if NEED_B:
                        sums_B += (grad_B[step * K + kappa] + tl.sum(g * v[kappa], axis=2),)
                vb = sums
            if NEED_B:
                grad_B = sums_B
            sums_C = ()
            for kappa in tl.static_range(K):
                total = tl.sum(vb[kappa], axis=1)[:, :, None]  # Vb / scaling
                if NEED_C:
                    if PER_RANK:
                        sums_C += (grad_C[kappa] + total * u[kappa],)
                    else:
                        grad_C = (grad_C[0] + total * u[kappa],)
                ub = tl.sum(C[kappa % KERNELS][None, :, :] * total, axis=1)
                ub = ub.to(ub_ptr.dtype.element_ty)
                tl.store(ub_ptr + column + kappa * W_IN, ub, mask=inside)
            if NEED_C and PER_RANK:
                grad_C = sums_C
        if NEED_B or NEED_C:
            partial_ptr += program.to(tl.int64) * stride_partial
        if NEED_B:
            for step in tl.static_range(STEPS):
                window = step * BLOCK_L + tl.arange(0, BLOCK_L)
                for kappa in tl.static_range(K):
                    total = tl.sum(grad_B[step * K + kappa], axis=0)
                    tl.store(partial_ptr + window * K + kappa, total, mask=window < J)
        if NEED_C:
            for kernel in tl.static_range(KERNELS):
                where = partial_ptr + offset_c + kernel * (W_OUT * W_IN) + offsets_C
                tl.store(where, tl.sum(grad_C[kernel], axis=0) * scaling)
    else:
        _write_input_factor(p_ptr, A_ptr, program - row_programs, n, I, K, W_IN, BLOCK_N)


def why_not(geometry: Geometry, arch: str) -> str | None:
    """Why an architecture has no tile for one of the passes, or None if it has."""
    sizes = {"shrink": geometry.inputs.size, "shrink_backward": _products(geometry)}
    for kernel, size in sizes.items():
        most = max(entries(arch, kernel, 2), default=0)
        if size > most:
            return f"it takes rows up to {most} features (for gB, times the rank), not {size}"
    return None


def _products(geometry: Geometry) -> int:
    """What the backward pass holds of a row: itself and its share of gB, or `C` and gC.

    Both with a kernel per rank, which has as many of `C` and gC.
    """
    rank, outputs, inputs, per_rank = geometry
    held = outputs.size, 4 * outputs.width * inputs.width
    return rank * (sum(held) if per_rank else max(held))


def _backward_tile(geometry: Geometry, bucket: TokenBucket, device: torch.device) -> Tile:
    tile = lookup(architecture(device), "shrink_backward", 2, _products(geometry))
    return tile.for_tokens(bucket)


def partial_shape(g: Tensor, adapter: Adapter, needs: tuple[bool, bool]) -> tuple[int, int]:
    """The shape of `shrink_backward`'s `partial` for these arguments: its programs, and columns."""
    tokens, device = g.shape[0], g.device
    geometry = adapter.geometry
    bucket = token_bucket(tokens, device)
    tile = _backward_tile(geometry, bucket, device)
    programs = min(-(-tokens // tile.tokens), tile.programs * multiprocessors(device))
    return programs, sum(_columns(geometry, needs))


def _columns(geometry: Geometry, needs: tuple[bool, bool]) -> tuple[int, int]:
    """Columns of `partial` for the gradients of `B` and `C`."""
    windows = geometry.rank * geometry.outputs.windows
    return windows * needs[0], math.prod(geometry.shape_C) * needs[1]


def shrink_backward(
    g: Tensor,
    u: Tensor | None,
    adapter: Adapter,
    *,
    ub: Tensor,
    spread: Tensor,
    partial: Tensor | None,
    needs: tuple[bool, bool],
) -> None:
    """Write `Ub`, the programs' shares of the gradients of `B` and `C`, and `A` spread to `P`.

    Args:
        g: `[T, m]`, 16-bit, with contiguous columns.
        u: `[T, K*d_in]`, contiguous, from `shrink`; read for the gradients.
        adapter: as in the forward.
        ub: `[T, K*d_in]`, any float dtype, contiguous; written.
        spread: `[K*d_in, n]`, contiguous; written.
        partial: `partial_shape(g, adapter, needs)`, float32, contiguous; written. In its rows the
            gradient of `B`, `[J, K]`, precedes that of `C`, `[d_out, d_in]`. None if neither is
            needed.
        needs: whether the gradients of `B` and `C` are.
    """
    tokens, device = g.shape[0], g.device
    tensors = (g, u if any(needs) else None, adapter.A, adapter.B, adapter.C, ub, spread)
    plan = _prepare_backward(
        adapter.geometry, token_bucket(tokens, device), needs, device, signatures(tensors)
    )
    row_programs = min(-(-tokens // plan.rows), plan.max_programs)
    plan.launch(
        row_programs + plan.spread_programs,
        *tensors, partial, row_programs, adapter.scaling, tokens,
    )  # fmt: skip


class _BackwardPlan(NamedTuple):
    launch: Launch
    rows: int  # of a block that a program works on
    max_programs: int  # that share the rows
    spread_programs: int


@prepared
def _prepare_backward(
    geometry: Geometry,
    bucket: TokenBucket,
    needs: tuple[bool, bool],
    device: torch.device,
    tensors: tuple[Signature, ...],
) -> _BackwardPlan:
    """The launch for `g`, `U`, `A`, `B`, `C`, `Ub` and `P` with these signatures."""
    rank, outputs, inputs, _ = geometry
    tile = _backward_tile(geometry, bucket, device)
    windows = _windows_per_step(tile, outputs)
    columns_B, columns_C = _columns(geometry, needs)
    block_n = windows * outputs.width // inputs.width  # as many elements of P as of g in a step
    launch = Launch(
        _shrink_backward_kernel,
        device,
        [
            PER_CALL, PER_CALL,
            PER_CALL, PER_CALL, PER_CALL,
            PER_CALL, PER_CALL,
            PER_CALL, columns_B + columns_C, columns_B,
            PER_CALL, PER_CALL, PER_CALL, inputs.size, inputs.windows,
        ],
        tile,
        stride_gt=strides(tensors[0], 2)[0], m=outputs.size, J=outputs.windows,
        K=rank, W_IN=inputs.width, W_OUT=outputs.width, PER_RANK=geometry.per_rank,
        BLOCK_T=tile.tokens, BLOCK_L=windows, STEPS=-(-outputs.windows // windows),
        BLOCK_N=block_n,
        NEED_B=needs[0], NEED_C=needs[1], OVERLAP=may_overlap(device),
    )  # fmt: skip
    return _BackwardPlan(
        launch,
        tile.tokens,
        tile.programs * multiprocessors(device),
        -(-inputs.size // block_n),
    )
