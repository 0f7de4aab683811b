"""What functions and backends pass to each other: an adapter, its geometry, its gradients.

The geometry says how a `DW` of shape `[m, n]` is cut into the windows of a transposed convolution.
Both sides of `DW` are covered by windows: along the input side, window `i` covers the columns
`i*s .. i*s + d - 1`; along the output side, window `j` covers the rows `j*s .. j*s + d - 1`.
With `stride == kernel_size` (the paper's choice, section 3.2.2) the windows tile the side; with
`stride < kernel_size` (Table 5) they overlap and their contributions add. Sizes that the windows do
not fit are ragged: the last window sticks out and what sticks out is cropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]

SHARED, PER_RANK = "shared", "per_rank"
"""Whether the ranks of an adapter share one kernel, or each has its own."""


class Side(NamedTuple):
    """The windows along one side of `DW`."""

    size: int  # features on this side: n or m
    windows: int  # how many: I or J
    width: int  # kernel extent on this side: d
    stride: int  # distance between window starts

    @property
    def span(self) -> int:
        """Features that the windows cover, `size` or more (the surplus is cropped)."""
        return (self.windows - 1) * self.stride + self.width

    @property
    def tile(self) -> bool:
        """Whether the windows neither overlap nor stick out."""
        return self.stride == self.width and self.windows * self.width == self.size


class Geometry(NamedTuple):
    """Shapes of one DCFT adapter: `A [k, I]`, `B [J, k]`, `C [d_out, d_in]`, `DW [m, n]`."""

    rank: int
    outputs: Side
    inputs: Side
    per_rank: bool = False  # whether every rank has its own kernel: `C [k, d_out, d_in]`

    @classmethod
    def build(
        cls,
        in_features: int,
        out_features: int,
        rank: int,
        kernel_size: Pair,
        stride: Pair,
        per_rank: bool = False,
    ) -> Geometry:
        """The geometry for given sizes; `kernel_size` and `stride` are `(out, in)` pairs."""
        outputs, inputs = (
            Side(size, window_count(size, width, step), width, step)
            for size, width, step in zip(
                (out_features, in_features), kernel_size, stride, strict=True
            )
        )
        return cls(rank, outputs, inputs, per_rank)

    @property
    def kernel_size(self) -> Pair:
        """`(d_out, d_in)`."""
        return (self.outputs.width, self.inputs.width)

    @property
    def stride(self) -> Pair:
        """`(s_out, s_in)`."""
        return (self.outputs.stride, self.inputs.stride)

    @property
    def shape_A(self) -> Pair:
        """`(k, I)`."""
        return (self.rank, self.inputs.windows)

    @property
    def shape_B(self) -> Pair:
        """`(J, k)`."""
        return (self.outputs.windows, self.rank)

    @property
    def shape_C(self) -> tuple[int, ...]:
        """`(d_out, d_in)`, or `(k, d_out, d_in)` with a kernel per rank."""
        return (self.rank, *self.kernel_size) if self.per_rank else self.kernel_size


def window_count(size: int, width: int, stride: int) -> int:
    """Windows of `width` every `stride` that it takes to cover `size` features (equation 9).

    `ceil((size - width) / stride) + 1`, at least one. With `stride == width` this is
    `ceil(size / width)`.
    """
    return max(0, -(-(size - width) // stride)) + 1


class Adapter(NamedTuple):
    """Factors and settings of one DCFT adapter; every field has been validated."""

    A: Tensor  # [k, I]
    B: Tensor  # [J, k]
    C: Tensor  # [d_out, d_in] or [k, d_out, d_in]
    scaling: float
    geometry: Geometry
    dropout_p: float = 0.0
    seed: Tensor | None = None  # int64 scalar; None: no dropout in this call
    matrices: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # of `torch_backend`, if computed

    def widened(self, dtype: torch.dtype) -> Adapter:
        """The same adapter with factors in `dtype`, or in float32 where that is wider."""
        wide = torch.promote_types(dtype, torch.float32)
        return self._replace(A=self.A.to(wide), B=self.B.to(wide), C=self.C.to(wide))

    @property
    def dtype(self) -> torch.dtype:
        """The factors' common dtype, that of `delta_weight`."""
        return torch.promote_types(torch.promote_types(self.A.dtype, self.B.dtype), self.C.dtype)


class Needs(NamedTuple):
    """Which gradients the backward pass was asked for."""

    x: bool
    weight: bool
    bias: bool
    A: bool
    B: bool
    C: bool


class Gradients(NamedTuple):
    """The gradients, None where not asked for."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    C: Tensor | None = None


def dtype_of_U(tokens: torch.dtype) -> torch.dtype:
    """The dtype in which kernels keep `U` for the backward pass of tokens in dtype `tokens`.

    Not float16, which overflows where the layer's output need not.
    """
    return tokens if tokens == torch.bfloat16 else torch.float32


def saved(tensor: Tensor | None) -> Tensor:
    """A tensor that a requested gradient reads: the forward kept it, or the caller erred."""
    if tensor is None:
        raise RuntimeError("backward: a gradient was asked for whose inputs were not saved")
    return tensor
