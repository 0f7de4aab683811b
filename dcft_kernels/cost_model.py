"""What each strategy moves, multiplies and launches, and how long that takes on a given GPU.

A strategy is a list of kernels forward and one backward (`kernels`). A kernel takes the longer of
the time its bytes and the time its flops need, plus the gap to the next one:

    device seconds = sum over kernels of max(bytes / bandwidth, flops / rate) + gap
    host seconds   = launches * what the processor needs for one
    seconds        = the longer of the two

The processor runs ahead of the GPU, so a layer takes the longer of the two times. Bytes are those
of main memory, every tensor counted once a kernel; caches are not modelled. The frozen layer, which
ratios refer to, is predicted likewise. The model is meant to rank strategies, not to replace a
measurement.

Notation as everywhere: `x [T, n]`, `W [m, n]`, `U [T, k*d_in]`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from dcft_kernels.geometry import Geometry, Side
from dcft_kernels.gpu_rates import Gpu

# Rows that a program of the row-block kernels owns, by how much it holds a row (see `tiles.json`).
_ROWS_16_BIT, _ROWS_MORE = 64, 32
_FEWEST_ROWS = 16
_NARROW_COLUMNS = 32
# Rows and columns of a tile of the fused matrix product.
_FUSED_ROWS = 128
_FUSED_COLUMNS_16_BIT, _FUSED_COLUMNS_MORE = 128, 64
# Columns that a token is shrunk to, at most, where one product makes the whole backward pass: what
# `tiles.json` has an entry of `fused_backward` for. In 16 bit only.
_MERGED_COLUMNS = 32
# Programs of the backward kernel, at most: about two to a multiprocessor, each with its own sums.
_SLICES = 256
# Share of the bandwidth that one multiprocessor can draw, over its fair share.
_BANDWIDTH_SURPLUS = 2.0

# Columns that a launch holds without spilling registers to memory, by bytes an element.
_COLUMNS_OF_A_LAUNCH = {2: 128, 4: 64}

_FLOAT32_BYTES = 4
_FEWEST_COLUMNS = 16


class Call(NamedTuple):
    """All that the choice of a strategy depends on; hashable."""

    tokens: int  # a power of two, see `bucket`
    geometry: Geometry
    dtype: torch.dtype  # of the tokens
    adapter_dtype: torch.dtype
    architecture: str | None  # "sm_90"; None: no GPU
    device_name: str | None = None
    base: bool = True  # False: the increment alone is added to a given y
    weight_trained: bool = False
    backward: bool = True  # whether gradients will be asked for
    dropout: bool = False
    tf32: bool = False  # whether PyTorch allows it for float32
    kernels_only: bool = False  # whether the Triton backend was asked for by name


class Kernel(NamedTuple):
    """One launch, or several equal ones."""

    name: str
    bytes: int
    flops: int = 0
    programs: int | None = None  # None: enough of them to fill any GPU
    most_programs: int | None = None  # what they are doubled to on a GPU that they do not fill
    library: bool = False  # the vendor's matrix product, not a Triton kernel
    launches: int = 1


class Cost(NamedTuple):
    """A direction of a strategy: counted, then predicted for a GPU."""

    bytes: int
    flops: int
    launches: int
    device_seconds: float
    host_seconds: float

    @property
    def seconds(self) -> float:
        """The longer of what the GPU and what the processor need."""
        return max(self.device_seconds, self.host_seconds)


class Estimate(NamedTuple):
    """What a strategy is predicted to cost; `backward` is all zeros where none follows."""

    strategy: str
    forward: Cost
    backward: Cost
    exact: bool  # False: updates below half a unit in the last place of W are lost

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward.seconds + self.backward.seconds


def bucket(tokens: int) -> int:
    """The power of two that a token count is rounded up to: a new count is no new decision."""
    return 1 << max(0, tokens - 1).bit_length()


def columns(side: Side, rank: int) -> int:
    """Columns that a token is shrunk to on a side, padded to what a matrix unit takes."""
    return max(_FEWEST_COLUMNS, _power_of_two(rank) * _power_of_two(side.width))


@functools.cache
def ranks_of_a_launch(geometry: Geometry, itemsize: int) -> int:
    """How many of an adapter's ranks one launch of a row-block kernel takes; the rest take more.

    As many as its registers hold columns of, in slices of about equal rank. Every slice is one
    more pass over the tokens. Windows that are padded or overlap take registers for addresses.
    """
    rank, outputs, inputs = geometry
    most = _COLUMNS_OF_A_LAUNCH[itemsize]
    if not all(_contiguous(side) for side in (outputs, inputs)):
        most //= 2
    for count in range(1, rank + 1):
        size = -(-rank // count)
        if max(columns(side, size) for side in (outputs, inputs)) <= most:
            return size
    return 1


def _contiguous(side: Side) -> bool:
    """Whether the windows lie one after the other without padding between them."""
    return side.stride == side.width == _power_of_two(side.width)


def estimate(strategy: str, call: Call, gpu: Gpu) -> Estimate:
    """The predicted cost of a strategy, or of the frozen layer alone (`"frozen"`)."""
    forward, backward = kernels(strategy, call)
    return Estimate(
        strategy,
        cost(forward, call, gpu),
        cost(backward if call.backward else (), call, gpu),
        exact=strategy != "scratch" or call.dtype.itemsize > 2,
    )


def cost(work: tuple[Kernel, ...], call: Call, gpu: Gpu) -> Cost:
    """Sum over kernels that run one after the other."""
    launches = sum(kernel.launches for kernel in work)
    return Cost(
        sum(kernel.bytes for kernel in work),
        sum(kernel.flops for kernel in work),
        launches,
        sum(_kernel_seconds(kernel, call, gpu) for kernel in work) + launches * gpu.launch_seconds,
        launches * gpu.host_seconds,
    )


def _kernel_seconds(kernel: Kernel, call: Call, gpu: Gpu) -> float:
    """The longer of the time of its bytes and that of its flops; few programs leave a GPU idle."""
    busy = 1.0
    if kernel.programs is not None:
        programs, most = kernel.programs, kernel.most_programs or kernel.programs
        while programs < min(most, gpu.multiprocessors):  # as `Tile.for_tokens` does
            programs = min(2 * programs, most)
        busy = min(1.0, programs / gpu.multiprocessors)
    rate = gpu.matrix_rate(call.dtype, call.tf32) * (1.0 if kernel.library else gpu.triton_gemm)
    bandwidth = gpu.bandwidth * min(1.0, busy * _BANDWIDTH_SURPLUS)
    return max(kernel.bytes / bandwidth, kernel.flops / (rate * busy))


def kernels(strategy: str, call: Call) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """What a strategy launches forward and backward.

    Raises:
        ValueError: an unknown name.
    """
    counts = {
        "frozen": _frozen,
        "row_block": _row_block,
        "fused": _fused,
        "scratch": _scratch,
        "torch": _torch,
    }
    if strategy not in counts:
        raise ValueError(f"strategy: expected one of {', '.join(counts)}, got {strategy!r}")
    forward, backward = counts[strategy](_Sizes(call))
    if call.weight_trained:
        backward = (*backward, _Sizes(call).weight_gradient)
    return forward, backward


class _Sizes:
    """Bytes of the tensors of a call, and flops of the products with a factor."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.T = call.tokens
        self.rank, self.outputs, self.inputs = call.geometry
        itemsize = call.dtype.itemsize
        self.x = self.T * self.inputs.size * itemsize
        self.y = self.T * self.outputs.size * itemsize
        self.W = self.outputs.size * self.inputs.size * itemsize
        self.U = self.T * self.rank * self.inputs.width * itemsize
        self.factor_elements = (
            self.rank * (self.inputs.windows + self.outputs.windows)
            + self.inputs.width * self.outputs.width
        )
        self.factors = self.factor_elements * call.adapter_dtype.itemsize
        self.slices = -(-self.rank // ranks_of_a_launch(call.geometry, min(4, itemsize)))
        self.columns = max(columns(side, self.rank) for side in (self.inputs, self.outputs))

    @property
    def gemm_flops(self) -> int:
        return 2 * self.T * self.inputs.size * self.outputs.size

    def gemm_programs(self, features: int, tile_columns: int) -> int:
        return -(-self.T // _FUSED_ROWS) * -(-features // tile_columns)

    @property
    def most_row_programs(self) -> int:
        return -(-self.T // _FEWEST_ROWS)

    @property
    def row_programs(self) -> int:
        narrow = self.call.dtype.itemsize == 2 and self.columns <= _NARROW_COLUMNS
        return -(-self.T // (_ROWS_16_BIT if narrow else _ROWS_MORE))

    def base(self, *, adds: bool) -> tuple[Kernel, ...]:
        """`x W^T`; `adds` if it adds to what `y` holds, which it then reads as well."""
        if not self.call.base:
            return ()
        moved = self.x + self.W + self.y * (2 if adds else 1)
        return (Kernel("base product", moved, self.gemm_flops, library=True),)

    def base_gradient(self, *, adds: bool) -> tuple[Kernel, ...]:
        """`g W`, likewise."""
        if not self.call.base:
            return ()
        moved = self.y + self.W + self.x * (2 if adds else 1)
        return (Kernel("base gradient", moved, self.gemm_flops, library=True),)

    @property
    def weight_gradient(self) -> Kernel:
        moved = self.x + self.y + self.W
        return Kernel("weight gradient", moved, self.gemm_flops, library=True)

    def shrink_flops(self, side: Side) -> int:
        """`shrink` and `factor_grad` walk over padded windows, and over overlaps repeatedly."""
        features = side.windows * _power_of_two(side.width)
        return 2 * self.T * features * columns(side, self.rank)

    def expand_flops(self, side: Side) -> int:
        features = side.windows * _power_of_two(side.width) if side.stride == side.width else 0
        return 2 * self.T * max(features, side.size) * columns(side, self.rank)

    @property
    def gradient_flops(self) -> int:
        """`Vb` and `gB` from `g`, `gA` from `x`."""
        return 2 * self.shrink_flops(self.outputs) + self.shrink_flops(self.inputs)

    def sums(self) -> tuple[int, Kernel]:
        """Bytes of the programs' sums of the factors' gradients, and the kernel that adds them."""
        partial = min(self.row_programs, _SLICES) * self.factor_elements * _FLOAT32_BYTES
        return partial, Kernel("sums of gradients", partial + self.factors)


def _frozen(s: _Sizes) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """The base layer alone: what everything is compared with."""
    return s.base(adds=False), s.base_gradient(adds=False)


def _row_block(s: _Sizes) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """One kernel a direction over whole rows, and the vendor's product added onto its result."""
    partial, sums = s.sums()
    given_y = 0 if s.call.base else s.y  # the increment alone: y is read, y + increment written
    more = s.slices - 1  # every further slice of the ranks adds to the results of those before
    forward = Kernel(
        "shrink and expand",
        s.x + s.y + given_y + s.U + s.factors + more * (s.x + 2 * s.y),
        s.shrink_flops(s.inputs) + s.expand_flops(s.outputs),
        s.row_programs,
        s.most_row_programs,
        launches=s.slices,
    )
    backward = Kernel(
        "gradients",
        s.y + s.x + s.x + s.U + s.factors + partial + more * (s.y + 3 * s.x),
        s.gradient_flops + s.expand_flops(s.inputs),
        s.row_programs,
        s.most_row_programs,
        launches=s.slices,
    )
    return (forward, *s.base(adds=True)), (backward, sums, *s.base_gradient(adds=True))


def _fused(s: _Sizes) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """One matrix product a direction with the adapter inside.

    The factors' gradients come out of that of the way back, if the adapter is narrow; if not, there
    is one kernel more for them. Every tile of outputs shrinks its rows again: `columns / tile` more
    flops, and no more bytes.
    """
    narrow = s.call.dtype.itemsize == 2 and s.columns < _FUSED_COLUMNS_16_BIT
    tile = _FUSED_COLUMNS_16_BIT if narrow else _FUSED_COLUMNS_MORE
    partial, sums = s.sums()
    forward = Kernel(
        "fused product",
        s.x + s.W + s.y + s.U + s.factors,
        s.gemm_flops
        + -(-s.outputs.size // tile) * s.shrink_flops(s.inputs)
        + s.expand_flops(s.outputs),
        s.gemm_programs(s.outputs.size, tile),
    )
    if s.call.dtype.itemsize == 2 and s.columns <= _MERGED_COLUMNS:
        partial = -(-s.T // _FUSED_ROWS) * s.factor_elements * _FLOAT32_BYTES
        gradient = Kernel(
            "fused gradients",
            s.y + s.W + s.x + s.x + s.U + s.factors + partial,
            s.gemm_flops
            + -(-s.inputs.size // tile) * s.shrink_flops(s.outputs)
            + s.expand_flops(s.inputs)
            + s.shrink_flops(s.outputs)
            + s.shrink_flops(s.inputs),
            s.gemm_programs(s.inputs.size, tile),
        )
        return (forward,), (gradient, Kernel("sums of gradients", partial + s.factors))
    grad_input = Kernel(
        "fused gradient",
        s.y + s.W + s.x + s.factors,
        s.gemm_flops
        + -(-s.inputs.size // tile) * s.shrink_flops(s.outputs)
        + s.expand_flops(s.inputs),
        s.gemm_programs(s.inputs.size, tile),
    )
    gradients = Kernel(
        "gradients",
        s.y + s.x + s.U + s.factors + partial,
        s.gradient_flops,
        s.row_programs,
        s.most_row_programs,
    )
    return (forward,), (grad_input, gradients, sums)


def _scratch(s: _Sizes) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """`W + s DW` written to a buffer, in each direction anew, then the vendor's product with it."""
    partial, sums = s.sums()
    expand = Kernel("expand", 2 * s.W + s.factors)
    shrink = Kernel(
        "shrink",
        s.x + s.U + s.factors,
        s.shrink_flops(s.inputs),
        s.row_programs,
        s.most_row_programs,
    )
    gradients = Kernel(
        "gradients",
        s.y + s.x + s.U + s.factors + partial,
        s.gradient_flops,
        s.row_programs,
        s.most_row_programs,
    )
    return (
        (shrink, expand, *s.base(adds=False)),
        (expand, *s.base_gradient(adds=False), gradients, sums),
    )


def _torch(s: _Sizes) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """`torch_backend.passes` on a GPU, operator by operator.

    A test counts the operators; scaling by a number other than one adds two or three.
    """
    cast = s.call.adapter_dtype != s.call.dtype
    itemsize = s.call.dtype.itemsize
    spread_in = s.rank * s.inputs.width * s.inputs.span * itemsize
    spread_out = s.rank * s.outputs.width * s.outputs.span * itemsize
    V = s.T * s.rank * s.outputs.width * itemsize
    product_in = 2 * s.T * s.inputs.size * s.rank * s.inputs.width
    product_out = 2 * s.T * s.outputs.size * s.rank * s.outputs.width
    mixing = 2 * s.T * s.rank * s.inputs.width * s.outputs.width

    def small(name: str, launches: int, moved: int = 0) -> Kernel:
        return Kernel(name, moved + launches * s.factors, launches=launches)

    def product(name: str, moved: int, flops: int) -> Kernel:
        return Kernel(name, moved, flops, library=True)

    def spread(name: str, matrix: int) -> Kernel:
        return small(f"spread {name}", 2 + cast, 2 * matrix)

    given_y = () if s.call.base else (small("copy of y", 1, 2 * s.y),)
    forward = (
        *s.base(adds=False),
        *given_y,
        spread("A", spread_in),
        product("shrink", s.x + spread_in + s.U, product_in),
        *((small("cast of C", 1),) if cast else ()),
        product("mix", s.U + V, mixing),
        spread("B", spread_out),
        product("expand", 2 * s.y + spread_out + V, product_out),
    )
    # Of the spread form of a gradient: the pad's copy, the sum over offsets, and the cast.
    collapse = 2 + cast
    zeros = () if s.call.base else (small("zeros", 1, s.x),)
    backward = (
        spread("B", spread_out),
        product("shrink of g", s.y + spread_out + V, product_out),
        product("gradient of C", V + s.U, mixing),
        *((small("casts of C and its gradient", 2),) if cast else ()),
        product("mix back", V + s.U, mixing),
        product("gradient of A", s.x + s.U + spread_in, product_in),
        small("collapse A", collapse, 2 * spread_in),
        *s.base_gradient(adds=False),
        *zeros,
        spread("A", spread_in),
        product("expand", 2 * s.x + spread_in + s.U, product_in),
        *((small("cast of C", 1),) if cast else ()),
        product("mix", s.U + V, mixing),
        product("gradient of B", s.y + V + spread_out, product_out),
        small("collapse B", collapse, 2 * spread_out),
    )
    return forward, backward


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
