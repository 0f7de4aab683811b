"""The gradients of the reference in closed form, derived by hand and free of autograd.

With `g = dL/dy [T, m]` and `xd = dropout(x)`, everything follows from the dense gradient
`G = s g^T xd [m, n]` of `kron(B A, C)`, read in windows `G[j, q, i, p] = G[j*s+q, i*s+p]`:

    gC[q, p] = sum_{j, i} F[j, i] G[j, q, i, p]          F = B A
    gF[j, i] = sum_{q, p} C[q, p] G[j, q, i, p]
    gA = B^T gF,    gB = gF A^T
    gx = g W + (g DW) * mask,    gW = g^T x,    gb = sum_t g
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcft_kernels.adapter import Adapter, Gradients
from dcft_kernels.dropout import drop, keep_mask
from dcft_kernels.reference.materialised import delta_weight


def closed_form_gradients(g: Tensor, x: Tensor, weight: Tensor, adapter: Adapter) -> Gradients:
    """All gradients of `y = x W^T + b + dropout(x) DW^T` for `g = dL/dy`; shapes as `linear`."""
    A, B, C, scaling, _, dropout_p, seed = adapter
    dropped = drop(x, dropout_p, seed)
    windows = _windows(scaling * g.t() @ dropped, adapter)  # [J, d_out, I, d_in]
    product = B @ A
    grad_product = torch.einsum("qp,jqip->ji", C, windows)
    through_adapter = g @ delta_weight(adapter)
    if seed is not None:
        through_adapter = through_adapter * keep_mask(
            seed, dropout_p, tuple(x.shape), x.dtype, x.device
        )
    return Gradients(
        x=g @ weight + through_adapter,
        weight=g.t() @ x,
        bias=g.sum(0),
        A=B.t() @ grad_product,
        B=grad_product @ A.t(),
        C=torch.einsum("ji,jqip->qp", product, windows),
    )


def _windows(dense: Tensor, adapter: Adapter) -> Tensor:
    """Read `dense [m, n]` in windows `[J, d_out, I, d_in]`; what sticks out reads as zero."""
    outputs, inputs = adapter.geometry.outputs, adapter.geometry.inputs
    padded = F.pad(dense, (0, inputs.span - inputs.size, 0, outputs.span - outputs.size))
    rows = padded.unfold(0, outputs.width, outputs.stride)  # [J, n', d_out]
    return rows.unfold(1, inputs.width, inputs.stride).transpose(1, 2)
