"""The layer as a differentiable operation, for eager and for compiled calls.

`_Layer` holds the gradient formulas. Eager calls apply it directly; a compiler sees the opaque
operator `dcft_kernels::forward`, for which the same formulas are registered. (Eager calls bypass
the dispatcher because two trips through it in each direction cost as much as a small layer.)

    forward(x, weight, bias, y, adapter...)             -> (x W^T + b + dropout(x) DW^T, U)
    backward(g, x, U, weight, adapter..., needs, gU)    -> six gradients
    delta_weight(A, B, C, scaling, geometry)            -> scaling * DW
    delta_weight_backward(grad, A, B, C, ..., needs)    -> its three gradients
    merge(weight, A, B, C, seed, scaling, geometry)     -> weight + scaling * DW

`forward` has either a base layer (`weight`, `bias`) or a base layer's output (`y`), to which the
increment is added. `U [T, k, d_in]` is an output only because the backward pass needs it. Saved for
backward are `x` as passed, `U`, the parameters and, with dropout, the 8-byte seed; and of these
only what the requested gradients read.

With `create_graph=True`, for gradients in batches (`is_grads_batched=True`) and under forward mode,
the backward pass runs as plain PyTorch operations on the same saved tensors. The strategy `plain`
has no operators at all: `torch.func`, `torch.jit.trace`, forward mode and exported programs see
through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from dcft_kernels import autocast, rounding, torch_backend
from dcft_kernels.adapter import Adapter, Geometry, Gradients, Needs, Side, dtype_of_U, saved
from dcft_kernels.nonlinearity import function_of

LIBRARY = torch.library.Library("dcft_kernels", "DEF")

# An adapter as operators take it: tensors, numbers, and the strategy that runs.
_ADAPTER = (
    "Tensor dcft_A, Tensor dcft_B, Tensor dcft_C, Tensor? seed, float scaling, SymInt[] geometry, "
    "float dropout_p, str strategy"
)
_ADAPTER_ARGUMENTS = 8
_FACTORS = "Tensor dcft_A, Tensor dcft_B, Tensor dcft_C, float scaling, SymInt[] geometry"

LIBRARY.define(
    f"forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? y, {_ADAPTER}) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"backward(Tensor g, Tensor? x, Tensor? u, Tensor? weight, {_ADAPTER}, bool[] needs, "
    "Tensor? grad_u)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"delta_weight({_FACTORS}) -> Tensor")
LIBRARY.define(
    f"delta_weight_backward(Tensor grad, {_FACTORS}, bool[] needs) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"merge(Tensor weight, {_FACTORS}, Tensor? seed) -> Tensor")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Adapter,
    strategy: str,
    nonlinearity: str | None = None,
) -> Tensor:
    """`x W^T + b + dropout(x) DW^T`; `x [T, n]`, result `[T, m]`."""
    if strategy == "plain":
        return _plain(x, weight, bias, None, adapter, nonlinearity)
    if strategy == "reference":
        return _reference().linear(x, weight, bias, adapter)
    return _entry_point(x)(x, weight, bias, None, *_flatten(adapter, strategy))[0]


def update(
    y: Tensor, x: Tensor, adapter: Adapter, strategy: str, nonlinearity: str | None = None
) -> Tensor:
    """A new `y + dropout(x) DW^T`; `y [T, m]`, `x [T, n]`."""
    if strategy == "plain":
        return _plain(x, None, None, y, adapter, nonlinearity)
    if strategy == "reference":
        return _reference().update(y, x, adapter)
    return _entry_point(x)(x, None, None, y, *_flatten(adapter, strategy))[0]


def _plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
    nonlinearity: str | None,
) -> Tensor:
    h = None if nonlinearity is None else function_of(nonlinearity)
    with autocast.suspended(x):
        y = base if weight is None else F.linear(x, weight, bias)
        return torch_backend.plain(saved(y), x, adapter, h)


def _entry_point(x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """How this call runs: as an operator, recorded by autograd, or neither."""
    if _is_traced(x):
        return torch.ops.dcft_kernels.forward
    return _Layer.apply if torch.is_grad_enabled() else _forward


def _is_traced(tensor: Tensor) -> bool:
    """Whether a compiler or a tensor subclass, such as a fake tensor, has to see an operator."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter)


def _flatten(adapter: Adapter, strategy: str) -> tuple[Any, ...]:
    A, B, C, scaling, (rank, outputs, inputs), dropout_p, seed = adapter
    return A, B, C, seed, scaling, (rank, *outputs, *inputs), dropout_p, strategy


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
def _geometry(rank: int, *sides: int) -> Geometry:
    return Geometry(rank, Side(*sides[:4]), Side(*sides[4:]))


def _module(strategy: str, tokens: int) -> Any:
    """Where the strategy is implemented. Empty inputs launch no kernel and run in PyTorch."""
    if strategy == "reference":
        return _reference()
    if strategy in ("torch", "plain") or tokens == 0:
        return torch_backend
    from dcft_kernels.triton import passes

    return passes


def _reference() -> Any:
    from dcft_kernels import reference  # loaded only when it is requested by name

    return reference


# ---------------------------------------------------------------------------------------------
# The layer


@torch.library.impl(LIBRARY, "forward", "CompositeExplicitAutograd")
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weight, bias, y, *adapter, strategy = arguments
    with autocast.suspended(x):
        return _module(strategy, x.shape[0]).forward(x, weight, bias, y, _unflatten(*adapter))


@torch.library.register_fake("dcft_kernels::forward", lib=LIBRARY)
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, _, A, _, C, _, _, (_, out_features, *_), _, strategy = arguments
    u = x.new_empty(x.shape[0], A.shape[0], C.shape[1], dtype=dtype_of_U(x.dtype, strategy))
    return x.new_empty(x.shape[0], out_features), u


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep for the backward pass what the requested gradients read, and nothing else."""
    x, weight, _, _, *adapter = inputs
    need_x, need_weight, need_bias, _, *need_factors = ctx.needs_input_grad[:7]
    needs = Needs(need_x, need_weight, need_bias, *need_factors)
    ctx.needs = needs
    ctx.numbers = adapter[4:]
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if needs.A or needs.weight else None,
        output[1] if needs.B or needs.C else None,
        weight if needs.x else None,
        *adapter[:4],
    )


def _backward(ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None) -> tuple[Any, ...]:
    """Gradients of all inputs of `forward`."""
    x, u, weight, *tensors = ctx.saved_tensors
    adapter = (*tensors, *ctx.numbers)
    gradients = Gradients()
    g = grad_y
    if g is None and grad_u is not None:
        # Only a double backward reaches U and not y.
        g = grad_u.new_zeros(grad_u.shape[0], adapter[5][1], dtype=ctx.dtype)
    if g is not None and _is_traced(g) and not torch.is_grad_enabled():
        results = torch.ops.dcft_kernels.backward(
            g, x, u, weight, *adapter, list(ctx.needs), grad_u
        )
        gradients = Gradients(*_those_needed(results, ctx.needs))
    elif g is not None:
        gradients = _gradients(g, x, u, weight, adapter, ctx.needs, grad_u)
    grad_x, grad_weight, grad_bias, *grad_factors = gradients
    return (
        grad_x,
        grad_weight,
        grad_bias,
        grad_y if ctx.needs_input_grad[3] else None,
        *grad_factors,
        *(None,) * (_ADAPTER_ARGUMENTS - 3),
    )


def _gradients(
    g: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    weight: Tensor | None,
    adapter: Sequence[Any],
    needs: Needs,
    grad_u: Tensor | None,
) -> Gradients:
    """The strategy's backward pass, or plain operations where autograd or a transform sees them."""
    *values, strategy = adapter
    with autocast.suspended(g):
        # Only a double backward has a gradient of U, or records its own operations.
        if grad_u is not None or torch.is_grad_enabled() or _is_followed(g):
            return torch_backend.plain_backward(g, x, u, weight, _unflatten(*values), needs, grad_u)
        module = _module(strategy, g.shape[0])
        return module.backward(g, x, u, weight, _unflatten(*values), needs)


def _is_followed(g: Tensor) -> bool:
    """Whether a transform or forward mode follows the backward pass, operation by operation."""
    functorch = torch._C._are_functorch_transforms_active()
    batched = functorch or torch._C._functorch.is_legacy_batchedtensor(g)
    return batched or forward_ad._current_level >= 0


@torch.library.impl(LIBRARY, "backward", "CompositeExplicitAutograd")
def _backward_operator(g: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    x, u, weight, *adapter, needs, grad_u = arguments
    return _as_tensors(g, _gradients(g, x, u, weight, adapter, Needs(*needs), grad_u))


@torch.library.register_fake("dcft_kernels::backward", lib=LIBRARY)
def _backward_fake(g: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, A, B, C, _, _, geometry, _, _, needs, _ = arguments
    (tokens, out_features), in_features = g.shape, geometry[5]
    base_shapes = ((tokens, in_features), (out_features, in_features), (out_features,))
    shapes = (*base_shapes, A.shape, B.shape, C.shape)
    likes = (g, g, g, A, B, C)
    return tuple(
        like.new_empty(shape) if needed else g.new_empty(0)
        for like, shape, needed in zip(likes, shapes, needs, strict=True)
    )


class _Layer(torch.autograd.Function):
    """The layer with its gradients, as an operation that autograd records."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        # Not by way of `_forward`: every Python call counts where a layer is small.
        weight, bias, y, *adapter, strategy = arguments
        with autocast.suspended(x):
            module = _module(strategy, x.shape[0])
            output = module.forward(x, weight, bias, y, _unflatten(*adapter))
        _save(ctx, (x, *arguments), output)
        return output

    backward = staticmethod(_backward)


torch.library.register_autograd(
    "dcft_kernels::forward", _backward, setup_context=_save, lib=LIBRARY
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
    if strategy != "row_block":
        return _module(strategy, 1).delta_weight(adapter)
    A, B, C, _, *numbers = _flatten(adapter, strategy)
    return torch.ops.dcft_kernels.delta_weight(A, B, C, *numbers[:2])


def merge(weight: Tensor, adapter: Adapter, seed: Tensor | None, strategy: str) -> Tensor:
    """A new `weight + scaling * DW`, rounded once; strides as `weight`'s. Not differentiable."""
    if strategy == "row_block":
        A, B, C, _, *numbers = _flatten(adapter, strategy)
        return torch.ops.dcft_kernels.merge(weight, A, B, C, *numbers[:2], seed)
    out = torch.empty_like(weight)
    _store_sum(weight, adapter, seed, strategy, out)
    return out


def merge_(weight: Tensor, adapter: Adapter, seed: Tensor | None, strategy: str) -> None:
    """`weight += scaling * DW` in place, rounded once. Not differentiable."""
    if _is_traced(weight):
        weight.copy_(merge(weight, adapter, seed, strategy))
        return
    _store_sum(weight, adapter, seed, strategy, weight)
    if strategy == "row_block":
        # Kernels write behind autograd's back: whatever it has saved of the weight is stale.
        torch.autograd.graph.increment_version(weight)


def _store_sum(
    weight: Tensor, adapter: Adapter, seed: Tensor | None, strategy: str, out: Tensor
) -> None:
    """Write `weight + scaling * DW`, in float32 or wider, to `out`, which may be `weight`."""
    if strategy == "row_block":
        _expand().expand(adapter, out=out, weight=weight, seed=seed)
        return
    dense = _module(strategy, 1).delta_weight(adapter.widened(weight.dtype))
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


@torch.library.impl(LIBRARY, "delta_weight_backward", "CompositeExplicitAutograd")
def _delta_weight_backward_operator(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *factors, needs = arguments
    gradients = _expand().expand_backward(grad, _dense(*factors), tuple(needs))
    return _as_tensors(grad, gradients)


@torch.library.register_fake("dcft_kernels::delta_weight_backward", lib=LIBRARY)
def _delta_weight_backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *factors, _, _, needs = arguments
    return tuple(
        factor.new_empty(factor.shape) if needed else grad.new_empty(0)
        for factor, needed in zip(factors, needs, strict=True)
    )


def _delta_weight_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.numbers = inputs[3:]


def _delta_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    factors, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
    gradients: list[Tensor | None]
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        # A double backward, or forward mode: the same values as differentiable operations.
        wanted = [factor for factor, needed in zip(factors, needs, strict=True) if needed]
        with torch.enable_grad():
            dense = torch_backend.delta_weight(_dense(*factors, *ctx.numbers))
            computed = iter(torch.autograd.grad(dense, wanted, grad, create_graph=True))
        gradients = [next(computed) if needed else None for needed in needs]
    else:
        operator = torch.ops.dcft_kernels.delta_weight_backward
        gradients = _those_needed(operator(grad, *factors, *ctx.numbers, list(needs)), needs)
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
    _store_sum(weight, _dense(*factors), seed, "row_block", out)
    return out


@torch.library.register_fake("dcft_kernels::merge", lib=LIBRARY)
def _merge_fake(weight: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(weight)
