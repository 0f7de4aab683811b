"""Backward by row blocks: one launch reads `g` once and `x` once, and writes the adapter's `gx`.

Gradients of the factors are sums over all tokens. Every program sums its own share into its own
slice of a buffer, and a second, small launch adds the slices: no atomics, so results repeat to
the bit. The number of programs is bounded by the GPU's size, and the buffer with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcft_kernels.adapter import Adapter
from dcft_kernels.geometry import Geometry
from dcft_kernels.triton.launching import (
    NUMBER,
    TENSOR,
    Form,
    Launch,
    dot_precision,
    forms,
    itemsize_of,
    may_use_tf32,
    prepared,
    strides,
)
from dcft_kernels.triton.layout import layout_of, windows_per_tile
from dcft_kernels.triton.philox import keep
from dcft_kernels.triton.ranks import fit_one_launch, slices
from dcft_kernels.triton.tiles import Crowd, architecture, crowd_of, lookup, multiprocessors
from dcft_kernels.triton.windows import (
    collapse,
    expand_matrix,
    expand_tiles,
    factor_tile,
    mix,
    mixing_matrix,
    rank_columns,
    spread,
    window_features,
)


@triton.jit
def _add_to_partial(
    partial_ptr, values, tile, L, stride_l, stride_k, has_partial,
    K: tl.constexpr, KP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Add a tile's `[BLOCK_L, KP]` gradient values to this program's slice of the buffer."""
    window = tile * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    kappa = tl.arange(0, KP)[None, :]
    mask = (window < L) & (kappa < K)
    where = partial_ptr + window * stride_l + kappa * stride_k
    # The buffer starts uninitialised: the first row block sets what later ones add to.
    before = tl.load(where, mask=mask & has_partial, other=0.0)
    tl.store(where, before + values, mask=mask)


@triton.jit
def store_mixing_gradient(
    gC_ptr, ranks,
    W_IN: tl.constexpr, W_OUT: tl.constexpr, WP_IN: tl.constexpr, WP_OUT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of `C`, `[W_OUT, W_IN]`: the sum of the ranks' blocks on the diagonal.

    `ranks [GROUP*WP_OUT, GROUP*WP_IN]` is `Vb^T U` of ranks that were multiplied side by side.
    """
    position_q = tl.arange(0, GROUP * WP_OUT)[:, None]
    position_p = tl.arange(0, GROUP * WP_IN)[None, :]
    same = position_q // WP_OUT == position_p // WP_IN
    blocks = tl.reshape(tl.where(same, ranks, 0.0), [GROUP, WP_OUT, GROUP, WP_IN])
    total = tl.sum(tl.sum(blocks, axis=2), axis=0)  # [WP_OUT, WP_IN]
    q = tl.arange(0, WP_OUT)[:, None]
    r = tl.arange(0, WP_IN)[None, :]
    tl.store(gC_ptr + q * W_IN + r, total, mask=(q < W_OUT) & (r < W_IN))


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    g_ptr, stride_gt, stride_gm,
    x_ptr, stride_xt, stride_xn,
    u_ptr, stride_ut,
    ub_ptr, stride_ubt,
    A_ptr, stride_ak, stride_al,
    B_ptr, stride_bk, stride_bl,
    C_ptr, stride_cq, stride_cp,
    gx_ptr, stride_gxt, stride_gxn,
    partial_ptr, stride_partial, offset_b, offset_c,
    seed_ptr, p, scaling,
    T, n, m, I, J,
    K: tl.constexpr, KP: tl.constexpr,
    W_IN: tl.constexpr, S_IN: tl.constexpr, WP_IN: tl.constexpr, L_IN: tl.constexpr,
    W_OUT: tl.constexpr, S_OUT: tl.constexpr, WP_OUT: tl.constexpr, L_OUT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr,
    READ_G: tl.constexpr, WRITE_UB: tl.constexpr,
    WRITE_GX: tl.constexpr, ADD_GX: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_C: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All that the adapter's backward pass does with a block of rows.

        Vb = scaling * shrink(g, B^T)     gB^T = factor_grad(g, V),  V = scaling * C U
        gC = sum over t, κ of Vb U        Ub = C^T Vb
        gA = factor_grad(dropout(x), Ub)  gx = mask * expand(Ub, A)

    | tensor | shape | |
    | --- | --- | --- |
    | `g` | `[T, m]` | read once (`READ_G`) |
    | `x` | `[T, n]` | read once (`NEED_A`) |
    | `U` | `[T, K*W_IN]` | read (`NEED_B` or `NEED_C`) |
    | `Ub` | `[T, K*W_IN]` | written (`WRITE_UB`), or read where `g` is not: grouped layers |
    | `gx` | `[T, n]` | written once (`WRITE_GX`), added to what it holds (`ADD_GX`) |
    | `partial` | `[programs, ...]` | float32: of A `[K, I]`, B `[J, K]`, C `[W_OUT, W_IN]` |

    Grid: `(programs,)`, each owning every programs-th block of `BLOCK_T` whole rows. All sums are
    in float32; `V`, `Vb` and `Ub` are rounded to the tokens' dtype for the matrix unit.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    CONTIGUOUS: tl.constexpr = S_IN == W_IN and W_IN == WP_IN and (L_IN * WP_IN) % 4 == 0
    NEED_UB: tl.constexpr = NEED_A or WRITE_GX or WRITE_UB
    dtype: tl.constexpr = g_ptr.dtype.element_ty if READ_G else ub_ptr.dtype.element_ty
    partial_ptr += program.to(tl.int64) * stride_partial
    grad_C = tl.zeros([GROUP * WP_OUT, GROUP * WP_IN], tl.float32)

    for block in range(program, tl.cdiv(T, BLOCK_T), programs):
        has_partial = block != program
        t = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        row = t[:, None]
        inside = row < T

        if READ_G:
            if NEED_B or NEED_C:
                u_offsets, u_valid = rank_columns(t, stride_ut, W_IN, K, WP_IN, KP)
                u = tl.load(u_ptr + u_offsets, mask=inside & u_valid, other=0.0)
            if NEED_B:
                C = mixing_matrix(
                    C_ptr, stride_cp, stride_cq, scaling, W_IN, W_OUT, WP_IN, WP_OUT, GROUP
                )
                v = mix(u.to(tl.float32), C, WP_IN, WP_OUT, KP, GROUP, BLOCK_T, PRECISION)
                v = v.to(dtype)
            vb = tl.zeros([BLOCK_T, KP * WP_OUT], tl.float32)
            for tile in range(tl.cdiv(J, L_OUT)):
                features, valid = window_features(tile, J, m, W_OUT, S_OUT, WP_OUT, L_OUT)
                g = tl.load(
                    g_ptr + row * stride_gt + features[None, :].to(tl.int64) * stride_gm,
                    mask=inside & valid[None, :],
                    other=0.0,
                )  # [BLOCK_T, L_OUT*WP_OUT]
                if NEED_UB or NEED_C:
                    values = factor_tile(B_ptr, stride_bk, stride_bl, tile, J, K, KP, L_OUT)
                    matrix = spread(values, WP_OUT, KP, L_OUT).to(dtype)
                    vb = tl.dot(g, matrix, vb, input_precision=PRECISION)
                if NEED_B:
                    dense = tl.dot(tl.trans(g), v, input_precision=PRECISION)
                    _add_to_partial(
                        partial_ptr + offset_b, collapse(dense, WP_OUT, KP, L_OUT),
                        tile, J, K, 1, has_partial, K, KP, L_OUT,
                    )  # fmt: skip
            vb *= scaling
            if NEED_C:
                grad_C = tl.dot(
                    tl.trans(tl.reshape(vb.to(dtype), [BLOCK_T * KP // GROUP, GROUP * WP_OUT])),
                    tl.reshape(u, [BLOCK_T * KP // GROUP, GROUP * WP_IN]),
                    grad_C,
                    input_precision=PRECISION,
                )
            if NEED_UB:
                CT = mixing_matrix(
                    C_ptr, stride_cq, stride_cp, 1.0, W_OUT, W_IN, WP_OUT, WP_IN, GROUP
                )
                ub = mix(vb, CT, WP_OUT, WP_IN, KP, GROUP, BLOCK_T, PRECISION).to(dtype)
            if WRITE_UB:
                ub_offsets, ub_valid = rank_columns(t, stride_ubt, W_IN, K, WP_IN, KP)
                tl.store(ub_ptr + ub_offsets, ub, mask=inside & ub_valid)
        else:
            ub_offsets, ub_valid = rank_columns(t, stride_ubt, W_IN, K, WP_IN, KP)
            ub = tl.load(ub_ptr + ub_offsets, mask=inside & ub_valid, other=0.0)

        if NEED_A:
            for tile in range(tl.cdiv(I, L_IN)):
                features, valid = window_features(tile, I, n, W_IN, S_IN, WP_IN, L_IN)
                x = tl.load(
                    x_ptr + row * stride_xt + features[None, :].to(tl.int64) * stride_xn,
                    mask=inside & valid[None, :],
                    other=0.0,
                )  # [BLOCK_T, L_IN*WP_IN]
                if HAS_DROPOUT:
                    kept = keep(
                        tl.load(seed_ptr), p, t, features, CONTIGUOUS, BLOCK_T, L_IN * WP_IN
                    )
                    x = tl.where(kept, x, 0.0).to(dtype)
                dense = tl.dot(tl.trans(x), ub, input_precision=PRECISION)
                _add_to_partial(
                    partial_ptr, collapse(dense, WP_IN, KP, L_IN),
                    tile, I, 1, I, has_partial, K, KP, L_IN,
                )  # fmt: skip

        if WRITE_GX:
            for tile in range(expand_tiles(I, n, W_IN, S_IN, WP_IN, L_IN)):
                features, valid, matrix = expand_matrix(
                    A_ptr, stride_ak, stride_al, tile, I, n, dtype,
                    W_IN, S_IN, K, WP_IN, KP, L_IN,
                )  # fmt: skip
                gx = tl.dot(ub, matrix, input_precision=PRECISION)  # [BLOCK_T, L_IN*WP_IN]
                if HAS_DROPOUT:
                    kept = keep(
                        tl.load(seed_ptr), p, t, features,
                        CONTIGUOUS or S_IN != W_IN, BLOCK_T, L_IN * WP_IN,
                    )  # fmt: skip
                    gx = tl.where(kept, gx, 0.0)
                where = gx_ptr + row * stride_gxt + features[None, :].to(tl.int64) * stride_gxn
                mask = inside & valid[None, :]
                if ADD_GX:
                    gx += tl.load(where, mask=mask, other=0.0).to(tl.float32)
                tl.store(where, gx.to(dtype), mask=mask)

        # What this program's threads have added to the buffer, all of them read in the next block.
        tl.debug_barrier()

    if NEED_C:
        store_mixing_gradient(partial_ptr + offset_c, grad_C, W_IN, W_OUT, WP_IN, WP_OUT, GROUP)


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
_SUM_BLOCK, _SUM_BLOCK_P = 32, 32

# Gradients of `A`, `B` and `C`; None where not asked for.
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Sums(NamedTuple):
    """How programs' own gradients of the factors become the factors' gradients."""

    columns: int  # of what a program writes: flattened, those of A, of B and of C that are needed
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
        A, B, C, *_ = adapter
        needs_A, needs_B, needs_C = self.needs
        grads = (
            A.new_empty(A.shape) if needs_A else None,
            B.new_empty(B.shape) if needs_B else None,
            C.new_empty(C.shape) if needs_C else None,
        )
        blocks = -(-self.columns // _SUM_BLOCK)
        self.launch(blocks, (partial, *grads), (partial.shape[0],))
        return grads


def prepare_sums(geometry: Geometry, needs: tuple[bool, bool, bool], device: torch.device) -> Sums:
    """How to sum the gradients of those of `A`, `B` and `C` that are needed."""
    needs_A, needs_B, needs_C = needs
    offset_b = geometry.rank * geometry.inputs.windows if needs_A else 0
    offset_c = offset_b + (geometry.rank * geometry.outputs.windows if needs_B else 0)
    columns = offset_c + (geometry.inputs.width * geometry.outputs.width if needs_C else 0)
    launch = None
    if columns > 0:
        launch = Launch(
            _sum_partials_kernel,
            device,
            [
                TENSOR, columns, NUMBER,
                TENSOR, TENSOR, TENSOR,
                offset_b, offset_c, columns,
            ],
            {"num_warps": 4, "num_stages": 1},
            BLOCK=_SUM_BLOCK, BLOCK_P=_SUM_BLOCK_P,
            NEED_A=needs_A, NEED_B=needs_B, NEED_C=needs_C,
        )  # fmt: skip
    return Sums(columns, offset_b, offset_c, needs, launch)


def backward(
    adapter: Adapter,
    *,
    g: Tensor | None = None,
    x: Tensor | None = None,
    u: Tensor | None = None,
    ub: Tensor | None = None,
    gx: Tensor | None = None,
    needs_A: bool = False,
    needs_B: bool = False,
    needs_C: bool = False,
    add_gx: bool = False,
) -> Grads:
    """The gradients of the factors that are needed, and the adapter's part of `gx`.

    Args:
        adapter: as in the forward; its `seed`, if any, on the tokens' device.
        g: `[T, m]`, or None to start from `ub`.
        x: `[T, n]`; for `needs_A`.
        u: `[T, K*d_in]` or `[T, K, d_in]`, from the forward; for `needs_B` and `needs_C`.
        ub: `[T, K*d_in]`: written if `g` is given, else read.
        gx: `[T, n]`, written; None where it is not needed.
        needs_A: whether to compute the gradient of `A`; the others likewise.
        needs_B: likewise; needs `g`.
        needs_C: likewise; needs `g`.
        add_gx: whether to add to what `gx` holds.

    Returns:
        The gradients of `A`, `B` and `C` in their dtypes, None where not needed.
    """
    like = ub if g is None else g
    tensors = (
        g,
        x if needs_A else None,
        u if needs_B or needs_C else None,
        ub,
        adapter.A,
        adapter.B,
        adapter.C,
        gx,
        adapter.seed if needs_A or gx is not None else None,
    )
    tokens, device = like.shape[0], like.device
    plan = _prepare(
        adapter.geometry,
        crowd_of(tokens, device),
        (needs_A, needs_B, needs_C),
        add_gx,
        device,
        may_use_tf32(like.dtype),
        forms(tensors),
    )
    if plan is None:
        return _by_slices(adapter, g, x, u, ub, gx, (needs_A, needs_B, needs_C), add_gx)
    programs = min(-(-tokens // plan.rows), plan.most_programs)
    partial = like.new_empty((programs, plan.sums.columns), dtype=torch.float32)
    *before, seed = tensors
    plan.launch(programs, (*before, partial, seed), (adapter.dropout_p, adapter.scaling, tokens))
    return plan.sums.total(partial, adapter)


def _by_slices(
    adapter: Adapter,
    g: Tensor | None,
    x: Tensor | None,
    u: Tensor | None,
    ub: Tensor | None,
    gx: Tensor | None,
    needs: tuple[bool, bool, bool],
    add_gx: bool,
) -> Grads:
    """`backward` of an adapter that takes more than one launch."""
    needs_A, needs_B, needs_C = needs
    parts = []
    for part, columns in slices(adapter, (ub if g is None else g).dtype):
        parts.append(
            backward(
                part,
                g=g,
                x=x,
                u=None if u is None else u.flatten(1)[:, columns],
                ub=None if ub is None else ub[:, columns],
                gx=gx,
                needs_A=needs_A,
                needs_B=needs_B,
                needs_C=needs_C,
                add_gx=add_gx or bool(parts),
            )
        )
    grads_A, grads_B, grads_C = zip(*parts, strict=True)
    return (
        torch.cat(grads_A) if needs_A else None,
        torch.cat(grads_B, dim=1) if needs_B else None,
        sum(grads_C) if needs_C else None,
    )


class _Plan(NamedTuple):
    """The launches of a backward pass."""

    launch: Launch
    rows: int  # of a block that a program works on
    most_programs: int
    sums: Sums


@prepared
def _prepare(
    geometry: Geometry,
    crowd: Crowd,
    needs: tuple[bool, bool, bool],
    add_gx: bool,
    device: torch.device,
    tf32: bool,
    tensors: tuple[Form, ...],
) -> _Plan | None:
    """The launches for tensors of these forms: `g`, `x`, `U`, `Ub`, `A`, `B`, `C`, `gx`, seed.

    None for more ranks than a launch holds.
    """
    g, x, u, ub, A, B, C, gx, seed = tensors
    itemsize = itemsize_of(ub if g is None else g)
    if not fit_one_launch(geometry, itemsize):
        return None
    inputs, outputs, layout = geometry.inputs, geometry.outputs, layout_of(geometry)
    tile = lookup(architecture(device), "backward", itemsize, layout.columns)
    tile = tile.for_tokens(crowd)
    needs_A, needs_B, needs_C = needs
    sums = prepare_sums(geometry, needs, device)
    launch = Launch(
        _backward_kernel,
        device,
        [
            TENSOR, *strides(g, 2),
            TENSOR, *strides(x, 2),
            TENSOR, strides(u, 2)[0],
            TENSOR, strides(ub, 2)[0],
            TENSOR, *strides(A, 2),
            TENSOR, *strides(B, 2)[::-1],
            TENSOR, *strides(C, 2),
            TENSOR, *strides(gx, 2),
            TENSOR, max(1, sums.columns), sums.offset_b, sums.offset_c,
            TENSOR, NUMBER, NUMBER,
            NUMBER, inputs.size, outputs.size, inputs.windows, outputs.windows,
        ],
        {"num_warps": tile.warps, "num_stages": tile.stages},
        K=geometry.rank, KP=layout.KP,
        W_IN=inputs.width, S_IN=inputs.stride, WP_IN=layout.WP_IN,
        L_IN=windows_per_tile(tile.features, layout.WP_IN),
        W_OUT=outputs.width, S_OUT=outputs.stride, WP_OUT=layout.WP_OUT,
        L_OUT=windows_per_tile(tile.features, layout.WP_OUT),
        GROUP=layout.GROUP, BLOCK_T=tile.tokens,
        READ_G=g is not None, WRITE_UB=g is not None and ub is not None,
        WRITE_GX=gx is not None, ADD_GX=add_gx and gx is not None,
        NEED_A=needs_A, NEED_B=needs_B, NEED_C=needs_C,
        HAS_DROPOUT=seed is not None, PRECISION=dot_precision(device, tf32),
    )  # fmt: skip
    return _Plan(launch, tile.tokens, tile.programs * multiprocessors(device), sums)
