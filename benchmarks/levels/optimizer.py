"""The optimizer level: a step of AdamW over the many small tensors that adapters of a model are."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gate
from benchmarks.cases import Case, Scope
from benchmarks.entries import Entry, Subject
from benchmarks.model_layers import linear_shapes
from dcft_kernels.geometry import Geometry

_LEARNING_RATE, _BETAS, _EPS = 1e-3, (0.9, 0.999), 1e-8


def cases(scope: Scope) -> list[Case]:
    """The adapters of whole models."""
    names = ("tiny-bert",) if scope.tiny else ("deberta-v3-base", "llama-3-8b")
    return [Case("optimizer", None, None, None, "fp32", "step", name) for name in names]


@dataclass
class OptimizerProblem:
    """The shapes of the layers that a model adapts."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        self.layers = linear_shapes(self.case.model or "")

    def tensors(self, method: str) -> list[nn.Parameter]:
        """Random parameters with gradients, of the shapes that a method trains."""
        shapes: list[tuple[int, ...]] = []
        for n, m in self.layers:
            if method == "dcft":
                geometry = Geometry.build(n, m, 1, (8, 8), (8, 8))
                shapes += [geometry.shape_A, geometry.shape_B, geometry.shape_C]
            else:
                rank = int(method.removeprefix("lora_r"))
                shapes += [(rank, n), (m, rank)]
        generator = torch.Generator().manual_seed(0)
        found = []
        for shape in shapes:
            parameter = nn.Parameter(torch.randn(shape, generator=generator).to(self.device))
            parameter.grad = torch.randn(shape, generator=generator).to(self.device)
            found.append(parameter)
        return found


class _OptimizerStep:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        self.optimizer.step()

    def release(self) -> None:
        pass


def _subject(problem: OptimizerProblem, method: str, options: dict[str, Any]) -> Subject:
    parameters = problem.tensors(method)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=_LEARNING_RATE, betas=_BETAS, eps=_EPS, weight_decay=0.0, **options
    )

    def check() -> str | None:
        steps = {int(state["step"]) for state in optimizer.state.values()}
        if len(optimizer.state) != len(parameters) or len(steps) != 1:
            return f"steps: expected one number for all parameters, got {sorted(steps)}"
        for index, (parameter, start) in enumerate(zip(parameters, before, strict=True)):
            expected = _after(start, _gradient(parameter), *steps)
            moved = (expected - start.double()).abs().max().item()
            reason = gate.difference(parameter, expected, 1e-3 * moved, 1e-3 * moved)
            if reason is not None:
                return f"parameter {index}: {reason}"
        return None

    elements = sum(p.numel() for p in parameters)
    # Value, two moments: read and written; the gradient: read.
    return Subject(_OptimizerStep(optimizer), check, moved_bytes=7 * 4 * elements, graphable=False)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise ValueError("parameter: expected a gradient, got None")
    return parameter.grad


def _after(start: Tensor, grad: Tensor, steps: int) -> Tensor:
    """AdamW after some steps with the same gradient, without decay, in float64."""
    value, g = start.double(), grad.double()
    first = second = torch.zeros_like(value)
    for step in range(1, steps + 1):
        first = _BETAS[0] * first + (1 - _BETAS[0]) * g
        second = _BETAS[1] * second + (1 - _BETAS[1]) * g * g
        corrected = second.sqrt() / math.sqrt(1 - _BETAS[1] ** step)
        value = value - _LEARNING_RATE / (1 - _BETAS[0] ** step) * first / (corrected + _EPS)
    return value


def entries(case: Case) -> Sequence[Entry[OptimizerProblem]]:
    """DCFT's tensors and LoRA's, by a loop, by batched operators, and fused."""
    ways: dict[str, dict[str, Any]] = {
        "loop": {"foreach": False, "fused": False},
        "foreach": {"foreach": True, "fused": False},
        "fused": {"fused": True},
    }
    sizes = {"dcft": (8, 1, 8), "lora_r8": (None, 8, None), "lora_r1": (None, 1, None)}
    labels = {"dcft": "DCFT", "lora_r8": "LoRA r=8", "lora_r1": "LoRA r=1"}
    return [
        Entry(
            f"{method}_{way}",
            f"{labels[method]}, {way}",
            functools.partial(_subject, method=method, options=options),
            *sizes[method],
        )
        for method in sizes
        for way, options in ways.items()
    ]
