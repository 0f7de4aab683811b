"""Forward and backward of the adapter, written with the primitives of `windows`.

Notation and derivation: with tokens `x [T, n]`, `DW = kron(B A, C)` (windows overlapping and
cropped as `geometry` says) and `s` the scaling,

    U[t, κ, p] = shrink(x, A)                    V[t, κ, q] = s sum_p C[q, p] U[t, κ, p]
    y = x W^T + b, then expand_(y, V, B^T)

    Vb[t, κ, q] = shrink(g, s B^T)               Ub[t, κ, p] = sum_q C[q, p] Vb[t, κ, q]
    gC[q, p] = sum_{t, κ} Vb[t, κ, q] U[t, κ, p]
    gB^T = factor_grad(g, V)                     gA = factor_grad(x, Ub)
    gx = g W, then expand_(gx, Ub, A)

No step touches an `[m, n]` tensor other than the base weight. The functions are built of
differentiable operations, so autograd can run through `backward` a second time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dcft_kernels.adapter import Adapter
from dcft_kernels.dropout import drop, keep_mask
from dcft_kernels.gradients import Gradients, Needs, saved
from dcft_kernels.rounding import store
from dcft_kernels.torch_backend.base_layer import base_grad_input
from dcft_kernels.torch_backend.windows import expand_, factor_grad, shrink, spread


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter
) -> tuple[Tensor, Tensor]:
    """`y = x W^T + b + dropout(x) DW^T` `[T, m]`, and `U [T, k, d_in]` for the backward."""
    # The base first, on its own: an adapter whose increment is zero changes no bit of it.
    y = F.linear(x, weight, bias)
    return y, add_adapter_(y, x, adapter)


def update(y: Tensor, x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A new `y + dropout(x) DW^T` `[T, m]`, and `U [T, k, d_in]` for the backward."""
    out = y.clone(memory_format=torch.contiguous_format)
    return out, add_adapter_(out, x, adapter)


def add_adapter_(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """Add `dropout(x) DW^T` to `y [T, m]` in place and return `U [T, k, d_in]` for the backward."""
    inputs, outputs = adapter.geometry.inputs, adapter.geometry.outputs
    U = shrink(drop(x, adapter.dropout_p, adapter.seed), adapter.A, inputs)
    expand_(y, _mix(U, adapter), adapter.B.t(), outputs)
    return U.to(x.dtype)


def add_nonlinear_adapter_(
    y: Tensor, dropped: Tensor, adapter: Adapter, h: Callable[[Tensor], Tensor]
) -> Tensor:
    """Add an adapter with `h` between its factors to `y [T, m]`, in place, for autograd to follow.

        U = shrink(x, A)        V[t, κ, q] = s sum_p C[q, p] h(U[t, κ, p])        expand_(y, V, B^T)

    With the identity for `h` it is `add_adapter_`, at the same cost.

    Args:
        y: `[T, m]`, changed in place.
        dropped: `[T, n]`, what `dropout.drop` leaves of `x`. The `1 / (1 - p)` of what is kept
            is put on `U` here: `h` is not linear, so it cannot be part of the scaling.
        adapter: factors and settings; its scaling is the layer's own.
        h: an elementwise differentiable function.

    Returns:
        `y`.
    """
    inputs, outputs = adapter.geometry.inputs, adapter.geometry.outputs
    U = shrink(dropped, adapter.A, inputs)
    if adapter.seed is not None:
        U = U / (1.0 - adapter.dropout_p)
    return expand_(y, _mix(h(U), adapter), adapter.B.t(), outputs)


def backward(
    g: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter,
    needs: Needs,
    grad_U: Tensor | None = None,
) -> Gradients:
    """The gradients that `needs` asks for.

    Args:
        g: `[T, m]`, gradient of the output.
        x: `[T, n]`, the forward's input; may be None unless `needs.A` or `needs.weight`.
        U: `[T, k, d_in]`, what `add_adapter_` returned; may be None unless `needs.B` or `needs.C`.
        weight: `[m, n]`, or None for an adapter without a base: then `gx` is the adapter's alone.
        adapter: as in the forward.
        needs: which gradients to compute.
        grad_U: `[T, k, d_in]`, gradient of `U` as an output: only a double backward has one.
    """
    _, B, C, scaling, geometry, dropout_p, seed = adapter
    inputs, outputs = geometry.inputs, geometry.outputs
    mask = None
    if seed is not None and (needs.x or needs.A):
        mask = keep_mask(seed, dropout_p, (g.shape[0], inputs.size), g.dtype, g.device)
    grad_x = grad_A = grad_B = grad_C = None

    if needs.x or needs.A or needs.C:
        Vb = shrink(g, _scaled(B.t(), scaling), outputs)  # [T, k, d_out]
        if needs.C:
            flat_U = saved(U).to(Vb.dtype).flatten(0, 1)
            grad_C = (Vb.flatten(0, 1).t() @ flat_U).to(C.dtype)
        if needs.x or needs.A:
            Ub = _on_windows(Vb, C.to(Vb.dtype))  # [T, k, d_in]
            if grad_U is not None:
                Ub = Ub + grad_U
            if needs.A:
                dropped = saved(x) if mask is None else saved(x) * mask
                grad_A = factor_grad(dropped, Ub, inputs).to(adapter.A.dtype)
            if needs.x:
                grad_x = _grad_input(g, Ub, weight, adapter, mask)
    if needs.B:
        grad_B = factor_grad(g, _mix(saved(U), adapter), outputs).t().to(B.dtype)

    return Gradients(
        x=grad_x,
        weight=g.t() @ saved(x) if needs.weight else None,
        bias=g.sum(0) if needs.bias else None,
        A=grad_A,
        B=grad_B,
        C=grad_C,
    )


def delta_weight(adapter: Adapter) -> Tensor:
    """`scaling * kron(B A, C)`, cropped to `[m, n]`, in the factors' common dtype; differentiable.

    Row `r` of `DW` is what the adapter makes of the r-th output's row of `spread(B^T)`, mixed by
    `C`: one `expand_` over a zero matrix, for any geometry.
    """
    geometry = adapter.geometry
    dtype = torch.promote_types(
        torch.promote_types(adapter.A.dtype, adapter.B.dtype), adapter.C.dtype
    )
    rows = spread(adapter.B.t().to(dtype), geometry.outputs)  # [k*d_out, m]
    rows = rows.unflatten(0, (geometry.rank, geometry.outputs.width)).permute(2, 0, 1)
    mixed = adapter.scaling * (rows @ adapter.C.to(dtype))  # [m, k, d_in]
    dense = rows.new_zeros(geometry.outputs.size, geometry.inputs.size)
    return expand_(dense, mixed, adapter.A, geometry.inputs)


def merge(
    weight: Tensor, adapter: Adapter, seed: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """`weight + scaling * DW` `[m, n]`, in float32 or wider, then `rounding.store`.

    Into `out`, which may be `weight`, or into a new tensor with `weight`'s strides.
    """
    out = torch.empty_like(weight) if out is None else out
    store(weight + delta_weight(adapter.widened(weight.dtype)), out, seed)
    return out


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
