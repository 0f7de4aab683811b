"""The ways to call the package's launchers that compile different kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dcft_kernels.adapter import Adapter
from dcft_kernels.geometry import Geometry
from dcft_kernels.triton.backward import backward
from dcft_kernels.triton.expand import expand, expand_backward
from dcft_kernels.triton.shrink_expand import shrink_expand

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

# Divisible by 16, as sizes of models are.
_TOKENS, _IN_FEATURES, _OUT_FEATURES = 256, 1024, 2048


class Setting(NamedTuple):
    """The tensors that a case is launched with; their values do not matter."""

    geometry: Geometry
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool
    tokens: int

    @property
    def adapter(self) -> Adapter:
        geometry, dtype = self.geometry, self.adapter_dtype
        return Adapter(
            torch.empty(geometry.shape_A, dtype=dtype),
            torch.empty(geometry.shape_B, dtype=dtype),
            torch.empty(geometry.shape_C, dtype=dtype),
            1.5,
            geometry,
            0.1 if self.dropout else 0.0,
            torch.tensor(0) if self.dropout else None,
        )

    def tensor(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    @property
    def x(self) -> Tensor:
        return self.tensor(self.tokens, self.geometry.inputs.size)

    @property
    def y(self) -> Tensor:
        return self.tensor(self.tokens, self.geometry.outputs.size)

    @property
    def u(self) -> Tensor:
        return self.tensor(self.tokens, self.geometry.rank * self.geometry.inputs.width)

    @property
    def bias(self) -> Tensor:
        return self.tensor(self.geometry.outputs.size)

    @property
    def weight(self) -> Tensor:
        return self.tensor(self.geometry.outputs.size, self.geometry.inputs.size)


class Case(NamedTuple):
    """One way to call a launcher, for every architecture and dtype."""

    launcher: str
    name: str
    geometry: Geometry
    launch: Callable[[Setting], object]
    dropout: bool = False
    tf32: bool = False
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    adapter_dtypes: tuple[str, ...] = ("fp32",)
    tokens: int = _TOKENS

    def run(self, dtype: str, adapter_dtype: str) -> None:
        """Call the launcher."""
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        try:
            self.launch(
                Setting(
                    self.geometry,
                    DTYPES[dtype],
                    DTYPES[adapter_dtype],
                    self.dropout,
                    self.tokens,
                )
            )
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed


def _geometry(width: int = 8, rank: int = 1, stride: int | None = None) -> Geometry:
    stride = width if stride is None else stride
    return Geometry.build(_IN_FEATURES, _OUT_FEATURES, rank, (width, width), (stride, stride))


# One for each class of columns in the tiles' table, see `dcft_kernels.triton.tiles`.
_MAIN = _geometry()
_COLUMNS = {
    "columns16": _MAIN,
    "columns32": _geometry(rank=4),
    "columns64": _geometry(rank=8),
    "columns128": _geometry(rank=16),
    "sliced": _geometry(width=12, rank=10),  # more columns than one launch holds
}
_OTHERS = {
    "overlap": _geometry(stride=2),
    "width4": _geometry(width=4),
    "width12": _geometry(width=12),
}


def _forward(s: Setting) -> None:
    shrink_expand(s.x, s.adapter, u=s.u, bias=s.bias, y=s.y)


def _update(s: Setting) -> None:
    shrink_expand(s.x, s.adapter, u=s.u, base=s.y, y=s.y)


def _shrink(s: Setting) -> None:
    shrink_expand(s.x, s.adapter, u=s.u)


def _expand_rows(s: Setting) -> None:
    shrink_expand(None, s.adapter, u=s.u, bias=s.bias, y=s.y)


def _backward(needs: str) -> Callable[[Setting], object]:
    """Of the gradients `x`, `A`, `B`, `C`, those in `needs`."""

    def launch(s: Setting) -> object:
        return backward(
            s.adapter,
            g=s.y,
            x=s.x if "A" in needs else None,
            u=s.u if "B" in needs or "C" in needs else None,
            gx=s.x if "x" in needs else None,
            needs_A="A" in needs,
            needs_B="B" in needs,
            needs_C="C" in needs,
        )

    return launch


def _expand(s: Setting) -> None:
    weight = s.weight
    expand(s.adapter, out=weight, weight=weight)


def _delta(s: Setting) -> None:
    expand(s.adapter, out=s.weight)


def _stochastic(s: Setting) -> None:
    weight = s.weight
    expand(s.adapter, out=weight, weight=weight, seed=torch.tensor(0))


def _expand_backward(s: Setting) -> object:
    return expand_backward(s.weight, s.adapter, True, True, True)


def _cases() -> Iterator[Case]:
    for launcher, launch in (("shrink_expand", _forward), ("backward", _backward("xABC"))):
        for name, geometry in (_COLUMNS | _OTHERS).items():
            yield Case(launcher, name, geometry, launch)
        yield Case(launcher, "fp16", _MAIN, launch, dtypes=("fp16",))
        yield Case(
            launcher, "bf16-adapter", _MAIN, launch, dtypes=("bf16",), adapter_dtypes=("bf16",)
        )
        yield Case(launcher, "dropout", _MAIN, launch, dropout=True)
        yield Case(launcher, "tf32", _MAIN, launch, tf32=True, dtypes=("fp32",))
        yield Case(launcher, "tokens16", _MAIN, launch, tokens=16)
    yield Case("shrink_expand", "update", _MAIN, _update)
    yield Case("shrink_expand", "shrink", _MAIN, _shrink)
    yield Case("shrink_expand", "expand", _MAIN, _expand_rows)
    for needs in ("x", "xBC", "ABC"):
        yield Case("backward", f"needs-{needs}", _MAIN, _backward(needs))
    for name, geometry in (_COLUMNS | _OTHERS).items():
        yield Case("expand_backward", name, geometry, _expand_backward)
    for name in ("columns16", "sliced", "overlap"):
        yield Case("expand", name, (_COLUMNS | _OTHERS)[name], _expand)
    yield Case("expand", "delta", _MAIN, _delta)
    yield Case("expand", "stochastic", _MAIN, _stochastic, dtypes=("bf16", "fp16"))


CASES = tuple(_cases())
