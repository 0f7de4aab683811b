"""The ceiling level: what the device can do at best, measured in the run that is held against it.

`copy` moves bytes, read and written; `product` is the vendor's matrix product, on random values:
zeros take less power, and run faster than real data will.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.cases import DTYPES, Case, Scope
from benchmarks.entries import Entry, Subject


def cases(scope: Scope) -> list[Case]:
    """One case a dtype: a product, and a copy of as many elements as its operands have."""
    sizes: tuple[int, int, int]
    dtypes: tuple[str, ...]
    if scope.tiny:
        sizes, dtypes = (32, 64, 64), ("fp32", "fp16")
    elif scope.gpu:
        sizes, dtypes = (8192, 8192, 8192), ("bf16", "fp16", "fp32")
    else:
        sizes, dtypes = (2048, 2048, 2048), ("fp32",)
    return [Case("ceiling", *sizes, dtype, direction=d) for dtype in dtypes for d in _STEPS]


@dataclass
class CeilingProblem:
    """Two random matrices and room for a result."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        T, n, m = self.case.sizes
        self.dtype = DTYPES[self.case.dtype]
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(rows: int, columns: int) -> Tensor:
            shape = (rows, columns)
            values = torch.randn(shape, generator=generator, device=self.device)
            return values.to(self.dtype)

        copying = self.case.direction == "copy"
        # No cache holds a copy's source.
        rows = max(T, (256 << 20) // (n * self.dtype.itemsize)) if copying and T > 32 else T
        self.x = draw(rows, n)
        self.weight = draw(m, n)
        self.out = torch.full_like(self.x, torch.nan)


class _Copy:
    def __init__(self, problem: CeilingProblem) -> None:
        self.problem = problem

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        self.problem.out.copy_(self.problem.x)

    def release(self) -> None:
        pass


class _Product:
    def __init__(self, problem: CeilingProblem) -> None:
        self.problem = problem
        self.y: Tensor | None = None

    def prepare(self) -> None:
        self.y = None

    def run(self) -> None:
        self.y = self.problem.x @ self.problem.weight.t()

    def release(self) -> None:
        self.y = None


def _copy(problem: CeilingProblem) -> Subject:
    def check() -> str | None:
        return None if torch.equal(problem.out, problem.x) else "the copy differs from its source"

    size = problem.x.numel() * problem.x.itemsize
    return Subject(_Copy(problem), check, moved_bytes=2 * size)


def _product(problem: CeilingProblem) -> Subject:
    step = _Product(problem)
    T, n, m = problem.case.sizes

    def check() -> str | None:
        expected = problem.x.double() @ problem.weight.double().t()
        return gate.difference(step.y, expected, *gate.budgets(problem.dtype, expected, n, 1))

    elements = T * n + n * m + T * m
    return Subject(step, check, moved_bytes=elements * problem.dtype.itemsize, flops=2 * T * n * m)


_STEPS = {"copy": ("device copy", _copy), "product": ("vendor's product", _product)}


def entries(case: Case) -> list[Entry[CeilingProblem]]:
    """The one provider of a case: what it is called by its direction."""
    label, build = _STEPS[case.direction]
    return [Entry(case.direction, label, functools.partial(build))]
