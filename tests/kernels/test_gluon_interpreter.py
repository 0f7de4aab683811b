"""The Gluon interpreter runs a kernel that is right, and names what is wrong in broken ones."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

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
from triton.language.extra.cuda import gdc_wait

from tests.kernels.gluon_interpreter import Interpreter

BUFFERS = gl.constexpr(3)


@gluon.jit
def _load_step(a_desc, b_desc, t, k, bar, a, b, pred, BYTES: gl.constexpr):
    mbarrier.expect(bar, BYTES, pred=pred)
    tma.async_copy_global_to_shared(a_desc, [t, k], bar, a, pred)
    tma.async_copy_global_to_shared(b_desc, [0, k], bar, b, pred)


@gluon.jit
def _product_kernel(
    a_desc,
    b_desc,
    out_desc,
    total_ptr,
    T,
    K,
    BYTES: gl.constexpr,
    AHEAD: gl.constexpr,
    PHASE: gl.constexpr,
    PENDING: gl.constexpr,
    FENCE: gl.constexpr,
    STORE_WAIT: gl.constexpr,
    LAST_STORE_WAIT: gl.constexpr,
    MASK: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`out = a b^T` for b of one tile, and the sums of its rows."""
    BLOCK_T: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = b_desc.block_type.shape[0]
    dtype: gl.constexpr = a_desc.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    a_bufs = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_T, BLOCK_K], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_N, BLOCK_K], b_desc.layout)
    out_buf = gl.allocate_shared_memory(dtype, [BLOCK_T, BLOCK_N], out_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(bars.index(i), count=1)

    step = 0
    for t in range(gl.program_id(0) * BLOCK_T, T, gl.num_programs(0) * BLOCK_T):
        for i in gl.static_range(AHEAD):
            index = (step + i) % BUFFERS
            bar = bars.index(index)
            a = a_bufs.index(index)
            b = b_bufs.index(index)
            _load_step(a_desc, b_desc, t, i * BLOCK_K, bar, a, b, i * BLOCK_K < K, BYTES)
        acc = gl.zeros([BLOCK_T, BLOCK_N], gl.float32, layout)
        for k in range(0, K, BLOCK_K):
            index = step % BUFFERS
            mbarrier.wait(bars.index(index), (step // BUFFERS + PHASE) & 1)
            b = b_bufs.index(index).permute((1, 0))
            token = warpgroup_mma(a_bufs.index(index), b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, (token,))
            index = (step + AHEAD) % BUFFERS
            bar = bars.index(index)
            a = a_bufs.index(index)
            b = b_bufs.index(index)
            ahead = k + AHEAD * BLOCK_K
            _load_step(a_desc, b_desc, t, ahead, bar, a, b, ahead < K, BYTES)
            step += 1
        acc = warpgroup_mma_wait(PENDING, (acc,))
        row = t + gl.arange(0, BLOCK_T, gl.SliceLayout(1, layout))
        gl.store(total_ptr + row, gl.sum(acc, axis=1), mask=row < (T if MASK else T + 1))
        if STORE_WAIT:
            tma.store_wait(pendings=0)
        out_buf.store(acc.to(dtype))
        if FENCE:
            fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [t, 0], out_buf)
    if LAST_STORE_WAIT:
        tma.store_wait(pendings=0)


RIGHT = {
    "BYTES": 2 * (64 + 32) * 16,
    "AHEAD": 2,
    "PHASE": 0,
    "PENDING": 0,
    "FENCE": True,
    "STORE_WAIT": True,
    "LAST_STORE_WAIT": True,
    "MASK": True,
}


def _product(**constants: Any) -> None:
    """Run the kernel on tiles that stick out of every tensor, more of them than programs."""
    T, K, N = 200, 72, 24
    generator = torch.Generator().manual_seed(0)
    # Small integers: the sums are exact in bfloat16's 8 bits, or rounded once.
    a, b = (
        torch.randint(-4, 5, (size, K), generator=generator).to(torch.bfloat16) for size in (T, N)
    )
    out, total = torch.full((T, N), float("nan"), dtype=torch.bfloat16), torch.empty(T)
    blocks = ((a, [64, 16]), (b, [32, 16]), (out, [64, 32]))
    descriptors = [
        TensorDescriptor.from_tensor(
            tensor, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        )
        for tensor, block in blocks
    ]
    constants = RIGHT | {"num_warps": 4} | constants
    Interpreter(_product_kernel)[(3,)](*descriptors, total, T, K, **constants)
    expected = a.double() @ b.double().t()
    assert torch.equal(out, expected.to(out.dtype))
    assert torch.equal(total, expected.sum(1).to(total.dtype))


def test_kernel_that_is_right() -> None:
    _product()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AHEAD": 3}, r"a_bufs\[0\]: a TMA load .* but an outstanding product reads it"),
        ({"AHEAD": 0}, r"bars\[0\]: deadlock, 1 arrivals are missing"),
        ({"PHASE": 1}, r"a_bufs\[0\]: a product reads it, but a TMA load .* not been waited for"),
        ({"BYTES": 2048}, r"bars\[0\]: expects 2048 bytes, but 3072 are loaded"),
        ({"PENDING": 1}, "the accumulator is used while its product is outstanding"),
        ({"FENCE": False}, "out_buf: a TMA store of it is issued, but fence_async_shared has not"),
        ({"STORE_WAIT": False}, "out_buf: it is stored into, but a TMA store still reads it"),
        ({"LAST_STORE_WAIT": False}, "out_buf: the program ends, but a TMA store still reads it"),
        ({"MASK": False}, "total_ptr: offset 200, it has 200 elements"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_broken_kernel(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        _product(**change)


@gluon.jit
def _square_kernel(x_desc, BARRIER: gl.constexpr, LATE: gl.constexpr, num_warps: gl.constexpr):
    """`x = x x^T` for x of one square tile, in place or by way of memory allocated later."""
    SIZE: gl.constexpr = x_desc.block_type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, SIZE, 16])
    buf = gl.allocate_shared_memory(x_desc.dtype, [SIZE, SIZE], x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, x_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(x_desc, [0, 0], bar, buf)
    mbarrier.wait(bar, 0)
    acc = warpgroup_mma(buf, buf.permute((1, 0)), gl.zeros([SIZE, SIZE], gl.float32, layout))
    if BARRIER:
        gl.thread_barrier()
    if LATE:
        buf = gl.allocate_shared_memory(x_desc.dtype, [SIZE, SIZE], x_desc.layout)
    buf.store(acc.to(x_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(x_desc, [0, 0], buf)
    tma.store_wait(pendings=0)


@pytest.mark.parametrize("late", [False, True])
def test_missing_thread_barrier(late: bool) -> None:
    x = torch.eye(64, dtype=torch.bfloat16) * 2
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    descriptor = TensorDescriptor.from_tensor(x, [64, 64], layout)
    kernel = Interpreter(_square_kernel)[(1,)]
    kernel(descriptor, BARRIER=True, LATE=late, num_warps=4)
    assert torch.equal(x, torch.eye(64, dtype=x.dtype) * 4)
    with pytest.raises(AssertionError, match=r"buf: it is stored into, but thread_barrier has not"):
        kernel(descriptor, BARRIER=False, LATE=late, num_warps=4)


@gluon.jit
def _dependent_kernel(x_desc, out_ptr, WAIT: gl.constexpr):
    """Load x, then store one; waiting before both, before the store, or never."""
    buf = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    if WAIT == 0:
        gdc_wait()
    mbarrier.expect(bar, x_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(x_desc, [0, 0], bar, buf)
    mbarrier.wait(bar, 0)
    if WAIT == 1:
        gdc_wait()
    gl.store(out_ptr, 1)


@pytest.mark.parametrize(
    ("wait", "late", "message"),
    [
        (0, "x_desc", None),
        (1, "x_desc", "x_desc: it is loaded before gdc_wait"),
        (1, "another", None),
        (2, "another", "out_ptr: it is stored before gdc_wait"),
    ],
)
def test_dependent_launch(wait: int, late: str, message: str | None) -> None:
    x, out = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(1)
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    descriptor = TensorDescriptor.from_tensor(x, [64, 64], layout)
    launch = Interpreter(_dependent_kernel, late=(late,))[(1,)]
    launch(descriptor, out, WAIT=2)  # without dependent launch, there is nothing to wait for
    expected = contextlib.nullcontext()
    if message is not None:
        expected = pytest.raises(AssertionError, match=message)
    with expected:
        launch(descriptor, out, WAIT=wait, launch_pdl=True)


@gluon.jit
def _divide_kernel(out_ptr, a, b):
    gl.store(out_ptr, a // b)
    gl.store(out_ptr + 1, a % b)


def test_division_as_on_a_gpu() -> None:
    out = torch.empty(2, dtype=torch.int32)
    Interpreter(_divide_kernel)[(1,)](out, -7, 2)
    assert out.tolist() == [-3, -1]
    with pytest.raises(AssertionError, match="division by zero"):
        Interpreter(_divide_kernel)[(1,)](out, -7, 0)


@gluon.jit
def _unknown_kernel(out_ptr):
    gl.store(out_ptr, gl.histogram(out_ptr, 2))


def test_unknown_operation() -> None:
    with pytest.raises(NotImplementedError, match=r"does not know gl\.histogram"):
        Interpreter(_unknown_kernel)[(1,)](torch.empty(1))
