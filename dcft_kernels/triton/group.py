"""Layers that share one input (q, k, v; gate, up): one pass over `x` forward, one backward.

The adapters' `A`, one above the other, are the `A` of an adapter whose rank is the sum of theirs:
it shrinks `x` for all of them at once, and on the way back takes the one pass over `x` and `gx`
for all. What lies between is each layer's own. See `passes` for a single layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcft_kernels.adapter import Adapter
from dcft_kernels.gradients import Gradients, Needs, saved
from dcft_kernels.triton import backward as backward_kernels
from dcft_kernels.triton.shrink_expand import shrink_expand


def linear_group(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], adapters: list[Adapter]
) -> tuple[list[Tensor], Tensor]:
    """Every layer's `y [T, m_i]`, and all their `U` side by side, `[T, sum of k_i, d_in]`.

    Args:
        x: `[T, n]`.
        weights: `[m_i, n]` each.
        biases: `[m_i]` or None each.
        adapters: with one input geometry and one seed.
    """
    joint = _joint(adapters)
    u = x.new_empty(x.shape[0], joint.geometry.rank * joint.geometry.inputs.width)
    shrink_expand(x, joint, u=u)
    outputs = []
    for weight, bias, adapter, columns in zip(
        weights, biases, adapters, _columns(u, adapters), strict=True
    ):
        y = x.new_empty(x.shape[0], weight.shape[0])
        shrink_expand(None, adapter, u=columns, bias=bias, y=y)
        outputs.append(y.addmm_(x, weight.t()))
    return outputs, u.unflatten(1, (joint.geometry.rank, joint.geometry.inputs.width))


def linear_group_backward(
    gs: Sequence[Tensor | None],
    x: Tensor | None,
    U: Tensor | None,
    weights: Sequence[Tensor | None],
    adapters: list[Adapter],
    needs: Sequence[Needs],
) -> list[Gradients]:
    """Every layer's gradients; that of `x`, the sum over all layers, in the first's place.

    Args:
        gs: gradients of the outputs, `[T, m_i]` each; None for an output that nothing depends on.
        x: `[T, n]`; may be None unless an `A` or a weight needs its gradient.
        U: `[T, sum of k_i, d_in]`; may be None unless a `B` or a `C` needs its gradient.
        weights: `[m_i, n]` each; may be None unless `x` needs its gradient.
        adapters: as in the forward.
        needs: which gradients to compute; `x` alike for all.
    """
    joint = _joint(adapters)
    like = next(g for g in gs if g is not None)
    width = joint.geometry.inputs.width
    # Nothing depends on a layer without a `g`, so it has no gradients, as if it stood alone.
    needs = [
        need if g is not None else Needs(need.x, False, False, False, False, False)
        for g, need in zip(gs, needs, strict=True)
    ]
    needs_x, needs_A = needs[0].x, any(need.A for need in needs)
    ub = like.new_empty(like.shape[0], joint.geometry.rank * width) if needs_x or needs_A else None
    u_columns = [None] * len(adapters) if U is None else _columns(U.flatten(1), adapters)
    ub_columns = [None] * len(adapters) if ub is None else _columns(ub, adapters)
    factors: list[tuple[Tensor | None, ...]] = []
    for g, adapter, need, u_part, ub_part in zip(
        gs, adapters, needs, u_columns, ub_columns, strict=True
    ):
        if g is None:
            if ub_part is not None:
                ub_part.zero_()
            factors.append((None, None, None))
        elif ub_part is not None or need.B or need.C:
            factors.append(
                backward_kernels.backward(
                    adapter, g=g, u=u_part, ub=ub_part, needs_B=need.B, needs_C=need.C
                )
            )
        else:
            factors.append((None, None, None))

    gx = like.new_empty(like.shape[0], joint.geometry.inputs.size) if needs_x else None
    grads_A: list[Tensor | None] = [None] * len(adapters)
    if ub is not None:
        grad_A, _, _ = backward_kernels.backward(
            joint, x=saved(x) if needs_A else None, ub=ub, gx=gx, needs_A=needs_A
        )
        if grad_A is not None:
            parts = grad_A.split([adapter.geometry.rank for adapter in adapters])
            grads_A = [
                part.to(adapter.A.dtype).clone() if need.A else None
                for part, adapter, need in zip(parts, adapters, needs, strict=True)
            ]
    if gx is not None:
        for g, weight in zip(gs, weights, strict=True):
            if g is not None:
                gx.addmm_(g, saved(weight))
    return [
        Gradients(
            gx if index == 0 else None,
            g.t() @ saved(x) if need.weight else None,
            g.sum(0) if need.bias else None,
            grads_A[index],
            *factors[index][1:],
        )
        for index, (g, need) in enumerate(zip(gs, needs, strict=True))
    ]


def _joint(adapters: list[Adapter]) -> Adapter:
    """The adapter that stands for all on the input side; its output side is never looked at."""
    first = adapters[0]
    rank = sum(adapter.geometry.rank for adapter in adapters)
    return first._replace(
        A=torch.cat([adapter.A for adapter in adapters]),
        geometry=first.geometry._replace(rank=rank),
    )


def _columns(u: Tensor, adapters: list[Adapter]) -> list[Tensor]:
    """Each adapter's columns of a `[T, sum of k_i*d_in]` tensor, as views."""
    width = adapters[0].geometry.inputs.width
    return list(u.split([adapter.geometry.rank * width for adapter in adapters], dim=1))
