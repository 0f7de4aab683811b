"""The kernel level: every launch alone, beside the base layer's products at the same shape.

A run launches each kernel several times over copies of its input that no cache still holds; the row
is of one launch. `moved_bytes` and `flops` count what the equations need, each tensor once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import gate, kernel_work
from benchmarks.cases import DTYPES, Case, Scope
from benchmarks.entries import BASELINE, Entry, Subject, UnavailableError
from benchmarks.kernel_work import KERNELS, Problem, Results, Work
from dcft_kernels import triton

_COLUMNS = 16  # rank 1, kernel size 8
_LAUNCHES = 8


def cases(scope: Scope) -> list[Case]:
    """The goals' shapes; of a CPU none, unless kernels are interpreted."""
    if not scope.gpu and triton.why_unavailable(torch.device("cpu")) is not None:
        return []
    if scope.tiny:
        return [Case("kernel", 20, 32, 48, "fp32")]
    shapes = [(8192, 4096, 4096), (4096, 768, 768)]
    dtypes = ["bf16"]
    if scope.full:
        shapes += [(8192, 4096, 14336), (8192, 14336, 4096), (16384, 8192, 8192), (64, 4096, 4096)]
        dtypes += ["fp32", "fp16"]
    return [Case("kernel", *shape, dtype) for dtype in dtypes for shape in shapes]


@dataclass
class KernelProblem:
    """The tensors of a shape, as the tuner has them."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        reason = triton.why_unavailable(self.device)
        if reason is not None:
            raise UnavailableError(reason)
        cold = kernel_work.COLD_BYTES if self.device.type == "cuda" else 0
        dtype = DTYPES[self.case.dtype]
        self.tensors = Problem(self.case.sizes, _COLUMNS, dtype, self.device, cold)


class _LaunchStep:
    """Several launches, each on the next copy of the input."""

    def __init__(self, work: Work, launches: int) -> None:
        self.work = work
        self.launches = launches
        self.first: Results = {}

    def prepare(self) -> None:
        for tensor in self.work.written:
            tensor.fill_(self.work.fill)

    def run(self) -> None:
        for number in range(self.launches):
            results = self.work.launch(number % self.work.copies)
            if number == 0:
                self.first = results

    def release(self) -> None:
        self.first = {}


def _subject(
    problem: KernelProblem,
    make: Callable[[Problem], Work],
    count: Callable[[Problem], tuple[int, int]],
) -> Subject:
    p = problem.tensors
    work = make(p)
    step = _LaunchStep(work, min(_LAUNCHES, work.copies))

    def check() -> str | None:
        peer, truth = work.expected(p.dtype), work.expected(torch.float64)
        return gate.check_beside(step.first, peer, truth, p.dtype, few=True)

    moved, flops = count(p)
    return Subject(step, check, moved_bytes=moved, flops=flops, repeats=step.launches)


def _base_products(p: Problem) -> Work:
    """`x W^T` and `g W`: the base layer, forward and backward."""
    copies = p.copies(2 * p.T * (p.n + p.m) + p.n * p.m)
    x = [p.draw(p.T, p.n) for _ in range(copies)]
    g = [p.draw(p.T, p.m) for _ in range(copies)]
    weight = [p.draw(p.m, p.n) * p.n**-0.5 for _ in range(copies)]

    def launch(i: int) -> Results:
        return {"y": F.linear(x[i], weight[i]), "gx": g[i] @ weight[i]}

    def expected(dtype: torch.dtype) -> Results:
        W = weight[0].to(dtype)
        return {"y": x[0].to(dtype) @ W.t(), "gx": g[0].to(dtype) @ W}

    return Work(copies, (), launch, expected)


def _added_products(p: Problem) -> Work:
    """`y += x W^T` and `gx += g W`, as the row-block strategy adds the base."""
    copies = p.copies(2 * p.T * (p.n + p.m) + p.n * p.m)
    x = [p.draw(p.T, p.n) for _ in range(copies)]
    g = [p.draw(p.T, p.m) for _ in range(copies)]
    weight = [p.draw(p.m, p.n) * p.n**-0.5 for _ in range(copies)]
    y, gx = p.empty(copies, p.T, p.m), p.empty(copies, p.T, p.n)

    def launch(i: int) -> Results:
        return {"y": y[i].addmm_(x[i], weight[i].t()), "gx": gx[i].addmm_(g[i], weight[i])}

    def expected(dtype: torch.dtype) -> Results:
        W = weight[0].to(dtype)
        return {
            "y": (1 + x[0].to(dtype) @ W.t()),
            "gx": (1 + g[0].to(dtype) @ W),
        }

    return Work(copies, (y, gx), launch, expected, fill=1.0)


def _shrink(p: Problem) -> Work:
    """`U` alone, as layers that share their input have it."""
    from dcft_kernels.triton.shrink_expand import shrink_expand

    copies = p.copies(p.T * p.n)
    x = [p.draw(p.T, p.n) for _ in range(copies)]
    u = p.empty(copies, p.T, p.geometry.rank * p.geometry.inputs.width)

    def launch(i: int) -> Results:
        shrink_expand(x[i], p.adapter, u=u[i])
        return {"U": u[i]}

    def expected(dtype: torch.dtype) -> Results:
        windows = x[0].to(dtype).unflatten(1, (p.geometry.inputs.windows, -1))
        return {"U": torch.einsum("tip,ki->tkp", windows, p.adapter.A.to(dtype)).flatten(1)}

    return Work(copies, (u[0],), launch, expected)


def _expand_rows(p: Problem) -> Work:
    """The adapter's part of `y` from `U`."""
    from dcft_kernels.triton.shrink_expand import shrink_expand

    copies = p.copies(p.T * p.m)
    width = p.geometry.inputs.width
    u = p.draw(copies, p.T, p.geometry.rank * width)
    y = p.empty(copies, p.T, p.m)

    def launch(i: int) -> Results:
        shrink_expand(None, p.adapter, u=u[i], bias=p.bias, y=y[i])
        return {"y": y[i]}

    def expected(dtype: torch.dtype) -> Results:
        adapter = p.adapter_in(dtype)
        mixed = u[0].to(dtype).unflatten(1, (p.geometry.rank, width)) @ adapter.C.t()
        return {"y": torch.einsum("tkq,jk->tjq", mixed, adapter.B).flatten(1) + p.bias.to(dtype)}

    return Work(copies, (y[0],), launch, expected)


# Elements of the tensors by name, and what each kernel reads and writes of them.
def _bytes(p: Problem, *tensors: str) -> int:
    sizes = {
        "x": p.T * p.n,
        "y": p.T * p.m,
        "W": p.n * p.m,
        "U": p.T * p.geometry.rank * p.geometry.inputs.width,
    }
    return sum(sizes[name] for name in tensors) * p.dtype.itemsize


def _flops(p: Problem, *passes: int) -> int:
    """Of shrinks, expands and factor gradients over so many features."""
    columns = p.geometry.rank * p.geometry.inputs.width
    return 2 * p.T * columns * sum(passes)


_Count = Callable[[Problem], tuple[int, int]]
_COUNTS: dict[str, _Count] = {
    "shrink": lambda p: (_bytes(p, "x", "U"), _flops(p, p.n)),
    "expand_rows": lambda p: (_bytes(p, "U", "y"), _flops(p, p.m)),
    "shrink_expand": lambda p: (_bytes(p, "x", "y", "U"), _flops(p, p.n, p.m)),
    "backward": lambda p: (_bytes(p, "x", "x", "y", "U"), _flops(p, p.m, p.m, p.n, p.n)),
    "fused_linear": lambda p: (
        _bytes(p, "x", "W", "y", "U", "y", "W", "x"),
        4 * p.T * p.n * p.m + _flops(p, p.n, p.m, p.m, p.n),
    ),
    "fused_backward": lambda p: (
        _bytes(p, "y", "W", "x", "U", "x"),
        2 * p.T * p.n * p.m + _flops(p, p.m, p.m, p.n, p.n),
    ),
    "expand": lambda p: (_bytes(p, "W", "W"), 2 * p.n * p.m),
    "expand_backward": lambda p: (_bytes(p, "W"), 6 * p.n * p.m),
}


def _products(p: Problem) -> tuple[int, int]:
    return _bytes(p, "x", "W", "y", "y", "W", "x"), 4 * p.T * p.n * p.m


def _added(p: Problem) -> tuple[int, int]:
    moved, flops = _products(p)
    return moved + _bytes(p, "x", "y"), flops


def entries(case: Case) -> Sequence[Entry[Any]]:
    """The base's products, then every kernel."""
    products: list[tuple[str, str, Callable[[Problem], Work], _Count]] = [
        (BASELINE, "base products", _base_products, _products),
        ("base_added", "base products, added", _added_products, _added),
    ]
    works = {"shrink": _shrink, "expand_rows": _expand_rows, **KERNELS}
    kernels = [(name, name, make, _COUNTS[name]) for name, make in works.items()]
    rank, width = kernel_work.ADAPTERS[_COLUMNS]
    of_base = [name for name, *_ in products]
    return [
        Entry(
            name,
            label,
            functools.partial(_subject, make=make, count=count),
            *((None, None, None) if name in of_base else (width, rank, width)),
        )
        for name, label, make, count in [*products, *kernels]
    ]
