"""A layer's passes as launches, by one of two strategies.

    seeded      a pass over the tokens, then a product of ours that carries the adapter
    row_block   a pass that writes the adapter's part of the result, then the vendor's product
                added to it (`addmm_`, which rounds once more than a single product does)

Left to choose, `seeded` runs where it can (`seeded.why_not`), without dropout, and where the base
layer's product is computed here, with a weight that needs no copy (`seeded.is_describable`):
forward, if it has enough tiles (`seeded.has_work`), backward, if the gradient of `x` is needed.
Everything else runs by `row_block`, also what `seeded` was requested for and has no product. What
is kept for the backward pass is the same for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcft_kernels.adapter import Adapter, Geometry, Gradients, Needs, dtype_of_U, saved
from dcft_kernels.triton import row_block, seeded
from dcft_kernels.triton.partials import NO_GRADS


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
    strategy: str = "triton",
) -> tuple[Tensor, Tensor]:
    """The layer's `y [T, m]`, and `U [T, k*d_in]` for the backward; see `torch_backend`.

    `strategy` is a strategy's name, or `"triton"` to leave the choice.
    """
    tokens = x.shape[0]
    rank, outputs, inputs, _ = geometry = adapter.geometry
    dropout = adapter.seed is not None
    strategy = strategy_for(
        strategy, weight, geometry, x.dtype, dropout=dropout, forward_tokens=tokens
    )
    if strategy == "seeded" and weight is not None and tokens > 0:
        return seeded.forward(x, weight, bias, adapter)
    u = x.new_empty(tokens, rank * inputs.width, dtype=dtype_of_U(x.dtype))
    y = x.new_empty(tokens, outputs.size)
    if tokens > 0:
        row_block.shrink_expand(x, adapter, u=u, y=y, bias=bias, base=base)
    if weight is not None:
        y.addmm_(x, weight.t())
    return y, u


def backward(
    g: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter,
    needs: Needs,
    strategy: str = "triton",
) -> Gradients:
    """The gradients that `needs` asks for; arguments as `torch_backend.backward` and `forward`."""
    dropout = adapter.seed is not None
    strategy = strategy_for(strategy, weight, adapter.geometry, g.dtype, dropout=dropout)
    if strategy == "seeded" and needs.x and weight is not None and g.shape[0] > 0:
        found = seeded.backward(g, x, U, weight, adapter, needs)
    else:
        found = _row_block_backward(g, x, U, weight, adapter, needs)
    return found._replace(
        weight=g.t() @ saved(x) if needs.weight else None,
        bias=g.sum(0) if needs.bias else None,
    )


def strategy_for(
    strategy: str,
    weight: Tensor | None,
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    dropout: bool,
    forward_tokens: int | None = None,
) -> str:
    """The strategy of a pass, `"seeded"` or `"row_block"`.

    The pass is a forward one over `forward_tokens` tokens, or, if that is None, a backward one in
    which the gradient of `x` is needed.

    Raises:
        RuntimeError: `"seeded"` was requested, and there is dropout.
    """
    if strategy == "seeded" and dropout:
        raise RuntimeError(
            "strategy='seeded' cannot run: it takes no dropout; use strategy='auto' or 'row_block'"
        )
    if strategy != "triton":
        return strategy
    if dropout or weight is None or not seeded.is_describable(weight):
        return "row_block"
    if seeded.why_not(geometry, dtype, weight.device) is not None:
        return "row_block"
    if forward_tokens is None:
        return "seeded"
    enough = seeded.has_work(forward_tokens, geometry.outputs.size, weight.device)
    return "seeded" if enough else "row_block"


def _row_block_backward(
    g: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter,
    needs: Needs,
) -> Gradients:
    gx = g.new_empty(g.shape[0], adapter.geometry.inputs.size) if needs.x else None
    factors = (needs.A, needs.B, needs.C)
    grads = NO_GRADS
    if g.shape[0] == 0:
        found = zip(adapter[:3], factors, strict=True)
        grads = tuple([torch.zeros_like(factor) if needed else None for factor, needed in found])
    elif needs.x or any(factors):
        grads = row_block.backward(
            g,
            saved(x) if needs.A else None,
            saved(U) if needs.B or needs.C else None,
            adapter,
            gx,
            factors,
        )
    if gx is not None and weight is not None:
        gx.addmm_(g, weight)
    return Gradients(gx, None, None, *grads)
