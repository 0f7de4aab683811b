"""The merge level: folding an adapter into the weight and taking it out, beside a plain copy.

`copy` reads the weight and writes another: no merge that leaves the base as it is can be quicker.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import adapters, gate
from benchmarks.adapters import AdapterKind, Candidate
from benchmarks.cases import DTYPES, Case, Scope
from benchmarks.entries import Entry, Subject
from dcft_kernels import DCFTLinear, add_delta_weight_

# A sum that is rounded once, and in peft's case an increment that is rounded before it.
_ROUNDINGS = 3


def cases(scope: Scope) -> list[Case]:
    """Square and feed-forward weights."""
    if scope.tiny:
        widths, dtypes = [(64, 96)], ["fp32"]
    elif scope.gpu:
        widths, dtypes = [(4096, 4096), (4096, 14336), (768, 768)], ["bf16"]
    else:
        widths, dtypes = [(768, 768), (4096, 4096)], ["fp32"]
    if scope.full and scope.gpu:
        dtypes = ["bf16", "fp32"]
    return [
        Case("merge", None, n, m, dtype, direction)
        for dtype in dtypes
        for n, m in widths
        for direction in ("merge", "unmerge")
    ]


@dataclass
class MergeProblem:
    """A base weight that all providers get a copy of."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        n, m = self.case.n or 0, self.case.m or 0
        self.dtype = DTYPES[self.case.dtype]
        generator = torch.Generator(self.device).manual_seed(0)
        values = torch.randn((m, n), generator=generator, device=self.device) * n**-0.5
        self.weight = values.to(self.dtype)
        self.generator = torch.Generator().manual_seed(0)

    def base(self) -> nn.Linear:
        """A frozen layer over a copy of the weight."""
        m, n = self.weight.shape
        linear = nn.Linear(n, m, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        return linear


@dataclass(frozen=True)
class _Calls:
    """A step of plain functions."""

    timed: Callable[[], object]
    before: Callable[[], object]

    def prepare(self) -> None:
        self.before()

    def run(self) -> None:
        self.timed()

    def release(self) -> None:
        pass


def _nothing() -> None:
    pass


def _subject(
    problem: MergeProblem, candidate: Candidate, step: _Calls, merged: Callable[[], Tensor]
) -> Subject:
    """A step that merges or unmerges, and the gate: the weight that is then there."""
    with torch.no_grad():
        parameters = {n: p.double() for n, p in candidate.layer.named_parameters()}
        dense, _ = candidate.dense(parameters)
    unmerging = problem.case.direction == "unmerge"
    expected = problem.weight.double() if unmerging else dense.detach()

    allowed = gate.budgets(problem.dtype, dense.detach(), 8, _ROUNDINGS)

    def check() -> str | None:
        after = merged().detach().clone()
        if unmerging:  # what does nothing at all leaves the base as well
            step.before()
            reason = gate.difference(merged(), dense.detach(), *allowed)
            if reason is not None:
                return f"weight before it was unmerged: {reason}"
        reason = gate.difference(after, expected, *allowed)
        return None if reason is None else f"weight: {reason}"

    size = problem.weight.numel() * problem.weight.itemsize
    return Subject(step, check, moved_bytes=2 * size, graphable=False)


def _copy(problem: MergeProblem) -> Subject:
    out = torch.full_like(problem.weight, math.nan)

    def check() -> str | None:
        return None if torch.equal(out, problem.weight) else "the copy differs from its source"

    step = _Calls(lambda: out.copy_(problem.weight), _nothing)
    size = out.numel() * out.itemsize
    return Subject(step, check, moved_bytes=2 * size)


def _dcft(problem: MergeProblem, kind: AdapterKind) -> Subject:
    """`DCFTLinear.merge`, which keeps the base beside, and `unmerge`, which puts it back."""
    candidate = kind.layer(problem.base(), problem.generator)
    layer = candidate.layer
    assert isinstance(layer, DCFTLinear)

    def back() -> None:
        if layer.merged:
            layer.unmerge()

    def forth() -> None:
        if not layer.merged:
            layer.merge()

    if problem.case.direction == "merge":
        step = _Calls(layer.merge, back)
    else:
        step = _Calls(layer.unmerge, forth)
    return _subject(problem, candidate, step, lambda: layer.weight)


def _in_place(problem: MergeProblem, kind: AdapterKind) -> Subject:
    """`add_delta_weight_`: one pass over the weight, and back with the negative increment."""
    candidate = kind.layer(problem.base(), problem.generator)
    layer = candidate.layer
    assert isinstance(layer, DCFTLinear)
    factors = (layer.dcft_A, layer.dcft_B, layer.dcft_C)
    weight = problem.weight.clone()

    def add(scaling: float) -> None:
        add_delta_weight_(weight, *factors, scaling=scaling)

    if problem.case.direction == "merge":
        step = _Calls(lambda: add(1.0), lambda: weight.copy_(problem.weight))
    else:

        def merged() -> None:
            weight.copy_(problem.weight)
            add(1.0)

        step = _Calls(lambda: add(-1.0), merged)
    return _subject(problem, candidate, step, lambda: weight)


def _peft(problem: MergeProblem, kind: AdapterKind) -> Subject:
    """`merge` and `unmerge` of a peft layer, which add to the base and subtract again."""
    candidate = kind.layer(problem.base(), problem.generator)
    layer: Any = candidate.layer
    weight: Tensor = layer.get_base_layer().weight

    def restored() -> None:
        if layer.merged:
            layer.unmerge()
        with torch.no_grad():
            weight.copy_(problem.weight)

    def merged() -> None:
        restored()
        layer.merge()

    if problem.case.direction == "merge":
        step = _Calls(layer.merge, restored)
    else:
        step = _Calls(layer.unmerge, merged)
    return _subject(problem, candidate, step, lambda: weight)


def entries(case: Case) -> list[Entry[MergeProblem]]:
    """A copy, DCFT in its two forms, and peft's adapters."""
    ways = {"dcft": _dcft, "dcft_in_place": _in_place}
    (dcft,) = adapters.by_name("dcft")
    found = [Entry("copy", "copy of the weight", _copy)]
    for name, label in (("dcft", "DCFT"), ("dcft_in_place", "DCFT, in place")):
        build = functools.partial(ways[name], kind=dcft)
        found.append(Entry(name, label, build, dcft.d, dcft.k, dcft.stride))
    for kind in adapters.by_name("lora_r8", "lora_r1", "lokr", "dora"):
        build = functools.partial(_peft, kind=kind)
        found.append(Entry(kind.name, kind.label, build, kind.d, kind.k, kind.stride))
    return found
