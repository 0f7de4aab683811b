"""The timing engine: wrong results are not timed, slow steps look slow, failures leave rows."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.environment import Environment
from benchmarks.rows import Row
from benchmarks.speed import conditions, gate, memory, methods, timing
from benchmarks.speed.cases import DTYPES, Case
from benchmarks.speed.levels import layer
from benchmarks.speed.levels.layer import LayerProblem, LayerStep
from benchmarks.speed.measure import Outcome, count_launches, measure
from benchmarks.speed.methods import LAYER_METHODS, AdaptedLayer, LayerMethod
from benchmarks.speed.provider import BASELINE, Provider, UnavailableError, Workload
from benchmarks.speed.timing import Plan, Sample, Step
from dcft_kernels.torch_backend import compute_dtype

CPU = torch.device("cpu")
SOMEWHERE = Environment("some device", "2.0", None, "0.1", "abc1234")
SMALL = {dtype: Case("layer", 48, 64, 96, dtype) for dtype in DTYPES}
SQUARE = Case("layer", 48, 128, 128, "fp32")
PLAN = Plan(budget_s=1e9, max_rounds=5, footprint=False)
FROZEN, DCFT = methods.by_name(BASELINE, "dcft")


def outcomes_of(
    case: Case, *chosen: LayerMethod, plan: Plan = PLAN, **options
) -> dict[str, Outcome]:
    outcomes = measure(
        case,
        layer.providers_of(chosen),
        lambda: LayerProblem(case, CPU),
        SOMEWHERE,
        plan,
        device=CPU,
        **options,
    )
    return {outcome.key: outcome for outcome in outcomes}


# Real methods.


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_method_passes_the_gate_and_is_timed(dtype: str) -> None:
    eager = [m for m in LAYER_METHODS if not m.compiled]
    outcomes = outcomes_of(SMALL[dtype], *eager)
    for key, outcome in outcomes.items():
        row = outcome.row
        if row.provider == "lora_r8_16bit" and dtype == "fp32":
            assert outcome.skipped
            assert row.error == "cannot run: 16-bit factors need a 16-bit base, not torch.float32"
            continue
        if row.provider.startswith("dcft_") and row.provider != "dcft_torch":
            assert outcome.skipped  # a strategy of kernels, which need a GPU
            continue
        assert (row.gate, row.error) == ("passed", None), key
        assert row.rounds == len(outcome.samples) == 5
        assert 0 < row.wall_ms_p20 <= row.wall_ms_p50 <= row.wall_ms_p80
        assert row.device_ms_p50 is None  # a CPU has no device clock
        assert row.ratio_to_frozen_wall > 0
    saved = {key: outcome.row.saved_bytes for key, outcome in outcomes.items()}
    case, size = SMALL[dtype], DTYPES[dtype].itemsize
    x = case.T * case.n * size
    assert (saved[BASELINE], saved["full"]) == (0, x)
    U = compute_dtype(DTYPES[dtype], torch.device("cpu"))
    # U, and the matrices that are smaller than x: P and Q, and S in float32.
    matrices = 8 * (case.n + case.m) * U.itemsize + 8 * case.m * 4
    assert saved["dcft"] == x + case.T * 8 * U.itemsize + matrices
    assert saved["published"] > x + case.n * case.m * size  # DW


@pytest.mark.parametrize("direction", ["fwd", "bwd", "inference"])
def test_single_directions_pass_the_gate(direction: str) -> None:
    case = replace(SMALL["fp32"], direction=direction)
    for outcome in outcomes_of(
        case, *methods.by_name(BASELINE, "dcft", "lora_r8", "dora")
    ).values():
        assert (outcome.row.gate, outcome.row.direction) == ("passed", direction)


@pytest.mark.parametrize("direction", ["fwd+bwd", "inference"])
@pytest.mark.parametrize("method", methods.by_name("dcft", "lora_r1", "lora_by_hand"))
def test_parameters_change_between_training_steps_alone(
    method: LayerMethod, direction: str
) -> None:
    problem = LayerProblem(replace(SMALL["fp32"], direction=direction), CPU)
    workload = method.provider(layer._workload).build(problem)
    training = direction == "fwd+bwd"
    step: LayerStep = workload.step  # type: ignore[assignment]
    assert (problem.x.requires_grad, step.module.training) == (training, training)
    trained = list(step.trained.values())
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in trained]
        step.prepare()
        changed = {bool((p != b).all()) for p, b in zip(trained, before, strict=True)}
        assert changed == {training}
        step.run()
        assert workload.check() is None


@pytest.mark.parametrize("make", [methods.dcft, methods.published_dcft])
def test_variants_have_the_sizes_in_their_rows(make: Callable[..., LayerMethod]) -> None:
    chosen = [make(), make(rank=3), make(kernel_size=4), make(stride=2)]
    assert [method.variant for method in chosen] == ["", "k3", "d4", "s2"]
    for outcome in outcomes_of(SQUARE, *chosen[1:]).values():
        row = outcome.row
        assert row.gate == "passed", row.error
        assert outcome.provider.variant in (f"k{row.k}", f"d{row.d}", f"s{row.stride}")


def test_lokr_equals_dcft_on_square_layers() -> None:
    from dcft_kernels import dcft_linear

    problem = LayerProblem(SQUARE, CPU)
    (method,) = methods.by_name("lokr")
    lokr = method.build(problem.base(), problem.generator).layer.double()
    own = dict(lokr.named_parameters())
    A, B, C = (own[f"lokr_{name}.default"] for name in ("w1_b", "w1_a", "w2"))
    x, g = problem.x.double(), problem.g.double()
    y = lokr(x)
    expected = (y, *torch.autograd.grad(y, (x, A, B, C), g))
    factors = [factor.detach().clone().requires_grad_() for factor in (A, B, C)]
    ours = dcft_linear(x, problem.weight.double(), problem.bias.double(), *factors)
    found = (ours, *torch.autograd.grad(ours, (x, *factors), g))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# Planted faults.


class Spoiled(nn.Module):
    """A right layer with something done to its output."""

    def __init__(self, layer: nn.Module, spoil: Callable[[Tensor, Tensor, nn.Module], Tensor]):
        super().__init__()
        self.layer, self.spoil = layer, spoil

    def forward(self, x: Tensor) -> Tensor:
        return self.spoil(self.layer(x), x, self.layer)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 1.001 * g


def with_element(index: tuple[int, int], value: float):
    def spoil(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        y = y.clone()
        y[index] = value
        return y

    return spoil


def detached_adapter(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    return nn.functional.linear(x, layer.weight + layer.delta_weight().detach()) + layer.bias


WRONG = {
    "no adapter": (lambda y, x, layer: x @ layer.weight.t() + layer.bias, "y: error "),
    "slightly off": (lambda y, x, layer: y * 1.0001, "y: error "),
    "permuted windows": (lambda y, x, layer: y.roll(8, dims=1), "y: error "),
    "one element": (with_element((3, 5), 0.0), "y: error "),
    "NaN": (with_element((-1, -1), torch.nan), "y: not finite"),
    "cropped": (lambda y, x, layer: y[:, :-1], "RuntimeError: "),
    "gradient off": (lambda y, x, layer: ScaledGradient.apply(y), "gradient of x: error "),
    "no gradient of x": (lambda y, x, layer: layer(x.detach()), "gradient of x: missing"),
    "no gradient of A": (detached_adapter, "gradient of layer.dcft_A: missing"),
}


def spoiled(spoil) -> LayerMethod:
    def build(base: nn.Linear, generator: torch.Generator) -> AdaptedLayer:
        right = DCFT.build(base, generator)

        def dense(p):
            return right.dense_weight({k.removeprefix("layer."): v for k, v in p.items()})

        return AdaptedLayer(Spoiled(right.layer, spoil), "layer.", dense)

    return LayerMethod("wrong", build)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_results_are_not_timed(what: str) -> None:
    spoil, reason = WRONG[what]
    outcomes = outcomes_of(SMALL["fp32"], FROZEN, spoiled(spoil), DCFT)
    row = outcomes["wrong"].row
    assert row.error.startswith(reason), row.error
    assert row.gate == (None if reason.startswith("RuntimeError") else "failed")
    assert (row.rounds, row.wall_ms_p50, row.ratio_to_frozen_wall) == (0, None, None)
    assert not outcomes["wrong"].skipped
    assert outcomes["dcft"].row.rounds == 5
    if what == "one element":
        assert " at (3, 5), budget " in row.error


def test_wrong_baseline_leaves_the_others_without_a_ratio() -> None:
    def build(base: nn.Linear, generator: torch.Generator) -> AdaptedLayer:
        return AdaptedLayer(base, "", lambda p: p["weight"] + 1)

    outcomes = outcomes_of(SMALL["fp32"], LayerMethod(BASELINE, build), DCFT)
    assert outcomes[BASELINE].row.gate == "failed"
    assert outcomes["dcft"].row.wall_ms_p50 > 0
    assert outcomes["dcft"].row.ratio_to_frozen_wall is None


def test_peer_sets_the_budget() -> None:
    truth = {"y": torch.linspace(-1, 1, 512, dtype=torch.float64)}
    peer = {"y": truth["y"].bfloat16()}
    off = {"y": truth["y"] * 1.02}
    far = {"y": truth["y"] + 11 * (peer["y"].double() - truth["y"])}

    def check(actual: dict[str, Tensor], **options) -> str | None:
        return gate.check_against_peer(actual, peer, truth, torch.bfloat16, **options)

    assert check(peer) is None
    assert "y: error 0.02 at (0,)" in check(off)
    assert check({}) == "y: missing"
    assert check(far) is not None
    assert check(far, together=True) is None
    assert check(off, together=True) is not None


# Timing.


class Clock:
    """Time that only passes when a step says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def stopwatch(self, step: Step) -> Sample:
        step.prepare()
        start = self.now
        step.run()
        return Sample(self.now - start)

    def method(self, name: str, seconds: float) -> LayerMethod:
        def spend(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
            self.now += seconds
            return y

        def build(base: nn.Linear, generator: torch.Generator) -> AdaptedLayer:
            return AdaptedLayer(Spoiled(base, spend), "layer.")

        return LayerMethod(name, build)


def test_slow_provider_shows_its_ratio() -> None:
    clock = Clock()
    chosen = (clock.method(BASELINE, 0.5), clock.method("slow", 1.5))
    slow = outcomes_of(SMALL["fp32"], *chosen, stopwatch=clock.stopwatch)["slow"].row
    assert slow.ratio_to_frozen_wall == pytest.approx(3.0)
    assert slow.wall_ms_p50 == pytest.approx(1500)


def test_ratios_are_taken_within_rounds() -> None:
    # The machine gets five times slower in the third round: the medians' ratio would be 9.
    assert timing.median_ratio([2, 2, 9, 10, 10], [1, 1, 1, 5, 5]) == 2
    found = timing.percentiles([0.001, 0.002, 0.003, 0.004, 0.005, 0.006])
    assert found == pytest.approx({"p20": 2, "p50": 3.5, "p80": 5})


def test_every_provider_runs_once_per_round_and_in_every_place() -> None:
    names = ["a", "b", "c", "d"]
    orders = [timing.order(names, number) for number in range(8)]
    assert all(sorted(order) == names for order in orders)
    assert sorted(order[0] for order in orders) == sorted(names * 2)
    assert sorted(order[-1] for order in orders) == sorted(names * 2)
    assert len({pair for order in orders for pair in itertools.pairwise(order)}) == 8


class Idle:
    """A step that does nothing."""

    def prepare(self) -> None: ...

    def run(self) -> None: ...

    def release(self) -> None: ...


@pytest.mark.parametrize(
    ("plan", "rounds"),
    [
        (Plan(budget_s=100, max_rounds=7), 7),
        (Plan(budget_s=12, max_rounds=7), 6),  # 2 s per round
        (Plan(budget_s=9, max_rounds=7), 5),  # four rounds fit, and the first one counts too
        (Plan(budget_s=1, max_rounds=7), 1),  # none fits: only the first one
        (Plan(budget_s=1, min_rounds=6, max_rounds=7), 6),
        (Plan(budget_s=1, min_rounds=6, max_rounds=7, longest_s=10), 5),
    ],
)
def test_rounds_keep_to_the_plan(plan: Plan, rounds: int) -> None:
    clock = Clock()

    def stopwatch(step: Step) -> Sample:
        clock.now += 1.0
        return Sample(1.0)

    steps: dict[str, Step] = {"a": Idle(), "b": Idle()}
    first = {"a": Sample(1.0), "b": Sample(1.0)}
    found = timing.paired_rounds(
        steps, first, plan, stopwatch, lambda name, error: None, now=lambda: clock.now
    )
    assert len(found) == rounds
    assert all(set(samples) == {"a", "b"} for samples in found)


@pytest.mark.parametrize(("seconds", "runs"), [(0.001, 2), (1.0, 1)])
def test_sample_of_a_short_step_is_the_mean_of_several_runs(
    seconds: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    calls: list[str] = []

    class Step(Idle):
        def prepare(self) -> None:
            clock.now += 0.002
            calls.append("prepare")

        def run(self) -> None:
            clock.now += seconds
            calls.append("run")

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    assert timing.host_stopwatch(Step(), sample_s=0.005).wall == pytest.approx(seconds)
    assert calls == ["prepare", "run"] * runs


def test_conditions_hold_and_are_undone_after_an_error() -> None:
    def state() -> tuple[int, bool]:
        return torch.get_num_threads(), torch.is_grad_enabled()

    before = state()
    case = replace(SQUARE, direction="inference", threads=before[0] + 1)
    inside = []

    def fail() -> None:
        with conditions.under(case), conditions.busy_neighbour() as neighbour:
            inside.extend([state(), neighbour.poll(), neighbour])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    threads_and_gradients, status, neighbour = inside
    assert threads_and_gradients == (before[0] + 1, False)
    assert status is None  # it was running
    assert neighbour.poll() is not None
    assert state() == before


def idle(name: str = "idle", **values) -> Provider:
    return Provider(name, lambda problem: Workload(Idle(), lambda: None, **values))


def measure_idle(*providers: Provider, plan: Plan = PLAN, **options) -> list[Row]:
    outcomes = measure(SQUARE, providers, lambda: None, SOMEWHERE, plan, device=CPU, **options)
    return [outcome.row for outcome in outcomes]


def two_clocks(step: Step) -> Sample:
    step.run()
    return Sample(0.8, 0.2 if isinstance(step, Captured) else 0.4, 0.1)


class Captured(Idle):
    """Stands in for a CUDA graph."""

    def __init__(self, step: Step, stream: object) -> None: ...


def test_clocks_have_columns_and_rates_are_by_the_device_clock() -> None:
    provider = idle(moved_bytes=4 * 10**9, flops=8 * 10**12, graphable=False)
    (row,) = measure_idle(provider, stopwatch=two_clocks)
    assert (row.wall_ms_p50, row.device_ms_p50, row.host_ms_p50) == (800.0, 400.0, 100.0)
    assert (row.gb_per_s, row.tflop_per_s) == (pytest.approx(10.0), pytest.approx(20.0))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr("benchmarks.speed.measure.Replay", Captured)
    return monkeypatch


def test_short_steps_are_also_timed_as_graphs(fake_cuda: pytest.MonkeyPatch) -> None:
    problems = []
    providers = [idle(BASELINE), idle("other"), idle("not", graphable=False)]
    outcomes = measure(
        SQUARE, providers, lambda: problems.append(0), SOMEWHERE,
        replace(PLAN, graph_s=1.0), device=CPU, stopwatch=two_clocks,
    )  # fmt: skip
    times = [(o.row.graph_ms_p50, o.row.ratio_to_frozen_graph) for o in outcomes]
    assert times == [(200.0, 1.0), (200.0, 1.0), (None, None)]
    assert len(problems) == 2  # one for eager steps, one for captures


def test_failed_and_wrong_graphs_are_noted(fake_cuda: pytest.MonkeyPatch) -> None:
    class Fails(Captured):
        def __init__(self, step: Step, stream: object) -> None:
            raise RuntimeError("a synchronization\nin a capture")

    plan = replace(PLAN, graph_s=1.0)
    fake_cuda.setattr("benchmarks.speed.measure.Replay", Fails)
    (row,) = measure_idle(idle(), plan=plan, stopwatch=two_clocks)
    assert (row.graph_error, row.error) == ("RuntimeError: a synchronization", None)

    checks = iter([None, "y: error"])  # of the step, then of its graph
    fake_cuda.setattr("benchmarks.speed.measure.Replay", Captured)
    provider = Provider("wrong", lambda problem: Workload(Idle(), lambda: next(checks)))
    (row,) = measure_idle(provider, plan=plan, stopwatch=two_clocks)
    assert (row.graph_error, row.gate, row.graph_ms_p50) == ("wrong: y: error", "passed", None)


def test_rounds_without_a_device_time_do_not_count_for_its_ratio() -> None:
    class Timed(Idle):
        def __init__(self, *device: float | None) -> None:
            self.device = iter(device)

    def timed(name: str, *device: float | None) -> Provider:
        return Provider(name, lambda problem: Workload(Timed(*device), lambda: None))

    providers = [timed(BASELINE, 9, 0.2, None, 0.2), timed("other", 9, 0.4, 0.5, 0.6)]
    plan = replace(PLAN, max_rounds=3, enough_rounds=0, graph_s=0.0)
    rows = measure_idle(
        *providers, timed("never", *[None] * 4), plan=plan,
        stopwatch=lambda step: Sample(1.0, next(step.device)),  # type: ignore[attr-defined]
    )  # fmt: skip
    assert [row.device_ms_p50 for row in rows] == pytest.approx([200.0, 500.0, None])
    assert [row.ratio_to_frozen_device for row in rows] == pytest.approx([1.0, 2.5, None])
    assert [row.ratio_to_frozen_wall for row in rows] == [1.0] * 3


def test_rows_are_recorded_before_their_graphs_and_launches_are_counted_last(
    fake_cuda: pytest.MonkeyPatch,
) -> None:
    written: list[Row] = []
    outcomes = measure(
        SQUARE, [idle()], lambda: None, SOMEWHERE, replace(PLAN, graph_s=1.0),
        device=CPU, stopwatch=two_clocks, record=written.append,
    )  # fmt: skip
    fake_cuda.setattr(memory, "launches", lambda step, device: 7)
    count_launches(outcomes, lambda: None, torch.device("cuda"), written.append)
    found = [(row.device_ms_p50, row.graph_ms_p50, row.launches) for row in written]
    assert found == [(400.0, None, None), (400.0, 200.0, None), (400.0, 200.0, 7)]
    assert rows.latest(written) == written[-1:]


@pytest.mark.gpu
def test_replay_reads_and_writes_what_lives() -> None:
    """Replays of several captures over one input, after all else is freed and overwritten."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        problem = LayerProblem(Case("layer", 256, 512, 384, "bf16"), torch.device("cuda"))
    replays, results, expected = [], [], []
    for method in methods.by_name(BASELINE, "dcft", "dcft_torch", "lora_by_hand"):
        with torch.cuda.stream(stream):
            step = method.provider(layer._workload).build(problem).step
        replays.append(timing.Replay(step, stream))
        replays[-1].run()
        results.append([v for v in step.results().values() if v is not None])
        expected.append([value.clone() for value in results[-1]])
    del problem, step
    gc.collect()
    torch.cuda.empty_cache()
    garbage = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    for _ in range(2):
        for value in itertools.chain(*results):
            value.fill_(torch.nan)
        for replay, values, right in zip(replays, results, expected, strict=True):
            replay.run()
            assert all(map(torch.equal, values, right))
    del garbage


# Failures.


@pytest.mark.parametrize("error", [ImportError("No module named 'x'"), UnavailableError("no x")])
def test_unavailable_provider_is_a_skipped_row(error: Exception) -> None:
    def build(base: nn.Linear, generator: torch.Generator) -> AdaptedLayer:
        raise error

    outcome = outcomes_of(SMALL["fp32"], FROZEN, LayerMethod("absent", build))["absent"]
    assert outcome.skipped
    assert outcome.row.error == f"cannot run: {error}"


def test_kernels_without_a_gpu_say_why() -> None:
    (outcome,) = outcomes_of(SMALL["fp32"], *methods.by_name("dcft_row_block")).values()
    assert outcome.skipped
    assert outcome.row.error.startswith("strategy='row_block' cannot run: the tensors are on 'cpu'")


def test_provider_that_fails_in_a_round_leaves_the_others() -> None:
    class FailsThirdTime(Idle):
        runs = 0

        def run(self) -> None:
            self.runs += 1
            if self.runs == 3:
                raise torch.OutOfMemoryError("out of memory\nand more")

    failing = Provider("failing", lambda problem: Workload(FailsThirdTime(), lambda: None))
    written: list[Row] = []
    rows = measure_idle(
        idle(BASELINE), failing, idle(), record=written.append, stopwatch=two_clocks
    )
    assert [row.rounds for row in rows] == [5, 0, 5]
    assert rows[1].error == "while timing: OutOfMemoryError: out of memory"
    assert {row.provider for row in written} == {BASELINE, "failing", "idle"}


def test_input_that_cannot_be_made_is_a_row_of_every_provider() -> None:
    def problem() -> None:
        raise torch.OutOfMemoryError("out of memory")

    outcomes = measure(SQUARE, [idle(), idle("b")], problem, SOMEWHERE, PLAN, device=CPU)
    assert [o.row.error for o in outcomes] == ["OutOfMemoryError: out of memory"] * 2


def test_slow_first_round_leaves_out_the_last_providers() -> None:
    plan = replace(PLAN, first_round_s=0.0)
    outcomes = outcomes_of(SMALL["fp32"], FROZEN, DCFT, plan=plan)
    assert outcomes["dcft"].skipped
    assert outcomes["dcft"].row.error.startswith("not run: the first steps before it took")


# Memory.


def test_saved_storages_count_once_and_parameters_do_not() -> None:
    x = torch.randn(6, 10, requires_grad=True)
    weight = nn.Parameter(torch.randn(10, 10))

    def forward() -> Tensor:
        doubled = x * 2
        return (doubled[:3] @ weight) * (doubled[3:] @ weight)

    # Two views of `doubled`, and the two factors of the product.
    assert memory.saved_bytes(forward, [weight]) == 6 * 10 * 4 + 2 * 3 * 10 * 4


def test_peak_bytes_are_those_held_at_once() -> None:
    class Allocating(Idle):
        def run(self) -> None:
            doubled = torch.ones(1000)
            tripled = doubled * 3
            del doubled
            self.y = tripled * 4

    held = 2 * 1000 * 4
    assert held <= memory.peak_bytes(Allocating(), CPU) < held + 200
    assert memory.launches(Allocating(), CPU) is None


def test_profiler_that_is_not_permitted_costs_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(step: Step, device: torch.device) -> None:
        raise RuntimeError("not permitted")

    monkeypatch.setattr(memory, "peak_bytes", refused)
    (row,) = measure_idle(idle(), plan=replace(PLAN, footprint=True))
    assert (row.error, row.rounds) == (None, 5)
    assert row.footprint_error == "RuntimeError: not permitted"
