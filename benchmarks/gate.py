"""The correctness gate: what is timed must first be right, on the very input that is timed.

A step's output, input gradient and parameter gradients are compared with the dense linear layer
that the provider claims to be, computed in float64 from the provider's own parameters:

    y = x W'^T + b',   gx = g W',   parameter gradients: autograd of W'(p), b'(p) at g^T x, sum_t g

The error budget is derived. Let `u` be the unit roundoff of the layer's dtype and `u_a` that of the
accumulators (float32 for 16-bit dtypes), `R` the number of values on the way to a result that are
rounded to the dtype, each about as large as the result, and `K` the number of terms that a result
sums. `R` rounding errors of up to `u` and `K` of up to `u_a` add up like a random walk where data
have zero mean, so the error relative to the result is, in root mean square, at most

    e = sqrt(R) u + sqrt(K) u_a

The largest of `N` elements: rounding to the dtype is bounded, by `R u` of the largest value; the
sum of accumulator errors is nearly normal, its largest value `sqrt(2 ln N)` times its deviation.
Twice this is allowed. `R` is 4 (base output, increment, `DW` where it is built, the sum). `K` is
`n + m + T` for the output and the input gradient, which sum over some of the three in turn. A
provider that builds `DW` also sums over its `n m / d^2` blocks for the gradient of the block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Problem
from benchmarks.providers import DCFT_KERNEL, Candidate

_ROUNDINGS = 4
_MARGIN = 2.0


@dataclass(frozen=True)
class StepResult:
    """What a training step of a layer computes."""

    y: Tensor
    grad_x: Tensor | None
    gradients: Mapping[str, Tensor | None]


def check(problem: Problem, candidate: Candidate, result: StepResult) -> str | None:
    """The reason why a step's result is wrong, or None if it is right."""
    actual: dict[str, Tensor | None] = {"y": result.y, "x": result.grad_x}
    actual.update(result.gradients)
    case = problem.case
    terms = case.n + case.m + case.T
    for name, expected in _expected(problem, candidate):
        blocks = case.n * case.m // DCFT_KERNEL**2 if name in result.gradients else 0
        reason = _difference(problem, actual.get(name), expected, terms + blocks)
        if reason is not None:
            return f"y: {reason}" if name == "y" else f"gradient of {name}: {reason}"
    return None


def _expected(problem: Problem, candidate: Candidate) -> Iterator[tuple[str, Tensor]]:
    """Float64 values of the output, "y", and of the gradients of "x" and each parameter."""
    parameters = {
        name: p.detach().double().requires_grad_(p.requires_grad)
        for name, p in candidate.layer.named_parameters()
    }
    weight, bias = candidate.dense(parameters)
    yield "y", torch.addmm(bias.detach(), problem.x64, weight.detach().t())
    yield "x", problem.g64 @ weight.detach()
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trained:
        return
    roots = [
        (value, grad)
        for value, grad in ((weight, problem.dense_gradient), (bias, problem.g64.sum(0)))
        if value.requires_grad
    ]
    gradients = torch.autograd.grad(
        [value for value, _ in roots], list(trained.values()), [grad for _, grad in roots]
    )
    yield from zip(trained, gradients, strict=True)


def _difference(
    problem: Problem, actual: Tensor | None, expected: Tensor, terms: int
) -> str | None:
    """What is wrong with a tensor: missing, of another shape, not finite, or over the budget."""
    if actual is None:
        return "missing"
    if actual.shape != expected.shape:
        return f"expected shape {list(expected.shape)}, got {list(actual.shape)}"
    error = (actual.double() - expected).abs()
    if not bool(torch.isfinite(error).all()):
        return "not finite"
    rms_budget, max_budget = budgets(problem, expected, terms)
    rms, largest = _rms(error), error.max().item()
    if rms <= rms_budget and largest <= max_budget:
        return None
    place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return (
        f"error {largest:.3g} at {place}, budget {max_budget:.3g}; "
        f"root mean square {rms:.3g}, budget {rms_budget:.3g}"
    )


def budgets(problem: Problem, expected: Tensor, terms: int) -> tuple[float, float]:
    """The allowed root-mean-square and largest error of sums of `terms`, as derived above."""
    unit = torch.finfo(problem.dtype).eps / 2
    accumulator = min(unit, torch.finfo(torch.float32).eps / 2)
    sums = math.sqrt(terms) * accumulator
    rms, largest = _rms(expected), expected.abs().max().item()
    spread = math.sqrt(2 * math.log(max(2, expected.numel())))
    return (
        _MARGIN * (math.sqrt(_ROUNDINGS) * unit + sums) * rms,
        _MARGIN * (_ROUNDINGS * unit * largest + spread * sums * rms),
    )


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
