"""The kernel level: every launch alone, and the copies and matrix products to compare it with.

`moved_bytes` and `flops` count what the equations need, each tensor once. The tuner measures tiles
with the same calls (`KERNELS`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed import gate
from benchmarks.speed.cases import DTYPES, Case, Scope
from benchmarks.speed.provider import BASELINE, Provider, UnavailableError, Workload
from dcft_kernels import triton
from dcft_kernels.adapter import Adapter, Geometry, dtype_of_U

Outputs = Mapping[str, Tensor | None]

# Rank and kernel size that fill each class of columns of the tiles' table.
ADAPTERS = {16: (1, 8), 32: (4, 8), 64: (8, 8), 128: (16, 8), 256: (10, 12)}


def cases(scope: Scope) -> list[Case]:
    """The project's two goals; none on a CPU unless kernels are interpreted."""
    if scope.tiny:
        return [Case("kernel", 20, 32, 48, "fp32")]
    if not scope.gpu:
        return []
    return [Case("kernel", *shape, "bf16") for shape in ((8192, 4096, 4096), (4096, 768, 768))]


class KernelProblem:
    """The tensors of a shape and an adapter, and what kernels have to compute from them."""

    def __init__(self, case: Case, device: torch.device, columns: int = 16) -> None:
        self.device, self.dtype = device, DTYPES[case.dtype]
        self.T, self.n, self.m = case.sizes
        self._generator = torch.Generator(device).manual_seed(0)
        self.rank, self.width = ADAPTERS[columns]
        sizes = (self.width, self.width)
        geometry = Geometry.build(self.n, self.m, self.rank, sizes, sizes)
        A = self._draw(*geometry.shape_A, dtype=torch.float32) * geometry.inputs.windows**-0.5
        B = self._draw(*geometry.shape_B, dtype=torch.float32)
        C = self._draw(*geometry.shape_C, dtype=torch.float32) * self.width**-0.5
        self.adapter = Adapter(A, B, C, 1.0, geometry)
        self.x, self.g = self._draw(self.T, self.n), self._draw(self.T, self.m)
        self.weight = self._draw(self.m, self.n) * self.n**-0.5
        self.bias = self._draw(self.m)
        self._expected: dict[torch.dtype, dict[str, Tensor]] = {}
        self.u = self.expected(torch.float64)["U"].to(dtype_of_U(self.dtype))

    def _draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(
            shape, generator=self._generator, dtype=dtype or self.dtype, device=self.device
        )

    def empty(self, *shape: int) -> Tensor:
        """Memory for results."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The results of all kernels from plain PyTorch in a dtype, by name."""
        if dtype not in self._expected:
            self._expected[dtype] = self._compute(dtype)
        return self._expected[dtype]

    def _compute(self, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [self.x, self.adapter.A, self.adapter.B, self.adapter.C]
        x, A, B, C = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
        g, W = self.g.to(dtype), self.weight.to(dtype)
        padded = torch.nn.functional.pad(x, (0, -self.n % self.width))
        U = torch.einsum("tip,ki->tkp", padded.unflatten(1, (-1, self.width)), A)
        y = torch.einsum("tkq,jk->tjq", U @ C.t(), B).flatten(1)[:, : self.m]
        delta = torch.kron(B @ A, C)[: self.m, : self.n]
        gradients = torch.autograd.grad(y, (x, A, B, C), g)
        of_delta = torch.autograd.grad(delta, (A, B, C), W)
        found = {
            "x": x,
            "U": U.flatten(1),
            "y": y + self.bias.to(dtype),
            "W + DW": W + delta,
            "x W^T": x @ W.t(),
            "g W": g @ W,
            **dict(zip(("gx", "gA", "gB", "gC"), gradients, strict=True)),
            **dict(zip(("gA of DW", "gB of DW", "gC of DW"), of_delta, strict=True)),
        }
        return {name: value.detach() for name, value in found.items()}


class KernelCall(NamedTuple):
    """A kernel on a problem."""

    launch: Callable[[], Outputs]  # returns its outputs, by the names of `expected`
    written: tuple[Tensor, ...]  # outputs that the caller allocated
    moved: str  # the tensors that have to move: x, y, W, U
    products: int = 0  # multiply-adds
    fill: float = math.nan  # what `written` holds before, so that an unwritten element shows


def _shrink_expand(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.row_block import shrink_expand

    y, u = p.empty(p.T, p.m), torch.empty_like(p.u)

    def launch() -> Outputs:
        shrink_expand(p.x, p.adapter, u=u, bias=p.bias, y=y)
        return {"y": y, "U": u}

    return KernelCall(launch, (y, u), "x U y", p.T * p.rank * (p.n + p.m))


def _backward(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.row_block import backward

    gx = p.empty(p.T, p.n)

    def launch() -> Outputs:
        gA, gB, gC = backward(p.g, p.x, p.u, p.adapter, gx, (True, True, True))
        return {"gx": gx, "gA": gA, "gB": gB, "gC": gC}

    return KernelCall(launch, (gx,), "x y x U", 2 * p.T * p.rank * (p.n + p.m))


def _expand(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.expand import expand

    out = p.empty(p.m, p.n)

    def launch() -> Outputs:
        expand(p.adapter, out=out, weight=p.weight)
        return {"W + DW": out}

    return KernelCall(launch, (out,), "W W", p.n * p.m)


def _expand_backward(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.expand import expand_backward

    def launch() -> Outputs:
        gA, gB, gC = expand_backward(p.weight, p.adapter, (True, True, True))
        return {"gA of DW": gA, "gB of DW": gB, "gC of DW": gC}

    return KernelCall(launch, (), "W", 3 * p.n * p.m)


def _copy(p: KernelProblem) -> KernelCall:
    out = torch.empty_like(p.x)
    return KernelCall(lambda: {"x": out.copy_(p.x)}, (out,), "x x")


def _base_products(p: KernelProblem) -> KernelCall:
    """The base layer, forward and backward."""
    y, gx = p.empty(p.T, p.m), p.empty(p.T, p.n)

    def launch() -> Outputs:
        return {
            "x W^T": torch.mm(p.x, p.weight.t(), out=y),
            "g W": torch.mm(p.g, p.weight, out=gx),
        }

    return KernelCall(launch, (y, gx), "x W y y W x", 2 * p.T * p.n * p.m)


def _added_products(p: KernelProblem) -> KernelCall:
    """The base layer added to the adapter's part."""
    y, gx = p.empty(p.T, p.m), p.empty(p.T, p.n)

    def launch() -> Outputs:
        return {"x W^T": y.addmm_(p.x, p.weight.t()), "g W": gx.addmm_(p.g, p.weight)}

    return KernelCall(launch, (y, gx), "x W y y y W x x", 2 * p.T * p.n * p.m, fill=0.0)


# By their names in the tiles' table, the most valuable first.
KERNELS: dict[str, Callable[[KernelProblem], KernelCall]] = {
    "backward": _backward,
    "shrink_expand": _shrink_expand,
    "expand": _expand,
    "expand_backward": _expand_backward,
}
_OF_TORCH = {BASELINE: _base_products, "base_added": _added_products, "copy": _copy}


class LaunchStep:
    """A launch, over memory that is filled so that an unwritten element shows."""

    def __init__(self, problem: KernelProblem, call: KernelCall) -> None:
        self.problem, self.call = problem, call
        self.results: Outputs = {}

    def prepare(self) -> None:
        for tensor in self.call.written:
            tensor.fill_(self.call.fill)

    def run(self) -> None:
        self.results = self.call.launch()

    def release(self) -> None:
        self.results = {}

    def check(self) -> str | None:
        """Why the results of the last run are wrong, or None."""
        p = self.problem
        peer, truth = (
            {name: p.expected(dtype)[name] for name in self.results}
            for dtype in (p.dtype, torch.float64)
        )
        return gate.check_against_peer(self.results, peer, truth, p.dtype, few=True)


def _workload(problem: KernelProblem, name: str) -> Workload:
    p = problem
    reason = triton.why_unavailable(p.device)
    if name in KERNELS and reason is not None:
        raise UnavailableError(reason)
    call = (KERNELS | _OF_TORCH)[name](p)
    step = LaunchStep(p, call)
    sizes = {"x": p.x.nbytes, "y": p.g.nbytes, "W": p.weight.nbytes, "U": p.u.nbytes}
    moved = sum(sizes[tensor] for tensor in call.moved.split())
    return Workload(step, step.check, moved_bytes=moved, flops=2 * call.products)


def providers(case: Case) -> Sequence[Provider]:
    """The base layer's products, a copy, and every kernel."""
    rank, width = ADAPTERS[16]
    build = functools.partial
    return [
        *(Provider(name, build(_workload, name=name)) for name in _OF_TORCH),
        *(Provider(name, build(_workload, name=name), width, rank, width) for name in KERNELS),
    ]
