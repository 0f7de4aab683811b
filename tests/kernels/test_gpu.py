"""What only a GPU shows: graphs, races, host synchronisation, memory, other devices, real sizes.

The rest of this folder runs on a GPU as well as under Triton's interpreter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from dcft_kernels import DCFTLinear, dcft_linear
from dcft_kernels.adapter import window_count
from tests.adapter_cases import AdapterShape, Inputs, random_inputs
from tests.kernels.parity import check, run, to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available(),
        reason="needs a GPU: the interpreter cannot show this",
    ),
]

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
seeded_on_hopper = pytest.param("seeded", marks=on_hopper)
every_strategy = pytest.mark.parametrize("strategy", ["row_block", seeded_on_hopper])
with_and_without_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.4])
SMALL_LAYER = AdapterShape(768, 768, 1, (8, 8), (8, 8))
REPOSITORY = Path(__file__).resolve().parents[2]


def layer_on(
    device: torch.device, dropout_p: float = 0.0, size: int = 256, strategy: str = "auto"
) -> DCFTLinear:
    """A bfloat16 layer with factors above zero, so that a gradient is zero where it is dropped."""
    options = {"dropout": dropout_p, "init": "paper", "backend": "triton", "strategy": strategy}
    layer = DCFTLinear(size, size, dtype=torch.bfloat16, **options)
    for factor in (layer.dcft_A, layer.dcft_B, layer.dcft_C):
        nn.init.uniform_(factor, 0.5, 1.5)
    return layer.to(device)


def step_of(layer: DCFTLinear, x: Tensor, grad: Tensor) -> Callable[[], list[Tensor]]:
    """A function that computes the output and all gradients of the layer."""
    operands = [x, layer.dcft_A, layer.dcft_B, layer.dcft_C]

    def step() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, operands, grad)]

    return step


def captured(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of one step, and the tensors that every replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_close(actual: Tensor, expected: Tensor, what: object) -> None:
    """Equal up to a few roundings of bfloat16, of the largest value."""
    error = (actual.double() - expected.double()).abs().max()
    # Written so that a NaN fails.
    assert float(error) <= 2**-6 * float(expected.double().abs().max()), what


@every_strategy
@pytest.mark.parametrize("tokens", [77, 1024])
def test_cuda_graph(device, tokens: int, strategy: str) -> None:
    """Forward and backward are captured, and every replay computes from what its inputs hold."""
    layer = layer_on(device, strategy=strategy)
    x = torch.randn(tokens, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, 256, device=device, dtype=torch.bfloat16)
    step = step_of(layer, x, grad)
    graph, results = captured(step)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            grad.normal_()
            layer.dcft_C.uniform_(0.5, 1.5)
        graph.replay()
        replayed = [each.clone() for each in results]
        for index, (actual, expected) in enumerate(zip(replayed, step(), strict=True)):
            if strategy == "seeded":  # its products are its own
                assert torch.equal(actual, expected), index
            assert_close(actual, expected, index)


def test_cuda_graph_with_dropout(device) -> None:
    """Every replay draws a new mask, and its forward and backward use the same one.

    Graphs register the device's default generator, which the seed is drawn from.
    """
    tokens, p = 512, 0.4
    layer = layer_on(device, p)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    x = torch.rand(tokens, 256, device=device, dtype=torch.bfloat16).add_(0.5).requires_grad_()
    grad = torch.ones(tokens, 256, device=device, dtype=torch.bfloat16)
    graph, results = captured(step_of(layer, x, grad))
    factors = (layer.dcft_A, layer.dcft_B, layer.dcft_C)
    A, B, C = (factor.detach().double() for factor in factors)
    dense = layer.scaling / (1 - p) * torch.kron(B @ A, C)
    masks = []
    for _ in range(3):
        graph.replay()
        y, grad_x, *_ = (each.clone() for each in results)
        # There is no base, and every factor is above zero.
        mask = grad_x != 0
        # More than ten standard deviations.
        assert abs(float(mask.double().mean()) - (1 - p)) < 0.02
        assert_close(y, (x.detach().double() * mask) @ dense.t(), "y of the mask of gx")
        masks.append(mask)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "dropout_p"),
    [("row_block", 0.0), ("row_block", 0.4), pytest.param("seeded", 0.0, marks=on_hopper)],
)
def test_a_hundred_repeats_are_bitwise_equal(device, strategy: str, dropout_p: float) -> None:
    inputs = to(random_inputs(SMALL_LAYER, (4096,), torch.bfloat16, torch.float32), device)
    options = {"strategy": strategy, "dropout_p": dropout_p}
    first = run(inputs, SMALL_LAYER, "triton", **options)
    assert all(bool(each.isfinite().all()) for each in first)
    for _ in range(99):
        again = run(inputs, SMALL_LAYER, "triton", **options)
        assert all(map(torch.equal, again, first))


@pytest.mark.slow
@with_and_without_dropout
@pytest.mark.parametrize("in_features", [1024, 1021])
def test_parity_at_a_real_size(device, in_features: int, dropout_p: float) -> None:
    case = AdapterShape(in_features, 4096, 1, (8, 8), (8, 8))
    inputs = to(random_inputs(case, (1000,), torch.bfloat16, torch.float32), device)
    check(inputs, case, dropout_p=dropout_p)


@pytest.mark.slow
@on_hopper
@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        (AdapterShape(1024, 4096, 1, (8, 8), (8, 8)), 1000),
        # Nothing that a tile divides, of either width of tiles; and tens of tiles per program.
        (AdapterShape(1032, 4104, 2, (16, 8), (16, 8)), 777),
        (AdapterShape(2056, 3080, 4, (8, 16), (8, 16)), 4100),
        (AdapterShape(2056, 3080, 4, (8, 16), (8, 16), True), 4100),
        (AdapterShape(4096, 4104, 1, (8, 8), (8, 8)), 16390),
        (AdapterShape(14336, 4096, 1, (8, 8), (8, 8)), 130),
    ],
    ids=str,
)
def test_parity_of_the_seeded_strategy(device, case: AdapterShape, tokens: int) -> None:
    inputs = to(random_inputs(case, (tokens,), torch.bfloat16, torch.float32), device)
    check(inputs, case, strategy="seeded")


@every_strategy
def test_two_streams(device, strategy: str) -> None:
    """Steps that may run at the same time compute what they compute alone."""
    layer = layer_on(device, size=1024, strategy=strategy)
    steps, expected = [], []
    for _ in range(2):
        x = torch.randn(1500, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
        steps.append(step_of(layer, x, torch.randn_like(x)))
        expected.append(steps[-1]())
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for stream, step, results in zip(streams, steps, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    for results, alone in zip(found, expected, strict=True):
        for result in results:
            for index, (a, b) in enumerate(zip(result, alone, strict=True)):
                if strategy == "seeded":
                    assert torch.equal(a, b), index
                assert_close(a, b, index)


@on_hopper
@pytest.mark.parametrize("late", ["u", "spread", "partial"])
def test_launches_wait_for_a_slow_one_before(device, late: str, monkeypatch) -> None:
    """A kernel after the one before lets the next start, and stores a result much later.

    The pass's `U`, or what it spreads, for the product; the product's shares of gA for their sum.
    """
    from dcft_kernels.triton import gemm, shrink

    def slowly(launcher: Callable[..., None], name: str) -> Callable[..., None]:
        def launch(*arguments: object, **named: Any) -> None:
            out = named[name]
            source = torch.empty_like(out)
            launcher(*arguments, **(named | {name: source}))
            out.fill_(float("nan"))
            _late_copy_kernel[(8,)](source, out, out.numel(), 100_000, BLOCK=1024)

        return launch

    # It would fill what is allocated between the two launches.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    layer = layer_on(device, size=512, strategy="seeded")
    x = torch.randn(1000, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    step = step_of(layer, x, grad)
    for _ in range(50):
        with torch.no_grad():
            x.normal_()
            grad.normal_()
        expected = step()
        with monkeypatch.context() as patch:
            if late == "partial":
                patch.setattr(gemm, "input_gradient", slowly(gemm.input_gradient, late))
            else:
                backward = "ub" if late == "u" else late
                patch.setattr(shrink, "shrink", slowly(shrink.shrink, late))
                patch.setattr(shrink, "shrink_backward", slowly(shrink.shrink_backward, backward))
            assert all(map(torch.equal, step(), expected))


@triton.jit
def _late_copy_kernel(source_ptr, out_ptr, size, turns, BLOCK: tl.constexpr):
    """`out = source` after `turns` dependent products, of which the next launch sees none."""
    gdc_launch_dependents()
    number = 1.0
    for _ in range(turns):
        number = number * 0.75 + 0.5  # stays positive
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        where = start + tl.arange(0, BLOCK)
        value = tl.load(source_ptr + where, mask=where < size)
        tl.store(out_ptr + where, value, mask=(where < size) & (number > 0.0))


@pytest.mark.parametrize(
    ("backend", "strategy", "dropout_p"),
    [
        ("triton", "row_block", 0.0),
        ("triton", "row_block", 0.4),
        pytest.param("triton", "seeded", 0.0, marks=on_hopper),
        ("torch", "auto", 0.0),
        ("torch", "auto", 0.4),
    ],
)
def test_no_host_synchronisation(device, backend: str, strategy: str, dropout_p: float) -> None:
    x = torch.randn(333, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer = layer_on(device, dropout_p)
    layer.backend, layer.strategy = backend, strategy
    step = step_of(layer, x, torch.randn_like(x))
    step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@with_and_without_dropout
def test_another_device_than_the_current_one(dropout_p: float) -> None:
    inputs = random_inputs(SMALL_LAYER, (100,), torch.bfloat16, torch.float32)
    assert torch.cuda.current_device() == 0
    results = check(to(inputs, torch.device("cuda", 1)), SMALL_LAYER, dropout_p=dropout_p)
    assert {each.device.index for each in results} == {1}
    assert torch.cuda.current_device() == 0


def peak_of(step: Callable[[], object]) -> int:
    """Bytes that a step allocates at most at once; what its first run leaves does not count."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


@pytest.mark.parametrize(
    ("strategy", "dropout_p"),
    [("row_block", 0.0), ("row_block", 0.4), pytest.param("seeded", 0.0, marks=on_hopper)],
)
def test_peak_memory(device, strategy: str, dropout_p: float) -> None:
    """More than `y`, `gx` and the products' workspaces: `U` and the gradients' partial sums."""
    tokens, size, width = 1024, 4096, 8
    case = AdapterShape(size, size, 1, (width, width), (width, width))
    inputs = to(random_inputs(case, (tokens,), torch.bfloat16, torch.float32), device)
    some: Inputs = inputs.requiring(True, False, False, True, True, True)
    operands = (some.x, some.A, some.B, some.C)
    options = {"dropout_p": dropout_p, "strategy": strategy}

    def step() -> list[Tensor]:
        y = dcft_linear(*some.operands, **options)
        return [y, *torch.autograd.grad(y, operands, some.grad)]

    def frozen() -> list[Tensor]:
        y = torch.zeros(tokens, size, dtype=torch.bfloat16, device=device)
        gx = torch.zeros_like(y)
        return [y.addmm_(inputs.x, inputs.weight.t()), gx.addmm_(inputs.grad, inputs.weight)]

    windows = window_count(size, width, width)
    if strategy == "row_block":
        # A program has a row block of 16 tokens or more, and its own float32 gradients.
        partials = tokens // 16 * (2 * windows + width**2) * 4
    else:
        # One token or more, without the gradient of A: of that a tile of 128 has its own.
        partials = tokens * (windows + width**2) * 4 + tokens // 128 * size * 4
    u = tokens * width * 4
    # The allocator hands out blocks of up to a MiB more than was asked for.
    more = u + partials + 4 * 2**20
    assert more < tokens * size * 2, "the bound would let a mask of the input's size pass"
    assert peak_of(step) <= peak_of(frozen) + more


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH"
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    """No access out of bounds, and no race in shared memory, in any of the kernels."""
    environment = {
        **os.environ,
        # A separate allocation for every tensor, so that an access outside of one shows.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [
        "compute-sanitizer",
        f"--tool={tool}",
        "--error-exitcode=9",
        "--kernel-regex=kns=_kernel",
        sys.executable,
        "-m",
        "tests.kernels.sanitizer_program",
    ]
    finished = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert "every kernel ran" in finished.stdout
