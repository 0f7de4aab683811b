"""The factored identity as PyTorch operations, for any device; no step forms a dense `DW`.

Notation and derivation: with tokens `x [T, n]`, `DW = kron(B A, C)` (windows overlapping and
cropped as `geometry` says) and `s` the scaling,

    U[t, κ, p] = shrink(x, A)                    V[t, κ, q] = s sum_p C[q, p] U[t, κ, p]
    y = x W^T + b, then expand_(y, V, B^T)

    Vb[t, κ, q] = shrink(g, s B^T)               Ub[t, κ, p] = sum_q C[q, p] Vb[t, κ, q]
    gC[q, p] = sum_{t, κ} Vb[t, κ, q] U[t, κ, p]
    gB^T = factor_grad(g, V)                     gA = factor_grad(x, Ub)
    gx = g W, then expand_(gx, Ub, A)

No step touches an `[m, n]` tensor other than the base weight.

Where autograd, a transform or a tracer follows the operations, the adapter is the LoRA of rank
`k*d_in` that it equals (`matrices`), `y = x W^T + b + (x P^T) Q`: `plain` and `plain_backward`.

The three primitives work on one side of `DW`, with `L` windows of width `w` (`adapter.Side`), a
factor `f [k, L]` (`A` on the input side, `B^T` on the output side) and a token tensor
`z [T, size]`. Feature `l*s + r` is the r-th of window `l`:

    shrink       v[t, κ, r]    = sum_l f[κ, l] z[t, l*s + r]
    expand_      z[t, l*s + r] += sum_κ f[κ, l] v[t, κ, r]        (in place)
    factor_grad  g[κ, l]       = sum_{t, r} z[t, l*s + r] v[t, κ, r]

They are computed in one of two forms:

- *spread*: one matrix product with `spread(f) [k*w, size]`, the matrix form of a factor (for
  tiling windows, `kron(f, I_w)`), as large as a LoRA factor of rank `k*w`. It costs
  `T * size * k * w` and takes every geometry: overlap and ragged ends are in `spread` alone.
- *batched*: one small product a token, on `z` read as `[T, L, w]`. It costs `T * size * k`, what
  the sums say, but takes tiling windows only, and T tiny products suit a CPU, not a GPU.

On the CPU, 16-bit inputs are computed in float32, a block of rows at a time: as exact as a GPU's
accumulators, and far quicker than 16-bit products on processors without the instructions for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dcft_kernels.adapter import Adapter, Gradients, Needs, Side, dtype_of_U, saved
from dcft_kernels.dropout import drop, keep_mask

# Elements of the float32 copy of a block of rows, or of its products in the batched form: 1 MiB,
# small enough to stay in a core's cache.
_BLOCK_ELEMENTS = 1 << 18

# On a CPU, `expand_` with at most this many spread rows (k*w) is quicker than in the batched form;
# `shrink` and `factor_grad` never are.
_EXPAND_SPREAD_ROWS = 8

# Modes of `torch.func.vmap` and of `is_grads_batched`, which refuse all random numbers.
_VMAP_MODES = torch._C.DispatchKeySet(
    torch._C._dispatch_key_parse("FuncTorchVmapMode")
) | torch._C.DispatchKeySet(torch._C._dispatch_key_parse("VmapMode"))

# Elements of the float32 copy of a block of weight rows: 4 MiB.
_WEIGHT_BLOCK_ELEMENTS = 1 << 20

# Below AVX-512, PyTorch has no 16-bit matrix product for the layout of `g @ W` but a scalar loop:
# a frozen layer's step takes some seventy times as long as in float32 (benchmarks/results).
_SLOW_16_BIT = not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
) -> tuple[Tensor, Tensor]:
    """`y = x W^T + b + dropout(x) DW^T` `[T, m]`, and `U [T, k, d_in]` for the backward.

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
    inputs, outputs = adapter.geometry.inputs, adapter.geometry.outputs
    U = shrink(drop(x, adapter.dropout_p, adapter.seed), adapter.A, inputs)
    expand_(y, _mix(U, adapter), adapter.B.t(), outputs)
    return y, U.to(dtype_of_U(x.dtype, "torch"))


def plain(
    y: Tensor, x: Tensor, adapter: Adapter, h: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """A new `y + h(dropout(x) P^T) Q` `[T, m]`, in operations for tracers and transforms.

    Args:
        y: `[T, m]`, the base layer's output.
        x: `[T, n]`.
        adapter: factors and settings; dropout is PyTorch's own, its scaling the layer's.
        h: an elementwise function on `U`, or None for the identity.
    """
    dtype = compute_dtype(x)
    P, _, Q = matrices(adapter, dtype)
    x = x.to(dtype)
    if adapter.dropout_p > 0.0:
        x = F.dropout(x, adapter.dropout_p)
    U = x @ P.t()
    return torch.addmm(y.to(dtype), U if h is None else h(U), Q).to(y.dtype)


def plain_backward(  # noqa: D417 - the others are `backward`'s
    g: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter,
    needs: Needs,
    grad_U: Tensor | None = None,
) -> Gradients:
    """`backward` in operations that autograd and transforms follow, like those of `plain`.

    Args:
        g: `[T, m]`, gradient of the output; to a transform, a batch of them.
        x: `[T, n]` or None; see `backward` for this and the arguments not listed.
        grad_U: `[T, k, d_in]`, gradient of `U` as an output: only a double backward has one.
    """
    rank, outputs, inputs = adapter.geometry
    dtype = torch.promote_types(g.dtype, torch.float32)
    P, S, Q = matrices(adapter, dtype)
    mask = None
    if adapter.seed is not None and (needs.x or needs.A):
        shape = (g.shape[0], inputs.size)
        with torch._C._ExcludeDispatchKeyGuard(_VMAP_MODES):
            mask = keep_mask(adapter.seed, adapter.dropout_p, shape, g.dtype, g.device)
    grad_x = grad_A = grad_B = grad_C = None

    wide = g.to(dtype)
    v = wide @ Q.t()  # [T, k*d_in]
    if grad_U is not None:
        v = v + grad_U.reshape(-1, Q.shape[0])
    if needs.x:
        grad_x = (v @ P).to(g.dtype)
        grad_x = grad_x if mask is None else grad_x * mask
        if weight is not None:
            narrow = compute_dtype(g)
            grad_x = grad_x + (g.to(narrow) @ weight.to(narrow)).to(g.dtype)
    if needs.A:
        dropped = saved(x) if mask is None else saved(x) * mask
        grad_A = collapse(v.t() @ dropped.to(dtype), inputs).to(adapter.A.dtype)
    if needs.B or needs.C:
        grad_Q = saved(U).to(dtype).reshape(-1, Q.shape[0]).t() @ wide
        grad_Q = adapter.scaling * grad_Q.reshape(rank, inputs.width, outputs.size)
        grad_S = (adapter.C.to(dtype) @ grad_Q).reshape(S.shape)
        grad_B = collapse(grad_S, outputs).t().to(adapter.B.dtype)
        ranks = S.reshape(rank, outputs.width, outputs.size) @ grad_Q.transpose(1, 2)
        grad_C = ranks.sum(0).to(adapter.C.dtype)

    return Gradients(
        x=grad_x,
        weight=g.t() @ saved(x) if needs.weight else None,
        bias=g.sum(0) if needs.bias else None,
        A=grad_A,
        B=grad_B if needs.B else None,
        C=grad_C if needs.C else None,
    )


def matrices(adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The adapter as a LoRA of rank `k*d_in`: `s DW = Q^T P`, where `Q` is `S` mixed by `C`.

    Returns:
        `P = spread(A) [k*d_in, n]`, `S = spread(B^T) [k*d_out, m]` and `Q [k*d_in, m]`.
    """
    rank, outputs, inputs = adapter.geometry
    P, S = plain_spread(adapter.A.to(dtype), inputs), plain_spread(adapter.B.t().to(dtype), outputs)
    C = _scaled(adapter.C.t(), adapter.scaling).to(dtype)
    Q = C @ S.reshape(rank, outputs.width, outputs.size)
    return P, S, Q.reshape(rank * inputs.width, outputs.size)


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
        U: `[T, k, d_in]`, what `forward` returned; may be None unless `needs.B` or `needs.C`.
        weight: `[m, n]`, or None for an adapter without a base: then `gx` is the adapter's alone.
        adapter: as in the forward.
        needs: which gradients to compute.
    """
    _, B, C, scaling, geometry, dropout_p, seed = adapter
    inputs, outputs = geometry.inputs, geometry.outputs
    mask = None
    if seed is not None and (needs.x or needs.A):
        mask = keep_mask(seed, dropout_p, (g.shape[0], inputs.size), g.dtype, g.device)
    grad_x = grad_A = grad_B = grad_C = None

    if needs.B:
        grad_B = factor_grad(g, _mix(saved(U), adapter), outputs).t().to(B.dtype)
    if needs.x or needs.A or needs.C:
        Vb = shrink(g, _scaled(B.t(), scaling), outputs)  # [T, k, d_out]
        if needs.C:
            flat_U = saved(U).flatten(0, 1)
            grad_C = (Vb.flatten(0, 1).t().to(flat_U.dtype) @ flat_U).to(C.dtype)
        if needs.x or needs.A:
            Ub = _on_windows(Vb, C.to(Vb.dtype))  # [T, k, d_in]
            if needs.A:
                dropped = saved(x) if mask is None else saved(x) * mask
                grad_A = factor_grad(dropped, Ub, inputs).to(adapter.A.dtype)
            if needs.x:
                grad_x = _grad_input(g, Ub, weight, adapter, mask)

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
    P, _, Q = matrices(adapter, adapter.dtype)
    return Q.t() @ P


def _mix(U: Tensor, adapter: Adapter) -> Tensor:
    """`V[t, κ, q] = s sum_p C[q, p] U[t, κ, p]`."""
    return _on_windows(U, _scaled(adapter.C.t(), adapter.scaling).to(U.dtype))


def _scaled(factor: Tensor, scaling: float) -> Tensor:
    return factor if scaling == 1.0 else scaling * factor


def _on_windows(v: Tensor, matrix: Tensor) -> Tensor:
    """`v [T, k, w] @ matrix [w, w']`, as a 2-D product, which is quicker than a batched one."""
    tokens, rank, _ = v.shape
    return (v.flatten(0, 1) @ matrix).view(tokens, rank, matrix.shape[1])


def _grad_input(
    g: Tensor, Ub: Tensor, weight: Tensor | None, adapter: Adapter, mask: Tensor | None
) -> Tensor:
    """`gx [T, n]`: the base layer's part, if there is a base, and the adapter's through dropout."""
    inputs = adapter.geometry.inputs
    shape = (g.shape[0], inputs.size)
    if mask is None:
        grad_x = g.new_zeros(shape) if weight is None else base_grad_input(g, weight)
        return expand_(grad_x, Ub, adapter.A, inputs)
    through_adapter = expand_(g.new_zeros(shape), Ub, adapter.A, inputs) * mask
    return through_adapter if weight is None else through_adapter + base_grad_input(g, weight)


def base_grad_input(g: Tensor, weight: Tensor) -> Tensor:
    """`g W`, `[T, n]`, in `g`'s dtype.

    On a CPU without 16-bit products it is computed in float32, a block of rows of `W` at a time,
    and rounded once.

    Args:
        g: `[T, m]`.
        weight: `[m, n]`, in `g`'s dtype.
    """
    if not (_SLOW_16_BIT and g.device.type == "cpu" and g.dtype.itemsize == 2):
        return g @ weight
    total = g.new_zeros(g.shape[0], weight.shape[1], dtype=torch.float32)
    length = max(1, _WEIGHT_BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], length):
        block = slice(start, start + length)
        total.addmm_(g[:, block].float(), weight[block].float())
    return total.to(g.dtype)


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which the primitives compute for tokens `like`."""
    return torch.float32 if like.is_cpu and like.dtype.itemsize == 2 else like.dtype


def spread(factor: Tensor, side: Side) -> Tensor:
    """The matrix `[k*w, size]` with `spread(f)[κ*w + r, l*s + r] = f[κ, l]` and zeros elsewhere."""
    rank, span = factor.shape[0], side.span
    matrix = factor.new_zeros(rank * side.width, span)
    _entries(matrix, rank, side).copy_(factor.unsqueeze(1))
    return matrix if span == side.size else matrix[:, : side.size]


def plain_spread(factor: Tensor, side: Side) -> Tensor:
    """`spread` in operations that autograd, transforms and tracers follow."""
    rank, width, span = factor.shape[0], side.width, side.span
    row = F.pad(factor.unsqueeze(2), (0, side.stride - 1)).reshape(rank, -1)
    # Equal rows of `span + 1` elements, reread as rows of `span`, are each shifted by one.
    row = F.pad(row, (0, span + 1 - row.shape[1])).unsqueeze(1)
    rows = row.expand(rank, width, span + 1).reshape(rank, -1)[:, : width * span]
    return rows.reshape(rank * width, span)[:, : side.size]


def collapse(matrix: Tensor, side: Side) -> Tensor:
    """The adjoint of `plain_spread`: `g[κ, l] = sum_r matrix[κ*w + r, l*s + r]`."""
    width, span = side.width, side.span
    rows = F.pad(matrix, (0, span - side.size)).reshape(-1, width * span)
    shifted = F.pad(rows, (0, width)).reshape(-1, width, span + 1)
    return shifted.sum(1)[:, : (side.windows - 1) * side.stride + 1 : side.stride]


def shrink(z: Tensor, factor: Tensor, side: Side) -> Tensor:
    """`v[t, κ, r] = sum_l f[κ, l] z[t, l*s + r]`.

    Args:
        z: `[T, size]`.
        factor: `[k, L]`, any float dtype.
        side: the windows.

    Returns:
        `[T, k, w]` in `compute_dtype(z)`.
    """
    dtype = compute_dtype(z)
    factor = factor.to(dtype)
    row_blocks = _row_blocks(z, _block_length(z, dtype))
    if _can_batch(z, side):
        blocks = [
            torch.bmm(factor.expand(len(rows), -1, -1), _in_windows(rows.to(dtype), side))
            for rows in row_blocks
        ]
    else:
        matrix, rank = spread(factor, side).t(), factor.shape[0]
        blocks = [
            (rows.to(dtype) @ matrix).view(len(rows), rank, side.width) for rows in row_blocks
        ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def expand_(z: Tensor, v: Tensor, factor: Tensor, side: Side) -> Tensor:
    """`z[t, l*s + r] += sum_κ f[κ, l] v[t, κ, r]`, in place, with one rounding to `z`'s dtype.

    Args:
        z: `[T, size]`, changed in place.
        v: `[T, k, w]`.
        factor: `[k, L]`, any float dtype.
        side: the windows.

    Returns:
        `z`.
    """
    dtype = compute_dtype(z)
    v, factor = v.to(dtype), factor.to(dtype)
    batched = _can_batch(z, side) and v.shape[1] * v.shape[2] > _EXPAND_SPREAD_ROWS
    matrix = factor.t() if batched else spread(factor, side)  # [L, k] or [k*w, size]
    length = _block_length(z, dtype)
    for rows, v_rows in zip(_row_blocks(z, length), _row_blocks(v, length), strict=True):
        if batched:
            target, left, right = _in_windows(rows, side), matrix.expand(len(rows), -1, -1), v_rows
        else:
            target, left, right = rows, v_rows.flatten(1), matrix
        if dtype != z.dtype:
            target.add_(left @ right)
        elif batched:
            target.baddbmm_(left, right)
        else:
            target.addmm_(left, right)
    return z


def factor_grad(z: Tensor, v: Tensor, side: Side) -> Tensor:
    """`g[κ, l] = sum_{t, r} z[t, l*s + r] v[t, κ, r]`.

    Args:
        z: `[T, size]`.
        v: `[T, k, w]`.
        side: the windows.

    Returns:
        `[k, L]` in `compute_dtype(z)`.
    """
    dtype = compute_dtype(z)
    length = _block_length(z, dtype)
    batched = _can_batch(z, side)
    if batched:  # each token's product, [k, L], is in memory before the sum
        length = min(length, max(1, _BLOCK_ELEMENTS // (v.shape[1] * side.windows)))

    def of_block(rows: Tensor, v_rows: Tensor) -> Tensor:
        rows = rows.to(dtype)
        if batched:
            return torch.bmm(v_rows, _in_windows(rows, side).transpose(1, 2)).sum(0)
        return v_rows.flatten(1).t() @ rows

    blocks = map(of_block, _row_blocks(z, length), _row_blocks(v.to(dtype), length))
    total = functools.reduce(Tensor.add_, blocks)
    return total if batched else collapse(total, side)


def _entries(matrix: Tensor, rank: int, side: Side) -> Tensor:
    """The non-zero entries of a contiguous spread matrix, as a view `[k, w, L]`."""
    span = side.span
    return matrix.as_strided(
        (rank, side.width, side.windows), (side.width * span, span + 1, side.stride)
    )


def _can_batch(z: Tensor, side: Side) -> bool:
    """Whether the batched form applies: tiling windows, on a CPU."""
    return z.is_cpu and side.tile


def _in_windows(z: Tensor, side: Side) -> Tensor:
    """Tokens `[T, size]` viewed as `[T, L, w]`, for tiling windows."""
    return z.view(z.shape[0], side.windows, side.width)


def _block_length(z: Tensor, dtype: torch.dtype) -> int:
    """Tokens in a block of rows, to be computed in `dtype`: all rows if no cast is needed."""
    if dtype == z.dtype:
        return max(1, z.shape[0])
    return max(1, _BLOCK_ELEMENTS // max(1, z.shape[1]))


def _row_blocks(z: Tensor, length: int) -> list[Tensor]:
    """`z` in blocks of `length` rows; a single empty block when there are no tokens."""
    if length >= z.shape[0]:
        return [z]
    # Slices, not split(): autograd forbids in-place changes of views that come several at a time.
    return [z[start : start + length] for start in range(0, z.shape[0], length)]
