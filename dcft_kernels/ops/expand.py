"""The increment `scaling * DW` itself, and its gradients, by the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcft_kernels import torch_backend
from dcft_kernels.adapter import Adapter
from dcft_kernels.ops.library import LIBRARY, unflatten

_EXPAND_SCHEMA = (
    "Tensor dcft_A, Tensor dcft_B, Tensor dcft_C, float scaling, int[] stride, "
    "int in_features, int out_features"
)
LIBRARY.define(f"expand({_EXPAND_SCHEMA}) -> Tensor")
LIBRARY.define(
    f"expand_backward(Tensor grad, {_EXPAND_SCHEMA}, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


_MERGE_SCHEMA = (
    "Tensor dcft_A, Tensor dcft_B, Tensor dcft_C, Tensor? seed, float scaling, int[] stride"
)
LIBRARY.define(f"merge(Tensor weight, {_MERGE_SCHEMA}) -> Tensor")
LIBRARY.define(f"merge_(Tensor(a!) weight, {_MERGE_SCHEMA}) -> ()")


def delta_weight(adapter: Adapter, strategy: str) -> Tensor:
    """`scaling * DW`, `[m, n]`, in the factors' common dtype; differentiable."""
    geometry = adapter.geometry
    if strategy == "torch" or 0 in (geometry.inputs.size, geometry.outputs.size):
        return torch_backend.delta_weight(adapter)
    stride = [geometry.outputs.stride, geometry.inputs.stride]
    sizes = (geometry.inputs.size, geometry.outputs.size)
    return torch.ops.dcft_kernels.expand(
        adapter.A, adapter.B, adapter.C, adapter.scaling, stride, *sizes
    )


def merge(weight: Tensor, adapter: Adapter, seed: Tensor | None, strategy: str) -> Tensor:
    """A new `weight + scaling * DW`, rounded once; strides as `weight`'s. Not differentiable."""
    if strategy == "torch":
        return torch_backend.merge(weight, adapter, seed)
    return torch.ops.dcft_kernels.merge(weight, *_flatten_merge(adapter, seed))


def merge_(weight: Tensor, adapter: Adapter, seed: Tensor | None, strategy: str) -> None:
    """`weight += scaling * DW` in place, rounded once. Not differentiable."""
    if strategy == "torch":
        torch_backend.merge(weight, adapter, seed, out=weight)
        return
    torch.ops.dcft_kernels.merge_(weight, *_flatten_merge(adapter, seed))
    if not torch.compiler.is_compiling():
        # What autograd has saved of the weight is no longer what was saved.
        torch.autograd.graph.increment_version(weight)


def _flatten_merge(adapter: Adapter, seed: Tensor | None) -> tuple[Any, ...]:
    stride = [adapter.geometry.outputs.stride, adapter.geometry.inputs.stride]
    return (adapter.A, adapter.B, adapter.C, seed, adapter.scaling, stride)


def _unflatten_merge(weight: Tensor, arguments: Sequence[Any]) -> tuple[Adapter, Tensor | None]:
    A, B, C, seed, scaling, stride = arguments
    sizes = (weight.shape[1], weight.shape[0])
    return _unflatten_expand((A, B, C, scaling, stride, *sizes)), seed


@torch.library.impl(LIBRARY, "merge", "CompositeExplicitAutograd")
def _merge_kernel(weight: Tensor, *arguments: Any) -> Tensor:
    from dcft_kernels.triton import passes

    return passes.merge(weight, *_unflatten_merge(weight, arguments))


@torch.library.impl(LIBRARY, "merge_", "CompositeExplicitAutograd")
def _merge_in_place_kernel(weight: Tensor, *arguments: Any) -> None:
    from dcft_kernels.triton import passes

    passes.merge(weight, *_unflatten_merge(weight, arguments), out=weight)


@torch.library.register_fake("dcft_kernels::merge", lib=LIBRARY)
def _merge_fake(weight: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(weight)


@torch.library.register_fake("dcft_kernels::merge_", lib=LIBRARY)
def _merge_in_place_fake(weight: Tensor, *arguments: Any) -> None:
    return None


def _unflatten_expand(arguments: Sequence[Any]) -> Adapter:
    A, B, C, scaling, stride, in_features, out_features = arguments
    factors = (A, B, C, None, scaling, stride, 0.0, "auto")
    return unflatten(factors, in_features, out_features)[0]


@torch.library.impl(LIBRARY, "expand", "CompositeExplicitAutograd")
def _expand_kernel(*arguments: Any) -> Tensor:
    from dcft_kernels.triton import passes

    return passes.delta_weight(_unflatten_expand(arguments))


@torch.library.impl(LIBRARY, "expand_backward", "CompositeExplicitAutograd")
def _expand_backward_kernel(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from dcft_kernels.triton import passes

    *adapter_arguments, needs = arguments
    adapter = _unflatten_expand(adapter_arguments)
    gradients = passes.delta_weight_backward(grad, adapter, (needs[0], needs[1], needs[2]))
    return tuple(grad.new_empty(0) if each is None else each for each in gradients)


@torch.library.register_fake("dcft_kernels::expand", lib=LIBRARY)
def _expand_fake(*arguments: Any) -> Tensor:
    A, B, C, _, _, in_features, out_features = arguments
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), C.dtype)
    return A.new_empty(out_features, in_features, dtype=dtype)


@torch.library.register_fake("dcft_kernels::expand_backward", lib=LIBRARY)
def _expand_backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *factors, _, _, _, _, needs = arguments
    return tuple(
        factor.new_empty(factor.shape) if needed else grad.new_empty(0)
        for factor, needed in zip(factors, needs, strict=True)
    )


def _expand_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.numbers = inputs[3:]


def _expand_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    factors = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients: Sequence[Tensor | None]
    if torch.is_grad_enabled():
        # A double backward: the same values as differentiable operations.
        wanted = [factor for factor, needed in zip(factors, needs, strict=True) if needed]
        dense = torch_backend.delta_weight(_unflatten_expand((*factors, *ctx.numbers)))
        computed = iter(torch.autograd.grad(dense, wanted, grad, create_graph=True))
        gradients = [next(computed) if needed else None for needed in needs]
    else:
        results = torch.ops.dcft_kernels.expand_backward(grad, *factors, *ctx.numbers, list(needs))
        gradients = [each if needed else None for each, needed in zip(results, needs, strict=True)]
    return (*gradients, None, None, None, None)


torch.library.register_autograd(
    "dcft_kernels::expand", _expand_autograd, setup_context=_expand_setup, lib=LIBRARY
)
