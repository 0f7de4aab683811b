"""A layer with a nonlinearity between its factors: PyTorch's operations, which autograd follows.

Every step is an ordinary operation that the compiler sees into. The one operator is `drop`: a mask
is drawn from the value of a seed, which no compiler can trace, and is drawn again in the backward
pass instead of kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcft_kernels import autocast, dropout, torch_backend
from dcft_kernels.adapter import Adapter
from dcft_kernels.nonlinearity import function_of
from dcft_kernels.ops.library import LIBRARY

LIBRARY.define("drop(Tensor x, Tensor seed, float dropout_p) -> Tensor")


def nonlinear_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, nonlinearity: str
) -> Tensor:
    """`x W^T + b + expand(C h(shrink(dropout(x))))`; `x [T, n]`, result `[T, m]`."""
    with autocast.suspended(x):
        return _add_adapter_(F.linear(x, weight, bias), x, adapter, nonlinearity)


def nonlinear_update(y: Tensor, x: Tensor, adapter: Adapter, nonlinearity: str) -> Tensor:
    """A new `y + expand(C h(shrink(dropout(x))))`; `x [T, n]`, `y [T, m]`."""
    with autocast.suspended(x):
        out = y.clone(memory_format=torch.contiguous_format)
        return _add_adapter_(out, x, adapter, nonlinearity)


def _add_adapter_(y: Tensor, x: Tensor, adapter: Adapter, nonlinearity: str) -> Tensor:
    if adapter.seed is not None:
        x = torch.ops.dcft_kernels.drop(x, adapter.seed, adapter.dropout_p)
    return torch_backend.add_nonlinear_adapter_(y, x, adapter, function_of(nonlinearity))


@torch.library.impl(LIBRARY, "drop", "CompositeExplicitAutograd")
def _drop_kernel(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    return dropout.drop(x, dropout_p, seed)


@torch.library.register_fake("dcft_kernels::drop", lib=LIBRARY)
def _drop_fake(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    return x * x.new_empty(x.shape)


def _drop_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(seed)


def _drop_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return torch.ops.dcft_kernels.drop(grad, seed, ctx.dropout_p), None, None


torch.library.register_autograd(
    "dcft_kernels::drop", _drop_autograd, setup_context=_drop_setup, lib=LIBRARY
)
