"""Adapter shapes that every backend must get right, and random inputs for them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dcft_kernels.adapter import Adapter, Geometry, Pair


class AdapterShape(NamedTuple):
    """One adapter shape; `kernel_size` and `stride` are `(out, in)`."""

    in_features: int
    out_features: int
    rank: int
    kernel_size: Pair
    stride: Pair
    per_rank: bool = False

    @property
    def geometry(self) -> Geometry:
        return Geometry.build(*self)

    def __str__(self) -> str:
        kernel, stride = self.kernel_size, self.stride
        kernels = "-per_rank" * self.per_rank
        return (
            f"{self.in_features}to{self.out_features}-k{self.rank}{kernels}"
            f"-d{kernel[0]}x{kernel[1]}-s{stride[0]}x{stride[1]}"
        )


CASES = [
    AdapterShape(48, 64, 1, (8, 8), (8, 8)),  # the paper's choice
    AdapterShape(64, 48, 3, (8, 8), (8, 8)),  # rank above one
    AdapterShape(24, 36, 2, (6, 12), (6, 12)),  # rectangular, not powers of two
    AdapterShape(50, 37, 1, (8, 8), (8, 8)),  # ragged on both sides
    AdapterShape(5, 3, 2, (8, 8), (8, 8)),  # kernel larger than the layer
    AdapterShape(40, 32, 1, (8, 8), (2, 4)),  # overlapping (Table 5)
    AdapterShape(33, 29, 4, (5, 7), (2, 3)),  # overlapping, ragged, rectangular
    AdapterShape(16, 24, 2, (1, 1), (1, 1)),  # d = 1: plain LoRA times a number
    AdapterShape(17, 17, 1, (8, 8), (1, 1)),  # stride one
    AdapterShape(1, 1, 1, (1, 1), (1, 1)),
    AdapterShape(64, 48, 3, (8, 8), (8, 8), True),  # a kernel per rank
    AdapterShape(33, 29, 4, (5, 7), (2, 3), True),
    AdapterShape(50, 37, 2, (4, 8), (4, 8), True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@st.composite
def any_case(draw: st.DrawFn) -> AdapterShape:
    """Any shape: ragged or not, tiling or overlapping, a kernel wider than the layer."""
    kernel = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    stride = (draw(st.integers(1, kernel[0])), draw(st.integers(1, kernel[1])))
    if draw(st.booleans()):
        stride = kernel
    sizes = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    return AdapterShape(*sizes, draw(st.integers(1, 5)), kernel, stride, draw(st.booleans()))


class Inputs(NamedTuple):
    """What `dcft_linear` takes, and the gradient of its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    grad: Tensor

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Everything that can have a gradient, in `dcft_linear`'s order."""
        return self[:6]

    def to(self, dtype: torch.dtype) -> Inputs:
        """Detached copies in another dtype."""
        return Inputs(*(tensor.detach().to(dtype) for tensor in self))

    def requiring(self, *flags: bool) -> Inputs:
        """The same data and strides, of which those flagged require gradients (default: all)."""
        wanted = flags or (True,) * 6
        operands = [
            tensor.detach().requires_grad_(flag)
            for tensor, flag in zip(self.operands, wanted, strict=True)
        ]
        return Inputs(*operands, self.grad)


def random_inputs(
    case: AdapterShape,
    leading: tuple[int, ...] = (5,),
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Inputs:
    """Inputs of unit variance with factors that make the increment as large as the base's output.

    Values are drawn in the narrowest dtype asked for, so that wider copies are exact.
    """
    generator = torch.Generator().manual_seed(seed)
    geometry = case.geometry
    n, m = case.in_features, case.out_features

    def draw(*shape: int, gain: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * gain
        return values.to(to)

    narrow = adapter_dtype or dtype
    return Inputs(
        x=draw(*leading, n),
        weight=draw(m, n, gain=n**-0.5),
        bias=draw(m),
        A=draw(*geometry.shape_A, gain=geometry.inputs.windows**-0.5, to=narrow),
        B=draw(*geometry.shape_B, to=narrow),
        C=draw(*geometry.shape_C, gain=geometry.inputs.width**-0.5, to=narrow),
        grad=draw(*leading, m),
    )


def adapter_of(inputs: Inputs, case: AdapterShape, scaling: float = 1.0) -> Adapter:
    """The factors of `inputs` as backends take them."""
    return Adapter(inputs.A, inputs.B, inputs.C, scaling, case.geometry)
