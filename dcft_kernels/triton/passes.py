"""The strategy `row_block`: a layer's passes as launches.

    forward     shrink and expand to `y`, then `y += x W^T`
    backward    gradients and the adapter's part of `gx`, then `gx += g W`

`+=` is the matrix product's own addition (`addmm_`), which rounds once more than a single product
does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcft_kernels.adapter import Adapter, Gradients, Needs, dtype_of_U, saved
from dcft_kernels.triton import row_block


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
) -> tuple[Tensor, Tensor]:
    """The layer's `y [T, m]`, and `U [T, k*d_in]` for the backward; see `torch_backend`."""
    rank, outputs, inputs = adapter.geometry
    u = x.new_empty(x.shape[0], rank * inputs.width, dtype=dtype_of_U(x.dtype))
    y = x.new_empty(x.shape[0], outputs.size)
    if x.shape[0] > 0:
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
    if g.shape[0] == 0:
        found = zip(adapter[:3], factors, strict=True)
        grads = tuple([torch.zeros_like(factor) if needed else None for factor, needed in found])
    elif needs.x or any(factors):
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
