"""One matrix product that carries the adapter: the strategy `seeded`'s part of a layer.

    forward     y  = x W^T + U Q^T + b
    backward    gx = g W + Ub P, and sums for gA = (x^T Ub) from the tiles of x

`U` and `Ub`, `[T, k*d_in]`, are known from the passes in `shrink`, so that the adapter is one more
step of the product, of a few columns. The loop over the base layer's steps only loads and
multiplies: its operands go from memory to the matrix unit by the copy engine (TMA), without
passing through registers, and a product is always in flight.

Written in Gluon, for Hopper: programs that stay on their multiprocessor, and load the first
operands of their next tile while they finish the one before, close the gap to the vendor's product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dcft_kernels.triton.launch import PER_CALL, Launch
from dcft_kernels.triton.tiles import Tile, architecture, lookup, multiprocessors, prepared

# By the names that they have had since Triton 3.7, 3.8 (both copies) and 3.9, or the earlier ones.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
_reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret


@gluon.jit
def _tile_origin(
    tile, tiles_t, tiles_n, GROUP: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr
):
    """First row and column of a tile; `GROUP` rows of tiles are done together, to share `W`."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    rows = gl.maximum(gl.minimum(tiles_t - first, GROUP), 1)  # past the last tile there are none
    inside = tile % per_group
    return (first + inside % rows) * BLOCK_T, inside // rows * BLOCK_N


@gluon.jit
def _load_step(z, w, t, n, k, barrier, z_buffer, w_buffer, wanted, FORWARD: gl.constexpr):
    """Begin to load the operands of one step, if they are wanted."""
    mbarrier.expect(barrier, z.block_type.nbytes + w.block_type.nbytes, pred=wanted)
    _load(z, [t, k], barrier, z_buffer, wanted)
    if FORWARD:
        _load(w, [n, k], barrier, w_buffer, wanted)
    else:
        _load(w, [k, n], barrier, w_buffer, wanted)


@gluon.jit
def _multiply_step(
    acc, z, w, z_buffers, w_buffers, loaded,
    step, first, steps, t, n, next_t, next_n, has_next,
    BUFFERS: gl.constexpr, FORWARD: gl.constexpr,
):  # fmt: skip
    """One step of the product of a tile, and the load of the step `BUFFERS - 1` ahead of it.

    `first` is the number of steps before this tile. Loads go on into the tile that follows.
    """
    ahead = step + (BUFFERS - 1)
    here = ahead < steps
    ahead_t = t if here else next_t
    ahead_n = n if here else next_n
    k = (ahead if here else ahead - steps) * z.block_type.shape[1]
    count = first + step
    index = count % BUFFERS
    free = (count + (BUFFERS - 1)) % BUFFERS

    mbarrier.wait(loaded.index(index), count // BUFFERS & 1)
    w_buffer = w_buffers.index(index)
    w_operand = w_buffer.permute((1, 0)) if FORWARD else w_buffer
    token = warpgroup_mma(z_buffers.index(index), w_operand, acc, is_async=True)
    # The product before this one is done, and its buffers are free.
    acc = warpgroup_mma_wait(1, (token,))
    _load_step(
        z, w, ahead_t, ahead_n, k,
        loaded.index(free), z_buffers.index(free), w_buffers.index(free),
        here | has_next, FORWARD,
    )  # fmt: skip
    return acc


@gluon.jit(do_not_specialize=["tiles_t"])
def _gemm_kernel(
    z, w, u, spread, x, out,
    bias_ptr, partial_ptr,
    K, N, tiles_n, tiles_t,
    RANK: gl.constexpr, WIDTH: gl.constexpr,
    BUFFERS: gl.constexpr, GROUP: gl.constexpr,
    FORWARD: gl.constexpr, HAS_BIAS: gl.constexpr, NEED_A: gl.constexpr,
):  # fmt: skip
    """`out = z W^T + u E^T + bias` (`FORWARD`) or `out = z W + u E`; see the module.

    | tensor | shape | |
    | --- | --- | --- |
    | `z` | `[T, K]` | read once per column of tiles |
    | `w` | `[N, K]` (`FORWARD`) or `[K, N]` | the base layer's weight |
    | `u` | `[T, r]` | `U` or `Ub` |
    | `spread` | `[N, r]` (`FORWARD`) or `[r, N]` | the spread factor `E`: `Q` or `P` |
    | `x` | `[T, N]` | read once (`NEED_A`) |
    | `bias` | `[N]` | optional |
    | `out` | `[T, N]` | written once |
    | `partial` | `[tiles_t, RANK, N]` | float32, written once (`NEED_A`) |

    Of `partial`, `[.., κ, f]` is the sum over the tile's tokens of `x[t,f] Ub[t, κ*WIDTH + p]`,
    where feature `f` is the p-th of its window. Matrices are descriptors; what lies outside reads
    as zero. Grid: `(programs,)`, each owning every programs-th tile of `out`. Sums are in float32.

    Of the operands, only `u` and `spread` may be written by the launch before this one, which may
    still be running when this one starts.
    """
    BLOCK_T: gl.constexpr = out.block_type.shape[0]
    BLOCK_N: gl.constexpr = out.block_type.shape[1]
    BLOCK_K: gl.constexpr = z.block_type.shape[1]
    R: gl.constexpr = u.block_type.shape[1]
    # In which a tile of x is loaded: the operands of the next steps do not queue up behind it.
    PARTS: gl.constexpr = BLOCK_N // x.block_type.shape[1] if NEED_A else 0
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = z.dtype
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    grad_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, R, 16])

    z_buffers = gl.allocate_shared_memory(dtype, [BUFFERS] + z.block_type.shape, z.layout)
    w_buffers = gl.allocate_shared_memory(dtype, [BUFFERS] + w.block_type.shape, w.layout)
    u_buffer = gl.allocate_shared_memory(dtype, u.block_type.shape, u.layout)
    spread_buffer = gl.allocate_shared_memory(dtype, spread.block_type.shape, spread.layout)
    # Holds the tile of x until its product is done, and then the tile of out.
    out_buffer = gl.allocate_shared_memory(dtype, out.block_type.shape, out.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    u_loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    x_loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(loaded.index(i), count=1)
    mbarrier.init(u_loaded, count=1)
    mbarrier.init(x_loaded, count=1)

    programs = gl.num_programs(0)
    tiles = tiles_t * tiles_n
    steps = gl.cdiv(K, BLOCK_K)
    # The step that loads u, when the pipeline is full; x follows in parts, a part a step. Every
    # tile has steps for all parts and buffers: `seeded` takes no layers with fewer features.
    lead = gl.minimum(4, steps - PARTS)
    tile = gl.program_id(0)
    t, n = _tile_origin(tile, tiles_t, tiles_n, GROUP, BLOCK_T, BLOCK_N)
    for i in gl.static_range(BUFFERS - 1):
        _load_step(
            z, w, t, n, i * BLOCK_K,
            loaded.index(i), z_buffers.index(i), w_buffers.index(i), i < steps, FORWARD,
        )  # fmt: skip

    for turn in range(gl.cdiv(tiles - tile, programs)):
        next_t, next_n = _tile_origin(tile + programs, tiles_t, tiles_n, GROUP, BLOCK_T, BLOCK_N)
        has_next = tile + programs < tiles
        first = turn * steps
        acc = gl.zeros([BLOCK_T, BLOCK_N], gl.float32, out_layout)
        for step in range(lead):
            acc = _multiply_step(
                acc, z, w, z_buffers, w_buffers, loaded,
                step, first, steps, t, n, next_t, next_n, has_next, BUFFERS, FORWARD,
            )  # fmt: skip
        gdc_wait()
        mbarrier.expect(u_loaded, u.block_type.nbytes + spread.block_type.nbytes)
        _load(u, [t, 0], u_loaded, u_buffer)
        if FORWARD:
            _load(spread, [n, 0], u_loaded, spread_buffer)
        else:
            _load(spread, [0, n], u_loaded, spread_buffer)
        if NEED_A:
            tma.store_wait(pendings=0)
            mbarrier.expect(x_loaded, PARTS * x.block_type.nbytes)
            x_parts = _reinterpret(out_buffer, dtype, [PARTS] + x.block_type.shape, x.layout)
        for part in gl.static_range(PARTS):
            acc = _multiply_step(
                acc, z, w, z_buffers, w_buffers, loaded,
                lead + part, first, steps, t, n, next_t, next_n, has_next, BUFFERS, FORWARD,
            )  # fmt: skip
            _load(x, [t, n + part * x.block_type.shape[1]], x_loaded, x_parts.index(part))
        for step in range(lead + PARTS, steps):
            acc = _multiply_step(
                acc, z, w, z_buffers, w_buffers, loaded,
                step, first, steps, t, n, next_t, next_n, has_next, BUFFERS, FORWARD,
            )  # fmt: skip

        mbarrier.wait(u_loaded, turn & 1)
        spread_operand = spread_buffer.permute((1, 0)) if FORWARD else spread_buffer
        token = warpgroup_mma(u_buffer, spread_operand, acc, is_async=True)
        feature = n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, grad_layout))
        sums = ()
        if NEED_A:
            mbarrier.wait(x_loaded, turn & 1)
            grad = gl.zeros([BLOCK_N, R], gl.float32, grad_layout)
            grad_token = warpgroup_mma(
                out_buffer.permute((1, 0)), u_buffer, grad, use_acc=False, is_async=True
            )
            acc, grad = warpgroup_mma_wait(0, (token, grad_token))
            column = gl.arange(0, R, gl.SliceLayout(0, grad_layout))[None, :]
            for kappa in gl.static_range(RANK):
                own = column == (kappa * WIDTH + feature % WIDTH)[:, None]
                sums += (gl.sum(gl.where(own, grad, 0.0), axis=1),)
            _barrier()  # every warp group's product has read x
        else:
            acc = warpgroup_mma_wait(0, (token,))
            tma.store_wait(pendings=0)
        if HAS_BIAS:
            o = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, out_layout))
            acc += gl.load(bias_ptr + o, mask=o < N, other=0.0).to(gl.float32)[None, :]
        out_buffer.store(acc.to(dtype))
        fence_async_shared()
        _store(out, [t, n], out_buffer)
        # After the fence, which would wait for these stores too.
        for kappa in gl.static_range(RANK if NEED_A else 0):
            slot = (t // BLOCK_T).to(gl.int64) * RANK + kappa
            gl.store(partial_ptr + slot * N + feature, sums[kappa], mask=feature < N)
        tile += programs
        t, n = next_t, next_n
    gdc_launch_dependents()
    tma.store_wait(pendings=0)


# Rows of tiles that are done together: their tiles of `W` are read from the L2 cache.
_GROUP = 8
# Fewest columns of `u` that the matrix unit takes in a step.
_MIN_COLUMNS = 16
# Columns of the parts in which a tile of `x` is loaded: 128 bytes, as shared memory stores them.
_PART_COLUMNS = 64


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, spread: Tensor, *, out: Tensor
) -> None:
    """Write `x W^T + U Q^T + bias`.

    Args:
        x: `[T, n]`, bfloat16. Like all matrices here with contiguous columns and rows that begin at
            multiples of 16 bytes.
        weight: `[m, n]`.
        bias: `[m]`, contiguous, or None.
        u: `[T, k*d_in]`, `U`. It may be an output of the launch before this one, like `spread`.
        spread: `[m, k*d_in]`, `Q`.
        out: `[T, m]`, written.
    """
    _product(x, weight, bias, u, spread, None, out, None, forward=True)


def input_gradient(
    g: Tensor,
    weight: Tensor,
    ub: Tensor,
    spread: Tensor,
    *,
    out: Tensor,
    x: Tensor | None = None,
    partial: Tensor | None = None,
) -> None:
    """Write `g W + Ub P` and, where `x` is given, shares of the gradient of `A`.

    Args:
        g: `[T, m]`, as in `linear`.
        weight: `[m, n]`.
        ub: `[T, k*d_in]`, `Ub`. It may be an output of the launch before this one, like `spread`.
        spread: `[k*d_in, n]`, `P`.
        out: `[T, n]`, written.
        x: `[T, n]`.
        partial: `[slices(T), k, n]`, float32, contiguous, written: per slice of tokens and feature
            of `x`, the sum that the feature adds to the gradient of its window.
    """
    _product(g, weight, None, ub, spread, x, out, partial, forward=False)


def slices(tokens: int, columns: int, device: torch.device) -> int:
    """The number of slices that the tokens are split into: one partial gradient of `A` for each."""
    return -(-tokens // _tile(columns, device).tokens)


def _tile(columns: int, device: torch.device) -> Tile:
    return lookup(architecture(device), "gemm", 2, columns)


def _product(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    spread: Tensor,
    x: Tensor | None,
    out: Tensor,
    partial: Tensor | None,
    *,
    forward: bool,
) -> None:
    tokens, columns = u.shape
    rank = None if partial is None else partial.shape[1]
    plan = _prepare(z.shape[1], out.shape[1], columns, rank, z.device, bias is not None, forward)
    tensors = (z, weight, u, spread, out if x is None else x, out)
    descriptors = [
        _descriptor(tensor, block, layout)
        for tensor, (block, layout) in zip(tensors, plan.blocks, strict=True)
    ]
    tiles_t = -(-tokens // plan.rows)
    programs = min(tiles_t * plan.tiles_n, plan.max_programs)
    plan.launch(programs, *descriptors, bias, partial, tiles_t)


def _descriptor(tensor: Tensor, block: list[int], layout: Any) -> TensorDescriptor:
    """A descriptor without its constructor's checks; `seeded` makes sure of them."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.__dict__.update(
        base=tensor,
        shape=tensor.shape,
        strides=tensor.stride(),
        block_shape=block,
        layout=layout,
    )
    return descriptor


class _Plan(NamedTuple):
    launch: Launch
    rows: int  # of a tile
    tiles_n: int  # of the result, along its columns
    max_programs: int
    blocks: list[tuple[list[int], Any]]  # of the descriptors: what they load or store at once


@prepared
def _prepare(
    K: int,
    N: int,
    columns: int,
    rank: int | None,
    device: torch.device,
    has_bias: bool,
    forward: bool,
) -> _Plan:
    """The launch for `z [T, K]`, `u [T, columns]` and `out [T, N]`.

    `rank` is the adapter's where the gradient of `A` is needed, else None.
    """
    tile = _tile(columns, device)
    rows, step, outputs = tile.tokens, tile.features, tile.outputs
    r = max(_MIN_COLUMNS, 1 << (columns - 1).bit_length())
    shapes = [
        [rows, step],
        [outputs, step] if forward else [step, outputs],
        [rows, r],
        [outputs, r] if forward else [r, outputs],
        [rows, _PART_COLUMNS],
        [rows, outputs],
    ]
    tiles_n = -(-N // outputs)
    launch = Launch(
        _gemm_kernel,
        device,
        [PER_CALL] * 8 + [K, N, tiles_n, PER_CALL],
        tile,
        may_overlap=True,
        RANK=rank or 1, WIDTH=columns // (rank or 1), BUFFERS=tile.stages, GROUP=_GROUP,
        FORWARD=forward, HAS_BIAS=has_bias, NEED_A=rank is not None,
    )  # fmt: skip
    return _Plan(
        launch,
        rows,
        tiles_n,
        tile.programs * multiprocessors(device),
        [(shape, gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)) for shape in shapes],
    )
