"""`explain`: which backend and strategy run a layer, why, with its counted bytes and flops."""

from __future__ import annotations

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
    strategy: str  # "seeded", "row_block", "torch", "reference", or "merged": one plain product
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
    strategy, reason = _choice(layer, tokens, dtype)
    rank, outputs, inputs = layer.geometry
    m, n = outputs.size, inputs.size
    name = f"DCFT layer {n} -> {m}, rank {rank}, kernel {outputs.width}x{inputs.width}, {dtype}"
    # y = x W^T and gx = g W, each reading two matrices and writing one.
    frozen = Work(2 * dtype.itemsize * (tokens * (n + m) + m * n), 4 * tokens * m * n)
    return Explanation(
        name, tokens, strategy, reason, frozen, _adapter_work(layer, tokens, dtype, strategy)
    )


def _choice(layer: DCFTLinear, tokens: int, dtype: torch.dtype) -> tuple[str, str]:
    """The strategy that runs, and why."""
    if layer.merged:
        return "merged", "the layer is merged, which leaves one plain product"
    if layer.nonlinearity is not None:
        between = f"nonlinearity={layer.nonlinearity!r} is between the factors"
        return "torch", f"{between}, which no kernel takes"
    adapter = layer.adapter
    strategy = select(layer.backend, adapter, dtype, layer.strategy)
    if strategy in KERNELS:
        from dcft_kernels.triton import passes

        dropout = layer.training and layer.dropout > 0
        strategy = passes.forward_strategy(
            strategy, tokens, layer.weight, layer.geometry, dtype, dropout=dropout
        )
    for argument in ("strategy", "backend"):
        asked = getattr(layer, argument)
        if asked != "auto":
            return strategy, f"requested by {argument}={asked!r}"
    return strategy, why_not_triton(adapter, dtype) or "the kernels take this layer"


def _adapter_work(layer: DCFTLinear, tokens: int, dtype: torch.dtype, strategy: str) -> Work:
    """What the adapter adds to the frozen layer, forward and backward."""
    rank, outputs, inputs = layer.geometry
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
    mixing = rank * outputs.width * inputs.width
    if strategy == "seeded":
        # The passes read x and g once more, the product of gx reads x. U is written once and read
        # twice, Ub, Q and P written and read once.
        passes = tokens * (2 * n + m + 5 * r) + 2 * r * (n + m)
        # U, Vb and gB in the passes; further columns of both products, and gA.
        sums = rank * (n + 2 * m) + r * (2 * n + m)
        return Work(dtype.itemsize * passes, 2 * tokens * (sums + 3 * mixing))
    # Forward: read x, add to y. Backward: read g and x, add to gx. U is written once, read once.
    passes = dtype.itemsize * (4 * n + 3 * m) + dtype_of_U(dtype).itemsize * 2 * r
    # Six sums over a window's features (U, y, Vb, gB, gA, gx), and C four times per token and rank.
    sums = 3 * rank * (n * inputs.width // inputs.stride + m * outputs.width // outputs.stride)
    return Work(tokens * passes, 2 * tokens * (sums + 4 * mixing))
