"""The ways to call the package's launchers that compile different kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from dcft_kernels.adapter import Adapter, Geometry, dtype_of_U
from dcft_kernels.triton import gemm
from dcft_kernels.triton.expand import expand
from dcft_kernels.triton.partials import prepare_sums
from dcft_kernels.triton.row_block import backward, shrink_expand
from dcft_kernels.triton.shrink import partial_shape, shrink, shrink_backward

# How names begin of the cases that the entries of the tiles' table are made for.
OF_ENTRIES = ("columns", "products")

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


def _geometry(
    width: int = 8,
    rank: int = 1,
    stride: int | None = None,
    n: int = 1024,
    m: int = 2048,
    per_rank: bool = False,
) -> Geometry:
    stride = width if stride is None else stride
    return Geometry.build(n, m, rank, (width, width), (stride, stride), per_rank)


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
    "per_rank4": _geometry(rank=4, per_rank=True),
    "per_rank8": _geometry(rank=8, per_rank=True),
    "per_rank16": _geometry(rank=16, per_rank=True),
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


def _shrink(t: Tensors) -> None:
    shrink(t.x, t.adapter, u=t.u, spread=t.y.new_empty(t.y.shape[1], t.u.shape[1]))


def _shrink_backward(t: Tensors, needs: tuple[bool, bool] = (True, True)) -> None:
    partial = torch.empty(partial_shape(t.y, t.adapter, needs)) if any(needs) else None
    spread = t.x.new_empty(t.u.shape[1], t.x.shape[1])
    ub = torch.empty_like(t.u, dtype=t.y.dtype)
    shrink_backward(t.y, t.u, t.adapter, ub=ub, spread=spread, partial=partial, needs=needs)


def _linear(t: Tensors, bias: bool = True) -> None:
    spread = t.y.new_empty(t.y.shape[1], t.u.shape[1])
    gemm.linear(t.x, t.weight, t.bias if bias else None, t.u, spread, out=t.y)


def _input_gradient(t: Tensors, need_A: bool = True) -> None:
    """Its result in the place of another `x`."""
    out, spread = torch.empty_like(t.x), t.x.new_empty(t.u.shape[1], t.x.shape[1])
    if not need_A:
        gemm.input_gradient(t.y, t.weight, t.u, spread, out=out)
        return
    slices = gemm.slices(t.x.shape[0], t.u.shape[1], t.x.device)
    partial = torch.empty(slices, t.adapter.geometry.rank, t.x.shape[1])
    gemm.input_gradient(t.y, t.weight, t.u, spread, out=out, x=t.x, partial=partial)


def _sums(t: Tensors, needs: tuple[bool, bool, bool] = (True, True, True)) -> None:
    """With the shares of gA by feature."""
    A, B, C, _, geometry, *_ = t.adapter
    dtypes = (A.dtype, B.dtype, C.dtype)
    sums = prepare_sums(geometry, needs, dtypes, t.x.device, by_feature=True)
    by_feature = torch.empty(4, geometry.rank, geometry.inputs.size) if needs[0] else None
    sums.total(torch.empty(4, sums.columns) if sums.columns else None, t.adapter, by_feature)


def _stochastic(t: Tensors) -> None:
    expand(t.adapter, out=t.weight, weight=t.weight, seed=torch.tensor(0))


_ROWS = {
    # One for each class of a row's products in the tiles' table.
    "products2048": _geometry(n=768, m=768),
    "products4096": _geometry(n=4096, m=4096),
    "products8192": _geometry(n=8192, m=8192),
    "products16384": _geometry(n=4096, m=14336),
    "products32768": _geometry(n=28672, m=28672),
    "rank4": _geometry(rank=4),
    "width4": _geometry(width=4),
    "width32": _geometry(width=32),
    "width64": _geometry(width=64),
    "per_rank4": _geometry(rank=4, per_rank=True),
    "per_rank4-4096": _geometry(n=4096, m=4096, rank=4, per_rank=True),
    "per_rank4-width16": _geometry(width=16, rank=4, per_rank=True),
}

_PRODUCTS = {
    "columns16": _MAIN,
    "columns32": _geometry(rank=4),
    "columns64": _geometry(width=16, rank=4),
}


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
    for launcher, launch in (("shrink", _shrink), ("shrink_backward", _shrink_backward)):
        for name, geometry in _ROWS.items():
            yield LaunchCase(launcher, name, geometry, launch, dtypes=("bf16",))
        yield LaunchCase(launcher, "fp16", _ROWS["products4096"], launch, dtypes=("fp16",))
        yield LaunchCase(
            launcher,
            "bf16-adapter",
            _ROWS["products4096"],
            launch,
            dtypes=("bf16",),
            adapter_dtype="bf16",
        )
    for name, needs_BC in (("needs-", (False, False)), ("needs-B", (True, False))):
        launch = partial(_shrink_backward, needs=needs_BC)
        yield LaunchCase("shrink_backward", name, _ROWS["products4096"], launch, dtypes=("bf16",))
    for name, geometry in _PRODUCTS.items():
        yield LaunchCase("gemm", name, geometry, _linear, dtypes=("bf16",))
        for suffix, need_A in (("", False), ("-A", True)):
            launch = partial(_input_gradient, need_A=need_A)
            yield LaunchCase("gemm", f"{name}-backward{suffix}", geometry, launch, dtypes=("bf16",))
    launch = partial(_linear, bias=False)
    yield LaunchCase("gemm", "no-bias", _MAIN, launch, dtypes=("bf16",))
    for name, needs_ABC in (("sums", (True, True, True)), ("sums-A", (True, False, False))):
        launch = partial(_sums, needs=needs_ABC)
        yield LaunchCase("gemm", name, _MAIN, launch, dtypes=("bf16",))
    for name in ("columns16", "sliced", "overlap", "per_rank4"):
        yield LaunchCase("expand", name, _GEOMETRIES[name], _expand)
    yield LaunchCase("expand", "delta", _MAIN, lambda t: expand(t.adapter, out=t.weight))
    yield LaunchCase("expand", "stochastic", _MAIN, _stochastic, dtypes=("bf16", "fp16"))


CASES = tuple(_cases())
