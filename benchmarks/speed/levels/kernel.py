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
        truth = self.expected(torch.float64)
        self.u = truth["U"].to(dtype_of_U(self.dtype))
        self.ub, self.Q, self.P = (truth[name].to(self.dtype) for name in ("Ub", "Q", "P"))

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
        Q = torch.kron(B, C)[: self.m]
        P = torch.kron(A, torch.eye(self.width, dtype=dtype, device=self.device))[:, : self.n]
        found = {
            "x": x,
            "U": U.flatten(1),
            "Ub": g @ Q,
            "Q": Q,
            "P": P,
            "y": y + self.bias.to(dtype),
            "W + DW": W + delta,
            "x W^T": x @ W.t(),
            "g W": g @ W,
            "layer y": y + x @ W.t() + self.bias.to(dtype),
            "layer gx": gradients[0] + g @ W,
            **dict(zip(("gx", "gA", "gB", "gC"), gradients, strict=True)),
        }
        return {name: value.detach() for name, value in found.items()}


class KernelCall(NamedTuple):
    """A kernel on a problem."""

    launch: Callable[[], Outputs]  # returns its outputs, by the names of `expected`
    written: tuple[Tensor, ...]  # outputs that the caller allocated
    moved: str  # the tensors that have to move: x, y, W, U, Q, P
    products: int = 0  # multiply-adds
    fill: float = math.nan  # what `written` holds before, so that an unwritten element shows
    # Results by their names from the output "partial", programs' shares of them.
    total: Callable[[Tensor], Outputs] | None = None


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


def _shrink(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.shrink import shrink

    u, Q = torch.empty_like(p.u), torch.empty_like(p.Q)

    def launch() -> Outputs:
        shrink(p.x, p.adapter, u=u, spread=Q)
        return {"U": u, "Q": Q}

    return KernelCall(launch, (u, Q), "x U Q", p.T * p.rank * p.n)


def _shrink_backward(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.shrink import partial_shape, shrink_backward

    ub, P = torch.empty_like(p.ub), torch.empty_like(p.P)
    needs = (True, True)

    def launch() -> Outputs:
        shape = partial_shape(p.g, p.adapter, needs)
        partial = p.g.new_empty(shape, dtype=torch.float32)
        shrink_backward(p.g, p.u, p.adapter, ub=ub, spread=P, partial=partial, needs=needs)
        return {"Ub": ub, "P": P, "partial": partial}

    def total(partial: Tensor) -> Outputs:
        shape_B, shape_C = p.adapter.geometry.shape_B, p.adapter.geometry.shape_C
        gB, gC = partial.sum(0).split([math.prod(shape_B), math.prod(shape_C)])
        return {"gB": gB.view(shape_B), "gC": gC.view(shape_C)}

    return KernelCall(launch, (ub, P), "y U U P", 2 * p.T * p.rank * p.m, total=total)


def _gemm_forward(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.gemm import linear

    y = p.empty(p.T, p.m)

    def launch() -> Outputs:
        linear(p.x, p.weight, p.bias, p.u, p.Q, out=y)
        return {"layer y": y}

    return KernelCall(launch, (y,), "x W U Q y", p.T * p.m * (p.n + p.rank * p.width))


def _gemm_backward(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.gemm import input_gradient, slices

    gx = p.empty(p.T, p.n)

    def launch() -> Outputs:
        shape = (slices(p.T, p.ub.shape[1], p.device), p.rank, p.n)
        partial = p.g.new_empty(shape, dtype=torch.float32)
        input_gradient(p.g, p.weight, p.ub, p.P, out=gx, x=p.x, partial=partial)
        return {"layer gx": gx, "partial": partial}

    def total(partial: Tensor) -> Outputs:
        by_feature = torch.nn.functional.pad(partial.sum(0), (0, -p.n % p.width))
        return {"gA": by_feature.unflatten(1, (-1, p.width)).sum(2)}

    products = p.T * p.n * (p.m + p.rank * p.width + p.rank)
    return KernelCall(launch, (gx,), "y W U P x x", products, total=total)


def _copy(p: KernelProblem) -> KernelCall:
    out = torch.empty_like(p.x)
    return KernelCall(lambda: {"x": out.copy_(p.x)}, (out,), "x x")


def _base_product(p: KernelProblem, *, forward: bool, added: bool = False) -> KernelCall:
    """The base layer in one direction, on its own or `added` to the adapter's part."""
    z, weight = (p.x, p.weight.t()) if forward else (p.g, p.weight)
    out, name = (p.empty(p.T, p.m), "x W^T") if forward else (p.empty(p.T, p.n), "g W")

    def launch() -> Outputs:
        return {name: out.addmm_(z, weight) if added else torch.mm(z, weight, out=out)}

    moved = ("x W y" if forward else "y W x") + (" y" if forward else " x") * added
    return KernelCall(launch, (out,), moved, p.T * p.n * p.m, fill=0.0 if added else math.nan)


Build = Callable[[KernelProblem], KernelCall]


def _both(forward: Build, backward: Build) -> Build:
    """The calls of both directions as one."""

    def build(p: KernelProblem) -> KernelCall:
        a, b = forward(p), backward(p)
        return KernelCall(
            lambda: {**a.launch(), **b.launch()},
            (*a.written, *b.written),
            f"{a.moved} {b.moved}",
            a.products + b.products,
            a.fill,
            b.total,
        )

    return build


# By their names in the tiles' table, the most valuable first.
KERNELS: dict[str, Build] = {
    "backward": _backward,
    "shrink_expand": _shrink_expand,
    "gemm": _both(_gemm_forward, _gemm_backward),
    "shrink_backward": _shrink_backward,
    "shrink": _shrink,
    "expand": _expand,
}
_GEMM = {"gemm_forward": _gemm_forward, "gemm_backward": _gemm_backward}
SEEDED = ("gemm", "shrink", "shrink_backward", *_GEMM)


def _of_torch(name: str, added: bool = False) -> dict[str, Build]:
    forward = functools.partial(_base_product, forward=True, added=added)
    backward = functools.partial(_base_product, forward=False, added=added)
    return {
        name: _both(forward, backward),
        f"{name}_forward": forward,
        f"{name}_backward": backward,
    }


_OF_TORCH = {**_of_torch(BASELINE), **_of_torch("base_added", added=True), "copy": _copy}


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
        p, results = self.problem, dict(self.results)
        if self.call.total is not None and (partial := results.pop("partial")) is not None:
            results |= self.call.total(partial)
        peer, truth = (
            {name: p.expected(dtype)[name] for name in results}
            for dtype in (p.dtype, torch.float64)
        )
        return gate.check_against_peer(results, peer, truth, p.dtype, few=True)


def _why_not(p: KernelProblem, name: str) -> str | None:
    """Why a kernel cannot run, or None if it can."""
    reason = triton.why_unavailable(p.device)
    if reason is None and name in SEEDED:
        from dcft_kernels.triton import seeded

        return seeded.why_not(p.adapter.geometry, p.dtype, p.device)
    return reason


def _workload(problem: KernelProblem, name: str) -> Workload:
    p = problem
    if name not in _OF_TORCH and (reason := _why_not(p, name)) is not None:
        raise UnavailableError(reason)
    call = (KERNELS | _GEMM | _OF_TORCH)[name](p)
    step = LaunchStep(p, call)
    sizes = {"x": p.x, "y": p.g, "W": p.weight, "U": p.u, "Q": p.Q, "P": p.P}
    moved = sum(sizes[tensor].nbytes for tensor in call.moved.split())
    return Workload(step, step.check, moved_bytes=moved, flops=2 * call.products)


def providers(case: Case) -> Sequence[Provider]:
    """The base layer's products, a copy, and every kernel."""
    rank, width = ADAPTERS[16]
    build = functools.partial
    kernels = (*KERNELS, *_GEMM)
    return [
        *(Provider(name, build(_workload, name=name)) for name in _OF_TORCH),
        *(Provider(name, build(_workload, name=name), width, rank, width) for name in kernels),
    ]
