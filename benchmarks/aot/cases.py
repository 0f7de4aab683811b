"""The ways to call the package's launchers that compile different kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from dcft_kernels.adapter import Adapter, Geometry, dtype_of_U
from dcft_kernels.triton.expand import expand, expand_backward
from dcft_kernels.triton.row_block import backward, shrink_expand

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Tensors:
    """What a case is launched with; the values do not matter."""

    def __init__(self, case: LaunchCase, dtype: str) -> None:
        geometry = case.geometry
        n, m = geometry.inputs.size, geometry.outputs.size
        new = partial(torch.empty, dtype=DTYPES[dtype])
        self.x, self.y = new(case.tokens, n), new(case.tokens, m)
        u_dtype = dtype_of_U(DTYPES[dtype])
        self.u = new(case.tokens, geometry.rank * geometry.inputs.width, dtype=u_dtype)
        self.weight, self.bias = new(m, n), new(m)
        shapes = (geometry.shape_A, geometry.shape_B, geometry.shape_C)
        A, B, C = (torch.empty(shape, dtype=DTYPES[case.adapter_dtype]) for shape in shapes)
        dropout = (0.1, torch.tensor(0)) if case.dropout else (0.0, None)
        self.adapter = Adapter(A, B, C, 1.5, geometry, *dropout)


class LaunchCase(NamedTuple):
    """One way to call a launcher."""

    launcher: str
    name: str
    geometry: Geometry
    launch: Callable[[Tensors], object]
    dropout: bool = False
    tf32: bool = False
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    adapter_dtype: str = "fp32"
    tokens: int = 256

    def run(self, dtype: str) -> None:
        """Call the launcher."""
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        try:
            self.launch(Tensors(self, dtype))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed


def _geometry(width: int = 8, rank: int = 1, stride: int | None = None) -> Geometry:
    stride = width if stride is None else stride
    return Geometry.build(1024, 2048, rank, (width, width), (stride, stride))


_MAIN = _geometry()
_GEOMETRIES = {
    # One for each class of columns in the tiles' table, see `dcft_kernels.triton.tiles`.
    "columns16": _MAIN,
    "columns32": _geometry(rank=4),
    "columns64": _geometry(rank=8),
    "columns128": _geometry(rank=16),
    "sliced": _geometry(width=12, rank=10),  # more columns than one launch holds
    "overlap": _geometry(stride=2),
    "width4": _geometry(width=4),
    "width12": _geometry(width=12),
}


def _forward(t: Tensors) -> None:
    shrink_expand(t.x, t.adapter, u=t.u, bias=t.bias, y=t.y)


def _update(t: Tensors) -> None:
    shrink_expand(t.x, t.adapter, u=t.u, base=t.y, y=t.y)


def _backward(t: Tensors, needs: str = "xABC") -> object:
    """Of the gradients `x`, `A`, `B`, `C`, those in `needs`."""
    factors = ("A" in needs, "B" in needs, "C" in needs)
    return backward(t.y, t.x, t.u, t.adapter, t.x if "x" in needs else None, factors)


def _expand(t: Tensors) -> None:
    expand(t.adapter, out=t.weight, weight=t.weight)


def _expand_backward(t: Tensors) -> object:
    return expand_backward(t.weight, t.adapter, (True, True, True))


def _stochastic(t: Tensors) -> None:
    expand(t.adapter, out=t.weight, weight=t.weight, seed=torch.tensor(0))


def _cases() -> Iterator[LaunchCase]:
    for launcher, launch in (("shrink_expand", _forward), ("backward", _backward)):
        for name, geometry in _GEOMETRIES.items():
            yield LaunchCase(launcher, name, geometry, launch)
        yield LaunchCase(launcher, "fp16", _MAIN, launch, dtypes=("fp16",))
        yield LaunchCase(
            launcher, "bf16-adapter", _MAIN, launch, dtypes=("bf16",), adapter_dtype="bf16"
        )
        yield LaunchCase(launcher, "dropout", _MAIN, launch, dropout=True)
        yield LaunchCase(launcher, "tf32", _MAIN, launch, tf32=True, dtypes=("fp32",))
        yield LaunchCase(launcher, "tokens16", _MAIN, launch, tokens=16)
    yield LaunchCase("shrink_expand", "update", _MAIN, _update)
    for needs in ("x", "xBC", "ABC"):
        yield LaunchCase("backward", f"needs-{needs}", _MAIN, partial(_backward, needs=needs))
    for name, geometry in _GEOMETRIES.items():
        yield LaunchCase("expand_backward", name, geometry, _expand_backward)
    for name in ("columns16", "sliced", "overlap"):
        yield LaunchCase("expand", name, _GEOMETRIES[name], _expand)
    yield LaunchCase("expand", "delta", _MAIN, lambda t: expand(t.adapter, out=t.weight))
    yield LaunchCase("expand", "stochastic", _MAIN, _stochastic, dtypes=("bf16", "fp16"))


CASES = tuple(_cases())
