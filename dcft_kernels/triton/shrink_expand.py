"""Forward by row blocks: one launch reads `x` once and writes the adapter's part of `y` once."""

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
from dcft_kernels.triton.tiles import Crowd, architecture, crowd_of, lookup
from dcft_kernels.triton.windows import (
    expand_matrix,
    expand_tiles,
    factor_tile,
    mix,
    mixing_matrix,
    rank_columns,
    spread,
    window_features,
)


@triton.jit(do_not_specialize=["T"])
def _shrink_expand_kernel(
    x_ptr, stride_xt, stride_xn,
    u_ptr, stride_ut,
    A_ptr, stride_ak, stride_al,
    B_ptr, stride_bk, stride_bl,
    C_ptr, stride_cq, stride_cp,
    bias_ptr, stride_bias,
    base_ptr, stride_baset, stride_basem,
    y_ptr, stride_yt, stride_ym,
    seed_ptr, p, scaling,
    T, n, m, I, J,
    K: tl.constexpr, KP: tl.constexpr,
    W_IN: tl.constexpr, S_IN: tl.constexpr, WP_IN: tl.constexpr, L_IN: tl.constexpr,
    W_OUT: tl.constexpr, S_OUT: tl.constexpr, WP_OUT: tl.constexpr, L_OUT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr,
    SHRINK: tl.constexpr, EXPAND: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BASE: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`U = shrink(dropout(x), A)`; `y = base + bias + expand(scaling * C U, B^T)`.

    | tensor | shape | |
    | --- | --- | --- |
    | `x` | `[T, n]` | read once (`SHRINK`) |
    | `U` | `[T, K*W_IN]` | written (`SHRINK`) or read |
    | `A`, `B`, `C` | `[K, I]`, `[J, K]`, `[W_OUT, W_IN]` | any float dtype |
    | `bias`, `base` | `[m]`, `[T, m]` | optional |
    | `y` | `[T, m]` | written once (`EXPAND`) |

    Grid: `(cdiv(T, BLOCK_T),)`, a program owning whole rows, so that its `U` is complete. All
    sums are in float32; `V = scaling * C U` is rounded to `x`'s dtype for the matrix unit.
    """
    block = tl.program_id(0)
    t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t[:, None]
    inside = row < T
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    CONTIGUOUS: tl.constexpr = S_IN == W_IN and W_IN == WP_IN and (L_IN * WP_IN) % 4 == 0

    u_offsets, u_valid = rank_columns(t, stride_ut, W_IN, K, WP_IN, KP)
    if SHRINK:
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
        tl.store(u_ptr + u_offsets, u.to(dtype), mask=inside & u_valid)
    else:
        u = tl.load(u_ptr + u_offsets, mask=inside & u_valid, other=0.0).to(tl.float32)

    if EXPAND:
        C = mixing_matrix(C_ptr, stride_cp, stride_cq, scaling, W_IN, W_OUT, WP_IN, WP_OUT, GROUP)
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
    x: Tensor | None,
    adapter: Adapter,
    *,
    u: Tensor,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Write `U`, `y` or both: the kernel, once for what of the ranks one launch holds.

    Args:
        x: `[T, n]`, or None to read `u` instead of computing it.
        adapter: its `seed`, if any, on `x`'s device.
        u: `[T, K*d_in]` or `[T, K, d_in]`, each token's contiguous; written if `x` is given, else
            read.
        bias: `[m]`, added to `y`.
        base: `[T, m]`, added to `y`; may be `y` itself.
        y: `[T, m]`, written; None to compute `U` only.
    """
    tensors = (
        x, u, adapter.A, adapter.B, adapter.C, bias, base, y, None if x is None else adapter.seed
    )  # fmt: skip
    tokens, device = u.shape[0], u.device
    plan = _prepare(
        adapter.geometry,
        crowd_of(tokens, device),
        device,
        may_use_tf32(u.dtype),
        forms(tensors),
    )
    if plan is not None:
        programs = -(-tokens // plan.rows)
        plan.launch(programs, tensors, (adapter.dropout_p, adapter.scaling, tokens))
        return
    for part, columns in slices(adapter, u.dtype):
        shrink_expand(x, part, u=u.flatten(1)[:, columns], bias=bias, base=base, y=y)
        bias, base = None, y  # what further ranks are added to


class _Plan(NamedTuple):
    launch: Launch
    rows: int  # of a program


@prepared
def _prepare(
    geometry: Geometry,
    crowd: Crowd,
    device: torch.device,
    tf32: bool,
    tensors: tuple[Form, ...],
) -> _Plan | None:
    """The launch for tensors of these forms: `x`, `U`, `A`, `B`, `C`, bias, base, `y`, seed.

    None for more ranks than a launch holds.
    """
    x, u, A, B, C, bias, base, y, seed = tensors
    itemsize = itemsize_of(u)
    if not fit_one_launch(geometry, itemsize):
        return None
    inputs, outputs, layout = geometry.inputs, geometry.outputs, layout_of(geometry)
    tile = lookup(architecture(device), "shrink_expand", itemsize, layout.columns)
    tile = tile.for_tokens(crowd)
    launch = Launch(
        _shrink_expand_kernel,
        device,
        [
            TENSOR, *strides(x, 2),
            TENSOR, strides(u, 2)[0],
            TENSOR, *strides(A, 2),
            TENSOR, *strides(B, 2)[::-1],
            TENSOR, *strides(C, 2),
            TENSOR, *strides(bias, 1),
            TENSOR, *strides(base, 2),
            TENSOR, *strides(y, 2),
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
        SHRINK=x is not None, EXPAND=y is not None,
        HAS_BIAS=bias is not None, HAS_BASE=base is not None, HAS_DROPOUT=seed is not None,
        PRECISION=dot_precision(device, tf32),
    )  # fmt: skip
    return _Plan(launch, tile.tokens)
