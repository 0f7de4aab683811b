"""`explain`: which backend and strategy run a layer, why, with its counted bytes and flops."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from dcft_kernels import validation
from dcft_kernels.adapter import dtype_of_U
from dcft_kernels.backends import KERNELS, select, why_not_triton
from dcft_kernels.torch_backend import compute_dtype

if TYPE_CHECKING:
    from dcft_kernels.linear import DCFTLinear


class Work(NamedTuple):
    """Counted work: multiply-adds count twice, and every pass over a tensor counts its bytes."""

    bytes: int
    flops: int

    def __str__(self) -> str:
        return f"{_in_units(self.bytes)}B, {_in_units(self.flops)}FLOP"


def _in_units(count: int) -> str:
    """The count with an SI prefix: `12.6 M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:,.1f} {prefix}"
    return f"{count} "


class Explanation(NamedTuple):
    """The answer of `explain`; `str` makes a short text of it."""

    layer: str
    tokens: int
    # "seeded", "row_block", "torch", "reference", or "merged": one plain product. Of the forward
    # pass; where another one runs the backward pass, the reason says so.
    strategy: str
    reason: str
    frozen: Work  # the base layer alone, forward and backward with the gradient of its input
    adapter: Work  # what the adapter adds

    def __str__(self) -> str:
        return (
            f"{self.layer}, {self.tokens} tokens\n"
            f"runs {self.strategy}: {self.reason}\n"
            "forward and backward, counted:\n"
            f"  frozen layer   {self.frozen}\n"
            f"  adapter        {self.adapter}"
        )


def explain(layer: DCFTLinear, *, tokens: int, dtype: torch.dtype | None = None) -> Explanation:
    """Say which backend and strategy run a layer, and why, without running it.

    Args:
        layer: a `DCFTLinear`, on the meta device too.
        tokens: rows of the input, all its leading dimensions together.
        dtype: of the tokens, such as autocast's; None is the weight's.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: `tokens` below one.
        RuntimeError: the layer's backend or strategy cannot run here.
    """
    if not hasattr(layer, "geometry") or not hasattr(layer, "dcft_A"):
        raise TypeError(f"layer: expected a DCFTLinear, got {type(layer).__name__}")
    tokens = validation.positive_int("tokens", tokens)
    dtype = layer.weight.dtype if dtype is None else validation.float_dtype("dtype", dtype)
    strategy, backward, reason = _choice(layer, tokens, dtype)
    rank, outputs, inputs, per_rank = layer.geometry
    m, n = outputs.size, inputs.size
    kernel = f"kernel {outputs.width}x{inputs.width}" + " per rank" * per_rank
    name = f"DCFT layer {n} -> {m}, rank {rank}, {kernel}, {dtype}"
    # y = x W^T and gx = g W, each reading two matrices and writing one.
    frozen = Work(2 * dtype.itemsize * (tokens * (n + m) + m * n), 4 * tokens * m * n)
    adapter = _adapter_work(layer, tokens, dtype, strategy, backward)
    return Explanation(name, tokens, strategy, reason, frozen, adapter)


def _choice(layer: DCFTLinear, tokens: int, dtype: torch.dtype) -> tuple[str, str, str]:
    """The strategies that run forward and backward, and why."""
    if layer.merged:
        return "merged", "merged", "the layer is merged, which leaves one plain product"
    if layer.nonlinearity is not None:
        between = f"nonlinearity={layer.nonlinearity!r} is between the factors"
        return "torch", "torch", f"{between}, which no kernel takes"
    adapter = layer.adapter
    forward = backward = select(layer.backend, adapter, dtype, layer.strategy)
    if forward in KERNELS:
        from dcft_kernels.triton import passes

        dropout = layer.training and layer.dropout > 0
        strategy_for = functools.partial(
            passes.strategy_for, backward, layer.weight, layer.geometry, dtype, dropout=dropout
        )
        forward, backward = strategy_for(forward_tokens=tokens), strategy_for()
    reason = why_not_triton(adapter, dtype) or "the kernels take this layer"
    for argument in ("backend", "strategy"):
        asked = getattr(layer, argument)
        if asked != "auto":
            reason = f"requested by {argument}={asked!r}"
    if backward != forward:
        reason += f"; its backward pass runs {backward}"
    return forward, backward, reason


def _adapter_work(
    layer: DCFTLinear, tokens: int, dtype: torch.dtype, strategy: str, backward: str
) -> Work:
    """What the adapter adds to the frozen layer, forward and backward."""
    rank, outputs, inputs, _ = layer.geometry
    m, n, r = outputs.size, inputs.size, rank * inputs.width
    if strategy == "merged":
        return Work(0, 0)
    if strategy == "reference":
        # DW is built, multiplied with twice, and its dense gradient is a product once more.
        products = 3 * (tokens * (n + m) + m * n)
        return Work(dtype.itemsize * products, 6 * tokens * m * n)
    if strategy == "torch":
        # Six products, each of rank r: U, y, Ub, gx, gP and gQ. U and Ub are read twice.
        itemsize = compute_dtype(dtype, layer.dcft_A.device).itemsize
        passes = dtype.itemsize * 4 * (n + m) + itemsize * 6 * r
        return Work(tokens * passes, 6 * tokens * r * (n + m))
    there, _ = _kernels_work(layer, tokens, dtype, strategy)
    _, back = _kernels_work(layer, tokens, dtype, backward)
    return Work(there.bytes + back.bytes, there.flops + back.flops)


def _kernels_work(
    layer: DCFTLinear, tokens: int, dtype: torch.dtype, strategy: str
) -> tuple[Work, Work]:
    """What the adapter adds forward, and backward, by a strategy of the kernels."""
    rank, outputs, inputs, _ = layer.geometry
    m, n, r = outputs.size, inputs.size, rank * inputs.width
    mixing = 2 * tokens * rank * outputs.width * inputs.width  # of C and one of U, V, Vb, gC
    if strategy == "seeded":
        # The passes read x and g once more, the product of gx reads x. U is written once and read
        # twice, Ub, Q and P written and read once.
        forward = tokens * (n + 2 * r) + 2 * r * m
        backward = tokens * (n + m + 3 * r) + 2 * r * n
        # U in a pass, then columns of a product; Vb and gB in a pass, then columns and gA.
        forward_flops = 2 * tokens * (rank * n + r * m)
        backward_flops = 4 * tokens * (rank * m + r * n) + 3 * mixing
    else:
        # Forward: read x, add to y. Backward: read g and x, add to gx. U is written and read once.
        from dcft_kernels.triton.row_block import ranks_per_launch

        launches = -(-rank // ranks_per_launch(layer.geometry, dtype.itemsize))
        u = tokens * r * dtype_of_U(dtype).itemsize // dtype.itemsize
        forward = launches * tokens * (n + 2 * m) + u
        backward = launches * tokens * (3 * n + m) + u
        # Sums over a window's features: U and y; then Vb, gB, gA and gx.
        sums = sum(2 * tokens * rank * s.size * s.width // s.stride for s in (inputs, outputs))
        forward_flops, backward_flops = sums + mixing, 2 * sums + 3 * mixing
    return (
        Work(dtype.itemsize * forward, forward_flops),
        Work(dtype.itemsize * backward, backward_flops),
    )
