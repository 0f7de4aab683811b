"""The strategy `row_block`: one launch per direction, whose programs own whole rows of tokens.

Forward, a launch reads `x` once and writes the adapter's part of `y` once; backward, one reads `g`
and `x` once and writes the adapter's part of `gx`. A program that owns whole rows has their `U` and
`Ub` complete in registers. The base layer's products are the vendor's (`passes`).

A launch holds as many ranks as its registers hold columns of. Wider adapters are computed a slice
of their ranks at a time: `y`, `gx` and `gC` are sums over the ranks; `U`, `gA` and `gB` consist of
the slices' own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcft_kernels.adapter import Adapter, Geometry, Side
from dcft_kernels.triton.launch import (
    PER_CALL,
    Launch,
    Signature,
    dot_precision,
    kernel_strides,
    may_use_tf32,
    signatures,
    strides,
)
from dcft_kernels.triton.partials import Grads, Sums, prepare_sums
from dcft_kernels.triton.philox import keep
from dcft_kernels.triton.tiles import (
    Tile,
    TokenBucket,
    architecture,
    lookup,
    multiprocessors,
    prepared,
    token_bucket,
)
from dcft_kernels.triton.windows import (
    collapse,
    expand_matrix,
    expand_tiles,
    factor_tile,
    layout_of,
    mix,
    mixing_matrix,
    rank_columns,
    spread,
    window_features,
    windows_per_tile,
)

# Columns `rank * width` of a launch, by bytes per element of the tokens.
_MAX_COLUMNS = {2: 128, 4: 64}


@functools.cache
def ranks_per_launch(geometry: Geometry, itemsize: int) -> int:
    """How many of an adapter's ranks one launch takes; slices are of about equal rank.

    Windows that are padded or overlap take registers for addresses, and kernels per rank for a
    mixing matrix of all ranks.
    """
    rank, outputs, inputs, per_rank = geometry
    most = _MAX_COLUMNS[itemsize]
    if per_rank:
        most //= 4
    if not all(_is_contiguous(side) for side in (outputs, inputs)):
        most //= 2
    for count in range(1, rank + 1):
        size = -(-rank // count)
        if layout_of(geometry._replace(rank=size)).columns <= most:
            return size
    return 1


def _is_contiguous(side: Side) -> bool:
    """Whether the windows lie one after the other without padding between them."""
    return side.stride == side.width == triton.next_power_of_2(side.width)


def _slices(adapter: Adapter, itemsize: int) -> Iterator[tuple[Adapter, slice]]:
    """The adapter in slices that a launch takes, and their columns of `U [T, k*d_in]`."""
    geometry = adapter.geometry
    size, width = ranks_per_launch(geometry, itemsize), geometry.inputs.width
    for start in range(0, geometry.rank, size):
        stop = min(start + size, geometry.rank)
        part = adapter._replace(
            A=adapter.A[start:stop],
            B=adapter.B[:, start:stop],
            C=adapter.C[start:stop] if geometry.per_rank else adapter.C,
            geometry=geometry._replace(rank=stop - start),
        )
        yield part, slice(start * width, stop * width)


@triton.jit(do_not_specialize=["T"])
def _shrink_expand_kernel(
    x_ptr, stride_xt, stride_xn,
    u_ptr, stride_ut,
    A_ptr, stride_ak, stride_al,
    B_ptr, stride_bk, stride_bl,
    C_ptr, stride_ck, stride_cq, stride_cp,
    bias_ptr, stride_bias,
    base_ptr, stride_baset, stride_basem,
    y_ptr, stride_yt, stride_ym,
    seed_ptr, p, scaling,
    T, n, m, I, J,
    K: tl.constexpr, KP: tl.constexpr,
    W_IN: tl.constexpr, S_IN: tl.constexpr, WP_IN: tl.constexpr, L_IN: tl.constexpr,
    W_OUT: tl.constexpr, S_OUT: tl.constexpr, WP_OUT: tl.constexpr, L_OUT: tl.constexpr,
    GROUP: tl.constexpr, PER_RANK: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BASE: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`U = shrink(dropout(x), A)`; `y = base + bias + expand(scaling * C U, B^T)`.

    | tensor | shape | |
    | --- | --- | --- |
    | `x` | `[T, n]` | read once |
    | `U` | `[T, K*W_IN]` | written, in its own dtype |
    | `A`, `B` | `[K, I]`, `[J, K]` | any float dtype |
    | `C` | `[W_OUT, W_IN]`, or `[K, W_OUT, W_IN]` (`PER_RANK`) | any float dtype |
    | `bias`, `base` | `[m]`, `[T, m]` | optional |
    | `y` | `[T, m]` | written once |

    Grid: `(cdiv(T, BLOCK_T),)`, a program owning whole rows, so that its `U` is complete. All
    sums are in float32; `V = scaling * C U` is rounded to `x`'s dtype for the matrix unit.
    """
    block = tl.program_id(0)
    t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t[:, None]
    inside = row < T
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    CONTIGUOUS: tl.constexpr = S_IN == W_IN and W_IN == WP_IN and (L_IN * WP_IN) % 4 == 0

    u = tl.zeros([BLOCK_T, KP * WP_IN], tl.float32)
    for tile in range(tl.cdiv(I, L_IN)):
        features, valid = window_features(tile, I, n, W_IN, S_IN, WP_IN, L_IN)
        x = tl.load(
            x_ptr + row * stride_xt + features[None, :].to(tl.int64) * stride_xn,
            mask=inside & valid[None, :],
            other=0.0,
        )  # [BLOCK_T, L_IN*WP_IN]
        if HAS_DROPOUT:
            kept = keep(tl.load(seed_ptr), p, t, features, CONTIGUOUS, BLOCK_T, L_IN * WP_IN)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        values = factor_tile(A_ptr, stride_ak, stride_al, tile, I, K, KP, L_IN)
        matrix = spread(values, WP_IN, KP, L_IN).to(dtype)
        u = tl.dot(x, matrix, u, input_precision=PRECISION)
    u_offsets, u_valid = rank_columns(t, stride_ut, W_IN, K, WP_IN, KP)
    tl.store(u_ptr + u_offsets, u.to(u_ptr.dtype.element_ty), mask=inside & u_valid)

    C = mixing_matrix(
        C_ptr, stride_ck, stride_cp, stride_cq, scaling,
        W_IN, W_OUT, WP_IN, WP_OUT, K, GROUP, PER_RANK,
    )  # fmt: skip
    v = mix(u, C, WP_IN, WP_OUT, KP, GROUP, BLOCK_T, PRECISION).to(dtype)
    for tile in range(expand_tiles(J, m, W_OUT, S_OUT, WP_OUT, L_OUT)):
        features, valid, matrix = expand_matrix(
            B_ptr, stride_bk, stride_bl, tile, J, m, dtype,
            W_OUT, S_OUT, K, WP_OUT, KP, L_OUT,
        )  # fmt: skip
        y = tl.dot(v, matrix, input_precision=PRECISION)  # [BLOCK_T, L_OUT*WP_OUT]
        column = features[None, :].to(tl.int64)
        mask = inside & valid[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + features * stride_bias, mask=valid, other=0.0)
            y += bias[None, :].to(tl.float32)
        if HAS_BASE:
            base = base_ptr + row * stride_baset + column * stride_basem
            y += tl.load(base, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * stride_yt + column * stride_ym, y.to(dtype), mask=mask)


def shrink_expand(
    x: Tensor,
    adapter: Adapter,
    *,
    u: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    base: Tensor | None = None,
) -> None:
    """Write `U` and `y`; see the kernel.

    Args:
        x: `[T, n]`.
        adapter: its `seed`, if any, on `x`'s device.
        u: `[T, K*d_in]` or `[T, K, d_in]`, any float dtype, contiguous per token; written.
        y: `[T, m]`, written.
        bias: `[m]`, added to `y`.
        base: `[T, m]`, added to `y`; may be `y` itself.
    """
    tokens, device = x.shape[0], x.device
    tensors = (x, u, adapter.A, adapter.B, adapter.C, bias, base, y, adapter.seed)
    plan = _prepare_forward(
        adapter.geometry,
        token_bucket(tokens, device),
        device,
        may_use_tf32(x.dtype),
        signatures(tensors),
    )
    if plan is not None:
        plan.launch(-(-tokens // plan.rows), *tensors, adapter.dropout_p, adapter.scaling, tokens)
        return
    for part, columns in _slices(adapter, x.dtype.itemsize):
        shrink_expand(x, part, u=u.flatten(1)[:, columns], y=y, bias=bias, base=base)
        bias, base = None, y  # what further ranks are added to


def _shape_constants(geometry: Geometry, tile: Tile) -> dict[str, int]:
    """The constants that both kernels begin with, in their order."""
    inputs, outputs, layout = geometry.inputs, geometry.outputs, layout_of(geometry)
    return {
        "K": geometry.rank, "KP": layout.KP,
        "W_IN": inputs.width, "S_IN": inputs.stride, "WP_IN": layout.WP_IN,
        "L_IN": windows_per_tile(tile.features, layout.WP_IN),
        "W_OUT": outputs.width, "S_OUT": outputs.stride, "WP_OUT": layout.WP_OUT,
        "L_OUT": windows_per_tile(tile.features, layout.WP_OUT),
        "GROUP": layout.GROUP, "PER_RANK": geometry.per_rank, "BLOCK_T": tile.tokens,
    }  # fmt: skip


class _ForwardPlan(NamedTuple):
    launch: Launch
    rows: int  # of a program


@prepared
def _prepare_forward(
    geometry: Geometry,
    bucket: TokenBucket,
    device: torch.device,
    tf32: bool,
    tensors: tuple[Signature, ...],
) -> _ForwardPlan | None:
    """The launch for `x`, `U`, `A`, `B`, `C`, bias, base, `y` and seed with these signatures.

    None for more ranks than a launch holds.
    """
    x, u, A, B, C, bias, base, y, seed = tensors
    itemsize = x[0].itemsize
    if ranks_per_launch(geometry, itemsize) < geometry.rank:
        return None
    inputs, outputs = geometry.inputs, geometry.outputs
    tile = lookup(architecture(device), "shrink_expand", itemsize, layout_of(geometry).columns)
    tile = tile.for_tokens(bucket)
    launch = Launch(
        _shrink_expand_kernel,
        device,
        [
            PER_CALL, *strides(x, 2),
            PER_CALL, strides(u, 2)[0],
            PER_CALL, *strides(A, 2),
            PER_CALL, *strides(B, 2)[::-1],
            PER_CALL, *kernel_strides(C),
            PER_CALL, *strides(bias, 1),
            PER_CALL, *strides(base, 2),
            PER_CALL, *strides(y, 2),
            PER_CALL, PER_CALL, PER_CALL,
            PER_CALL, inputs.size, outputs.size, inputs.windows, outputs.windows,
        ],
        tile,
        **_shape_constants(geometry, tile),
        HAS_BIAS=bias is not None, HAS_BASE=base is not None, HAS_DROPOUT=seed is not None,
        PRECISION=dot_precision(device, tf32),
    )  # fmt: skip
    return _ForwardPlan(launch, tile.tokens)


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
def _store_mixing_gradient(
    gC_ptr, ranks,
    W_IN: tl.constexpr, W_OUT: tl.constexpr, WP_IN: tl.constexpr, WP_OUT: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, PER_RANK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of `C`: the blocks on the diagonal (`PER_RANK`), or else their sum.

    `ranks [GROUP*WP_OUT, GROUP*WP_IN]` is `Vb^T U` of ranks that were multiplied side by side.
    """
    position_q = tl.arange(0, GROUP * WP_OUT)[:, None]
    position_p = tl.arange(0, GROUP * WP_IN)[None, :]
    kappa = position_q // WP_OUT
    same = kappa == position_p // WP_IN
    if PER_RANK:
        q = position_q % WP_OUT
        r = position_p % WP_IN
        where = gC_ptr + (kappa * W_OUT + q) * W_IN + r
        tl.store(where, ranks, mask=same & (kappa < K) & (q < W_OUT) & (r < W_IN))
        return
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
    A_ptr, stride_ak, stride_al,
    B_ptr, stride_bk, stride_bl,
    C_ptr, stride_ck, stride_cq, stride_cp,
    gx_ptr, stride_gxt, stride_gxn,
    partial_ptr, stride_partial, offset_b, offset_c,
    seed_ptr, p, scaling,
    T, n, m, I, J,
    K: tl.constexpr, KP: tl.constexpr,
    W_IN: tl.constexpr, S_IN: tl.constexpr, WP_IN: tl.constexpr, L_IN: tl.constexpr,
    W_OUT: tl.constexpr, S_OUT: tl.constexpr, WP_OUT: tl.constexpr, L_OUT: tl.constexpr,
    GROUP: tl.constexpr, PER_RANK: tl.constexpr, BLOCK_T: tl.constexpr,
    WRITE_GX: tl.constexpr, ADD_GX: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_C: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All that the adapter's backward pass does with a block of rows.

        Vb = scaling * shrink(g, B^T)     gB^T = factor_grad(g, V),  V = scaling * C U
        gC = sum over t, κ of Vb U        Ub = C^T Vb       (`PER_RANK`: gC_κ, sums over t)
        gA = factor_grad(dropout(x), Ub)  gx = mask * expand(Ub, A)

    | tensor | shape | |
    | --- | --- | --- |
    | `g` | `[T, m]` | read once |
    | `x` | `[T, n]` | read once (`NEED_A`) |
    | `U` | `[T, K*W_IN]` | `adapter.dtype_of_U`; read (`NEED_B` or `NEED_C`) |
    | `gx` | `[T, n]` | written once (`WRITE_GX`), added to what it holds (`ADD_GX`) |
    | `partial` | `[programs, ...]` | float32: of A `[K, I]`, B `[J, K]`, and C |

    Grid: `(programs,)`, each owning every programs-th block of `BLOCK_T` whole rows. All sums are
    in float32; `V`, `Vb` and `Ub` are rounded to the tokens' dtype for the matrix unit, except that
    `Vb` is multiplied with `U` in the dtype of `U`.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    CONTIGUOUS: tl.constexpr = S_IN == W_IN and W_IN == WP_IN and (L_IN * WP_IN) % 4 == 0
    NEED_UB: tl.constexpr = NEED_A or WRITE_GX
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    partial_ptr += program.to(tl.int64) * stride_partial
    grad_C = tl.zeros([GROUP * WP_OUT, GROUP * WP_IN], tl.float32)

    for block in range(program, tl.cdiv(T, BLOCK_T), programs):
        has_partial = block != program
        t = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        row = t[:, None]
        inside = row < T

        if NEED_B or NEED_C:
            u_offsets, u_valid = rank_columns(t, stride_ut, W_IN, K, WP_IN, KP)
            u = tl.load(u_ptr + u_offsets, mask=inside & u_valid, other=0.0)
        if NEED_B:
            C = mixing_matrix(
                C_ptr, stride_ck, stride_cp, stride_cq, scaling,
                W_IN, W_OUT, WP_IN, WP_OUT, K, GROUP, PER_RANK,
            )  # fmt: skip
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
                tl.trans(tl.reshape(vb.to(u.dtype), [BLOCK_T * KP // GROUP, GROUP * WP_OUT])),
                tl.reshape(u, [BLOCK_T * KP // GROUP, GROUP * WP_IN]),
                grad_C,
                # tf32 has float16's digits and the range that it lacks.
                input_precision="tf32"
                if dtype == tl.float16 and PRECISION == "tf32x3"
                else PRECISION,
            )
        if NEED_UB:
            CT = mixing_matrix(
                C_ptr, stride_ck, stride_cq, stride_cp, 1.0,
                W_OUT, W_IN, WP_OUT, WP_IN, K, GROUP, PER_RANK,
            )  # fmt: skip
            ub = mix(vb, CT, WP_OUT, WP_IN, KP, GROUP, BLOCK_T, PRECISION).to(dtype)

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
        _store_mixing_gradient(
            partial_ptr + offset_c, grad_C, W_IN, W_OUT, WP_IN, WP_OUT, K, GROUP, PER_RANK
        )


def backward(
    g: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    adapter: Adapter,
    gx: Tensor | None,
    needs: tuple[bool, bool, bool],
    *,
    add_gx: bool = False,
) -> Grads:
    """The gradients of the factors that are needed, and the adapter's part of `gx`.

    Args:
        g: `[T, m]`.
        x: `[T, n]`; read for the gradient of `A`.
        u: `[T, K*d_in]` or `[T, K, d_in]`, from `shrink_expand`; read for those of `B` and `C`.
        adapter: as in the forward; its `seed`, if any, on the tokens' device.
        gx: `[T, n]`, written; None where it is not needed.
        needs: whether the gradients of `A`, `B` and `C` are.
        add_gx: whether to add to what `gx` holds.

    Returns:
        The gradients of `A`, `B` and `C` in their dtypes, None where not needed.
    """
    needs_A, needs_B, needs_C = needs
    tokens, device = g.shape[0], g.device
    tensors = (
        g,
        x if needs_A else None,
        u if needs_B or needs_C else None,
        adapter.A,
        adapter.B,
        adapter.C,
        gx,
        adapter.seed if needs_A or gx is not None else None,
    )
    plan = _prepare_backward(
        adapter.geometry,
        token_bucket(tokens, device),
        needs,
        add_gx,
        device,
        may_use_tf32(g.dtype),
        signatures(tensors),
    )
    if plan is None:
        return _backward_by_slices(g, x, u, adapter, gx, needs)
    programs = min(-(-tokens // plan.rows), plan.max_programs)
    partial = g.new_empty((programs, plan.sums.columns), dtype=torch.float32)
    *before, seed = tensors
    plan.launch(programs, *before, partial, seed, adapter.dropout_p, adapter.scaling, tokens)
    return plan.sums.total(partial, adapter)


def _backward_by_slices(
    g: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    adapter: Adapter,
    gx: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> Grads:
    """`backward` of an adapter that takes more than one launch."""
    parts: list[Grads] = []
    for part, columns in _slices(adapter, g.dtype.itemsize):
        u_part = None if u is None else u.flatten(1)[:, columns]
        parts.append(backward(g, x, u_part, part, gx, needs, add_gx=bool(parts)))
    grads_A, grads_B, grads_C = zip(*parts, strict=True)
    needs_A, needs_B, needs_C = needs
    return (
        torch.cat(grads_A) if needs_A else None,
        torch.cat(grads_B, dim=1) if needs_B else None,
        (torch.cat(grads_C) if adapter.geometry.per_rank else sum(grads_C)) if needs_C else None,
    )


# From this many rows on, a tile of the backward pass has half of them with dropout or kernels per
# rank: the mask and the mixing matrices take registers.
_MANY_ROWS = 64


class _BackwardPlan(NamedTuple):
    launch: Launch
    rows: int  # of a block that a program works on
    max_programs: int
    sums: Sums


@prepared
def _prepare_backward(
    geometry: Geometry,
    bucket: TokenBucket,
    needs: tuple[bool, bool, bool],
    add_gx: bool,
    device: torch.device,
    tf32: bool,
    tensors: tuple[Signature, ...],
) -> _BackwardPlan | None:
    """The launches for `g`, `x`, `U`, `A`, `B`, `C`, `gx` and seed with these signatures.

    None for more ranks than a launch holds.
    """
    g, x, u, A, B, C, gx, seed = tensors
    itemsize = g[0].itemsize
    if ranks_per_launch(geometry, itemsize) < geometry.rank:
        return None
    inputs, outputs = geometry.inputs, geometry.outputs
    tile = lookup(architecture(device), "backward", itemsize, layout_of(geometry).columns)
    if (seed is not None or geometry.per_rank) and tile.tokens >= _MANY_ROWS:
        tile = tile._replace(tokens=tile.tokens // 2)
    tile = tile.for_tokens(bucket)
    needs_A, needs_B, needs_C = needs
    dtypes = tuple([found[0] for found in (A, B, C) if found is not None])
    sums = prepare_sums(geometry, needs, dtypes, device)
    launch = Launch(
        _backward_kernel,
        device,
        [
            PER_CALL, *strides(g, 2),
            PER_CALL, *strides(x, 2),
            PER_CALL, strides(u, 2)[0],
            PER_CALL, *strides(A, 2),
            PER_CALL, *strides(B, 2)[::-1],
            PER_CALL, *kernel_strides(C),
            PER_CALL, *strides(gx, 2),
            PER_CALL, max(1, sums.columns), sums.offset_b, sums.offset_c,
            PER_CALL, PER_CALL, PER_CALL,
            PER_CALL, inputs.size, outputs.size, inputs.windows, outputs.windows,
        ],
        tile,
        **_shape_constants(geometry, tile),
        WRITE_GX=gx is not None, ADD_GX=add_gx and gx is not None,
        NEED_A=needs_A, NEED_B=needs_B, NEED_C=needs_C,
        HAS_DROPOUT=seed is not None, PRECISION=dot_precision(device, tf32),
    )  # fmt: skip
    max_programs = tile.programs * multiprocessors(device)
    return _BackwardPlan(launch, tile.tokens, max_programs, sums)
