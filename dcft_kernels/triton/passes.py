"""The strategy `row_block` as launches, and the dense increment.

    forward     shrink and expand to `y`, then `y += x W^T`
    backward    gradients and the adapter's part of `gx`, then `gx += g W`

`+=` is the matrix product's own addition (`addmm_`), which rounds once more than a single product
does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcft_kernels.adapter import Adapter, Gradients, Needs, saved
from dcft_kernels.triton import row_block
from dcft_kernels.triton.expand import expand, expand_backward


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
) -> tuple[Tensor, Tensor]:
    """The layer's `y [T, m]`, and `U [T, k, d_in]` for the backward; see `torch_backend`."""
    rank, outputs, inputs = adapter.geometry
    u = x.new_empty(x.shape[0], rank, inputs.width)
    y = x.new_empty(x.shape[0], outputs.size)
    row_block.shrink_expand(x, adapter, u=u, y=y, bias=bias, base=base)
    if weight is not None:
        y.addmm_(x, weight.t())
    return y, u


def backward(
    g: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter,
    needs: Needs,
) -> Gradients:
    """The gradients that `needs` asks for; arguments as `torch_backend.backward`."""
    gx = g.new_empty(g.shape[0], adapter.geometry.inputs.size) if needs.x else None
    factors = (needs.A, needs.B, needs.C)
    grads: row_block.Grads = (None, None, None)
    if needs.x or any(factors):
        grads = row_block.backward(
            g,
            saved(x) if needs.A else None,
            saved(U) if needs.B or needs.C else None,
            adapter,
            gx,
            factors,
        )
    if gx is not None and weight is not None:
        gx.addmm_(g, weight)
    return Gradients(
        gx,
        g.t() @ saved(x) if needs.weight else None,
        g.sum(0) if needs.bias else None,
        *grads,
    )


def delta_weight(adapter: Adapter) -> Tensor:
    """`scaling * DW`, `[m, n]`, in the factors' common dtype."""
    sizes = (adapter.geometry.outputs.size, adapter.geometry.inputs.size)
    out = adapter.A.new_empty(sizes, dtype=adapter.dtype)
    expand(adapter, out=out)
    return out


def delta_weight_backward(
    grad: Tensor, adapter: Adapter, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of `A`, `B` and `C` for `grad [m, n]`, that of `delta_weight`'s result."""
    return expand_backward(grad, adapter, (needs[0], needs[1], needs[2]))


def merge(
    weight: Tensor, adapter: Adapter, seed: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """`weight + scaling * DW` `[m, n]` in one pass, rounded once; see `expand`.

    Into `out`, which may be `weight`, or into a new tensor with `weight`'s strides.
    """
    out = torch.empty_like(weight) if out is None else out
    expand(adapter, out=out, weight=weight, seed=seed)
    return out
