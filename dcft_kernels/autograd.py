"""The layer as a differentiable operation, for eager and for compiled calls.

Eager calls apply `_Layer`, which runs a strategy's passes. A compiler sees the kernels as opaque
operators, with the same gradients registered:

    forward(x, weight, bias, y, adapter..., strategy)          -> (x W^T + b + dropout(x) DW^T, U)
    backward(g, x, U, weight, adapter..., needs, strategy)     -> six gradients
    delta_weight(A, B, C, scaling, geometry)            -> scaling * DW
    merge(weight, A, B, C, seed, scaling, geometry)     -> weight + scaling * DW

(Eager calls bypass them because two trips through the dispatcher in each direction cost as much as
a small layer.) `forward` has either a base layer (`weight`, `bias`) or a base layer's output (`y`),
to which the increment is added. `U [T, k*d_in]` is an output only because the backward pass needs
it. Saved for backward are `x` as passed, `U`, the parameters, with dropout the 8-byte seed, and the
matrices of `torch_backend` where they are smaller than `x`; and of these only what the requested
gradients read.

With `create_graph=True`, for gradients in batches (`is_grads_batched=True`) and under forward mode,
the backward pass runs as plain PyTorch operations on the same saved tensors. The strategy
`composite` is plain operations both ways: compilers, transforms, tracers and exports see through
it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dcft_kernels import autocast, backends, rounding, torch_backend
from dcft_kernels.adapter import Adapter, Geometry, Gradients, Needs, Side, dtype_of_U
from dcft_kernels.backends import KERNELS
from dcft_kernels.nonlinearity import function_of

LIBRARY = torch.library.Library("dcft_kernels", "DEF")

# An adapter as operators take it.
_ADAPTER = (
    "Tensor dcft_A, Tensor dcft_B, Tensor dcft_C, Tensor? seed, float scaling, SymInt[] geometry, "
    "float dropout_p"
)
_FACTORS = "Tensor dcft_A, Tensor dcft_B, Tensor dcft_C, float scaling, SymInt[] geometry"

LIBRARY.define(
    f"forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? y, {_ADAPTER}, str strategy)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"backward(Tensor g, Tensor? x, Tensor? u, Tensor? weight, {_ADAPTER}, bool[] needs,"
    " str strategy) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"delta_weight({_FACTORS}) -> Tensor")
LIBRARY.define(f"merge(Tensor weight, {_FACTORS}, Tensor? seed) -> Tensor")


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
    strategy: str,
    nonlinearity: str | None = None,
) -> Tensor:
    """`x W^T + b + dropout(x) DW^T`, or a new `base + dropout(x) DW^T`; `[T, n]` to `[T, m]`.

    Args:
        x: `[T, n]`.
        weight: `[m, n]`, or None where `base` is given.
        bias: `[m]` or None.
        base: `[T, m]`, the base layer's output where there is no `weight`.
        adapter: factors and settings.
        strategy: what `backends.select` says.
        nonlinearity: the name of the function between the factors, or None.
    """
    if strategy == "reference":
        if base is None:
            return _passes(strategy).linear(x, weight, bias, adapter)
        return _passes(strategy).update(base, x, adapter)
    if strategy == "composite":
        h = None if nonlinearity is None else function_of(nonlinearity)
        with autocast.suspended(x):
            return torch_backend.composite_forward(x, weight, bias, base, adapter, h)
    if is_traced(x):
        operands = (x, weight, bias, base, *_flatten(adapter), strategy)
        return torch.ops.dcft_kernels.forward(*operands)[0]
    if torch.is_grad_enabled():
        factors = (adapter.A, adapter.B, adapter.C)
        return _Layer.apply(x, weight, bias, base, *factors, adapter, strategy)[0]
    with autocast.suspended(x):
        return _forward(strategy, x, weight, bias, base, adapter)[0]


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler or a tensor subclass, such as a fake tensor, has to see operations."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter)


def _flatten(adapter: Adapter) -> tuple[Any, ...]:
    A, B, C, scaling, (rank, outputs, inputs, per_rank), dropout_p, seed, _ = adapter
    return A, B, C, seed, scaling, (rank, *outputs, *inputs, per_rank), dropout_p


def _unflatten(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    seed: Tensor | None,
    scaling: float,
    geometry: Sequence[int],
    dropout_p: float = 0.0,
) -> Adapter:
    return Adapter(A, B, C, scaling, _geometry(*geometry), dropout_p, seed)


@functools.lru_cache(maxsize=4096)
def _geometry(rank: int, *numbers: int) -> Geometry:
    per_rank = bool(numbers[8:] and numbers[8])  # exports of earlier versions lack it
    return Geometry(rank, Side(*numbers[:4]), Side(*numbers[4:8]), per_rank)


def _passes(strategy: str) -> Any:
    """The module that implements a strategy."""
    if strategy == "reference":
        from dcft_kernels import reference  # loaded only when it is requested by name

        return reference
    return torch_backend


def _forward(strategy: str, *operands: Any) -> tuple[Tensor, Tensor]:
    """The forward pass by a strategy; arguments and results as `torch_backend.forward`."""
    if strategy in KERNELS:
        return _kernels().forward(*operands, strategy)
    return torch_backend.forward(*operands)


def _backward_passes(strategy: str, *operands: Any) -> Gradients:
    """The backward pass by a strategy; arguments and results as `torch_backend.backward`."""
    if strategy in KERNELS:
        return _kernels().backward(*operands, strategy)
    return torch_backend.backward(*operands)


def _kernels() -> Any:
    from dcft_kernels.triton import passes

    return passes


# ---------------------------------------------------------------------------------------------
# The layer


class _Layer(torch.autograd.Function):
    """The layer with its gradients, as an operation that autograd records."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        adapter: Adapter,
        strategy: str,
    ) -> tuple[Tensor, Tensor]:
        prepared = adapter
        with autocast.suspended(x):
            if strategy == "torch":
                matrices = torch_backend.new_matrices(adapter, x.dtype)
                prepared = adapter._replace(matrices=matrices)
                # Kept for the backward pass only where they are smaller than what is saved anyway.
                if sum(matrix.numel() for matrix in matrices) <= x.numel():
                    adapter = prepared
            y, U = _forward(strategy, x, weight, bias, base, prepared)
        _save(ctx, x, weight, U, adapter, strategy)
        return y, U

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_U: Tensor | None) -> tuple[Any, ...]:
        return (*_backward(ctx, grad_y, grad_U), None, None)


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    U: Tensor,
    adapter: Adapter,
    strategy: str,
) -> None:
    """Keep for the backward pass what the requested gradients read, and nothing else."""
    need_x, need_weight, need_bias, _, *need_factors = ctx.needs_input_grad[:7]
    needs = Needs(need_x, need_weight, need_bias, *need_factors)
    ctx.needs, ctx.strategy, ctx.dtype = needs, strategy, x.dtype
    ctx.adapter = adapter._replace(matrices=None)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if needs.A or needs.weight else None,
        U if needs.B or needs.C else None,
        weight if needs.x else None,
        adapter.A,
        adapter.B,
        adapter.C,
        adapter.seed,
        *(adapter.matrices or ()),
    )


def _backward(ctx: Any, grad_y: Tensor | None, grad_U: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, base, A, B and C."""
    x, U, weight, A, B, C, seed, *matrices = ctx.saved_tensors
    adapter = ctx.adapter._replace(A=A, B=B, C=C, seed=seed, matrices=tuple(matrices) or None)
    needs, g = ctx.needs, grad_y
    if g is None and grad_U is not None:
        # Only a double backward reaches U and not y.
        g = grad_U.new_zeros(grad_U.shape[0], adapter.geometry.outputs.size, dtype=ctx.dtype)
    if g is None:
        gradients = Gradients()
    # Only a double backward has a gradient of U, or records its own operations.
    elif grad_U is not None or torch.is_grad_enabled() or _is_transformed(g):
        with autocast.suspended(g):
            gradients = torch_backend.composite_backward(g, x, U, weight, adapter, needs, grad_U)
    elif ctx.strategy in KERNELS and is_traced(g):
        operands = (g, x, U, weight, *_flatten(adapter), list(needs), ctx.strategy)
        results = torch.ops.dcft_kernels.backward(*operands)
        gradients = Gradients(*_those_needed(results, needs))
    else:
        with autocast.suspended(g):
            gradients = _backward_passes(ctx.strategy, g, x, U, weight, adapter, needs)
    grad_x, grad_weight, grad_bias, *grad_factors = gradients
    grad_base = grad_y if ctx.needs_input_grad[3] else None
    return grad_x, grad_weight, grad_bias, grad_base, *grad_factors


def _is_transformed(g: Tensor) -> bool:
    """Whether a transform or forward mode follows the backward pass, operation by operation."""
    if backends.is_transformed():
        return True
    # A compiler does not trace the question.
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(g)


# The kernels as operators, for compilers.


@torch.library.impl(LIBRARY, "forward", "CompositeExplicitAutograd")
def _forward_operator(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weight, bias, base, *adapter, strategy = arguments
    with autocast.suspended(x):
        return _forward(strategy, x, weight, bias, base, _unflatten(*adapter))


@torch.library.register_fake("dcft_kernels::forward", lib=LIBRARY)
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, _, A, _, C, _, _, (_, out_features, *_), _, _ = arguments
    U = x.new_empty(x.shape[0], A.shape[0] * C.shape[-1], dtype=dtype_of_U(x.dtype))
    return x.new_empty(x.shape[0], out_features), U


def _operator_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _, *adapter, strategy = inputs
    _save(ctx, x, weight, output[1], _unflatten(*adapter), strategy)


def _operator_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return (*_backward(ctx, *grads), None, None, None, None, None)


torch.library.register_autograd(
    "dcft_kernels::forward", _operator_backward, setup_context=_operator_save, lib=LIBRARY
)


@torch.library.impl(LIBRARY, "backward", "CompositeExplicitAutograd")
def _backward_operator(g: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    x, U, weight, *adapter, needs, strategy = arguments
    with autocast.suspended(g):
        operands = (g, x, U, weight, _unflatten(*adapter), Needs(*needs))
        gradients = _backward_passes(strategy, *operands)
    return _as_tensors(g, gradients)


@torch.library.register_fake("dcft_kernels::backward", lib=LIBRARY)
def _backward_fake(g: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, A, B, C, _, _, geometry, _, needs, _ = arguments
    (tokens, out_features), in_features = g.shape, geometry[5]
    base_shapes = ((tokens, in_features), (out_features, in_features), (out_features,))
    shapes = (*base_shapes, A.shape, B.shape, C.shape)
    likes = (g, g, g, A, B, C)
    return tuple(
        like.new_empty(shape) if needed else g.new_empty(0)
        for like, shape, needed in zip(likes, shapes, needs, strict=True)
    )


def _as_tensors(like: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for a gradient that was not requested."""
    return tuple([like.new_empty(0) if each is None else each.contiguous() for each in gradients])


def _those_needed(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of `_as_tensors`."""
    return [each if needed else None for each, needed in zip(tensors, needs, strict=True)]


# ---------------------------------------------------------------------------------------------
# The dense increment


def delta_weight(adapter: Adapter, strategy: str) -> Tensor:
    """`scaling * DW`, `[m, n]`, in the factors' common dtype; differentiable."""
    if strategy not in KERNELS:
        return _passes(strategy).delta_weight(adapter)
    A, B, C, _, *numbers = _flatten(adapter)
    return torch.ops.dcft_kernels.delta_weight(A, B, C, *numbers[:2])


def merge(weight: Tensor, adapter: Adapter, seed: Tensor | None, strategy: str) -> Tensor:
    """A new `weight + scaling * DW`, rounded once; strides as `weight`'s. Not differentiable."""
    if strategy in KERNELS:
        A, B, C, _, *numbers = _flatten(adapter)
        return torch.ops.dcft_kernels.merge(weight, A, B, C, *numbers[:2], seed)
    out = torch.empty_like(weight)
    _store_sum(weight, adapter, seed, strategy, out)
    return out


def merge_(weight: Tensor, adapter: Adapter, seed: Tensor | None, strategy: str) -> None:
    """`weight += scaling * DW` in place, rounded once. Not differentiable."""
    if is_traced(weight):
        weight.copy_(merge(weight, adapter, seed, strategy))
        return
    _store_sum(weight, adapter, seed, strategy, weight)
    if strategy in KERNELS:
        # Kernels write behind autograd's back: whatever it has saved of the weight is stale.
        torch.autograd.graph.increment_version(weight)


def _store_sum(
    weight: Tensor, adapter: Adapter, seed: Tensor | None, strategy: str, out: Tensor
) -> None:
    """Write `weight + scaling * DW`, in float32 or wider, to `out`, which may be `weight`."""
    if strategy in KERNELS:
        _expand().expand(adapter, out=out, weight=weight, seed=seed)
        return
    dense = _passes(strategy).delta_weight(adapter.widened(weight.dtype))
    rounding.store(weight + dense, out, seed)


def _expand() -> Any:
    from dcft_kernels.triton import expand

    return expand


def _dense(A: Tensor, B: Tensor, C: Tensor, scaling: float, geometry: Sequence[int]) -> Adapter:
    """The adapter of these operators' arguments."""
    return _unflatten(A, B, C, None, scaling, geometry)


@torch.library.impl(LIBRARY, "delta_weight", "CompositeExplicitAutograd")
def _delta_weight_operator(*factors: Any) -> Tensor:
    adapter = _dense(*factors)
    sizes = (adapter.geometry.outputs.size, adapter.geometry.inputs.size)
    out = adapter.A.new_empty(sizes, dtype=adapter.dtype)
    _expand().expand(adapter, out=out)
    return out


@torch.library.register_fake("dcft_kernels::delta_weight", lib=LIBRARY)
def _delta_weight_fake(A: Tensor, B: Tensor, C: Tensor, *numbers: Any) -> Tensor:
    _, (_, out_features, _, _, _, in_features, *_) = numbers
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), C.dtype)
    return A.new_empty(out_features, in_features, dtype=dtype)


def _delta_weight_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.numbers = inputs[3:]


def _delta_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    adapter = _dense(*ctx.saved_tensors, *ctx.numbers)
    needs = ctx.needs_input_grad[:3]
    with autocast.suspended(grad):
        gradients = torch_backend.delta_weight_gradients(grad, adapter, needs)
    return (*gradients, None, None)


torch.library.register_autograd(
    "dcft_kernels::delta_weight",
    _delta_weight_backward,
    setup_context=_delta_weight_save,
    lib=LIBRARY,
)


@torch.library.impl(LIBRARY, "merge", "CompositeExplicitAutograd")
def _merge_operator(weight: Tensor, *arguments: Any) -> Tensor:
    *factors, seed = arguments
    out = torch.empty_like(weight)
    _store_sum(weight, _dense(*factors), seed, "triton", out)
    return out


@torch.library.register_fake("dcft_kernels::merge", lib=LIBRARY)
def _merge_fake(weight: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(weight)
