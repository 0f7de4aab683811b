"""DCFT as published, written anew from equations 5 and 6 of arXiv 2503.01419.

Both forms build `DW = ConvT(B A, C)` in every forward pass and leave the rest to autograd, which
then computes a dense gradient of `DW`. Over a 16-bit base the factors are float32, as in every
other adapter here, and what is multiplied with tokens is cast to the base's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def delta_weight(self) -> Tensor:
        """`DW` `[m, n]`, in the factors' dtype."""
        subspace = self.B @ self.A
        return F.conv_transpose2d(subspace[None, None], self.C[None, None], stride=self.stride)[
            0, 0
        ]

    def forward(self, x: Tensor) -> Tensor:
        DW = self.delta_weight()
        if self.merged:
            weight = (self.base.weight + DW).to(x.dtype)
            return F.linear(x, weight, self.base.bias)
        return self.base(x) + F.linear(x, DW.to(x.dtype))
