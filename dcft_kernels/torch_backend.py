"""The layer's passes as PyTorch operations, for any device: the adapter as the LoRA it equals.

Notation and derivation: with tokens `x [T, n]`, `DW` of `adapter` and `r = k*d_in`,
`s DW = Q^T P`, where

    P = spread(A) [r, n]                   Q = (s C^T) S [r, m],  S = spread(B^T) [k*d_out, m]

    U = x P^T                              y = x W^T + b, then y += U Q
    Ub = g Q^T                             gx = g W, then gx += Ub P
    gP = Ub^T x, summed to gA              gQ = U^T g, summed to gB and gC

The matrices are as large as the factors of a LoRA of rank `r`. `spread` takes every geometry:
overlapping windows and ragged ends are nowhere else. No step touches an `[m, n]` tensor other than
the base weight.

`U` and `Ub` are computed as `[r, T]`: on a CPU, products with few rows are twice as fast as those
with few columns. Where the CPU has no 16-bit products, 16-bit inputs are computed in float32, a
block of rows at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from dcft_kernels.adapter import Adapter, Geometry, Gradients, Needs, Side, saved
from dcft_kernels.dropout import drop, keep_mask

# Elements of the float32 copy of a block of rows: 1 MiB, small enough to stay in a core's cache.
_BLOCK_ELEMENTS = 1 << 18
# Elements of the float32 copy of a block of weight rows: 4 MiB.
_WEIGHT_BLOCK_ELEMENTS = 1 << 20

# Modes of `torch.func.vmap` and of `is_grads_batched`, which refuse all random numbers.
_VMAP_MODES = torch._C.DispatchKeySet(
    torch._C._dispatch_key_parse("FuncTorchVmapMode")
) | torch._C.DispatchKeySet(torch._C._dispatch_key_parse("VmapMode"))


def _slow_on_cpu() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that this CPU has no products for: PyTorch's `g W` is a scalar loop."""
    slow = {torch.bfloat16, torch.float16}
    if torch.backends.mkldnn.is_available():
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            slow.remove(torch.bfloat16)
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            slow.remove(torch.float16)
    return frozenset(slow)


_SLOW_ON_CPU = _slow_on_cpu()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
) -> tuple[Tensor, Tensor]:
    """`y = x W^T + b + dropout(x) DW^T` `[T, m]`, and `U [T, k*d_in]` for the backward.

    Args:
        x: `[T, n]`.
        weight: `[m, n]`, or None where `base` is given.
        bias: `[m]` or None.
        base: `[T, m]`, the base layer's output where there is no `weight`; not changed.
        adapter: factors and settings.
    """
    # The base first, on its own: an adapter whose increment is zero changes no bit of it.
    if weight is None:
        y = saved(base).clone(memory_format=torch.contiguous_format)
    else:
        y = F.linear(x, weight, bias)
    P, Q = adapter.matrices or _kept_matrices(adapter, x.dtype)
    U = _shrink(P, drop(x, adapter.dropout_p, adapter.seed))
    _expand_(y, U, Q)
    return y, U.t()


def composite_forward(  # noqa: D417 - the others are `forward`'s
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
    h: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """`y` of `forward`, in operations that autograd, compilers and transforms follow.

    Args:
        x: `[T, n]`; see `forward` for this and the arguments not listed.
        adapter: factors and settings; dropout is PyTorch's own, its scaling the layer's.
        h: an elementwise function on `U`, or None for the identity.
    """
    y = saved(base) if weight is None else F.linear(x, weight, bias)
    dtype = compute_dtype(x.dtype, x.device)
    P, Q = matrices(adapter, dtype)
    dropped = F.dropout(x, adapter.dropout_p) if adapter.dropout_p > 0.0 else x
    U = P @ dropped.to(dtype).t()
    return torch.addmm(y.to(dtype), (U if h is None else h(U)).t(), Q).to(y.dtype)


def backward(
    g: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter,
    needs: Needs,
) -> Gradients:
    """The gradients that `needs` asks for.

    Args:
        g: `[T, m]`, gradient of the output.
        x: `[T, n]`, the forward's input; may be None unless `needs.A` or `needs.weight`.
        U: `[T, k*d_in]`, what `forward` returned; may be None unless `needs.B` or `needs.C`.
        weight: `[m, n]`, or None for an adapter without a base: then `gx` is the adapter's alone.
        adapter: as in the forward.
        needs: which gradients to compute.
    """
    P, Q = adapter.matrices or _kept_matrices(adapter, g.dtype)
    mask = _mask(g, adapter, needs)
    grad_x = grad_P = grad_Q = None
    if needs.x or needs.A:
        Ub = _shrink(Q, g)
    if needs.x:
        if mask is None:
            grad_x = g.new_zeros(len(g), P.shape[1]) if weight is None else base_grad(g, weight)
            _expand_(grad_x, Ub, P)
        else:
            grad_x = _expand_(g.new_zeros(mask.shape), Ub, P).mul_(mask)
            grad_x = grad_x if weight is None else grad_x.add_(base_grad(g, weight))
    if needs.A:
        grad_P = _sum_rows(Ub, saved(x) if mask is None else saved(x) * mask)
    if needs.B or needs.C:
        grad_Q = _sum_rows(saved(U).t(), g, adapter.scaling)
    return _gradients(g, x, grad_x, grad_P, grad_Q, adapter, needs)


def composite_backward(  # noqa: D417 - the others are `backward`'s
    g: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter,
    needs: Needs,
    grad_U: Tensor | None = None,
) -> Gradients:
    """`backward` in operations that autograd and transforms follow, in float32 or wider.

    Args:
        g: `[T, m]`, gradient of the output; to a transform, a batch of them.
        x: `[T, n]` or None; see `backward` for this and the arguments not listed.
        grad_U: `[T, k*d_in]`, gradient of `U` as an output: only a double backward has one.
    """
    dtype = torch.promote_types(g.dtype, torch.float32)
    P, Q = matrices(adapter, dtype)
    with torch._C._ExcludeDispatchKeyGuard(_VMAP_MODES):
        mask = _mask(g, adapter, needs)
    grad_x = grad_P = grad_Q = None
    wide = g.to(dtype)
    Ub = wide @ Q.t()
    if grad_U is not None:
        Ub = Ub + grad_U
    if needs.x:
        grad_x = (Ub @ P).to(g.dtype)
        grad_x = grad_x if mask is None else grad_x * mask
        if weight is not None:
            narrow = compute_dtype(g.dtype, g.device)
            grad_x = grad_x + (g.to(narrow) @ weight.to(narrow)).to(g.dtype)
    if needs.A:
        grad_P = Ub.t() @ (saved(x) if mask is None else saved(x) * mask).to(dtype)
    if needs.B or needs.C:
        grad_Q = _scaled(saved(U).to(dtype).t() @ wide, adapter.scaling)
    return _gradients(g, x, grad_x, grad_P, grad_Q, adapter, needs)


def _mask(g: Tensor, adapter: Adapter, needs: Needs) -> Tensor | None:
    """Dropout's mask, if there is dropout and a gradient reads it."""
    if adapter.seed is None or not (needs.x or needs.A):
        return None
    shape = (g.shape[0], adapter.geometry.inputs.size)
    return keep_mask(adapter.seed, adapter.dropout_p, shape, g.dtype, g.device)


def _gradients(
    g: Tensor,
    x: Tensor | None,
    grad_x: Tensor | None,
    grad_P: Tensor | None,
    grad_Q: Tensor | None,
    adapter: Adapter,
    needs: Needs,
) -> Gradients:
    """All gradients, from those of `P` and `s Q`."""
    A, B, C, _, (rank, outputs, inputs), *_ = adapter
    grad_A = grad_B = grad_C = None
    if grad_P is not None:
        grad_A = _entries(_to_span(grad_P, inputs), rank, inputs).sum(1, dtype=A.dtype)
    if grad_Q is not None:
        grad_Q = _to_span(grad_Q, outputs)
        # `[J, k, d_out, d_in]`: a window of one rank is an outer product of an entry of B and C.
        shape = (outputs.windows, rank, outputs.width, inputs.width)
        strides = (outputs.stride, inputs.width * outputs.span, 1, outputs.span)
        rows = grad_Q.as_strided(shape, strides).reshape(B.numel(), C.numel())
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if needs.B:
            grad_B = torch.mv(rows, C.to(rows.dtype).reshape(-1)).reshape(B.shape).to(B.dtype)
        if needs.C:
            grad_C = torch.mv(rows.t(), B.to(rows.dtype).reshape(-1)).reshape(C.shape).to(C.dtype)
    return Gradients(
        x=grad_x,
        weight=g.t() @ saved(x) if needs.weight else None,
        bias=g.sum(0) if needs.bias else None,
        A=grad_A,
        B=grad_B,
        C=grad_C,
    )


def delta_weight(adapter: Adapter) -> Tensor:
    """`scaling * DW` `[m, n]`, in the factors' common dtype; differentiable."""
    P, Q = matrices(adapter, adapter.dtype)
    return Q.t() @ P


def matrices(adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`P [k*d_in, n]` and `Q [k*d_in, m]` with `s DW = Q^T P`; differentiable."""
    rank, outputs, inputs = adapter.geometry
    A, B, C, scaling, *_ = adapter.widened(adapter.dtype)  # each entry is rounded once
    P, S = _spread(A, inputs), _spread(B.t(), outputs)
    Q = torch.bmm(_scaled(C.t(), scaling).expand(rank, -1, -1), S)
    P, Q = (matrix.reshape(rank * inputs.width, -1).to(dtype) for matrix in (P, Q))
    return P, Q


def _spread(factor: Tensor, side: Side) -> Tensor:
    """`spread(f)[κ, r, l*s + r] = f[κ, l]` and zeros elsewhere, `[k, w, size]`."""
    rank, width, span = factor.shape[0], side.width, side.span
    # Equal rows of `span + 1` elements, reread as rows of `span`, are each shifted by one.
    rows = factor.new_zeros(rank, width, span + 1)
    rows[:, :, : span - width + 1 : side.stride] = factor.unsqueeze(1)
    rows = rows.reshape(rank, -1)[:, : width * span]
    return rows.reshape(rank, width, span)[:, :, : side.size]


def _matrices(adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`matrices` in fewer operations, which transforms and exports do not all take."""
    A, B, C, scaling, (rank, outputs, inputs), *_ = adapter
    P = A.new_zeros(rank * inputs.width, inputs.span, dtype=dtype)
    _entries(P, rank, inputs).copy_(A.unsqueeze(1))
    if outputs.stride != outputs.width:
        return P[:, : inputs.size], matrices(adapter, dtype)[1]
    # kron(B^T, s C^T)
    Q = B.new_empty(rank, inputs.width, outputs.windows, outputs.width, dtype=dtype)
    torch.mul(B.t()[:, None, :, None], _scaled(C, scaling).t()[:, None], out=Q)
    return P[:, : inputs.size], Q.view(P.shape[0], outputs.span)[:, : outputs.size]


def _entries(matrix: Tensor, rank: int, side: Side) -> Tensor:
    """The entries of a contiguous spread matrix `[k*w, span]` that are not zero, `[k, w, L]`."""
    strides = (side.width * side.span, side.span + 1, side.stride)
    return matrix.as_strided((rank, side.width, side.windows), strides)


class _Kept(NamedTuple):
    """An adapter's matrices, and all that they were computed from."""

    settings: tuple[float, Geometry, torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    A: Tensor
    B: Tensor
    C: Tensor
    matrices: tuple[Tensor, Tensor]
    owner: weakref.ref[Tensor]


# The matrices of each `A` that is alive, by its id. What changes a factor need not change its
# version (`.data`, memory shared with other processes), so an entry counts while the values of the
# factors are what they were; a recycled id cannot do harm either.
_kept: dict[int, _Kept] = {}


def with_matrices(adapter: Adapter, tokens: torch.dtype) -> Adapter:
    """The adapter with its matrices for tokens of this dtype."""
    return adapter._replace(matrices=_kept_matrices(adapter, tokens))


def _kept_matrices(adapter: Adapter, tokens: torch.dtype) -> tuple[Tensor, Tensor]:
    """The adapter's matrices for tokens of this dtype, computed anew if it has changed."""
    A, B, C, scaling, geometry, *_ = adapter
    dtype = compute_dtype(tokens, A.device)
    if not A.is_cpu or type(A) not in (Tensor, Parameter):
        # To compare would be to wait for the device.
        return _matrices(adapter, dtype)
    key, settings = id(A), (scaling, geometry, dtype, A.dtype, B.dtype, C.dtype)
    kept = _kept.get(key)
    if (
        kept is None
        or kept.settings != settings
        or not torch.equal(kept.A, A)
        or not torch.equal(kept.B, B)
        or not torch.equal(kept.C, C)
    ):
        # Of copies: what another thread changes meanwhile, the next comparison finds.
        copy = adapter._replace(A=A.clone(), B=B.clone(), C=C.clone())
        owner = weakref.ref(A, lambda _: _kept.pop(key, None))
        kept = _Kept(settings, copy.A, copy.B, copy.C, _matrices(copy, dtype), owner)
        _kept[key] = kept
    return kept.matrices


def _to_span(matrix: Tensor, side: Side) -> Tensor:
    """Add the columns that `side.size` cropped."""
    return F.pad(matrix, (0, side.span - side.size)) if side.span > side.size else matrix


def _scaled(factor: Tensor, scaling: float) -> Tensor:
    return factor if scaling == 1.0 else scaling * factor


def compute_dtype(tokens: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of products with tokens of this dtype: the same, if the device multiplies it."""
    return torch.float32 if device.type == "cpu" and tokens in _SLOW_ON_CPU else tokens


def _row_blocks(z: Tensor) -> list[slice]:
    """Blocks of rows of `z`; a single empty one when there are no rows."""
    length = max(1, _BLOCK_ELEMENTS // max(1, z.shape[1]))
    return [slice(start, start + length) for start in range(0, max(1, z.shape[0]), length)]


def _shrink(matrix: Tensor, z: Tensor) -> Tensor:
    """`matrix z^T` `[r, T]`; matrix `[r, size]`, `z [T, size]`."""
    if z.dtype == matrix.dtype:
        return torch.mm(matrix, z.t())
    blocks = [torch.mm(matrix, z[rows].to(matrix.dtype).t()) for rows in _row_blocks(z)]
    return torch.cat(blocks, 1)


def _expand_(z: Tensor, v: Tensor, matrix: Tensor) -> Tensor:
    """`z += v^T matrix` in place; `z [T, size]`, `v [r, T]`, matrix `[r, size]`."""
    if z.dtype == matrix.dtype:
        return z.addmm_(v.t(), matrix)
    for rows in _row_blocks(z):
        z[rows].add_(torch.mm(v[:, rows].t(), matrix))
    return z


def _sum_rows(v: Tensor, z: Tensor, scaling: float = 1.0) -> Tensor:
    """`scaling v z` `[r, size]`, a sum over tokens; `v [r, T]`, `z [T, size]`."""
    total = v.new_empty(v.shape[0], z.shape[1])
    if z.dtype == v.dtype:
        return total.addmm_(v, z, beta=0, alpha=scaling)
    for start, rows in enumerate(_row_blocks(z)):
        total.addmm_(v[:, rows], z[rows].to(v.dtype), beta=min(start, 1), alpha=scaling)
    return total


def base_grad(g: Tensor, weight: Tensor) -> Tensor:
    """`g W`, `[T, n]`, in `g`'s dtype.

    Where the CPU has no products in that dtype it is computed in float32, a block of rows of `W`
    at a time, and rounded once.

    Args:
        g: `[T, m]`.
        weight: `[m, n]`, in `g`'s dtype.
    """
    if compute_dtype(g.dtype, g.device) == g.dtype:
        return g @ weight
    total = g.new_zeros(g.shape[0], weight.shape[1], dtype=torch.float32)
    length = max(1, _WEIGHT_BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], length):
        block = slice(start, start + length)
        total.addmm_(g[:, block].float(), weight[block].float())
    return total.to(g.dtype)
