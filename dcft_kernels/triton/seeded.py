"""The strategy `seeded`: passes that read the tokens once, and products that carry the adapter.

    forward     U and Q from `x`;                       y = x W^T + U Q^T + b
    backward    Ub, P and shares of gB, gC from `g`;    gx = g W + Ub P, and shares of gA

Nothing of the size of `y` or `gx` is written but these themselves. The product of a direction may
start before its pass ends: it needs the pass's results last. So nothing is launched between the
two, and what has to be copied is copied before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcft_kernels.adapter import Adapter, Geometry, Gradients, Needs, Side, saved
from dcft_kernels.triton import shrink
from dcft_kernels.triton.partials import NO_GRADS, prepare_sums
from dcft_kernels.triton.tiles import architecture, multiprocessors, prepared

# Gluon is experimental: a Triton that has renamed something leaves everything to `row_block`.
_why_no_gemm: str | None = None
try:
    from dcft_kernels.triton import gemm
except (AttributeError, ImportError) as error:
    _why_no_gemm = f"it needs Gluon as in Triton 3.6 to 3.9 ({error})"

_MAX_RANK = 4
_WIDTHS = (4, 8, 16, 32, 64)
_MAX_COLUMNS = 64
# Descriptors describe matrices whose rows begin at multiples of 16 bytes: of 8 elements.
_ALIGNMENT = 8
# Four steps of `gemm`: it loads at most as many ahead, and a tile of `x` in as many parts.
_LEAST_FEATURES = 256
# The usual tile of a product, and fewest of them per multiprocessor: measured on an H200, where
# forward passes with 64 tiles take 0.86 to 1.13 of `row_block`'s time, with 32 1.00 to 1.60.
_TILE = (128, 256)
_LEAST_TILES = 0.48


@prepared
def why_not(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the strategy cannot take a layer that the kernels can take, or None if it can.

    It takes no dropout either.
    """
    if architecture(device) != "sm_90":
        return "it needs a GPU of compute capability 9.0"
    if _why_no_gemm is not None:
        return _why_no_gemm
    if dtype != torch.bfloat16:
        return f"it takes tokens in bfloat16, not {str(dtype).removeprefix('torch.')}"
    rank, outputs, inputs, _ = geometry
    for side in (outputs, inputs):
        reason = _why_not_side(side)
        if reason is not None:
            return reason
    columns = rank * inputs.width
    if rank > _MAX_RANK or columns > _MAX_COLUMNS or columns % _ALIGNMENT:
        return (
            f"it takes ranks up to {_MAX_RANK} and rank * kernel_size of 8, 16, .. {_MAX_COLUMNS}, "
            f"not {rank} * {inputs.width}"
        )
    return shrink.why_not(geometry, architecture(device))


def why_not_constant(
    dtype: torch.dtype, device: torch.device, per_rank: bool, rank: int, *sides: int
) -> str | None:
    """`why_not` for compilers, which take the result as a constant and cannot pass a geometry."""
    return why_not(Geometry(rank, Side(*sides[:4]), Side(*sides[4:]), per_rank), dtype, device)


# See `why_unavailable`.
why_not_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not_side(side: Side) -> str | None:
    if side.stride != side.width:
        return "it takes windows that tile the features, with stride equal to kernel_size"
    if side.width not in _WIDTHS:
        return f"it takes kernel sizes {', '.join(map(str, _WIDTHS))}, not {side.width}"
    if side.size % _ALIGNMENT or side.size < _LEAST_FEATURES:
        return (
            f"it takes numbers of features that are multiples of {_ALIGNMENT} from "
            f"{_LEAST_FEATURES} on, not {side.size}"
        )
    return None


def has_work(tokens: int, out_features: int, device: torch.device) -> bool:
    """Whether a product has enough tiles for a GPU: with fewer, the vendor's is faster."""
    tiles = -(-tokens // _TILE[0]) * -(-out_features // _TILE[1])
    return tiles >= _LEAST_TILES * multiprocessors(device)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter
) -> tuple[Tensor, Tensor]:
    """`y [T, m]` and `U [T, k*d_in]`; at least one token."""
    x, weight, adapter = _aligned(x), _aligned(weight), _contiguous(adapter)
    bias = None if bias is None else bias.contiguous()
    rank, outputs, inputs, _ = adapter.geometry
    u = x.new_empty(x.shape[0], rank * inputs.width)
    spread = x.new_empty(outputs.size, rank * inputs.width)
    y = x.new_empty(x.shape[0], outputs.size)
    shrink.shrink(x, adapter, u=u, spread=spread)
    gemm.linear(x, weight, bias, u, spread, out=y)
    return y, u


def backward(
    g: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    weight: Tensor,
    adapter: Adapter,
    needs: Needs,
) -> Gradients:
    """The gradients of `x` and of the factors that `needs` asks for; at least one token."""
    g, weight, adapter = _aligned(g), _aligned(weight), _contiguous(adapter)
    x = _aligned(saved(x)) if needs.A else None
    rank, _, inputs, _ = adapter.geometry
    tokens, columns = g.shape[0], rank * inputs.width
    ub = g.new_empty(tokens, columns)
    spread = g.new_empty(columns, inputs.size)
    gx = g.new_empty(tokens, inputs.size)
    partial = by_feature = None
    if needs.B or needs.C:
        shape = shrink.partial_shape(g, adapter, (needs.B, needs.C))
        partial = g.new_empty(shape, dtype=torch.float32)
    shrink.shrink_backward(
        g, U, adapter, ub=ub, spread=spread, partial=partial, needs=(needs.B, needs.C)
    )
    if needs.A:
        shape = (gemm.slices(tokens, columns, g.device), rank, inputs.size)
        by_feature = g.new_empty(shape, dtype=torch.float32)
    gemm.input_gradient(g, weight, ub, spread, out=gx, x=x, partial=by_feature)
    factors = (needs.A, needs.B, needs.C)
    grads = NO_GRADS
    if any(factors):
        dtypes = (adapter.A.dtype, adapter.B.dtype, adapter.C.dtype)
        sums = prepare_sums(adapter.geometry, factors, dtypes, g.device, by_feature=True)
        grads = sums.total(partial, adapter, by_feature)
    return Gradients(gx, None, None, *grads)


def is_describable(matrix: Tensor) -> bool:
    """Whether a descriptor can describe the matrix: rows that are contiguous, aligned, apart."""
    stride, step = matrix.stride()
    aligned = stride % _ALIGNMENT == 0 and matrix.data_ptr() % (_ALIGNMENT * matrix.itemsize) == 0
    return step == 1 and stride >= matrix.shape[1] and aligned


def _aligned(matrix: Tensor) -> Tensor:
    """The matrix, or a copy that a descriptor can describe."""
    if is_describable(matrix):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _contiguous(adapter: Adapter) -> Adapter:
    A, B, C = (factor.contiguous() for factor in adapter[:3])
    return adapter._replace(A=A, B=B, C=C)
