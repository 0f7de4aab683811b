"""LoRA as a hand-written autograd function of cuBLAS or MKL products, in the usual layouts.

    y = x W^T + b + (x A^T) B^T
    gB = g^T (x A^T),   gA = (g B)^T x,   gx = g W + (g B) A

Increments are added inside the products (`addmm`), and `x A^T` is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _LoRAFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        A, B = A.to(x.dtype), B.to(x.dtype)
        rows = x.flatten(0, -2)
        shrunk = rows @ A.t()  # [T, r]
        y = rows @ W.t() if b is None else torch.addmm(b, rows, W.t())
        y.addmm_(shrunk, B.t())
        ctx.save_for_backward(x, W, A, B, shrunk)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, shrunk = ctx.saved_tensors
        rows, g = x.flatten(0, -2), grad.flatten(0, -2)
        g_shrunk = g @ B  # [T, r]
        gx = (g @ W).addmm_(g_shrunk, A) if ctx.needs_input_grad[0] else None
        gA, gB = g_shrunk.t() @ rows, g.t() @ shrunk
        return None if gx is None else gx.view_as(x), None, None, gA, gB


class LoRALinear(nn.Module):
    """A frozen linear layer with a LoRA adapter of rank `r`, float32 factors and scaling 1."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        weight = base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(
            torch.empty(rank, base.in_features, device=weight.device, dtype=dtype)
        )
        self.B = nn.Parameter(
            torch.empty(base.out_features, rank, device=weight.device, dtype=dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        return _LoRAFunction.apply(x, self.base.weight, self.base.bias, self.A, self.B)
