"""Layers that share one input, by the Triton kernels; see `dcft_kernels.triton.group`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcft_kernels import autocast, torch_backend
from dcft_kernels.adapter import Adapter
from dcft_kernels.gradients import Gradients, Needs
from dcft_kernels.ops.library import LIBRARY, needs_dispatcher, records, unflatten

# `biases` are those there are: of lists with a None among the tensors, PyTorch's autograd for
# operators sees none. `stride` has a pair (out, in) for each layer.
_ADAPTERS_SCHEMA = (
    "Tensor[] dcft_A, Tensor[] dcft_B, Tensor[] dcft_C, Tensor? seed, "
    "float[] scaling, int[] stride, float dropout_p"
)
LIBRARY.define(
    "linear_group(Tensor x, Tensor[] weights, Tensor[] biases, bool[] has_bias, "
    f"{_ADAPTERS_SCHEMA}) -> (Tensor[], Tensor)"
)
LIBRARY.define(
    "linear_group_backward(Tensor?[] g, Tensor? x, Tensor? u, Tensor[] weights, "
    f"{_ADAPTERS_SCHEMA}, SymInt in_features, bool[] needs) -> Tensor[]"
)

# Gradients that one layer can be asked for, and thus flags in `needs` and results to a layer.
_PER_LAYER = len(Needs._fields)


def linear_group(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], adapters: list[Adapter]
) -> list[Tensor]:
    """Every layer's `y [T, m_i]`.

    Args:
        x: `[T, n]`.
        weights: `[m_i, n]` each.
        biases: `[m_i]` or None each.
        adapters: with one input geometry, one seed, and a sum of ranks that the kernels take.
    """
    if not needs_dispatcher(x):
        if not records():
            return _run_group(x, weights, biases, adapters)[0]
        factors = [factor for name in "ABC" for factor in (getattr(a, name) for a in adapters)]
        *outputs, _ = _EagerGroup.apply(x, adapters, *weights, *biases, *factors)
        return outputs
    first = adapters[0]
    sides = [(each.geometry.outputs, each.geometry.inputs) for each in adapters]
    outputs, _ = torch.ops.dcft_kernels.linear_group(
        x,
        weights,
        [bias for bias in biases if bias is not None],
        [bias is not None for bias in biases],
        [adapter.A for adapter in adapters],
        [adapter.B for adapter in adapters],
        [adapter.C for adapter in adapters],
        first.seed,
        [adapter.scaling for adapter in adapters],
        [side.stride for pair in sides for side in pair],
        first.dropout_p,
    )
    return outputs


def _adapters(
    arguments: Sequence[Any], in_features: int, weights: Sequence[Tensor]
) -> list[Adapter]:
    As, Bs, Cs, seed, scalings, stride, dropout_p = arguments
    strides = zip(stride[::2], stride[1::2], strict=True)
    adapters = []
    for A, B, C, scaling, pair, weight in zip(As, Bs, Cs, scalings, strides, weights, strict=True):
        one = (A, B, C, seed, scaling, pair, dropout_p, "auto")
        adapters.append(unflatten(one, in_features, weight.shape[0])[0])
    return adapters


def _by_layer(biases: Sequence[Any], has_bias: Sequence[bool]) -> list[Any]:
    """What there is of every layer that has a bias, with None for the others."""
    there = iter(biases)
    return [next(there) if has else None for has in has_bias]


@torch.library.impl(LIBRARY, "linear_group", "CompositeExplicitAutograd")
def _group_kernel(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], has_bias: list[bool], *arguments: Any
) -> tuple[list[Tensor], Tensor]:
    adapters = _adapters(arguments, x.shape[1], weights)
    return _run_group(x, weights, _by_layer(biases, has_bias), adapters)


def _run_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    adapters: list[Adapter],
) -> tuple[list[Tensor], Tensor]:
    """Every layer's `y`, and all their `U`."""
    from dcft_kernels.triton import group

    with autocast.suspended(x):
        return group.linear_group(x, weights, biases, adapters)


@torch.library.register_fake("dcft_kernels::linear_group", lib=LIBRARY)
def _group_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], has_bias: list[bool], *arguments: Any
) -> tuple[list[Tensor], Tensor]:
    As, _, Cs = arguments[:3]
    rank = sum(A.shape[0] for A in As)
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    return outputs, x.new_empty(x.shape[0], rank, Cs[0].shape[1])


@torch.library.impl(LIBRARY, "linear_group_backward", "CompositeExplicitAutograd")
def _group_backward_kernel(
    gs: list[Tensor | None],
    x: Tensor | None,
    u: Tensor | None,
    weights: list[Tensor],
    *arguments: Any,
) -> list[Tensor]:
    *adapter_arguments, in_features, flags = arguments
    adapters = _adapters(adapter_arguments, in_features, weights)
    like = next(g for g in gs if g is not None)
    layers = _run_group_backward(gs, x, u, weights, adapters, _needs(flags))
    # An operator returns tensors only: an empty one stands for a gradient that there is none of.
    return [
        like.new_empty(0) if grad is None else grad.contiguous()
        for layer in layers
        for grad in layer
    ]


def _run_group_backward(
    gs: Sequence[Tensor | None],
    x: Tensor | None,
    u: Tensor | None,
    weights: Sequence[Tensor | None],
    adapters: list[Adapter],
    needs: Sequence[Needs],
) -> list[Gradients]:
    """Every layer's gradients, where there is a `g`."""
    from dcft_kernels.triton import group

    like = next(g for g in gs if g is not None)
    with autocast.suspended(like):
        return group.linear_group_backward(gs, x, u, weights, adapters, needs)


@torch.library.register_fake("dcft_kernels::linear_group_backward", lib=LIBRARY)
def _group_backward_fake(
    gs: list[Tensor | None],
    x: Tensor | None,
    u: Tensor | None,
    weights: list[Tensor],
    *arguments: Any,
) -> list[Tensor]:
    As, Bs, Cs = arguments[:3]
    *_, in_features, flags = arguments
    like = next(g for g in gs if g is not None)
    results = []
    for index, (g, weight, A, B, C, needs) in enumerate(
        zip(gs, weights, As, Bs, Cs, _needs(flags), strict=True)
    ):
        full = (
            like.new_empty(like.shape[0], in_features),
            like.new_empty(weight.shape[0], in_features),
            like.new_empty(weight.shape[0]),
            A.new_empty(A.shape),
            B.new_empty(B.shape),
            C.new_empty(C.shape),
        )
        there = _has_gradients(g is not None, index, needs)
        results += [
            grad if is_there else like.new_empty(0)
            for grad, is_there in zip(full, there, strict=True)
        ]
    return results


def _has_gradients(has_g: bool, index: int, needs: Needs) -> Needs:
    """Which of a layer's results are gradients: `x`'s is in the first place, the sum for all."""
    return Needs(
        needs.x and index == 0,
        needs.weight and has_g,
        needs.bias and has_g,
        needs.A and has_g,
        needs.B and has_g,
        needs.C and has_g,
    )


def _needs(flags: Sequence[bool]) -> list[Needs]:
    return [Needs(*flags[start : start + _PER_LAYER]) for start in range(0, len(flags), _PER_LAYER)]


def _group_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, weights, biases, has_bias, As, Bs, Cs, seed, *numbers = inputs
    # One flag for each tensor of each list here, however they are nested, and one for `has_bias`.
    flags = iter(torch.utils._pytree.tree_leaves(list(ctx.needs_input_grad)))
    need_x = next(flags)
    need_weights = [next(flags) for _ in weights]
    need_biases = [bool(need) for need in _by_layer([next(flags) for _ in biases], has_bias)]
    next(flags)
    need_A, need_B, need_C = ([next(flags) for _ in tensors] for tensors in (As, Bs, Cs))
    ctx.has_bias = has_bias
    ctx.needs = [
        Needs(need_x, *flags)
        for flags in zip(need_weights, need_biases, need_A, need_B, need_C, strict=True)
    ]
    ctx.numbers = numbers
    ctx.in_features = x.shape[1]
    ctx.layers = len(weights)
    ctx.set_materialize_grads(False)
    keep_x = any(needs.A or needs.weight for needs in ctx.needs)
    keep_u = any(needs.B or needs.C for needs in ctx.needs)
    ctx.save_for_backward(
        x if keep_x else None, output[1] if keep_u else None, seed, *weights, *As, *Bs, *Cs
    )


def _group_autograd(
    ctx: Any, grads_y: list[Tensor | None], grad_u: Tensor | None
) -> tuple[Any, ...]:
    x, u, seed, *tensors = ctx.saved_tensors
    weights, As, Bs, Cs = (
        tensors[start : start + ctx.layers] for start in range(0, 4 * ctx.layers, ctx.layers)
    )
    arguments = (As, Bs, Cs, seed, *ctx.numbers)
    if torch.is_grad_enabled() or grad_u is not None:
        # A double backward: every layer for itself, as differentiable operations.
        layers = _differentiable(
            grads_y,
            grad_u,
            x,
            u,
            weights,
            _adapters(arguments, ctx.in_features, weights),
            ctx.needs,
        )
    elif all(g is None for g in grads_y):
        layers = [Gradients()] * ctx.layers
    else:
        flags = [flag for needs in ctx.needs for flag in needs]
        results = torch.ops.dcft_kernels.linear_group_backward(
            grads_y, x, u, weights, *arguments, ctx.in_features, flags
        )
        layers = [
            Gradients(
                *(
                    grad if is_there else None
                    for grad, is_there in zip(
                        results[index * _PER_LAYER : (index + 1) * _PER_LAYER],
                        _has_gradients(grads_y[index] is not None, index, needs),
                        strict=True,
                    )
                )
            )
            for index, needs in enumerate(ctx.needs)
        ]
    _, grad_weights, grad_biases, *factors = map(list, zip(*layers, strict=True))
    grad_biases = [g for g, has in zip(grad_biases, ctx.has_bias, strict=True) if has]
    return (layers[0].x, grad_weights, grad_biases, None, *factors, None, None, None, None)


def _differentiable(
    gs: list[Tensor | None],
    grad_u: Tensor | None,
    x: Tensor | None,
    u: Tensor | None,
    weights: Sequence[Tensor | None],
    adapters: list[Adapter],
    needs: Sequence[Needs],
) -> list[Gradients]:
    """`linear_group_backward` in PyTorch operations, with a gradient of `U` too."""
    layers: list[Gradients] = []
    total: Tensor | None = None
    start = 0
    for g, weight, adapter, need in zip(gs, weights, adapters, needs, strict=True):
        columns = slice(start, start + adapter.geometry.rank)
        start = columns.stop
        if g is None:
            if grad_u is None:
                layers.append(Gradients())
                continue
            g = grad_u.new_zeros(grad_u.shape[0], adapter.geometry.outputs.size)
        with autocast.suspended(g):
            gradients = torch_backend.backward(
                g,
                x,
                None if u is None else u[:, columns],
                weight,
                adapter,
                need,
                None if grad_u is None else grad_u[:, columns],
            )
        if gradients.x is not None:
            total = gradients.x if total is None else total + gradients.x
        layers.append(gradients)
    return [layers[0]._replace(x=total), *layers[1:]]


torch.library.register_autograd(
    "dcft_kernels::linear_group", _group_autograd, setup_context=_group_setup, lib=LIBRARY
)


class _EagerGroup(torch.autograd.Function):
    """`linear_group` outside of a compiler: the same passes, without the dispatcher.

    The tensors are weights, biases (None for none), and the adapters' `A`, `B` and `C`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, adapters: list[Adapter], *tensors: Any) -> tuple[Tensor, ...]:
        count = len(adapters)
        weights, biases, *factors = _chunks(tensors, count)
        outputs, u = _run_group(x, weights, biases, adapters)
        need_x, _, *flags = ctx.needs_input_grad
        ctx.needs = [
            Needs(need_x, *of_layer) for of_layer in zip(*_chunks(flags, count), strict=True)
        ]
        ctx.numbers = [adapter[3:6] for adapter in adapters]
        ctx.set_materialize_grads(False)
        keep_x = any(needs.A or needs.weight for needs in ctx.needs)
        keep_u = any(needs.B or needs.C for needs in ctx.needs)
        ctx.save_for_backward(
            x if keep_x else None,
            u if keep_u else None,
            adapters[0].seed,
            *(weights if need_x else [None] * count),
            *(factor for of_name in factors for factor in of_name),
        )
        return (*outputs, u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *gs, grad_u = grads
        x, u, seed, *tensors = ctx.saved_tensors
        weights, As, Bs, Cs = _chunks(tensors, len(gs))
        adapters = [
            Adapter(A, B, C, scaling, geometry, dropout_p, seed)
            for A, B, C, (scaling, geometry, dropout_p) in zip(As, Bs, Cs, ctx.numbers, strict=True)
        ]
        if torch.is_grad_enabled() or grad_u is not None:
            # A double backward: every layer for itself, as differentiable operations.
            layers = _differentiable(gs, grad_u, x, u, weights, adapters, ctx.needs)
        elif all(g is None for g in gs):
            layers = [Gradients()] * len(gs)
        else:
            layers = _run_group_backward(gs, x, u, weights, adapters, ctx.needs)
        _, *others = zip(*layers, strict=True)
        return (layers[0].x, None, *(grad for of_name in others for grad in of_name))


def _chunks(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Values in runs of `size`."""
    return [values[start : start + size] for start in range(0, len(values), size)]
