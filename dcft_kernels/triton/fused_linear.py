"""The base layer's product with the adapter inside it: one launch forward, one for `gx`.

For shapes where a launch and a pass through the caches cost more than what this matrix product
loses against the vendor's: see `dcft_kernels.strategy`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dcft_kernels.adapter import Adapter
from dcft_kernels.geometry import Geometry, Pair
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
from dcft_kernels.triton.tiles import Tile, architecture, crowd_of, lookup, multiprocessors
from dcft_kernels.triton.windows import (
    expand_features,
    expand_matrix,
    expand_tiles,
    factor_tile,
    mix,
    mixing_matrix,
    rank_columns,
    spread,
    window_features,
)

# Row blocks that run side by side over the same columns of W, so that the caches hold both.
SWIZZLE = 8


@triton.jit
def swizzled(program, blocks_t, blocks_o, SWIZZLE: tl.constexpr):
    """The row block and the column block of a program: SWIZZLE row blocks share columns of W."""
    in_group = SWIZZLE * blocks_o
    first_t = (program // in_group) * SWIZZLE
    group_size = tl.minimum(blocks_t - first_t, SWIZZLE)
    return first_t + (program % in_group) % group_size, (program % in_group) // group_size


@triton.jit
def operand_tiles(
    z, z_ptr, stride_zt, stride_zf,
    w, w_ptr, stride_wf, stride_wo,
    block_t, tile, block_o, row, inside, features, valid, out_column, out_valid,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, W_IS_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What a step of the product multiplies: `[BLOCK_T, BLOCK_IN]`, `[BLOCK_IN, BLOCK_OUT]`."""
    if DESCRIPTORS:  # the copy engine checks bounds and fills in zeros
        z_tile = z.load([block_t * BLOCK_T, tile * BLOCK_IN])
        if W_IS_TRANSPOSED:
            w_tile = tl.trans(w.load([block_o * BLOCK_OUT, tile * BLOCK_IN]))
        else:
            w_tile = w.load([tile * BLOCK_IN, block_o * BLOCK_OUT])
    else:
        column = features.to(tl.int64)
        z_tile = tl.load(
            z_ptr + row * stride_zt + column[None, :] * stride_zf,
            mask=inside & valid[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w_ptr + column[:, None] * stride_wf + out_column * stride_wo,
            mask=valid[:, None] & out_valid[None, :],
            other=0.0,
        )
    return z_tile, w_tile


@triton.jit
def _fused_tile(
    program, blocks_t, blocks_o,
    z, z_ptr, stride_zt, stride_zf,
    w, w_ptr, stride_wf, stride_wo,
    fi_ptr, stride_fik, stride_fil,
    fo_ptr, stride_fok, stride_fol,
    C_ptr, stride_from, stride_to,
    bias_ptr, stride_bias,
    u_ptr, stride_ut,
    out_ptr, stride_ot, stride_oo,
    seed_ptr, p, scaling,
    T, size_in, size_out, windows_in, windows_out,
    K: tl.constexpr, KP: tl.constexpr,
    W_IN: tl.constexpr, WP_IN: tl.constexpr, L_IN: tl.constexpr,
    W_OUT: tl.constexpr, S_OUT: tl.constexpr, WP_OUT: tl.constexpr, L_OUT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, SWIZZLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, WRITE_U: tl.constexpr,
    DROPOUT_IN: tl.constexpr, DROPOUT_OUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, W_IS_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One tile `[BLOCK_T, L_OUT*WP_OUT]` of the kernel's result; see there."""
    BLOCK_IN: tl.constexpr = L_IN * WP_IN
    BLOCK_OUT: tl.constexpr = L_OUT * WP_OUT
    CONTIGUOUS_IN: tl.constexpr = W_IN == WP_IN and BLOCK_IN % 4 == 0
    block_t, block_o = swizzled(program, blocks_t, blocks_o, SWIZZLE)
    t = tl.cast(block_t, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t[:, None]
    inside = row < T
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    out_features, out_valid = expand_features(
        block_o, windows_out, size_out, W_OUT, S_OUT, WP_OUT, L_OUT
    )
    out_column = out_features[None, :].to(tl.int64)

    u = tl.zeros([BLOCK_T, KP * WP_IN], tl.float32)
    out = tl.zeros([BLOCK_T, BLOCK_OUT], tl.float32)
    for tile in range(tl.cdiv(windows_in, L_IN)):
        features, valid = window_features(tile, windows_in, size_in, W_IN, W_IN, WP_IN, L_IN)
        z_tile, w_tile = operand_tiles(
            z, z_ptr, stride_zt, stride_zf,
            w, w_ptr, stride_wf, stride_wo,
            block_t, tile, block_o, row, inside, features, valid, out_column, out_valid,
            BLOCK_T, BLOCK_IN, BLOCK_OUT, DESCRIPTORS, W_IS_TRANSPOSED,
        )  # fmt: skip
        out = tl.dot(z_tile, w_tile, out, input_precision=PRECISION)
        if DROPOUT_IN:
            kept = keep(tl.load(seed_ptr), p, t, features, CONTIGUOUS_IN, BLOCK_T, BLOCK_IN)
            z_tile = tl.where(kept, z_tile, 0.0).to(dtype)
        values = factor_tile(fi_ptr, stride_fik, stride_fil, tile, windows_in, K, KP, L_IN)
        matrix = spread(values, WP_IN, KP, L_IN).to(dtype)
        u = tl.dot(z_tile, matrix, u, input_precision=PRECISION)

    if WRITE_U:
        u_offsets, u_valid = rank_columns(t, stride_ut, W_IN, K, WP_IN, KP)
        tl.store(u_ptr + u_offsets, u.to(dtype), mask=inside & u_valid & (block_o == 0))

    C = mixing_matrix(C_ptr, stride_from, stride_to, scaling, W_IN, W_OUT, WP_IN, WP_OUT, GROUP)
    v = mix(u, C, WP_IN, WP_OUT, KP, GROUP, BLOCK_T, PRECISION).to(dtype)
    _, _, matrix = expand_matrix(
        fo_ptr, stride_fok, stride_fol, block_o, windows_out, size_out, dtype,
        W_OUT, S_OUT, K, WP_OUT, KP, L_OUT,
    )  # fmt: skip
    if DROPOUT_OUT:
        CONTIGUOUS_OUT: tl.constexpr = BLOCK_OUT % 4 == 0 and (S_OUT != W_OUT or W_OUT == WP_OUT)
        kept = keep(tl.load(seed_ptr), p, t, out_features, CONTIGUOUS_OUT, BLOCK_T, BLOCK_OUT)
        out += tl.where(kept, tl.dot(v, matrix, input_precision=PRECISION), 0.0)
    else:
        out = tl.dot(v, matrix, out, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + out_features * stride_bias, mask=out_valid, other=0.0)
        out += bias[None, :].to(tl.float32)
    tl.store(
        out_ptr + row * stride_ot + out_column * stride_oo,
        out.to(dtype),
        mask=inside & out_valid[None, :],
    )


@triton.jit(do_not_specialize=["T"])
def _fused_linear_kernel(
    z, z_ptr, stride_zt, stride_zf,
    w, w_ptr, stride_wf, stride_wo,
    fi_ptr, stride_fik, stride_fil,
    fo_ptr, stride_fok, stride_fol,
    C_ptr, stride_from, stride_to,
    bias_ptr, stride_bias,
    u_ptr, stride_ut,
    out_ptr, stride_ot, stride_oo,
    seed_ptr, p, scaling,
    T, size_in, size_out, windows_in, windows_out,
    K: tl.constexpr, KP: tl.constexpr,
    W_IN: tl.constexpr, WP_IN: tl.constexpr, L_IN: tl.constexpr,
    W_OUT: tl.constexpr, S_OUT: tl.constexpr, WP_OUT: tl.constexpr, L_OUT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, SWIZZLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, WRITE_U: tl.constexpr,
    DROPOUT_IN: tl.constexpr, DROPOUT_OUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, W_IS_TRANSPOSED: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """`out = z W + bias + mask * expand(scaling * C shrink(z, fi), fo)`.

    Forward: `z = x`, `W = weight^T`, `fi = A`, `fo = B^T`, and dropout on what is shrunk. For
    `gx`: `z = g`, `W = weight`, `fi = B^T`, `fo = A`, `C` transposed, and dropout on what is
    expanded.

    | tensor | shape | |
    | --- | --- | --- |
    | `z` | `[T, size_in]` | as a pointer, and a tensor descriptor (`DESCRIPTORS`) |
    | `W` | `[size_in, size_out]` | likewise; the descriptor's is maybe transposed |
    | `fi`, `fo`, `C` | `[K, windows_in]`, `[K, windows_out]`, `[W_IN, W_OUT]` by its strides | |
    | `U` | `[T, K*W_IN]` | what `z` was shrunk to; written once (`WRITE_U`) |
    | `out` | `[T, size_out]` | written once |

    Grid: `(cdiv(T, BLOCK_T) * expand_tiles(out side),)`, or as many programs as the GPU holds, each
    looping over tiles (`PERSISTENT`). The contracted windows must tile their side. Every program
    shrinks its own rows again: `KP*WP_IN` more columns to its matrix product. All sums are in
    float32.
    """
    blocks_t = tl.cdiv(T, BLOCK_T)
    blocks_o = expand_tiles(windows_out, size_out, W_OUT, S_OUT, WP_OUT, L_OUT)
    step = tl.num_programs(0) if PERSISTENT else blocks_t * blocks_o
    for program in range(tl.program_id(0), blocks_t * blocks_o, step):
        _fused_tile(
            program, blocks_t, blocks_o,
            z, z_ptr, stride_zt, stride_zf,
            w, w_ptr, stride_wf, stride_wo,
            fi_ptr, stride_fik, stride_fil,
            fo_ptr, stride_fok, stride_fol,
            C_ptr, stride_from, stride_to,
            bias_ptr, stride_bias,
            u_ptr, stride_ut,
            out_ptr, stride_ot, stride_oo,
            seed_ptr, p, scaling,
            T, size_in, size_out, windows_in, windows_out,
            K, KP, W_IN, WP_IN, L_IN, W_OUT, S_OUT, WP_OUT, L_OUT,
            GROUP, BLOCK_T, SWIZZLE, HAS_BIAS, WRITE_U, DROPOUT_IN, DROPOUT_OUT, PRECISION,
            DESCRIPTORS, W_IS_TRANSPOSED,
        )  # fmt: skip


def fused_linear(
    z: Tensor,
    weight: Tensor,
    adapter: Adapter,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    u: Tensor | None = None,
    grad_input: bool = False,
) -> None:
    """Write `out = z weight^T + bias + adapter`, or with `grad_input` its gradient for `z = g`.

    Args:
        z: `[T, n]`, or `g [T, m]` for `grad_input`.
        weight: `[m, n]`, any strides.
        adapter: its `seed`, if any, on `z`'s device.
        out: `[T, m]`, or `[T, n]` for `grad_input`; written.
        bias: `[m]`.
        u: `[T, K*d_in]`, written with `U`; None to drop it.
        grad_input: whether this is the way back.
    """
    factors = (adapter.B, adapter.A) if grad_input else (adapter.A, adapter.B)
    tensors = (z, weight, *factors, adapter.C, bias, u, out, adapter.seed)
    tokens = z.shape[0]
    plan = _prepare(
        adapter.geometry,
        grad_input,
        crowd_of(tokens, z.device).wide,
        are_aligned(z, weight),
        z.device,
        may_use_tf32(z.dtype),
        forms(tensors),
    )
    product = plan.product
    programs = -(-tokens // product.tile.tokens) * product.blocks_out
    if plan.most_programs is not None:
        programs = min(programs, plan.most_programs)
    handles = product.handles(z, weight)
    plan.launch(programs, tensors, (*handles, adapter.dropout_p, adapter.scaling, tokens))


class Product(NamedTuple):
    """How a product `z W` is cut into tiles; `W` is `weight` or its transpose."""

    tile: Tile
    windows_in: int  # of a tile, along what is contracted
    windows_out: int  # along the result's columns
    blocks_out: int  # tiles along the result's columns
    strides: tuple[int, ...]  # of `W`
    is_transposed: bool  # whether the transpose of `W` is what has contiguous rows
    # Tiles of `z` and `W` as the copy engine loads them; None where it does not.
    blocks: tuple[Pair, Pair] | None
    stored_transposed: bool  # whether the transpose of `weight` is what has contiguous rows

    def handles(self, z: Tensor, weight: Tensor) -> tuple[TensorDescriptor, ...]:
        """Descriptors of `z` and `weight`, if the copy engine loads them."""
        if self.blocks is None:
            return ()
        stored = weight.t() if self.stored_transposed else weight
        block_z, block_w = self.blocks
        return (
            TensorDescriptor.from_tensor(z, list(block_z)),
            TensorDescriptor.from_tensor(stored, list(block_w)),
        )


def plan_product(
    tile: Tile, geometry: Geometry, z: Form, weight: Form, *, aligned: bool, grad_input: bool
) -> Product:
    """Cut `x weight^T`, or `g weight` for `grad_input`, into tiles.

    Args:
        tile: of the kernel's table.
        geometry: of the adapter.
        z: the form of `x` or `g`.
        weight: that of `weight [m, n]`.
        aligned: whether both begin where the copy engine can load them.
        grad_input: whether this is the way back.
    """
    inputs, outputs, layout = geometry.inputs, geometry.outputs, layout_of(geometry)
    strides_w = strides(weight, 2)
    if grad_input:
        inputs, outputs, layout = outputs, inputs, layout.reversed()
    else:
        strides_w = strides_w[::-1]
    if (inputs.width, outputs.width) != (layout.WP_IN, layout.WP_OUT):
        # Addresses of padded windows take registers, which fewer rows leave.
        tile = tile._replace(tokens=max(16, tile.tokens // 2))
    windows_out = windows_per_tile(tile.outputs, layout.WP_OUT)
    if outputs.stride == outputs.width:
        blocks_out = triton.cdiv(outputs.windows, windows_out)
    else:
        blocks_out = triton.cdiv(outputs.size, windows_out * layout.WP_OUT)
    windows_in = windows_per_tile(tile.features, layout.WP_IN)
    block_in, block_out = windows_in * layout.WP_IN, windows_out * layout.WP_OUT
    is_transposed = strides_w[1] != 1
    rows_w = strides_w[::-1] if is_transposed else strides_w
    blocks = None
    # Descriptors are of whole tiles of features, with no window padded between them.
    if (
        tile.descriptors
        and aligned
        and inputs.width == layout.WP_IN
        and (outputs.width == layout.WP_OUT or outputs.stride != outputs.width)
        and _is_describable(z, strides(z, 2))
        and _is_describable(weight, rows_w)
    ):
        block_w = (block_out, block_in) if is_transposed else (block_in, block_out)
        blocks = ((tile.tokens, block_in), block_w)
    return Product(
        tile, windows_in, windows_out, blocks_out, strides_w, is_transposed, blocks,
        is_transposed == grad_input,
    )  # fmt: skip


class _Plan(NamedTuple):
    launch: Launch
    product: Product
    most_programs: int | None


@prepared
def _prepare(
    geometry: Geometry,
    grad_input: bool,
    wide: bool,
    aligned: bool,
    device: torch.device,
    tf32: bool,
    tensors: tuple[Form, ...],
) -> _Plan:
    """The launch for tensors of these forms: `z`, `weight`, factors, `C`, bias, `U`, out, seed.

    The factors are `A` and `B`, that of the contracted side first; `aligned` are `z` and `weight`;
    `wide` is what Triton depends on of the number of tokens.
    """
    z, weight, factor_in, factor_out, C, bias, u, out, seed = tensors
    inputs, outputs, layout = geometry.inputs, geometry.outputs, layout_of(geometry)
    tile = lookup(architecture(device), "fused_linear", itemsize_of(z), layout.columns)
    product = plan_product(tile, geometry, z, weight, aligned=aligned, grad_input=grad_input)
    tile = product.tile
    # `B` is `[J, k]`, and the kernel's factors are `[k, windows]`.
    strides_in, strides_out = strides(factor_in, 2), strides(factor_out, 2)
    strides_c = strides(C, 2)
    if grad_input:
        inputs, outputs, layout = outputs, inputs, layout.reversed()
        strides_in = strides_in[::-1]
    else:
        strides_c, strides_out = strides_c[::-1], strides_out[::-1]
    descriptors = product.blocks is not None
    handle = NUMBER if descriptors else None
    launch = Launch(
        _fused_linear_kernel,
        device,
        [
            handle, TENSOR, *strides(z, 2),
            handle, TENSOR, *product.strides,
            TENSOR, *strides_in,
            TENSOR, *strides_out,
            TENSOR, *strides_c,
            TENSOR, *strides(bias, 1),
            TENSOR, strides(u, 2)[0],
            TENSOR, *strides(out, 2),
            TENSOR, NUMBER, NUMBER,
            NUMBER, inputs.size, outputs.size, inputs.windows, outputs.windows,
        ],
        {"num_warps": tile.warps, "num_stages": tile.stages},
        K=geometry.rank, KP=layout.KP,
        W_IN=inputs.width, WP_IN=layout.WP_IN, L_IN=product.windows_in,
        W_OUT=outputs.width, S_OUT=outputs.stride, WP_OUT=layout.WP_OUT,
        L_OUT=product.windows_out,
        GROUP=layout.GROUP, BLOCK_T=tile.tokens, SWIZZLE=SWIZZLE,
        HAS_BIAS=bias is not None, WRITE_U=u is not None,
        DROPOUT_IN=seed is not None and not grad_input,
        DROPOUT_OUT=seed is not None and grad_input,
        PRECISION=dot_precision(device, tf32),
        DESCRIPTORS=descriptors, W_IS_TRANSPOSED=product.is_transposed,
        PERSISTENT=tile.programs > 0,
    )  # fmt: skip
    most = tile.programs * multiprocessors(device) if tile.programs else None
    return _Plan(launch, product, most)


def are_aligned(z: Tensor, weight: Tensor) -> bool:
    """Whether both begin where the copy engine can load them."""
    return (z.data_ptr() | weight.data_ptr()) % _DESCRIPTOR_ALIGNMENT == 0


# In bytes, of a matrix and of each of its rows: what the copy engine takes.
_DESCRIPTOR_ALIGNMENT = 16


def _is_describable(form: Form, rows: tuple[int, ...]) -> bool:
    """Whether the copy engine takes an aligned matrix: of contiguous rows, aligned as well."""
    return rows[1] == 1 and rows[0] * itemsize_of(form) % _DESCRIPTOR_ALIGNMENT == 0
