"""The merge level: folding an adapter into the weight and taking it out, against a plain copy.

`copy` reads the weight and writes another one: no merge that keeps the base can be faster.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed import gate, methods
from benchmarks.speed.cases import DTYPES, Case, Scope
from benchmarks.speed.methods import AdaptedLayer, LayerMethod
from benchmarks.speed.provider import Provider, Workload
from dcft_kernels import add_delta_weight_

# A sum that is rounded once, and in peft's case an increment that is rounded before it.
_ROUNDINGS = 3


def cases(scope: Scope) -> list[Case]:
    """Square and feed-forward weights."""
    if scope.tiny:
        widths, dtype = [(64, 96)], "fp32"
    elif scope.gpu:
        widths, dtype = [(4096, 4096), (4096, 14336), (768, 768)], "bf16"
    else:
        widths, dtype = [(768, 768), (4096, 4096)], "fp32"
    return [
        Case("merge", None, n, m, dtype, direction)
        for n, m in widths
        for direction in ("merge", "unmerge")
    ]


@dataclass
class MergeProblem:
    """A base weight, which every provider gets a copy of."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        n, m = self.case.n or 0, self.case.m or 0
        self.dtype = DTYPES[self.case.dtype]
        self.unmerging = self.case.direction == "unmerge"
        on_device = torch.Generator(self.device).manual_seed(0)
        values = torch.randn((m, n), generator=on_device, device=self.device) * n**-0.5
        self.weight = values.to(self.dtype)
        self.generator = torch.Generator().manual_seed(0)

    def adapted(self, method: LayerMethod) -> AdaptedLayer:
        """A layer over a copy of the weight."""
        m, n = self.weight.shape
        linear = nn.Linear(n, m, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        return method.build(linear, self.generator)


@dataclass
class _MergeStep:
    """Merges or unmerges, starting from the base or from the merged weight."""

    unmerging: bool
    weight: Callable[[], Tensor]
    restore: Callable[[], object]  # the base, whether it is merged or not
    merge: Callable[[], object]
    unmerge: Callable[[], object]

    def prepare(self) -> None:
        self.restore()
        if self.unmerging:
            self.merge()

    def run(self) -> None:
        if self.unmerging:
            self.unmerge()
        else:
            self.merge()

    def release(self) -> None:
        pass


def _workload(problem: MergeProblem, adapted: AdaptedLayer, step: _MergeStep) -> Workload:
    """A step, and a check of the weight after it."""
    with torch.no_grad():
        parameters = {n: p.double() for n, p in adapted.layer.named_parameters()}
        dense = adapted.dense(parameters)[0].detach()
    allowed = gate.budgets(problem.dtype, dense, 8, _ROUNDINGS)

    def check() -> str | None:
        after = step.weight().detach().clone()
        if step.unmerging:  # an unmerge that follows no merge would pass as well
            step.prepare()
            reason = gate.difference(step.weight(), dense, *allowed)
            if reason is not None:
                return f"weight before it was unmerged: {reason}"
        expected = problem.weight.double() if step.unmerging else dense
        reason = gate.difference(after, expected, *allowed)
        return None if reason is None else f"weight: {reason}"

    moved = 2 * problem.weight.numel() * problem.weight.itemsize
    return Workload(step, check, moved_bytes=moved, graphable=False)


def _copy(problem: MergeProblem) -> Workload:
    out = torch.full_like(problem.weight, math.nan)

    def copy() -> None:
        out.copy_(problem.weight)

    step = _MergeStep(False, lambda: out, lambda: None, copy, lambda: None)

    def check() -> str | None:
        return None if torch.equal(out, problem.weight) else "the copy differs from its source"

    return Workload(step, check, moved_bytes=2 * out.numel() * out.itemsize, graphable=False)


def _dcft(problem: MergeProblem, method: LayerMethod) -> Workload:
    """`DCFTLinear.merge`, which keeps the base, and `unmerge`, which puts it back."""
    adapted = problem.adapted(method)
    layer: Any = adapted.layer

    def restore() -> None:
        if layer.merged:
            layer.unmerge()

    step = _MergeStep(problem.unmerging, lambda: layer.weight, restore, layer.merge, layer.unmerge)
    return _workload(problem, adapted, step)


def _in_place(problem: MergeProblem, method: LayerMethod) -> Workload:
    """`add_delta_weight_`: one pass over the weight, and back with the negative increment."""
    adapted = problem.adapted(method)
    layer: Any = adapted.layer
    weight = problem.weight.clone()

    def add(scaling: float) -> None:
        add_delta_weight_(weight, layer.dcft_A, layer.dcft_B, layer.dcft_C, scaling=scaling)

    step = _MergeStep(
        problem.unmerging,
        lambda: weight,
        lambda: weight.copy_(problem.weight),
        lambda: add(1.0),
        lambda: add(-1.0),
    )
    return _workload(problem, adapted, step)


def _peft(problem: MergeProblem, method: LayerMethod) -> Workload:
    """`merge` and `unmerge` of a peft layer, which add to the base and subtract again."""
    adapted = problem.adapted(method)
    layer: Any = adapted.layer
    weight: Tensor = layer.get_base_layer().weight

    def restore() -> None:
        if layer.merged:
            layer.unmerge()
        with torch.no_grad():
            weight.copy_(problem.weight)

    step = _MergeStep(problem.unmerging, lambda: weight, restore, layer.merge, layer.unmerge)
    return _workload(problem, adapted, step)


def providers(case: Case) -> list[Provider]:
    """A copy, DCFT in its two forms, and peft's adapters."""
    (dcft,) = methods.by_name("dcft")
    found = [Provider("copy", _copy)]
    for name, build in (("dcft", _dcft), ("dcft_in_place", _in_place)):
        made = functools.partial(build, method=dcft)
        found.append(Provider(name, made, dcft.d, dcft.k, dcft.stride))
    for method in methods.by_name("lora_r8", "lora_r1", "lokr", "dora"):
        found.append(method.provider(_peft))
    return found
