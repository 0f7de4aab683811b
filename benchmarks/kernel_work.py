"""The kernels one by one: what each is called with, and what it has to write.

Shared by the tuner, which tries tiles, and the kernel level of the benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dcft_kernels import torch_backend
from dcft_kernels.adapter import Adapter
from dcft_kernels.geometry import Geometry
from dcft_kernels.gradients import Needs

Shape = tuple[int, int, int]  # T, n, m
Results = dict[str, Tensor]

# Rank and kernel size that fill each class of columns of the tiles' table.
ADAPTERS = {16: (1, 8), 32: (4, 8), 64: (8, 8), 128: (16, 8), 256: (10, 12)}

COLD_BYTES = 200 << 20  # more than any cache: inputs rotate over as many copies as make this up
_MOST_COPIES = 32


class Problem:
    """The tensors of a shape; what kernels stream lies in several copies, to be read cold."""

    def __init__(
        self,
        shape: Shape,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        cold_bytes: int = COLD_BYTES,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.T, self.n, self.m = shape
        self._generator = torch.Generator(device).manual_seed(0)
        rank, width = ADAPTERS[columns]
        self.geometry = Geometry.build(self.n, self.m, rank, (width, width), (width, width))
        gain_A, gain_C = self.geometry.inputs.windows**-0.5, width**-0.5
        self.adapter = Adapter(
            self.draw(*self.geometry.shape_A, dtype=torch.float32) * gain_A,
            self.draw(*self.geometry.shape_B, dtype=torch.float32),
            self.draw(*self.geometry.shape_C, dtype=torch.float32) * gain_C,
            1.0,
            self.geometry,
        )
        self.bias = self.draw(self.m)
        self._cold_bytes = cold_bytes

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values."""
        return torch.randn(
            shape, generator=self._generator, dtype=dtype or self.dtype, device=self.device
        )

    def copies(self, elements: int) -> int:
        """How many copies of `elements` exceed what caches hold."""
        size = elements * self.dtype.itemsize
        return min(_MOST_COPIES, 2 + self._cold_bytes // max(1, size))

    def empty(self, *shape: int) -> Tensor:
        """For results: NaN, so that an element which nothing wrote shows."""
        return torch.full(shape, math.nan, dtype=self.dtype, device=self.device)

    def adapter_in(self, dtype: torch.dtype) -> Adapter:
        """The adapter with its factors in a dtype."""
        A, B, C = (f.to(dtype) for f in (self.adapter.A, self.adapter.B, self.adapter.C))
        return self.adapter._replace(A=A, B=B, C=C)


class Work(NamedTuple):
    """A kernel on a problem."""

    copies: int
    written: tuple[Tensor, ...]  # what a launch on copy 0 writes to
    launch: Callable[[int], Results]  # on a copy; returns what it has written
    expected: Callable[[torch.dtype], Results]  # by the PyTorch backend, of copy 0, in a dtype
    fill: float = math.nan  # what `written` holds before: an element that nothing wrote shows


def _shrink_expand(p: Problem) -> Work:
    from dcft_kernels.triton.shrink_expand import shrink_expand

    copies = p.copies(p.T * (p.n + p.m))
    columns = p.geometry.rank * p.geometry.inputs.width
    x = [p.draw(p.T, p.n) for _ in range(copies)]
    y, u = p.empty(copies, p.T, p.m), p.empty(copies, p.T, columns)

    def launch(i: int) -> Results:
        shrink_expand(x[i], p.adapter, u=u[i], bias=p.bias, y=y[i])
        return {"y": y[i], "U": u[i]}

    def expected(dtype: torch.dtype) -> Results:
        out = p.bias.to(dtype).expand(p.T, p.m).clone()
        U = torch_backend.add_adapter_(out, x[0].to(dtype), p.adapter_in(dtype))
        return {"y": out, "U": U.flatten(1)}

    return Work(copies, (y[0], u[0]), launch, expected)


def _backward(p: Problem) -> Work:
    from dcft_kernels.triton.backward import backward

    copies = p.copies(p.T * (2 * p.n + p.m))
    columns = p.geometry.rank * p.geometry.inputs.width
    x = [p.draw(p.T, p.n) for _ in range(copies)]
    g = [p.draw(p.T, p.m) for _ in range(copies)]
    u, gx = p.draw(p.T, columns), p.empty(copies, p.T, p.n)

    def launch(i: int) -> Results:
        gA, gB, gC = backward(
            p.adapter, g=g[i], x=x[i], u=u, gx=gx[i], needs_A=True, needs_B=True, needs_C=True
        )
        return _present({"gx": gx[i], "gA": gA, "gB": gB, "gC": gC})

    def expected(dtype: torch.dtype) -> Results:
        needs = Needs(x=True, weight=False, bias=False, A=True, B=True, C=True)
        U = u.to(dtype).unflatten(1, (p.geometry.rank, p.geometry.inputs.width))
        grads = torch_backend.backward(
            g[0].to(dtype), x[0].to(dtype), U, None, p.adapter_in(dtype), needs
        )
        return _present({"gx": grads.x, "gA": grads.A, "gB": grads.B, "gC": grads.C})

    return Work(copies, (gx[0],), launch, expected)


def _fused_linear(p: Problem) -> Work:
    from dcft_kernels.triton.fused_linear import fused_linear

    copies = p.copies(2 * p.T * (p.n + p.m) + p.n * p.m)
    columns = p.geometry.rank * p.geometry.inputs.width
    x = [p.draw(p.T, p.n) for _ in range(copies)]
    g = [p.draw(p.T, p.m) for _ in range(copies)]
    weight = [p.draw(p.m, p.n) * p.n**-0.5 for _ in range(copies)]
    y, gx = p.empty(copies, p.T, p.m), p.empty(copies, p.T, p.n)
    u = p.empty(copies, p.T, columns)

    def launch(i: int) -> Results:
        fused_linear(x[i], weight[i], p.adapter, y[i], bias=p.bias, u=u[i])
        fused_linear(g[i], weight[i], p.adapter, gx[i], grad_input=True)
        return {"y": y[i], "gx": gx[i], "U": u[i]}

    def expected(dtype: torch.dtype) -> Results:
        needs = Needs(x=True, weight=False, bias=False, A=False, B=False, C=False)
        W, adapter = weight[0].to(dtype), p.adapter_in(dtype)
        out, U = torch_backend.linear(x[0].to(dtype), W, p.bias.to(dtype), adapter)
        grads = torch_backend.backward(g[0].to(dtype), None, None, W, adapter, needs)
        return _present({"y": out, "gx": grads.x, "U": U.flatten(1)})

    return Work(copies, (y[0], gx[0], u[0]), launch, expected)


def _fused_backward(p: Problem) -> Work:
    from dcft_kernels.triton.backward import backward
    from dcft_kernels.triton.fused_backward import fused_backward
    from dcft_kernels.triton.fused_linear import fused_linear

    copies = p.copies(p.T * (2 * p.n + p.m) + p.n * p.m)
    columns = p.geometry.rank * p.geometry.inputs.width
    x = [p.draw(p.T, p.n) for _ in range(copies)]
    g = [p.draw(p.T, p.m) for _ in range(copies)]
    weight = [p.draw(p.m, p.n) * p.n**-0.5 for _ in range(copies)]
    u, gx = p.draw(p.T, columns), p.empty(copies, p.T, p.n)

    def launch(i: int) -> Results:
        grads = fused_backward(
            g[i], x[i], u, weight[i], p.adapter, gx[i], needs_A=True, needs_B=True, needs_C=True
        )
        if grads is None:  # what stands in for it where the table has no tile
            fused_linear(g[i], weight[i], p.adapter, gx[i], grad_input=True)
            grads = backward(
                p.adapter, g=g[i], x=x[i], u=u, needs_A=True, needs_B=True, needs_C=True
            )
        gA, gB, gC = grads
        return _present({"gx": gx[i], "gA": gA, "gB": gB, "gC": gC})

    def expected(dtype: torch.dtype) -> Results:
        needs = Needs(x=True, weight=False, bias=False, A=True, B=True, C=True)
        U = u.to(dtype).unflatten(1, (p.geometry.rank, p.geometry.inputs.width))
        adapter, W = p.adapter_in(dtype), weight[0].to(dtype)
        grads = torch_backend.backward(g[0].to(dtype), x[0].to(dtype), U, W, adapter, needs)
        return _present({"gx": grads.x, "gA": grads.A, "gB": grads.B, "gC": grads.C})

    return Work(copies, (gx[0],), launch, expected)


def _expand(p: Problem) -> Work:
    from dcft_kernels.triton.expand import expand

    copies = p.copies(2 * p.n * p.m)
    weight = [p.draw(p.m, p.n) for _ in range(copies)]
    out = p.empty(copies, p.m, p.n)

    def launch(i: int) -> Results:
        expand(p.adapter, out=out[i], weight=weight[i])
        return {"W": out[i]}

    def expected(dtype: torch.dtype) -> Results:
        return {"W": weight[0].to(dtype) + torch_backend.delta_weight(p.adapter_in(dtype))}

    return Work(copies, (out[0],), launch, expected)


def _expand_backward(p: Problem) -> Work:
    from dcft_kernels.triton.expand import expand_backward

    copies = p.copies(p.n * p.m)
    grad = [p.draw(p.m, p.n) for _ in range(copies)]

    def launch(i: int) -> Results:
        gA, gB, gC = expand_backward(grad[i], p.adapter, True, True, True)
        return _present({"gA": gA, "gB": gB, "gC": gC})

    def expected(dtype: torch.dtype) -> Results:
        adapter = p.adapter_in(dtype)
        A, B, C = (f.detach().requires_grad_() for f in (adapter.A, adapter.B, adapter.C))
        delta = torch_backend.delta_weight(adapter._replace(A=A, B=B, C=C))
        grads = torch.autograd.grad(delta, (A, B, C), grad[0].to(dtype))
        return dict(zip(("gA", "gB", "gC"), grads, strict=True))

    return Work(copies, (), launch, expected)


# A kernel's name in the table, and how it is called. In order of value.
KERNELS: dict[str, Callable[[Problem], Work]] = {
    "backward": _backward,
    "shrink_expand": _shrink_expand,
    "fused_linear": _fused_linear,
    "fused_backward": _fused_backward,
    "expand": _expand,
    "expand_backward": _expand_backward,
}


def _present(results: dict[str, Tensor | None]) -> Results:
    return {name: value for name, value in results.items() if value is not None}
