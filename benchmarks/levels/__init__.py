"""What can be measured, by level: each proposes cases, makes their input and lists providers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case, Scope
from benchmarks.entries import AnyEntry
from benchmarks.levels import (
    adapter_files,
    ceiling,
    kernel,
    layer,
    merge,
    model,
    optimizer,
)


@dataclass(frozen=True)
class Level:
    """One kind of measurement."""

    cases: Callable[[Scope], list[Case]]
    entries: Callable[[Case], Sequence[AnyEntry]]
    problem: Callable[[Case, torch.device], Any]


# In the order in which a run that is cut off should have had them.
LEVELS: dict[str, Level] = {
    "ceiling": Level(ceiling.cases, ceiling.entries, ceiling.CeilingProblem),
    "layer": Level(layer.cases, layer.entries, layer.LayerProblem),
    "block": Level(model.block_cases, model.entries, model.ModelProblem),
    "step": Level(model.step_cases, model.entries, model.ModelProblem),
    "kernel": Level(kernel.cases, kernel.entries, kernel.KernelProblem),
    "merge": Level(merge.cases, merge.entries, merge.MergeProblem),
    "optimizer": Level(optimizer.cases, optimizer.entries, optimizer.OptimizerProblem),
    "load": Level(adapter_files.cases, adapter_files.entries, adapter_files.FilesProblem),
}
