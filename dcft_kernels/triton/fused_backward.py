"""The whole backward pass of a layer in one matrix product: `gx`, and what the factors' sums need.

A program of the product `gx = g W` holds all that the adapter's gradients are made of: it reads a
block of rows of `g` from end to end, shrinks it to `Ub` on the way, and owns columns of `gx`, which
are those of `x`. So it takes

    its share of  gB^T = factor_grad(g, V)   from a few of the tiles of `g` that it reads anyway,
    its part of   gA = factor_grad(x, Ub)    from the columns of `x` that are its columns of `gx`.

`x` is read once, and `g` not once more, as the two kernels do that this stands for (`fused_linear`,
`backward`), and there is one launch less. It is for the shapes of `fused_linear`, and for adapters
that leave a program room for all of it: those that the table of tiles has an entry for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcft_kernels.adapter import Adapter
from dcft_kernels.geometry import Geometry
from dcft_kernels.triton.backward import (
    Grads,
    Sums,
    prepare_sums,
    store_mixing_gradient,
)
from dcft_kernels.triton.fused_linear import (
    SWIZZLE,
    Product,
    are_aligned,
    operand_tiles,
    plan_product,
    swizzled,
)
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
from dcft_kernels.triton.layout import layout_of
from dcft_kernels.triton.philox import keep
from dcft_kernels.triton.tiles import architecture, crowd_of, find
from dcft_kernels.triton.windows import (
    collapse,
    expand_matrix,
    factor_tile,
    mix,
    mixing_matrix,
    rank_columns,
    spread,
    window_features,
)


@triton.jit
def _store_partial(
    partial_ptr, values, tile, L, stride_l, stride_k,
    K: tl.constexpr, KP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Write a tile's `[BLOCK_L, KP]` gradient values to a row block's slice of the buffer."""
    window = tile * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    kappa = tl.arange(0, KP)[None, :]
    where = partial_ptr + window * stride_l + kappa * stride_k
    tl.store(where, values, mask=(window < L) & (kappa < K))


@triton.jit
def _contract(
    tile, gx, vb,
    g, g_ptr, stride_gt, stride_gm,
    w, w_ptr, stride_wm, stride_wn,
    B_ptr, stride_bk, stride_bl,
    block_t, block_n, row, inside, in_column, in_valid, m, J,
    K: tl.constexpr, KP: tl.constexpr,
    W_OUT: tl.constexpr, WP_OUT: tl.constexpr, L_OUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, W_IS_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Add what a tile of `g` contributes to `gx` and, but for `scaling`, to `Vb`; and the tile."""
    features, valid = window_features(tile, J, m, W_OUT, W_OUT, WP_OUT, L_OUT)
    g_tile, w_tile = operand_tiles(
        g, g_ptr, stride_gt, stride_gm,
        w, w_ptr, stride_wm, stride_wn,
        block_t, tile, block_n, row, inside, features, valid, in_column, in_valid,
        BLOCK_T, L_OUT * WP_OUT, BLOCK_IN, DESCRIPTORS, W_IS_TRANSPOSED,
    )  # fmt: skip
    gx = tl.dot(g_tile, w_tile, gx, input_precision=PRECISION)
    values = factor_tile(B_ptr, stride_bk, stride_bl, tile, J, K, KP, L_OUT)
    matrix = spread(values, WP_OUT, KP, L_OUT).to(g_ptr.dtype.element_ty)
    vb = tl.dot(g_tile, matrix, vb, input_precision=PRECISION)
    return gx, vb, g_tile


@triton.jit(do_not_specialize=["T"])
def _fused_backward_kernel(
    g, g_ptr, stride_gt, stride_gm,
    w, w_ptr, stride_wm, stride_wn,
    x_ptr, stride_xt, stride_xn,
    u_ptr, stride_ut,
    A_ptr, stride_ak, stride_al,
    B_ptr, stride_bk, stride_bl,
    C_ptr, stride_cq, stride_cp,
    gx_ptr, stride_gxt, stride_gxn,
    partial_ptr, stride_partial, offset_b, offset_c,
    seed_ptr, p, scaling,
    T, n, m, I, J,
    K: tl.constexpr, KP: tl.constexpr,
    W_IN: tl.constexpr, WP_IN: tl.constexpr, L_IN: tl.constexpr,
    W_OUT: tl.constexpr, WP_OUT: tl.constexpr, L_OUT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, SWIZZLE: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_C: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, W_IS_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """`gx = g W + mask * expand(Ub, A)`, and the row block's part of the factors' gradients.

        Vb = scaling * shrink(g, B^T)     gB^T = factor_grad(g, V),  V = scaling * C U
        gC = sum over t, κ of Vb U        Ub = C^T Vb
        gA = factor_grad(dropout(x), Ub)

    | tensor | shape | |
    | --- | --- | --- |
    | `g` | `[T, m]` | as a pointer, and a tensor descriptor (`DESCRIPTORS`) |
    | `W` | `[m, n]` | likewise; the descriptor's is maybe transposed |
    | `x` | `[T, n]` | read once (`NEED_A`) |
    | `U` | `[T, K*W_IN]` | read by every program of a row block (`NEED_B`, `NEED_C`) |
    | `gx` | `[T, n]` | written once |
    | `partial` | `[blocks of rows, ...]` | float32: of A `[K, I]`, B `[J, K]`, C `[W_OUT, W_IN]` |

    Grid: `(cdiv(T, BLOCK_T) * cdiv(I, L_IN),)`. Windows must tile both sides. Every element of
    `partial` is written by one program: of A by the one with these columns, of B by the programs of
    a row block in turn, of C by the first of them. All sums are in float32; `V`, `Vb` and `Ub` are
    rounded to the tokens' dtype for the matrix unit.
    """
    BLOCK_IN: tl.constexpr = L_IN * WP_IN
    CONTIGUOUS: tl.constexpr = W_IN == WP_IN and BLOCK_IN % 4 == 0
    blocks_n = tl.cdiv(I, L_IN)
    block_t, block_n = swizzled(tl.program_id(0), tl.cdiv(T, BLOCK_T), blocks_n, SWIZZLE)
    t = tl.cast(block_t, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t[:, None]
    inside = row < T
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    in_features, in_valid = window_features(block_n, I, n, W_IN, W_IN, WP_IN, L_IN)
    in_column = in_features[None, :].to(tl.int64)
    partial_ptr += tl.cast(block_t, tl.int64) * stride_partial

    if NEED_B or NEED_C:
        u_offsets, u_valid = rank_columns(t, stride_ut, W_IN, K, WP_IN, KP)
        u = tl.load(u_ptr + u_offsets, mask=inside & u_valid, other=0.0)
    if NEED_B:
        C = mixing_matrix(C_ptr, stride_cp, stride_cq, scaling, W_IN, W_OUT, WP_IN, WP_OUT, GROUP)
        v = mix(u.to(tl.float32), C, WP_IN, WP_OUT, KP, GROUP, BLOCK_T, PRECISION).to(dtype)

    vb = tl.zeros([BLOCK_T, KP * WP_OUT], tl.float32)
    gx = tl.zeros([BLOCK_T, BLOCK_IN], tl.float32)
    tiles = tl.cdiv(J, L_OUT)
    # The programs of a row block take turns at the tiles of `g`. Two loops, not a condition in one:
    # what is read under a condition, Triton 3.7 keeps for too short a time on sm_100.
    own = 0
    others = 1
    if NEED_B:
        own = tl.cdiv(tl.maximum(tiles - block_n, 0), blocks_n)
        others = tl.maximum(blocks_n - 1, 1)
        for number in range(own):
            tile = block_n + number * blocks_n
            gx, vb, g_tile = _contract(
                tile, gx, vb,
                g, g_ptr, stride_gt, stride_gm,
                w, w_ptr, stride_wm, stride_wn,
                B_ptr, stride_bk, stride_bl,
                block_t, block_n, row, inside, in_column, in_valid, m, J,
                K, KP, W_OUT, WP_OUT, L_OUT, BLOCK_T, BLOCK_IN, PRECISION,
                DESCRIPTORS, W_IS_TRANSPOSED,
            )  # fmt: skip
            dense = tl.dot(tl.trans(g_tile), v, input_precision=PRECISION)
            values = collapse(dense, WP_OUT, KP, L_OUT)
            _store_partial(partial_ptr + offset_b, values, tile, J, K, 1, K, KP, L_OUT)
    for number in range(tiles - own):
        # One after the other, but for those that are this program's own.
        tile = number
        if NEED_B:
            between = number % others
            tile = number // others * blocks_n + between + (between >= block_n)
        gx, vb, _ = _contract(
            tile, gx, vb,
            g, g_ptr, stride_gt, stride_gm,
            w, w_ptr, stride_wm, stride_wn,
            B_ptr, stride_bk, stride_bl,
            block_t, block_n, row, inside, in_column, in_valid, m, J,
            K, KP, W_OUT, WP_OUT, L_OUT, BLOCK_T, BLOCK_IN, PRECISION,
            DESCRIPTORS, W_IS_TRANSPOSED,
        )  # fmt: skip
    vb *= scaling

    CT = mixing_matrix(C_ptr, stride_cq, stride_cp, 1.0, W_OUT, W_IN, WP_OUT, WP_IN, GROUP)
    ub = mix(vb, CT, WP_OUT, WP_IN, KP, GROUP, BLOCK_T, PRECISION).to(dtype)
    _, _, matrix = expand_matrix(
        A_ptr, stride_ak, stride_al, block_n, I, n, dtype, W_IN, W_IN, K, WP_IN, KP, L_IN
    )
    if HAS_DROPOUT:
        kept = keep(tl.load(seed_ptr), p, t, in_features, CONTIGUOUS, BLOCK_T, BLOCK_IN)
        gx += tl.where(kept, tl.dot(ub, matrix, input_precision=PRECISION), 0.0)
    else:
        gx = tl.dot(ub, matrix, gx, input_precision=PRECISION)
    mask = inside & in_valid[None, :]
    tl.store(gx_ptr + row * stride_gxt + in_column * stride_gxn, gx.to(dtype), mask=mask)

    if NEED_A:
        x = tl.load(x_ptr + row * stride_xt + in_column * stride_xn, mask=mask, other=0.0)
        if HAS_DROPOUT:
            x = tl.where(kept, x, 0.0).to(dtype)
        dense = tl.dot(tl.trans(x), ub, input_precision=PRECISION)
        values = collapse(dense, WP_IN, KP, L_IN)
        _store_partial(partial_ptr, values, block_n, I, 1, I, K, KP, L_IN)
    if NEED_C:  # noqa: SIM102
        if block_n == 0:
            ranks = tl.dot(
                tl.trans(tl.reshape(vb.to(dtype), [BLOCK_T * KP // GROUP, GROUP * WP_OUT])),
                tl.reshape(u, [BLOCK_T * KP // GROUP, GROUP * WP_IN]),
                input_precision=PRECISION,
            )  # [GROUP*WP_OUT, GROUP*WP_IN]
            store_mixing_gradient(partial_ptr + offset_c, ranks, W_IN, W_OUT, WP_IN, WP_OUT, GROUP)


def fused_backward(
    g: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    weight: Tensor,
    adapter: Adapter,
    gx: Tensor,
    *,
    needs_A: bool,
    needs_B: bool,
    needs_C: bool,
) -> Grads | None:
    """Write the layer's `gx`, and return the gradients of the factors that are needed.

    Args:
        g: `[T, m]`.
        x: `[T, n]`; for `needs_A`.
        u: `[T, K*d_in]` or `[T, K, d_in]`, from the forward; for `needs_B` and `needs_C`.
        weight: `[m, n]`, any strides.
        adapter: of windows that tile both sides; its `seed`, if any, on the tokens' device.
        gx: `[T, n]`, written.
        needs_A: whether to compute the gradient of `A`; one at least is needed.
        needs_B: likewise.
        needs_C: likewise.

    Returns:
        The gradients of `A`, `B` and `C` in their dtypes, None where not needed. None in place of
        all three if there is no tile for such an adapter; nothing is done then.
    """
    before = (
        g, weight, x if needs_A else None, u if needs_B or needs_C else None,
        adapter.A, adapter.B, adapter.C, gx,
    )  # fmt: skip
    tokens = g.shape[0]
    plan = _prepare(
        adapter.geometry,
        crowd_of(tokens, g.device).wide,
        (needs_A, needs_B, needs_C),
        are_aligned(g, weight),
        g.device,
        may_use_tf32(g.dtype),
        forms((*before, adapter.seed)),
    )
    if plan is None:
        return None
    product = plan.product
    blocks_t = -(-tokens // product.tile.tokens)
    partial = g.new_empty((blocks_t, plan.sums.columns), dtype=torch.float32)
    plan.launch(
        blocks_t * product.blocks_out,
        (*before, partial, adapter.seed),
        (*product.handles(g, weight), adapter.dropout_p, adapter.scaling, tokens),
    )
    return plan.sums.total(partial, adapter)


class _Plan(NamedTuple):
    launch: Launch
    product: Product
    sums: Sums


@prepared
def _prepare(
    geometry: Geometry,
    wide: bool,
    needs: tuple[bool, bool, bool],
    aligned: bool,
    device: torch.device,
    tf32: bool,
    tensors: tuple[Form, ...],
) -> _Plan | None:
    """The launches for tensors of these forms: `g`, `weight`, `x`, `U`, `A`, `B`, `C`, `gx`, seed.

    None where there is no tile; `aligned` are `g` and `weight`; `wide` is what Triton depends
    on of the number of tokens.
    """
    g, weight, x, u, A, B, C, gx, seed = tensors
    inputs, outputs, layout = geometry.inputs, geometry.outputs, layout_of(geometry)
    tile = find(architecture(device), "fused_backward", itemsize_of(g), layout.columns)
    if tile is None:
        return None
    product = plan_product(tile, geometry, g, weight, aligned=aligned, grad_input=True)
    tile = product.tile
    needs_A, needs_B, needs_C = needs
    sums = prepare_sums(geometry, needs, device)
    descriptors = product.blocks is not None
    handle = NUMBER if descriptors else None
    launch = Launch(
        _fused_backward_kernel,
        device,
        [
            handle, TENSOR, *strides(g, 2),
            handle, TENSOR, *product.strides,
            TENSOR, *strides(x, 2),
            TENSOR, strides(u, 2)[0],
            TENSOR, *strides(A, 2),
            TENSOR, *strides(B, 2)[::-1],
            TENSOR, *strides(C, 2),
            TENSOR, *strides(gx, 2),
            TENSOR, sums.columns, sums.offset_b, sums.offset_c,
            TENSOR, NUMBER, NUMBER,
            NUMBER, inputs.size, outputs.size, inputs.windows, outputs.windows,
        ],
        {"num_warps": tile.warps, "num_stages": tile.stages},
        K=geometry.rank, KP=layout.KP,
        W_IN=inputs.width, WP_IN=layout.WP_IN, L_IN=product.windows_out,
        W_OUT=outputs.width, WP_OUT=layout.WP_OUT, L_OUT=product.windows_in,
        GROUP=layout.GROUP, BLOCK_T=tile.tokens, SWIZZLE=SWIZZLE,
        NEED_A=needs_A, NEED_B=needs_B, NEED_C=needs_C,
        HAS_DROPOUT=seed is not None, PRECISION=dot_precision(device, tf32),
        DESCRIPTORS=descriptors, W_IS_TRANSPOSED=product.is_transposed,
    )  # fmt: skip
    return _Plan(launch, product, sums)
