"""DCFT as published, written from equations 5 and 6 of arXiv 2503.01419.

Both forms build `DW = ConvT(B A, C)` in every forward pass and leave the rest to autograd, which
then computes a dense gradient of `DW`. Over a 16-bit base the factors are float32, as in every
other adapter here, and `DW` is cast to the base's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def increment(A: Tensor, B: Tensor, C: Tensor, stride: int) -> Tensor:
    """`DW` of shape `[m, n]`."""
    return F.conv_transpose2d((B @ A)[None, None], C[None, None], stride=stride)[0, 0]


class PublishedDCFT(nn.Module):
    """`y = x W^T + b + x DW^T`, or in one product `y = x (W + DW)^T + b` if `merged`."""

    def __init__(
        self, base: nn.Linear, rank: int, kernel_size: int, stride: int, *, merged: bool
    ) -> None:
        super().__init__()
        self.base = base
        self.stride = stride
        self.merged = merged
        windows_in, windows_out = (
            (size - kernel_size) // stride + 1 for size in (base.in_features, base.out_features)
        )
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, windows_in, device=device))
        self.B = nn.Parameter(torch.empty(windows_out, rank, device=device))
        self.C = nn.Parameter(torch.empty(kernel_size, kernel_size, device=device))

    def forward(self, x: Tensor) -> Tensor:
        DW = increment(self.A, self.B, self.C, self.stride)
        if self.merged:
            return F.linear(x, (self.base.weight + DW).to(x.dtype), self.base.bias)
        return self.base(x) + F.linear(x, DW.to(x.dtype))
