"""The choice of a strategy: counted as the design counts, steady, overridable, never silent."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dcft_kernels import cost_model, gpu_rates, torch_backend
from dcft_kernels.adapter import Adapter
from dcft_kernels.cost_model import Call, columns, estimate, kernels
from dcft_kernels.adapter import Geometry
from dcft_kernels.gpu_rates import lookup, named
from dcft_kernels.gradients import Needs
from dcft_kernels.strategy import (
    ENVIRONMENT_VARIABLE,
    STRATEGIES,
    bucket,
    check_strategy,
    choose,
    why_kernels_cannot,
    why_strategy_cannot,
)
from dcft_kernels.triton.layout import layout_of
from tests.adapter_cases import Case, every_case

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def geometry(n: int, m: int, rank: int = 1, width: int = 8, stride: int | None = None) -> Geometry:
    return Geometry.build(n, m, rank, (width, width), (stride or width,) * 2)


def call(
    tokens: int = 8192, n: int = 4096, m: int = 4096, dtype: torch.dtype = BF16, **changes: Any
) -> Call:
    made = Call(bucket(tokens), geometry(n, m), dtype, FP32, "sm_90", "NVIDIA H100 80GB HBM3")
    return made._replace(**changes)


# The counts.


def test_row_block_moves_five_passes_and_what_is_small() -> None:
    """The design's shape: `T = 8192`, `n = m = 4096`, bf16."""
    forward, backward = kernels("row_block", call())
    P = 8192 * 4096 * 2
    U = 8192 * 8 * 2
    factors = (512 + 512 + 64) * 4
    partial = 128 * factors  # a program for 64 rows
    assert forward[0].bytes == 2 * P + U + factors
    assert backward[0].bytes == 3 * P + U + factors + partial
    assert backward[1].bytes == partial + factors
    W = 4096 * 4096 * 2
    assert forward[1].bytes == backward[2].bytes == 3 * P + W  # the product reads its sum as well
    assert [len(forward), len(backward)] == [2, 3]


def test_the_design_shape_costs_what_the_design_says() -> None:
    """+16% for row blocks, +13% for the scratch buffer, which stays as tokens grow."""
    chosen = choose(call())
    assert chosen.frozen is not None
    base = chosen.frozen.seconds
    assert base == pytest.approx(687e-6, rel=0.02)

    def overhead(strategy: str) -> float:
        predicted = chosen.candidate(strategy).estimate
        assert predicted is not None
        return predicted.forward.device_seconds + predicted.backward.device_seconds - base

    assert overhead("row_block") / base == pytest.approx(0.16, abs=0.03)
    assert overhead("scratch") / base == pytest.approx(0.16, abs=0.04)


def test_fused_forward_moves_no_more_than_the_base_but_u_and_factors() -> None:
    frozen, fused = kernels("frozen", call())[0], kernels("fused", call())[0]
    assert len(frozen) == len(fused) == 1
    assert fused[0].bytes - frozen[0].bytes == 8192 * 8 * 2 + (512 + 512 + 64) * 4


class Operators(TorchDispatchMode):
    """Counts operators that a GPU would launch a kernel for: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [result] if isinstance(result, Tensor) else list(result)
        changes = func.overloadpacket.__name__[-1] == "_"
        view = not changes and func.is_view
        if not view and not func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.count += len(outputs)
        return result


@pytest.mark.parametrize("adapter_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("base", [True, False], ids=["linear", "update"])
def test_torch_launches_are_those_of_the_backend(adapter_dtype: torch.dtype, base: bool) -> None:
    """Counted on the meta device, where the backend takes the way that it takes on a GPU."""
    shape, T = geometry(48, 64, rank=2), 16

    def meta(*size: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    factors = [meta(*s, dtype=adapter_dtype) for s in (shape.shape_A, shape.shape_B, shape.shape_C)]
    adapter = Adapter(*factors, 1.0, shape)
    x, y, g, weight = meta(T, 48), meta(T, 64), meta(T, 64), meta(64, 48)
    with torch.no_grad():
        with Operators() as forward:
            if base:
                _, U = torch_backend.linear(x, weight, meta(64), adapter)
            else:
                _, U = torch_backend.update(y, x, adapter)
        with Operators() as backward:
            needs = Needs(x=True, weight=False, bias=False, A=True, B=True, C=True)
            torch_backend.backward(g, x, U, weight if base else None, adapter, needs)
    counted = kernels("torch", call(T, geometry=shape, adapter_dtype=adapter_dtype, base=base))
    launches = [sum(kernel.launches for kernel in direction) for direction in counted]
    assert launches == [forward.count, backward.count]


@every_case
def test_columns_are_those_that_the_kernels_compile_for(case: Case) -> None:
    shape = case.geometry
    assert max(columns(side, shape.rank) for side in shape[1:]) == layout_of(shape).columns


def test_columns_for_every_adapter_that_kernels_take() -> None:
    for rank, out, into in itertools.product((1, 2, 3, 5, 16), (1, 2, 3, 8, 12), (1, 4, 7, 8, 33)):
        shape = Geometry.build(100, 90, rank, (out, into), (out, into))
        if why_kernels_cannot(shape, BF16) is None:
            assert max(columns(s, rank) for s in shape[1:]) == layout_of(shape).columns, shape


# The prediction.


@pytest.mark.parametrize("strategy", ["frozen", "row_block", "fused", "scratch", "torch"])
def test_more_work_never_takes_less_time(strategy: str) -> None:
    gpu = named("H100")
    by_tokens = [estimate(strategy, call(1 << e), gpu) for e in range(20)]
    by_features = [estimate(strategy, call(n=64 << e, m=64 << e), gpu) for e in range(8)]
    for grows in (by_tokens, by_features):
        for smaller, larger in itertools.pairwise(grows):
            # A GPU that is half idle takes twice the work in the same time, give or take the sums.
            assert smaller.seconds <= larger.seconds * 1.001
            assert smaller.forward.bytes < larger.forward.bytes
            assert smaller.backward.flops < larger.backward.flops


@pytest.mark.parametrize("gpu", sorted(gpu_rates.table()))
def test_every_adapter_costs_something_on_every_gpu(gpu: str) -> None:
    rates = named(gpu)
    frozen = estimate("frozen", call(), rates)
    for strategy in ("row_block", "fused", "scratch", "torch"):
        predicted = estimate(strategy, call(), rates)
        assert predicted.seconds > frozen.seconds
        assert predicted.forward.seconds >= predicted.forward.launches * rates.host_seconds


def test_a_faster_gpu_is_predicted_faster() -> None:
    slow = named("H100")
    fast = slow._replace(bandwidth=2 * slow.bandwidth, matrix_16=2 * slow.matrix_16)
    for strategy in ("row_block", "fused", "torch"):
        assert estimate(strategy, call(), fast).seconds < estimate(strategy, call(), slow).seconds


def test_without_a_backward_pass_there_is_none_to_pay() -> None:
    predicted = choose(call(backward=False)).estimate
    assert predicted is not None
    assert predicted.backward == cost_model.Cost(0, 0, 0, 0.0, 0.0)


def test_a_trained_weight_costs_its_gradient_in_every_strategy() -> None:
    for strategy in ("frozen", "row_block", "fused", "scratch", "torch"):
        frozen, trained = (kernels(strategy, call(weight_trained=t))[1] for t in (False, True))
        (extra,) = trained[len(frozen) :]
        assert extra.flops == 2 * 8192 * 4096 * 4096


# The choice.


def test_large_shapes_take_row_blocks() -> None:
    for gpu in ("A100", "RTX 4090", "H100", "H200", "B200", "MI300X"):
        architecture = named(gpu).architecture
        made = call(device_name=gpu, architecture=architecture)
        assert choose(made).strategy == "row_block", gpu
    assert choose(call(32768, 4096, 14336)).strategy == "row_block"


def test_small_shapes_take_the_fewest_launches() -> None:
    chosen = choose(call(4096, 768, 768))
    assert chosen.strategy == "fused"
    assert chosen.estimate is not None
    launches = {
        c.strategy: c.estimate.forward.launches + c.estimate.backward.launches
        for c in chosen.candidates
        if c.estimate is not None
    }
    assert min(launches, key=launches.__getitem__) == "fused"


def test_scratch_is_never_chosen_unasked() -> None:
    for T, n, dtype in itertools.product((1, 64, 4096, 1 << 20), (64, 4096, 16384), (BF16, FP32)):
        made = call(T, n, n, dtype)
        assert choose(made).strategy != "scratch"
        scratch = choose(made).candidate("scratch")
        assert scratch.why_not is not None
        assert "only if asked for" in scratch.why_not


def test_only_scratch_is_inexact_and_only_in_16_bit() -> None:
    for dtype in (BF16, torch.float16, FP32):
        for candidate in choose(call(dtype=dtype)).candidates:
            assert candidate.estimate is not None
            exact = candidate.strategy != "scratch" or dtype == FP32
            assert candidate.estimate.exact is exact


def test_the_choice_is_the_least_of_what_may_be_chosen() -> None:
    for T, n in itertools.product((1, 64, 1024, 4096, 65536), (64, 768, 4096)):
        chosen = choose(call(T, n, n))
        open_to_auto = [c.estimate for c in chosen.candidates if c.why_not is None]
        assert chosen.estimate is not None
        assert chosen.estimate.seconds == min(e.seconds for e in open_to_auto if e is not None)


def test_a_new_token_count_is_no_new_decision() -> None:
    assert [bucket(t) for t in (0, 1, 2, 3, 4, 5, 4096, 4097)] == [1, 1, 2, 4, 4, 8, 4096, 8192]
    assert choose(call(4097)) is choose(call(8000))


def test_what_kernels_cannot_take_goes_to_torch() -> None:
    for made in (
        call(dtype=torch.float64),
        call(adapter_dtype=torch.float64),
        call(geometry=geometry(4096, 4096, rank=17)),
        call(architecture=None, device_name=None),
    ):
        chosen = choose(made)
        assert chosen.strategy == "torch"
        assert chosen.reason == chosen.candidate("row_block").why_not
        for strategy in ("row_block", "fused", "scratch"):
            with pytest.raises(ValueError, match=f"strategy: '{strategy}' cannot run here: "):
                choose(made, strategy)


def test_overlapping_windows_are_not_fused() -> None:
    made = call(4096, geometry=geometry(768, 768, stride=4))
    assert choose(made).strategy == "row_block"
    with pytest.raises(ValueError, match=r"stride == kernel_size, not stride \(4, 4\) under"):
        choose(made, "fused")


def test_the_increment_alone_has_row_blocks_or_torch() -> None:
    made = call(4096, 768, 768, base=False)
    assert choose(made).strategy == "row_block"
    assert choose(made).frozen is None
    for strategy in ("fused", "scratch"):
        with pytest.raises(ValueError, match="this call has none; use auto, or use 'torch'"):
            choose(made, strategy)


def test_scratch_cannot_drop() -> None:
    assert why_strategy_cannot("scratch", call()) is None
    with pytest.raises(ValueError, match="dropout acts on the adapter's input alone"):
        choose(call(dropout=True), "scratch")


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "auto"])
def test_what_is_asked_for_runs(strategy: str) -> None:
    chosen = choose(call(), strategy)
    assert chosen.strategy == strategy
    assert chosen.reason == f"asked for by strategy={strategy!r}"


def test_the_environment_takes_the_place_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(call()).strategy == "row_block"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    chosen = choose(call())
    assert chosen.strategy == "torch"
    assert chosen.reason == "asked for by DCFT_STRATEGY='torch'"
    assert choose(call(), "fused").strategy == "fused"  # the argument goes first
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert choose(call()).strategy == "row_block"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(
        ValueError, match=r"DCFT_STRATEGY: expected one of 'auto', 'row_block', .*, got 'fastest'"
    ):
        choose(call())
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fused")
    with pytest.raises(ValueError, match=r"DCFT_STRATEGY: 'fused' cannot run here: .* unset it"):
        choose(call(geometry=geometry(768, 768, stride=4)))


@pytest.mark.parametrize("name", ["Fused", "", None, 3])
def test_unknown_strategies_are_named(name: Any) -> None:
    with pytest.raises(ValueError, match="strategy: expected one of 'auto', 'row_block', 'fused'"):
        check_strategy(name)


def test_the_rule_of_what_kernels_take() -> None:
    for dtype in (FP32, BF16, torch.float16):
        assert why_kernels_cannot(geometry(64, 64), dtype, BF16) is None
    assert "not float64" in str(why_kernels_cannot(geometry(64, 64), torch.float64))
    assert "factors" in str(why_kernels_cannot(geometry(64, 64), FP32, torch.float64))
    assert why_kernels_cannot(geometry(640, 640, rank=2, width=64), BF16) is None
    assert "up to 64, not 65" in str(why_kernels_cannot(geometry(640, 640, width=65), BF16))
    assert why_kernels_cannot(geometry(64, 64, rank=128, width=1), BF16) is None
    assert "not 129 * 1 = 129" in str(why_kernels_cannot(geometry(64, 64, 129, 1), BF16))


def test_what_kernels_take_has_a_tile() -> None:
    for rank, width in itertools.product(range(1, 129), range(1, 65)):
        shape = geometry(128, 128, rank, width)
        if why_kernels_cannot(shape, BF16) is None:
            assert layout_of(shape).columns <= 256


# The rates.


def test_every_gpu_says_where_its_rates_come_from() -> None:
    architectures = set()
    for name, gpu in gpu_rates.table().items():
        architectures.add(gpu.architecture)
        assert "data sheet" in gpu.source or "measured" in gpu.source, name
        assert 1e11 < gpu.bandwidth < 2e13
        assert gpu.matrix_fp32 <= gpu.matrix_tf32 <= gpu.matrix_16 < 1e16
        assert 0 < gpu.triton_gemm <= 1.5
        assert 0 < gpu.launch_seconds < 1e-4
    assert architectures >= {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}


@pytest.mark.parametrize(
    ("device", "architecture", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "sm_90", "H100"),
        ("NVIDIA H100 PCIe", "sm_90", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "A100"),
        ("NVIDIA A100-SXM4-40GB", "sm_80", "A100-SXM4-40GB"),
        ("NVIDIA L4", "sm_89", "L4"),
        ("NVIDIA L40S", "sm_89", "RTX 4090"),  # by architecture: it is no L4
        ("AMD Instinct MI300X", "gfx942", "MI300X"),
        ("some new card", "sm_120", "B200"),  # the nearest older one
        (None, "sm_86", "A100"),
        (None, "sm_70", "A100"),  # older than all
        (None, "gfx90a", "MI300X"),
        (None, "interpreter", "H100"),
    ],
)
def test_rates_are_found(device: str | None, architecture: str, expected: str) -> None:
    assert lookup(device, architecture).name == expected


def test_unknown_gpus_are_named() -> None:
    with pytest.raises(ValueError, match=r"gpu: expected one of A100, .*H100.*, got 'GTX 970'"):
        named("GTX 970")
    with pytest.raises(ValueError, match="architecture: expected 'sm_<number>'"):
        lookup(None, "riscv")


def test_a_backend_named_is_never_exchanged_for_torch() -> None:
    """Where PyTorch is predicted to be quickest, `backend="triton"` still runs the kernels."""
    sizes = [(tokens, n) for tokens in (1, 64, 4096) for n in (256, 4096)]
    alike = 0
    for tokens, n in sizes:
        free = call(tokens, n, n, FP32)
        bound = free._replace(kernels_only=True)
        chosen = choose(bound)
        assert chosen.strategy in ("row_block", "fused")
        assert chosen.candidate("torch").why_not == "backend='triton' was asked for"
        candidates = {c.strategy: c for c in choose(free).candidates}
        assert candidates["torch"].why_not is None
        alike += choose(free).strategy == chosen.strategy
    assert alike, "where torch is not quickest, the choice is the same"
    with pytest.raises(ValueError, match=r"'torch' cannot run here: backend='triton' was asked"):
        choose(call(kernels_only=True), "torch")
