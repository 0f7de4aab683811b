"""One layer: `linear` and `update`, their gradients, and which tensors they keep for them.

Saved for backward are `x` (as passed, no copy; not even it when neither `A` nor the weight is
trained), `U`, the parameters and, with dropout, the 8-byte seed; and of these only what the
gradients asked for need.

Outside of a compiler, `linear` and `update` call the operators' kernels and gradient formulas from
an ordinary `autograd.Function`: the way through the dispatcher and back into Python, twice in each
direction, costs as much as a small layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcft_kernels import autocast, torch_backend
from dcft_kernels.adapter import Adapter
from dcft_kernels.gradients import Gradients, Needs
from dcft_kernels.ops.library import (
    ADAPTER_ARGUMENTS,
    ADAPTER_SCHEMA,
    LIBRARY,
    flatten,
    needs_dispatcher,
    records,
    resolve,
    unflatten,
)

# The gradients of an adapter's seed, scaling, stride, probability and strategy.
_NOT_DIFFERENTIABLE = (None,) * (ADAPTER_ARGUMENTS - 3)

LIBRARY.define(
    f"linear(Tensor x, Tensor weight, Tensor? bias, {ADAPTER_SCHEMA}) -> (Tensor, Tensor)"
)
LIBRARY.define(f"update(Tensor y, Tensor x, {ADAPTER_SCHEMA}) -> (Tensor, Tensor)")
LIBRARY.define(
    "backward(Tensor g, Tensor? x, Tensor? u, Tensor? weight, "
    f"{ADAPTER_SCHEMA}, SymInt in_features, bool[] needs, Tensor? grad_u)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, strategy: str
) -> Tensor:
    """`x W^T + b + dropout(x) DW^T`; `x [T, n]`, result `[T, m]`."""
    if needs_dispatcher(x):
        y, _ = torch.ops.dcft_kernels.linear(x, weight, bias, *flatten(adapter, strategy))
    else:
        strategy = resolve(strategy, x, adapter)
        if records():
            A, B, C = adapter[:3]
            y, _ = _EagerLinear.apply(x, weight, bias, A, B, C, adapter, strategy)
        else:
            y, _ = _run_linear(x, weight, bias, adapter, strategy)
    return y


def update(y: Tensor, x: Tensor, adapter: Adapter, strategy: str) -> Tensor:
    """`y + dropout(x) DW^T`; `y [T, m]`, `x [T, n]`."""
    if needs_dispatcher(x):
        out, _ = torch.ops.dcft_kernels.update(y, x, *flatten(adapter, strategy))
    else:
        strategy = resolve(strategy, x, adapter, base=False)
        if records():
            A, B, C = adapter[:3]
            out, _ = _EagerUpdate.apply(y, x, A, B, C, adapter, strategy)
        else:
            out, _ = _run_update(y, x, adapter, strategy)
    return out


@torch.library.impl(LIBRARY, "linear", "CompositeExplicitAutograd")
def _linear_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    adapter, strategy = unflatten(arguments, x.shape[1], weight.shape[0])
    return _run_linear(x, weight, bias, adapter, resolve(strategy, x, adapter))


def _run_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, strategy: str
) -> tuple[Tensor, Tensor]:
    """`y` and `U`, by a strategy that is settled."""
    with autocast.suspended(x):
        if strategy == "torch":
            return torch_backend.linear(x, weight, bias, adapter)
        from dcft_kernels.triton import passes

        return passes.linear(x, weight, bias, adapter, strategy)


@torch.library.impl(LIBRARY, "update", "CompositeExplicitAutograd")
def _update_kernel(y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    adapter, strategy = unflatten(arguments, x.shape[1], y.shape[1])
    return _run_update(y, x, adapter, resolve(strategy, x, adapter, base=False))


def _run_update(y: Tensor, x: Tensor, adapter: Adapter, strategy: str) -> tuple[Tensor, Tensor]:
    """`y` and `U`, by a strategy that is settled."""
    with autocast.suspended(x):
        if strategy == "torch":
            return torch_backend.update(y, x, adapter)
        from dcft_kernels.triton import passes

        return passes.update(y, x, adapter)


@torch.library.impl(LIBRARY, "backward", "CompositeExplicitAutograd")
def _backward_kernel(
    g: Tensor, x: Tensor | None, u: Tensor | None, weight: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    *adapter_arguments, in_features, needs, grad_u = arguments
    adapter, strategy = unflatten(adapter_arguments, in_features, g.shape[1])
    strategy = resolve(strategy, g, adapter, base=weight is not None)
    gradients = _compute_gradients(g, x, u, weight, adapter, strategy, Needs(*needs), grad_u)
    # An operator returns tensors only: an empty one stands for a gradient nobody asked for.
    return tuple(g.new_empty(0) if grad is None else grad.contiguous() for grad in gradients)


def _compute_gradients(
    g: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter,
    strategy: str,
    needs: Needs,
    grad_u: Tensor | None,
) -> Gradients:
    """The backward pass of whoever ran the forward, or a differentiable one if autograd records."""
    with autocast.suspended(g):
        # Only a double backward has a gradient of U, or has its own operations recorded.
        if strategy == "torch" or grad_u is not None or torch.is_grad_enabled():
            return torch_backend.backward(g, x, u, weight, adapter, needs, grad_u)
        from dcft_kernels.triton import passes

        return passes.backward(g, x, u, weight, adapter, needs, strategy)


def _u_shape(x: Tensor, A: Tensor, C: Tensor) -> tuple[int, int, int]:
    return (x.shape[0], A.shape[0], C.shape[1])


@torch.library.register_fake("dcft_kernels::linear", lib=LIBRARY)
def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    A, _, C = arguments[:3]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(_u_shape(x, A, C))


@torch.library.register_fake("dcft_kernels::update", lib=LIBRARY)
def _update_fake(y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    A, _, C = arguments[:3]
    return y.new_empty(y.shape), x.new_empty(_u_shape(x, A, C))


@torch.library.register_fake("dcft_kernels::backward", lib=LIBRARY)
def _backward_fake(
    g: Tensor, x: Tensor | None, u: Tensor | None, weight: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    A, B, C = arguments[:3]
    in_features, needs, _ = arguments[ADAPTER_ARGUMENTS:]
    full = (
        g.new_empty(g.shape[0], in_features),
        g.new_empty(g.shape[1], in_features),
        g.new_empty(g.shape[1]),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
    )
    return tuple(
        grad if needed else g.new_empty(0) for grad, needed in zip(full, needs, strict=True)
    )


def _save(
    ctx: Any,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    factors_and_seed: Sequence[Tensor | None],
    needs: Needs,
) -> None:
    """Keep for the backward pass what the gradients asked for read, and nothing else."""
    ctx.needs = needs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if needs.A or needs.weight else None,
        u if needs.B or needs.C else None,
        weight if needs.x else None,
        *factors_and_seed,
    )


def _some_gradient(
    grad_y: Tensor | None, grad_u: Tensor | None, out_features: int
) -> Tensor | None:
    """The gradient of `y`, or zeros where only `U` has one; None where neither has."""
    if grad_y is None and grad_u is not None:
        # Only a double backward reaches U and not y.
        return grad_u.new_zeros(grad_u.shape[0], out_features)
    return grad_y


# As operators, for whom a compiler looks on: tensors and numbers, one by one.


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *adapter_arguments = inputs
    ctx.sizes = (x.shape[1], weight.shape[0])
    ctx.numbers = adapter_arguments[4:]
    _save(ctx, x, output[1], weight, adapter_arguments[:4], Needs(*ctx.needs_input_grad[:6]))


def _update_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, x, *adapter_arguments = inputs
    ctx.sizes = (x.shape[1], y.shape[1])
    ctx.numbers = adapter_arguments[4:]
    _save(ctx, x, output[1], None, adapter_arguments[:4], _needs_of_update(ctx))


def _needs_of_update(ctx: Any) -> Needs:
    _, need_x, *need_factors = ctx.needs_input_grad[:5]
    return Needs(need_x, False, False, *need_factors)


def _gradients(ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None) -> Gradients:
    """The backward pass: an operator again, unless it is itself to be differentiated."""
    x, u, weight, *factors_and_seed = ctx.saved_tensors
    arguments = (*factors_and_seed, *ctx.numbers)
    in_features, out_features = ctx.sizes
    grad_y = _some_gradient(grad_y, grad_u, out_features)
    if grad_y is None:
        return Gradients()
    if torch.is_grad_enabled():
        adapter, strategy = unflatten(arguments, in_features, out_features)
        return _compute_gradients(grad_y, x, u, weight, adapter, strategy, ctx.needs, grad_u)
    gradients = torch.ops.dcft_kernels.backward(
        grad_y, x, u, weight, *arguments, in_features, list(ctx.needs), grad_u
    )
    return Gradients(
        *(grad if needed else None for grad, needed in zip(gradients, ctx.needs, strict=True))
    )


def _linear_autograd(
    ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad_y, grad_u), *_NOT_DIFFERENTIABLE)


def _update_autograd(
    ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradients = _gradients(ctx, grad_y, grad_u)
    return (grad_y, gradients.x, *gradients[3:], *_NOT_DIFFERENTIABLE)


# Outside of a compiler: the same formulas, the adapter as one argument beside its factors.


def _eager_gradients(ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None) -> Gradients:
    x, u, weight, A, B, C, seed = ctx.saved_tensors
    scaling, geometry, dropout_p = ctx.numbers
    grad_y = _some_gradient(grad_y, grad_u, geometry.outputs.size)
    if grad_y is None:
        return Gradients()
    adapter = Adapter(A, B, C, scaling, geometry, dropout_p, seed)
    return _compute_gradients(grad_y, x, u, weight, adapter, ctx.strategy, ctx.needs, grad_u)


class _EagerLinear(torch.autograd.Function):
    """`linear` with its strategy settled; `A`, `B` and `C` are the adapter's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        adapter: Adapter,
        strategy: str,
    ) -> tuple[Tensor, Tensor]:
        y, u = _run_linear(x, weight, bias, adapter, strategy)
        ctx.strategy = strategy
        ctx.numbers = adapter[3:6]
        _save(ctx, x, u, weight, (A, B, C, adapter.seed), Needs(*ctx.needs_input_grad[:6]))
        return y, u

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None) -> Any:
        return (*_eager_gradients(ctx, grad_y, grad_u), None, None)


class _EagerUpdate(torch.autograd.Function):
    """`update`, likewise."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        adapter: Adapter,
        strategy: str,
    ) -> tuple[Tensor, Tensor]:
        out, u = _run_update(y, x, adapter, strategy)
        ctx.strategy = strategy
        ctx.numbers = adapter[3:6]
        _save(ctx, x, u, None, (A, B, C, adapter.seed), _needs_of_update(ctx))
        return out, u

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None) -> Any:
        gradients = _eager_gradients(ctx, grad_y, grad_u)
        return (grad_y, gradients.x, *gradients[3:], None, None)


torch.library.register_autograd(
    "dcft_kernels::linear", _linear_autograd, setup_context=_linear_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "dcft_kernels::update", _update_autograd, setup_context=_update_setup, lib=LIBRARY
)
