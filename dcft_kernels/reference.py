"""The oracle: DCFT as published, which builds `DW` by a transposed convolution.

Plain differentiable PyTorch, so autograd, double backward, `torch.func` transforms and every float
dtype up to float64 work. It costs three full matrix products a layer and a dense gradient of `DW`:
it is what the other backends are checked against and measured against, not what to train with.

As a float32 oracle on a GPU it needs `torch.backends.cudnn.allow_tf32 = False`: by default, cuDNN's
convolutions round their operands to ten bits.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dcft_kernels.adapter import Adapter
from dcft_kernels.dropout import drop


def delta_weight(adapter: Adapter) -> Tensor:
    """`scaling * ConvT(B A, C)`, equations 5 and 6 of arXiv 2503.01419, cropped to `[m, n]`.

    With a kernel per rank, the ranks are the input channels of the transposed convolution:
    `sum over κ of ConvT(b_κ a_κ, C_κ)`.
    """
    A, B, C, *_ = adapter
    outputs, inputs = adapter.geometry.outputs, adapter.geometry.inputs
    if adapter.geometry.per_rank:
        maps, kernels = B.t()[:, :, None] * A[:, None, :], C[:, None]  # [k, J, I], [k, 1, d, d]
    else:
        maps, kernels = (B @ A)[None], C[None, None]  # [1, J, I], [1, 1, d, d]
    full = F.conv_transpose2d(maps[None], kernels, stride=adapter.geometry.stride)[0, 0]
    return adapter.scaling * full[: outputs.size, : inputs.size]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """`x W^T + b + dropout(x) DW^T`; `x [T, n]`, result `[T, m]`."""
    return update(F.linear(x, weight, bias), x, adapter)


def update(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """`y + dropout(x) DW^T`; `y [T, m]`, `x [T, n]`."""
    dense = delta_weight(adapter).to(x.dtype)
    return y + F.linear(drop(x, adapter.dropout_p, adapter.seed), dense)
