"""The correctness gate: results are checked on the very input that is timed.

**One layer** (`check_layer`). A step's output, input gradient and parameter gradients are compared
with the dense linear layer that the provider is equal to, computed in float64 from the provider's
own parameters `p`:

    y = x W'^T + b',   gx = g W',   parameter gradients: autograd of W'(p), b'(p) at g^T x, sum_t g

The error budget is derived. Let `u` be the unit roundoff of the layer's dtype and `u_a` that of the
accumulators (float32 for 16-bit dtypes), `R` the number of values on the way to a result that are
rounded to the dtype, each about as large as the result, and `K` the number of terms that a result
sums. With zero-mean data the rounding errors add up like a random walk, so the relative error in
root mean square is at most

    e = sqrt(R) u + sqrt(K) u_a

For the largest of `N` elements, rounding to the dtype is bounded by `R u` times the largest value;
the sum of accumulator errors is nearly normal, with a largest value of `sqrt(2 ln N)` times its
deviation. Twice this is allowed. `R` is `AdaptedLayer.roundings`; `K` is `n + m + T` for the output
and the input gradient, which sum over some of the three in turn. A provider that forms a dense
gradient also reduces its `n m` elements to the `N` of a parameter's, in sums of `n m / N`.

**Blocks, models and kernels** (`check_against_peer`). Errors pass through many layers, so the
measure is PyTorch computing the same thing in the plainest way in the same dtype. Against a
computation in higher precision, an error may be twice the peer's plus a few roundings of the value,
in the largest element and in root mean square. A root mean square of `N` independent errors is
known to a relative `1 / sqrt(2 N)`, so for small tensors (`few`) the peer's counts
`1 + 3 / sqrt(N)` times. In a model of many layers the errors of a tensor grow from those of a few
early roundings and move `together`: there `N` is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed.methods import AdaptedLayer

_MARGIN = 2.0
_TOGETHER = 4.0  # 1 + 3 / sqrt(1)


@dataclass(frozen=True)
class LayerInput:
    """The input of a layer's step, in float64."""

    x: Tensor  # [T, n]
    g: Tensor | None  # [T, m]; None without a backward pass
    dense_gradient: Tensor | None  # g^T x [m, n]
    dtype: torch.dtype  # of the layer


def check_layer(
    given: LayerInput, adapted: AdaptedLayer, actual: Mapping[str, Tensor | None]
) -> str | None:
    """Why a layer's results are wrong, or None: the output "y" and the gradients by name."""
    T, n = given.x.shape
    for name, expected in expected_results(given, adapted):
        if name == "y":
            m = expected.shape[-1]
        terms = T + n + m
        if adapted.dense_gradient and name not in ("x", "y"):
            terms += n * m // expected.numel()
        allowed = budgets(given.dtype, expected, terms, adapted.roundings)
        reason = difference(actual.get(name), expected, *allowed)
        if reason is not None:
            return f"y: {reason}" if name == "y" else f"gradient of {name}: {reason}"
    return None


def expected_results(given: LayerInput, adapted: AdaptedLayer) -> Iterator[tuple[str, Tensor]]:
    """Float64 values of the output "y" and of the gradients of "x" and each parameter."""
    parameters = {
        name: p.detach().double().requires_grad_(p.requires_grad)
        for name, p in adapted.layer.named_parameters()
    }
    weight, bias = adapted.dense(parameters)
    y = given.x @ weight.detach().t()
    yield "y", y if bias is None else y.add_(bias.detach())
    if given.g is None:
        return
    yield "x", given.g @ weight.detach()
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trained:
        return
    roots = [(weight, given.dense_gradient)]
    if bias is not None:
        roots.append((bias, given.g.sum(0)))
    roots = [(value, grad) for value, grad in roots if value.requires_grad]
    gradients = torch.autograd.grad(
        [value for value, _ in roots], list(trained.values()), [grad for _, grad in roots]
    )
    yield from zip(trained, gradients, strict=True)


def budgets(
    dtype: torch.dtype, expected: Tensor, terms: int, roundings: int = 4
) -> tuple[float, float]:
    """The allowed root-mean-square and largest error of sums of `terms`, as derived above."""
    unit = torch.finfo(dtype).eps / 2
    accumulator = min(unit, torch.finfo(torch.float32).eps / 2)
    sums = math.sqrt(terms) * accumulator
    rms, largest = _rms(expected), _largest(expected)
    spread = math.sqrt(2 * math.log(max(2, expected.numel())))
    return (
        _MARGIN * (math.sqrt(roundings) * unit + sums) * rms,
        _MARGIN * (roundings * unit * largest + spread * sums * rms),
    )


def check_against_peer(
    actual: Mapping[str, Tensor | None],
    peer: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    together: bool = False,
    few: bool = False,
) -> str | None:
    """Why results are wrong, or None: their errors against those of a peer.

    Args:
        actual: what is checked, by name; a result that is missing or None is wrong.
        peer: the same from plain PyTorch in `dtype`.
        truth: the same in higher precision.
        dtype: of the computation.
        together: whether the errors of a tensor's elements depend on each other.
        few: whether tensors may be so small that the peer's error is a matter of luck.
    """
    unit = torch.finfo(dtype).eps
    for name, value in truth.items():
        value = value.detach().double()
        peer_error = (peer[name].detach().double() - value).abs()
        margin = _MARGIN * (1 + 3 / math.sqrt(max(1, value.numel())) if few else 1.0)
        margin = _MARGIN * _TOGETHER if together else margin
        rms_budget = margin * _rms(peer_error) + unit * _rms(value)
        max_budget = margin * _largest(peer_error) + 4 * unit * _largest(value)
        reason = difference(actual.get(name), value, rms_budget, max_budget)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def difference(
    actual: Tensor | None, expected: Tensor, rms_budget: float, max_budget: float
) -> str | None:
    """What is wrong with a tensor: missing, of another shape, not finite, or over the budget."""
    if actual is None:
        return "missing"
    if actual.shape != expected.shape:
        return f"expected shape {list(expected.shape)}, got {list(actual.shape)}"
    error = (actual.detach().double() - expected).abs()
    if not bool(torch.isfinite(error).all()):
        return "not finite"
    rms, largest = _rms(error), _largest(error)
    if rms <= rms_budget and largest <= max_budget:
        return None
    place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return (
        f"error {largest:.3g} at {place}, budget {max_budget:.3g}; "
        f"root mean square {rms:.3g}, budget {rms_budget:.3g}"
    )


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if values.numel() else 0.0
