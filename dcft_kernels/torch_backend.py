"""The layer's passes as PyTorch operations, for any device: the adapter as the LoRA it equals.

Notation and derivation: with tokens `x [T, n]`, `DW` of `adapter` and `r = k*d_in`,
`s DW = Q^T P`, where

    P = spread(A) [r, n]        S = spread(B^T) [k*d_out, m]        Q = s C^T S [r, m], rank by rank

    U = P x^T                   y = x W^T + b, then y += U^T Q
    Ub = Q g^T                  gx = g W, then gx += Ub^T P
    gP = Ub x, summed to gA     gQ = U g     gS = s C gQ, summed to gB     gC = s sum_κ S gQ^T

With a kernel per rank, `C` is `C_κ` in these products and `gC_κ` is not a sum over ranks.
The matrices are as large as the factors of a LoRA of rank `r`; for tiling windows, `spread(A)` is
`kron(A, I)`. Overlapping windows and ragged ends are in `spread` alone. No step touches an `[m, n]`
tensor other than the base weight.

`U` and `Ub` are computed as `[r, T]`, since CPUs multiply few rows faster than few columns. Where
the CPU has no products in bfloat16, and in float16, whose range `U` may exceed, the adapter is
computed in float32, a block of rows at a time.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
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
    P, Q, *_ = adapter.matrices or kept_matrices(adapter, x.dtype)
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
    P, Q, *_ = matrices(adapter, dtype, _spread)
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
    P, Q, S, C = adapter.matrices or new_matrices(adapter, g.dtype)
    mask = _mask(g, adapter, needs)
    grad_x = grad_P = grad_Q = None
    if needs.B or needs.C:
        grad_Q = _sum_rows(saved(U).t(), g)
    if needs.x or needs.A:
        Ub = _shrink(Q, g)
    if needs.A:
        grad_P = _sum_rows(Ub, saved(x) if mask is None else saved(x) * mask)
    if needs.x:
        if mask is None:
            grad_x = g.new_zeros(len(g), P.shape[1]) if weight is None else base_grad(g, weight)
            _expand_(grad_x, Ub, P)
        else:
            grad_x = _expand_(g.new_zeros(mask.shape), Ub, P).mul_(mask)
            grad_x = grad_x if weight is None else grad_x.add_(base_grad(g, weight))
    return _gradients(g, x, grad_x, grad_P, grad_Q, S, C, adapter, needs)


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
    P, Q, S, C = matrices(adapter, dtype, _spread)
    with torch._C._ExcludeDispatchKeyGuard(_VMAP_MODES):
        mask = _mask(g, adapter, needs)
    grad_x = grad_P = grad_Q = None
    wide = g.to(dtype)
    Ub = Q @ wide.t()
    if grad_U is not None:
        Ub = Ub + grad_U.to(dtype).t()
    if needs.x:
        grad_x = (Ub.t() @ P).to(g.dtype)
        grad_x = grad_x if mask is None else grad_x * mask
        if weight is not None:
            narrow = compute_dtype(g.dtype, g.device)
            grad_x = grad_x + (g.to(narrow) @ weight.to(narrow)).to(g.dtype)
    if needs.A:
        grad_P = Ub @ (saved(x) if mask is None else saved(x) * mask).to(dtype)
    if needs.B or needs.C:
        grad_Q = saved(U).to(dtype).t() @ wide
    return _gradients(g, x, grad_x, grad_P, grad_Q, S, C, adapter, needs)


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
    S: Tensor,
    C: Tensor,
    adapter: Adapter,
    needs: Needs,
) -> Gradients:
    """All gradients, from those of `P` and `Q`; the last steps in the dtype of `S` and `s C`."""
    rank, outputs, inputs, per_rank = adapter.geometry
    grad_A = grad_B = grad_C = None
    if grad_P is not None:
        grad_A = _collapse(grad_P, rank, inputs, adapter.A.dtype)
    if grad_Q is not None:
        grad_Q = grad_Q.to(S.dtype)
        if needs.B:
            grad_B = _collapse(_mix(C, grad_Q, rank), rank, outputs, adapter.B.dtype).t()
        if needs.C:
            grad_C = _mixing_gradient(S, grad_Q, rank, per_rank)
            grad_C = (adapter.scaling * grad_C).to(adapter.C.dtype)
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
    P, Q, *_ = matrices(adapter, adapter.dtype, _spread)
    return Q.t() @ P


def delta_weight_gradients(
    grad: Tensor, adapter: Adapter, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of `A`, `B` and `C` from `grad`, that of `scaling * DW`; differentiable."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    P, Q, S, C = matrices(adapter, dtype, _spread)
    wide = grad.to(dtype)
    needed = Needs(False, False, False, *needs)
    grad_P = Q @ wide if needed.A else None
    grad_Q = P @ wide.t() if needed.B or needed.C else None
    return _gradients(grad, None, None, grad_P, grad_Q, S, C, adapter, needed)[3:]


Matrices = tuple[Tensor, Tensor, Tensor, Tensor]  # P, Q, S and s C


def matrices(
    adapter: Adapter, dtype: torch.dtype, spread: Callable[[Tensor, Side, torch.dtype], Tensor]
) -> Matrices:
    """`P` and `Q` in `dtype`, `S` and `s C` in float32 or wider."""
    rank, outputs, inputs, _ = adapter.geometry
    wide = torch.promote_types(dtype, torch.float32)
    P, S = spread(adapter.A, inputs, dtype), spread(adapter.B.t(), outputs, wide)
    C = adapter.C.to(wide)
    C = C if adapter.scaling == 1.0 else adapter.scaling * C
    return P, _mix(C.transpose(-2, -1), S, rank).to(dtype), S, C


def lora_factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """`lora_A [r, n]` and `lora_B [m, r]` in float64, `lora_B @ lora_A = s DW`, `r = k*min(d)`."""
    P, Q, S, C = matrices(adapter, torch.float64, _spread)
    if C.shape[-1] <= C.shape[-2]:
        return P, Q.t()
    return _mix(C, P, adapter.geometry.rank), S.t()


def _spread(factor: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
    """`spread(f)[κ*w + r, l*s + r] = f[κ, l]`, zeros elsewhere, `[k*w, size]`; differentiable."""
    rank, width, span = factor.shape[0], side.width, side.span
    # Equal rows of `span + 1` elements, reread as rows of `span`, are each shifted by one.
    rows = factor.new_zeros(rank, width, span + 1)
    rows[:, :, : span - width + 1 : side.stride] = factor.unsqueeze(1)
    rows = rows.reshape(rank, -1)[:, : width * span]
    return _cropped(rows.reshape(rank * width, span), side).to(dtype)


def _spread_by_strides(factor: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
    """`_spread` in fewer operations, which exports do not take."""
    matrix = factor.new_zeros(factor.shape[0] * side.width, side.span, dtype=dtype)
    _entries(matrix, factor.shape[0], side).copy_(factor.unsqueeze(1))
    return _cropped(matrix, side)


def _entries(matrix: Tensor, rank: int, side: Side) -> Tensor:
    """The entries of a contiguous spread matrix `[k*w, span]` that are not zero, `[k, w, L]`."""
    strides = (side.width * side.span, side.span + 1, side.stride)
    return matrix.as_strided((rank, side.width, side.windows), strides)


def _cropped(matrix: Tensor, side: Side) -> Tensor:
    return matrix if side.span == side.size else matrix[:, : side.size]


def _collapse(matrix: Tensor, rank: int, side: Side, dtype: torch.dtype) -> Tensor:
    """The adjoint of `spread`, `[k, L]`: `g[κ, l] = sum_r matrix[κ*w + r, l*s + r]`."""
    if side.span > side.size:
        matrix = F.pad(matrix, (0, side.span - side.size))
    # In the wider dtype: a sum in a narrower one would round every term.
    wide = torch.promote_types(matrix.dtype, dtype)
    return _entries(matrix, rank, side).sum(1, dtype=wide).to(dtype)


class _Kept(NamedTuple):
    """An adapter's matrices, and all that they were computed from."""

    settings: tuple[float, Geometry, torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    A: Tensor
    B: Tensor
    C: Tensor
    matrices: tuple[Tensor, Tensor]  # P and Q
    owner: weakref.ref[Tensor]


_PROXY = torch._C._TorchDispatchModeKey.PROXY

# The matrices of each `A` that is alive, by its id. What changes a factor need not change its
# version (`.data`, memory shared with other processes), so an entry counts while the values of the
# factors are what they were; a recycled id cannot do harm either.
_kept: dict[int, _Kept] = {}


def kept_matrices(adapter: Adapter, tokens: torch.dtype) -> tuple[Tensor, Tensor]:
    """`P` and `Q` for tokens of this dtype, computed anew if the adapter has changed.

    For calls without gradients: a training step changes the factors, and remembering takes longer.
    """
    A, B, C, scaling, geometry, *_ = adapter
    # A comparison would wait for a GPU, and what `make_fx` traces has to follow the adapter.
    if not A.is_cpu or type(A) not in (Tensor, Parameter) or torch._C._get_dispatch_mode(_PROXY):
        return new_matrices(adapter, tokens)[:2]
    key, settings = id(A), (scaling, geometry, tokens, A.dtype, B.dtype, C.dtype)
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
        # Bound here: when the interpreter ends, the module loses its globals before `A` goes.
        owner = weakref.ref(A, functools.partial(_forget, _kept, key))
        built = new_matrices(copy, tokens)[:2]
        kept = _kept[key] = _Kept(settings, copy.A, copy.B, copy.C, built, owner)
    return kept.matrices


def _forget(kept: dict[int, _Kept], key: int, _: weakref.ref[Tensor]) -> None:
    kept.pop(key, None)


def new_matrices(adapter: Adapter, tokens: torch.dtype) -> Matrices:
    """The adapter's matrices for tokens of this dtype; not differentiable."""
    return matrices(adapter, compute_dtype(tokens, adapter.A.device), _spread_by_strides)


def compute_dtype(tokens: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the adapter's products with tokens of this dtype.

    The same, but float32 on a CPU that does not multiply it, and for float16 on any CPU: `U` may
    exceed its range where the layer's output does not.
    """
    if device.type != "cpu":
        return tokens
    return torch.float32 if tokens == torch.float16 or tokens in _SLOW_ON_CPU else tokens


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


def _mix(C: Tensor, matrix: Tensor, rank: int) -> Tensor:
    """`C` times the rows of each rank, `[k*d', size]`; matrix `[k*d, size]`.

    `C` is `[d', d]`, or `[k, d', d]` with a kernel per rank.
    """
    if rank == 1:
        return (C if C.dim() == 2 else C[0]) @ matrix
    return (C @ matrix.reshape(rank, C.shape[-1], -1)).reshape(rank * C.shape[-2], -1)


def _mixing_gradient(S: Tensor, grad_Q: Tensor, rank: int, per_rank: bool) -> Tensor:
    """`S gQ^T` of each rank, `[k, d_out, d_in]` with a kernel per rank, or else their sum.

    `S` is `[k*d_out, m]`, `gQ` `[k*d_in, m]`.
    """
    if rank == 1:
        product = S @ grad_Q.t()
        return product[None] if per_rank else product
    S, grad_Q = (each.reshape(rank, -1, each.shape[-1]) for each in (S, grad_Q))
    products = S @ grad_Q.transpose(1, 2)
    return products if per_rank else products.sum(0)


def _expand_(z: Tensor, v: Tensor, matrix: Tensor) -> Tensor:
    """`z += v^T matrix` in place; `z [T, size]`, `v [r, T]`, matrix `[r, size]`."""
    if z.dtype == matrix.dtype:
        return z.addmm_(v.t(), matrix)
    for rows in _row_blocks(z):
        z[rows].add_(torch.mm(v[:, rows].t(), matrix))
    return z


def _sum_rows(v: Tensor, z: Tensor) -> Tensor:
    """`v z` `[r, size]`, a sum over tokens; `v [r, T]`, `z [T, size]`."""
    if z.dtype == v.dtype:
        return torch.mm(v, z)
    total = v.new_zeros(v.shape[0], z.shape[1])
    for rows in _row_blocks(z):
        total.addmm_(v[:, rows], z[rows].to(v.dtype))
    return total


def base_grad(g: Tensor, weight: Tensor) -> Tensor:
    """`g W`, `[T, n]`, in `g`'s dtype.

    Where the CPU has no products in that dtype it is computed in float32, a block of rows of `W`
    at a time, and rounded once.

    Args:
        g: `[T, m]`.
        weight: `[m, n]`, in `g`'s dtype.
    """
    if not g.is_cpu or g.dtype not in _SLOW_ON_CPU:
        return g @ weight
    total = g.new_zeros(g.shape[0], weight.shape[1], dtype=torch.float32)
    length = max(1, _WEIGHT_BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], length):
        block = slice(start, start + length)
        total.addmm_(g[:, block].float(), weight[block].float())
    return total.to(g.dtype)
