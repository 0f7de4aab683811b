"""Launches: the cached kernel, its key, and the calls from a module to it."""

from __future__ import annotations

import sys
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

import dcft_kernels
from dcft_kernels import DCFTLinear, dcft_linear
from tests.adapter_cases import CASES, AdapterShape, random_inputs
from tests.kernels.conftest import INTERPRETED
from tests.kernels.parity import run, to

pytest.importorskip("triton")

from dcft_kernels.triton.launch import PER_CALL, Launch
from dcft_kernels.triton.tiles import Tile, multiprocessors

on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
TILE = Tile(16, 16, 0, 0, warps=4, stages=1)


class Kernel:
    """Records launches as a `triton.jit` function would run them; compiles for CUDA."""

    arg_names = ("x_ptr", "stride_x", "T", "BLOCK")

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: int) -> Any:
            self.launched.append(("first", grid, arguments))
            assert options == {"num_warps": 4, "num_stages": 1}
            return Compiled(self)

        return launch


class Compiled:
    metadata = SimpleNamespace(target=SimpleNamespace(backend="cuda"))

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.launched.append(("cached", grid[:1], arguments))


def test_cached_launch_passes_what_the_first_passed() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    launch = Launch(kernel, torch.device("cpu"), [PER_CALL, 1, PER_CALL], TILE, BLOCK=16)
    for _ in range(2):
        launch(3, x, 40)
    launch(3, x[1:], 40)  # not aligned: Triton compiles another kernel
    launch(3, x[4:], 40)  # aligned again
    launch(3, x[2:], 41)
    ways = [way for way, *_ in kernel.launched]
    assert ways == ["first", "cached", "first", "cached", "cached"]
    assert kernel.launched[0][1:] == kernel.launched[1][1:] == ((3,), (x, 1, 40, 16))


def test_constants_must_be_the_kernels() -> None:
    with pytest.raises(TypeError, match=r"constants: expected BLOCK in this order, got BLOCKS"):
        Launch(Kernel(), torch.device("cpu"), [PER_CALL, 1, PER_CALL], TILE, BLOCKS=16)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cached_launch_matches_first_launch(device, dtype: torch.dtype) -> None:
    """Aligned and not: every alignment has its own compiled kernel."""
    case = CASES[3]
    inputs = to(random_inputs(case, (37,), dtype), device)
    expected = run(inputs, case, "triton")
    for _ in range(3):
        assert all(map(torch.equal, run(inputs, case, "triton"), expected))
        padded = torch.zeros(inputs.x.numel() + 1, dtype=dtype, device=device)
        shifted = padded[1:].view_as(inputs.x).copy_(inputs.x)
        for a, b in zip(run(inputs._replace(x=shifted), case, "triton"), expected, strict=True):
            torch.testing.assert_close(a, b)


def compiled_kernels() -> dict[str, int]:
    """How many variants of each kernel are compiled in this process."""
    from dcft_kernels.triton import gemm, partials, row_block, shrink

    return {
        name: sum(len(cache[0]) for cache in kernel.device_caches.values())
        for module in (gemm, partials, row_block, shrink)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }


@on_a_gpu
@pytest.mark.parametrize("strategy", ["row_block", "seeded"])
def test_no_kernel_is_compiled_again_for_other_tokens(device, strategy: str, request) -> None:
    """The number of tokens is an ordinary argument: three heights of tiles serve them all."""
    if strategy == "seeded":
        request.getfixturevalue("hopper")
    busy = multiprocessors(device)  # blocks that it takes to have a program for each
    case = AdapterShape(264, 328, 1, (8, 8), (8, 8))
    inputs = to(random_inputs(case, (100 * busy,), torch.bfloat16), device)

    def step(tokens: int) -> None:
        some = inputs._replace(x=inputs.x[:tokens], grad=inputs.grad[:tokens]).requiring()
        dcft_linear(*some.operands, strategy=strategy).backward(some.grad)

    for rows in (10, 40, 100):  # blocks of 16, 32 and 64 rows
        step(rows * busy)
    before = compiled_kernels()
    for tokens in (1, 2, 16, 17, 64, 333, 1024, 1999, 33 * busy, 50 * busy + 1, 70 * busy + 3):
        step(tokens)
    assert compiled_kernels() == before


@pytest.mark.parametrize("recorded", [True, False], ids=["training", "inference"])
def test_six_calls_from_module_to_launch(device, monkeypatch, recorded: bool) -> None:
    """The package's functions on the stack when the forward's kernel is launched."""
    stacks: list[list[str]] = []
    package = dcft_kernels.__path__[0]
    original = Launch.__call__

    def traced(self: Launch, *arguments: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        names: list[str] = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(package):
                names.insert(0, frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(names)
        original(self, *arguments)

    monkeypatch.setattr(Launch, "__call__", traced)
    layer = DCFTLinear(16, 16, backend="triton").to(device)
    with torch.set_grad_enabled(recorded):
        layer(torch.randn(3, 16, device=device))
    # `autograd.linear` calls the passes by way of the autograd function, or directly.
    middle = ["forward"] * recorded
    passes = ["_forward", "forward"]  # of whatever strategy, and of the kernels'
    # Each calls the next one, and the last one launches: at most six calls.
    assert stacks == [["forward", "dcft_linear", "linear", *middle, *passes, "shrink_expand"]]
