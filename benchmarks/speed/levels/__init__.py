"""What can be measured: each level proposes cases, makes their input and lists providers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.speed.cases import Case, Scope
from benchmarks.speed.levels import kernel, layer, merge, model
from benchmarks.speed.provider import Provider


@dataclass(frozen=True)
class Level:
    """One kind of measurement."""

    cases: Callable[[Scope], list[Case]]  # the most valuable first
    providers: Callable[[Case], Sequence[Provider]]
    problem: Callable[[Case, torch.device], Any]  # the input that all providers share


# The most valuable first.
LEVELS: dict[str, Level] = {
    "layer": Level(layer.cases, layer.providers, layer.LayerProblem),
    "block": Level(model.block_cases, model.providers, model.ModelProblem),
    "step": Level(model.step_cases, model.providers, model.ModelProblem),
    "kernel": Level(kernel.cases, kernel.providers, kernel.KernelProblem),
    "merge": Level(merge.cases, merge.providers, merge.MergeProblem),
}
