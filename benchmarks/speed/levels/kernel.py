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
from dcft_kernels.adapter import Adapter
from dcft_kernels.geometry import Geometry

Results = dict[str, Tensor]
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
    """The tensors of a shape and an adapter."""

    def __init__(self, case: Case, device: torch.device, columns: int = 16) -> None:
        self.device, self.dtype = device, DTYPES[case.dtype]
        self.T, self.n, self.m = case.sizes
        self._generator = torch.Generator(device).manual_seed(0)
        rank, width = ADAPTERS[columns]
        self.rank, self.width = rank, width
        geometry = Geometry.build(self.n, self.m, rank, (width, width), (width, width))
        gain_A, gain_C = geometry.inputs.windows**-0.5, width**-0.5
        A = self.draw(*geometry.shape_A, dtype=torch.float32) * gain_A
        B = self.draw(*geometry.shape_B, dtype=torch.float32)
        C = self.draw(*geometry.shape_C, dtype=torch.float32) * gain_C
        self.adapter = Adapter(A, B, C, 1.0, geometry)
        self.x, self.g = self.draw(self.T, self.n), self.draw(self.T, self.m)
        self.weight = self.draw(self.m, self.n) * self.n**-0.5
        self.bias = self.draw(self.m)
        with torch.no_grad():
            self.u = self.shrunk(torch.float64).to(self.dtype).flatten(1)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values."""
        return torch.randn(
            shape, generator=self._generator, dtype=dtype or self.dtype, device=self.device
        )

    def empty(self, *shape: int) -> Tensor:
        """Memory for results."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def factors(self, dtype: torch.dtype) -> list[Tensor]:
        """`A`, `B`, `C` in a dtype, as leaves that require gradients."""
        factors = (self.adapter.A, self.adapter.B, self.adapter.C)
        return [f.detach().to(dtype).requires_grad_() for f in factors]

    def shrunk(
        self, dtype: torch.dtype, x: Tensor | None = None, A: Tensor | None = None
    ) -> Tensor:
        """`U [T, k, d]`."""
        x = _padded(self.x if x is None else x, self.width).to(dtype)
        A = self.adapter.A.to(dtype) if A is None else A
        return torch.einsum("tip,ki->tkp", x.unflatten(1, (-1, self.width)), A)

    def expanded(self, U: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The adapter's part of `y`, from `U`."""
        y = torch.einsum("tkq,jk->tjq", U @ C.t(), B).flatten(1)
        return y[:, : self.m]


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % width))


class KernelCall(NamedTuple):
    """A kernel on a problem."""

    launch: Callable[[], Outputs]  # returns what it has written
    expected: Callable[[torch.dtype], Results]  # the same from plain PyTorch in a dtype
    written: tuple[Tensor, ...]  # what a launch writes to, apart from what it allocates
    moved: str  # the tensors that have to move: x, y, W, U
    products: int = 0  # multiply-adds
    fill: float = math.nan  # what `written` holds before, so that an unwritten element shows


def _shrink(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.shrink_expand import shrink_expand

    u = p.empty(p.T, p.rank * p.width)

    def launch() -> Outputs:
        shrink_expand(p.x, p.adapter, u=u)
        return {"U": u}

    def expected(dtype: torch.dtype) -> Results:
        return {"U": p.shrunk(dtype).flatten(1)}

    return KernelCall(launch, expected, (u,), "x U", p.T * p.rank * p.n)


def _expand_rows(p: KernelProblem) -> KernelCall:
    """The adapter's part of `y`, from `U`."""
    from dcft_kernels.triton.shrink_expand import shrink_expand

    y = p.empty(p.T, p.m)

    def launch() -> Outputs:
        shrink_expand(None, p.adapter, u=p.u, bias=p.bias, y=y)
        return {"y": y}

    def expected(dtype: torch.dtype) -> Results:
        U = p.u.to(dtype).unflatten(1, (p.rank, p.width))
        _, B, C = (f.detach() for f in p.factors(dtype))
        return {"y": p.expanded(U, B, C) + p.bias.to(dtype)}

    return KernelCall(launch, expected, (y,), "U y", p.T * p.rank * p.m)


def _shrink_expand(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.shrink_expand import shrink_expand

    y, u = p.empty(p.T, p.m), p.empty(p.T, p.rank * p.width)

    def launch() -> Outputs:
        shrink_expand(p.x, p.adapter, u=u, bias=p.bias, y=y)
        return {"y": y, "U": u}

    def expected(dtype: torch.dtype) -> Results:
        _, B, C = (f.detach() for f in p.factors(dtype))
        U = p.shrunk(dtype)
        return {"y": p.expanded(U, B, C) + p.bias.to(dtype), "U": U.flatten(1)}

    return KernelCall(launch, expected, (y, u), "x U y", p.T * p.rank * (p.n + p.m))


def _backward(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.backward import backward

    gx = p.empty(p.T, p.n)

    def launch() -> Outputs:
        gA, gB, gC = backward(
            p.adapter, g=p.g, x=p.x, u=p.u, gx=gx, needs_A=True, needs_B=True, needs_C=True
        )
        return {"gx": gx, "gA": gA, "gB": gB, "gC": gC}

    def expected(dtype: torch.dtype) -> Results:
        x = p.x.detach().to(dtype).requires_grad_()
        A, B, C = p.factors(dtype)
        y = p.expanded(p.shrunk(dtype, x, A), B, C)
        grads = torch.autograd.grad(y, (x, A, B, C), p.g.to(dtype))
        return dict(zip(("gx", "gA", "gB", "gC"), grads, strict=True))

    return KernelCall(launch, expected, (gx,), "x y x U", 2 * p.T * p.rank * (p.n + p.m))


def _expand(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.expand import expand

    out = p.empty(p.m, p.n)

    def launch() -> Outputs:
        expand(p.adapter, out=out, weight=p.weight)
        return {"W": out}

    def expected(dtype: torch.dtype) -> Results:
        A, B, C = (f.detach() for f in p.factors(dtype))
        return {"W": p.weight.to(dtype) + torch.kron(B @ A, C)[: p.m, : p.n]}

    return KernelCall(launch, expected, (out,), "W W", p.n * p.m)


def _expand_backward(p: KernelProblem) -> KernelCall:
    from dcft_kernels.triton.expand import expand_backward

    def launch() -> Outputs:
        gA, gB, gC = expand_backward(p.weight, p.adapter, True, True, True)
        return {"gA": gA, "gB": gB, "gC": gC}

    def expected(dtype: torch.dtype) -> Results:
        A, B, C = p.factors(dtype)
        delta = torch.kron(B @ A, C)[: p.m, : p.n]
        grads = torch.autograd.grad(delta, (A, B, C), p.weight.to(dtype))
        return dict(zip(("gA", "gB", "gC"), grads, strict=True))

    return KernelCall(launch, expected, (), "W", 3 * p.n * p.m)


def _copy(p: KernelProblem) -> KernelCall:
    out = torch.empty_like(p.x)
    return KernelCall(
        lambda: {"x": out.copy_(p.x)}, lambda dtype: {"x": p.x.to(dtype)}, (out,), "x x"
    )


def _base_products(p: KernelProblem) -> KernelCall:
    """`x W^T` and `g W`: the base layer, forward and backward."""
    y, gx = p.empty(p.T, p.m), p.empty(p.T, p.n)

    def launch() -> Outputs:
        return {
            "y": torch.mm(p.x, p.weight.t(), out=y),
            "gx": torch.mm(p.g, p.weight, out=gx),
        }

    def expected(dtype: torch.dtype) -> Results:
        W = p.weight.to(dtype)
        return {"y": p.x.to(dtype) @ W.t(), "gx": p.g.to(dtype) @ W}

    return KernelCall(launch, expected, (y, gx), "x W y y W x", 2 * p.T * p.n * p.m)


def _added_products(p: KernelProblem) -> KernelCall:
    """`y += x W^T` and `gx += g W`: the base added to the adapter's part."""
    y, gx = p.empty(p.T, p.m), p.empty(p.T, p.n)

    def launch() -> Outputs:
        return {"y": y.addmm_(p.x, p.weight.t()), "gx": gx.addmm_(p.g, p.weight)}

    def expected(dtype: torch.dtype) -> Results:
        W = p.weight.to(dtype)
        return {"y": 1 + p.x.to(dtype) @ W.t(), "gx": 1 + p.g.to(dtype) @ W}

    return KernelCall(launch, expected, (y, gx), "x W y y y W x x", 2 * p.T * p.n * p.m, fill=1.0)


# By their names in the tiles' table, the most valuable first.
KERNELS: dict[str, Callable[[KernelProblem], KernelCall]] = {
    "backward": _backward,
    "shrink_expand": _shrink_expand,
    "expand": _expand,
    "expand_backward": _expand_backward,
}
_CALLS = {
    BASELINE: _base_products,
    "base_added": _added_products,
    "copy": _copy,
    "shrink": _shrink,
    "expand_rows": _expand_rows,
    **KERNELS,
}


class LaunchStep:
    """A launch, over memory that is filled so that an unwritten element shows."""

    def __init__(self, call: KernelCall) -> None:
        self.call = call
        self.results: Outputs = {}

    def prepare(self) -> None:
        for tensor in self.call.written:
            tensor.fill_(self.call.fill)

    def run(self) -> None:
        self.results = self.call.launch()

    def release(self) -> None:
        self.results = {}


def _workload(problem: KernelProblem, name: str) -> Workload:
    p = problem
    if name in KERNELS or name in ("shrink", "expand_rows"):
        reason = triton.why_unavailable(p.device)
        if reason is not None:
            raise UnavailableError(reason)
    call = _CALLS[name](p)
    step = LaunchStep(call)

    def check() -> str | None:
        peer, truth = call.expected(p.dtype), call.expected(torch.float64)
        return gate.check_against_peer(step.results, peer, truth, p.dtype, few=True)

    sizes = {"x": p.T * p.n, "y": p.T * p.m, "W": p.n * p.m, "U": p.T * p.rank * p.width}
    moved = sum(sizes[tensor] for tensor in call.moved.split()) * p.dtype.itemsize
    return Workload(step, check, moved_bytes=moved, flops=2 * call.products)


def providers(case: Case) -> Sequence[Provider]:
    """The base layer's products, a copy, and every kernel."""
    of_torch = (BASELINE, "base_added", "copy")
    rank, width = ADAPTERS[16]
    return [
        Provider(
            name,
            functools.partial(_workload, name=name),
            *((None, None, None) if name in of_torch else (width, rank, width)),
        )
        for name in _CALLS
    ]
