"""The layer's forward and backward as launches, one way for every strategy.

| strategy | forward | backward |
| --- | --- | --- |
| `row_block` | shrink and expand to `y`, then `y += x W^T` | gradients and `gx`, then `gx += g W` |
| `fused` | all in one product | all in one product, or `gx` in one and then the gradients |
| `scratch` | `W' = W + scaling * DW`, `x W'^T`, and a shrink | `W'` again, `g W'`, the gradients |

`+=` is the matrix product's own addition (`addmm_`), which rounds once more than a single product
does. `scratch` drops what of the update is below half a unit in the last place of `W`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcft_kernels.adapter import Adapter
from dcft_kernels.gradients import Gradients, Needs, saved
from dcft_kernels.triton import backward as backward_kernels
from dcft_kernels.triton.backward import Grads
from dcft_kernels.triton.expand import expand, expand_backward
from dcft_kernels.triton.fused_backward import fused_backward
from dcft_kernels.triton.fused_linear import fused_linear
from dcft_kernels.triton.shrink_expand import shrink_expand


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, strategy: str
) -> tuple[Tensor, Tensor]:
    """`y = x W^T + b + dropout(x) DW^T` `[T, m]`, and `U [T, k, d_in]` for the backward."""
    u = _empty_u(x, adapter)
    if strategy == "scratch":
        shrink_expand(x, adapter, u=u)
        return F.linear(x, merge(weight, adapter), bias), u
    y = x.new_empty(x.shape[0], weight.shape[0])
    if strategy == "fused":
        fused_linear(x, weight, adapter, y, bias=bias, u=u)
    else:
        shrink_expand(x, adapter, u=u, bias=bias, y=y)
        y.addmm_(x, weight.t())
    return y, u


def update(y: Tensor, x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A new `y + dropout(x) DW^T` `[T, m]`, and `U [T, k, d_in]` for the backward."""
    u, out = _empty_u(x, adapter), torch.empty_like(y, memory_format=torch.contiguous_format)
    shrink_expand(x, adapter, u=u, base=y, y=out)
    return out, u


def backward(
    g: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter,
    needs: Needs,
    strategy: str,
) -> Gradients:
    """The gradients that `needs` asks for; arguments as `torch_backend.backward`."""
    gx = g.new_empty(g.shape[0], adapter.geometry.inputs.size) if needs.x else None
    call = _Backward(
        g,
        saved(x) if needs.A else None,
        saved(U) if needs.B or needs.C else None,
        adapter,
        needs,
    )
    if gx is None or weight is None:
        grads = call.factors(gx)
    elif strategy == "fused":
        grads = call.fused(weight, gx)
    elif strategy == "scratch":
        torch.mm(g, merge(weight, adapter), out=gx)
        grads = call.factors(None)
    else:
        grads = call.factors(gx)
        gx.addmm_(g, weight)
    return Gradients(
        gx,
        g.t() @ saved(x) if needs.weight else None,
        g.sum(0) if needs.bias else None,
        *grads,
    )


class _Backward(NamedTuple):
    """What the kernels of a backward pass read besides the weight."""

    g: Tensor
    x: Tensor | None
    u: Tensor | None
    adapter: Adapter
    needs: Needs

    def factors(self, gx: Tensor | None) -> Grads:
        """The factors' gradients, and the adapter's part of `gx` in it if there is one."""
        needs = self.needs
        if gx is None and not (needs.A or needs.B or needs.C):
            return None, None, None
        return backward_kernels.backward(
            self.adapter,
            g=self.g,
            x=self.x,
            u=self.u,
            gx=gx,
            needs_A=needs.A,
            needs_B=needs.B,
            needs_C=needs.C,
        )

    def fused(self, weight: Tensor, gx: Tensor) -> Grads:
        """The factors' gradients, and all of `gx` in it: in one product if there is a tile."""
        g, x, u, adapter, needs = self
        if needs.A or needs.B or needs.C:
            grads = fused_backward(
                g, x, u, weight, adapter, gx,
                needs_A=needs.A, needs_B=needs.B, needs_C=needs.C,
            )  # fmt: skip
            if grads is not None:
                return grads
        fused_linear(g, weight, adapter, gx, grad_input=True)
        return self.factors(None)


def delta_weight(adapter: Adapter) -> Tensor:
    """`scaling * DW`, `[m, n]`, in the factors' common dtype."""
    geometry = adapter.geometry
    dtype = torch.promote_types(
        torch.promote_types(adapter.A.dtype, adapter.B.dtype), adapter.C.dtype
    )
    out = adapter.A.new_empty(geometry.outputs.size, geometry.inputs.size, dtype=dtype)
    expand(adapter, out=out)
    return out


def delta_weight_backward(
    grad: Tensor, adapter: Adapter, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of `A`, `B` and `C` for `grad [m, n]`, that of `delta_weight`'s result."""
    return expand_backward(grad, adapter, *needs)


def merge(
    weight: Tensor, adapter: Adapter, seed: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """`weight + scaling * DW` `[m, n]` in one pass, rounded once; see `expand`.

    Into `out`, which may be `weight`, or into a new tensor with `weight`'s strides.
    """
    out = torch.empty_like(weight) if out is None else out
    expand(adapter, out=out, weight=weight, seed=seed)
    return out


def _empty_u(x: Tensor, adapter: Adapter) -> Tensor:
    """`[T, k, d_in]`, uninitialised."""
    return x.new_empty(x.shape[0], adapter.geometry.rank, adapter.geometry.inputs.width)
