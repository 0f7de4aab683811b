"""The benchmarks themselves: what is wrong is not timed, what is slow looks slow, rows survive."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import adapters, environment, footprint, gate, rows, run, selftest, timing
from benchmarks.adapters import ADAPTERS, AdapterKind, Candidate
from benchmarks.cases import DTYPES, Case, Scope, parse_shape
from benchmarks.entries import BASELINE, DeviceLostError, Entry, Subject, UnavailableError
from benchmarks.environment import Environment
from benchmarks.levels import LEVELS, layer
from benchmarks.levels.layer import LayerProblem, LayerStep
from benchmarks.measure import Outcome, measure
from benchmarks.rows import Row
from benchmarks.timing import Plan, Sample, Step
from dcft_kernels import DCFTLinear, dcft_linear

CPU = torch.device("cpu")
SOMEWHERE = Environment("some device", "2.0", None, "0.1", "abc1234")
BY_NAME = {kind.name: kind for kind in reversed(ADAPTERS)}
SMALL = {dtype: Case("layer", 48, 64, 96, dtype) for dtype in DTYPES}
SQUARE = Case("layer", 48, 128, 128, "fp32")
FEW_ROUNDS = Plan(budget_s=1e9, max_rounds=5, extras=False)
# What needs a compiler, a GPU or another package than the tests have.
PLAIN = [
    kind
    for kind in ADAPTERS
    if not kind.compiled
    and kind.name not in ("dcft_row_block", "dcft_fused", "dcft_scratch")
    and kind.name not in ("lycoris_lokr", "unsloth_lora", "liger")
]


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def stopwatch(self, step: Step) -> Sample:
        step.prepare()
        start = self.now
        step.run()
        return Sample(self.now - start)


class Slowed(nn.Module):
    """A layer that takes `seconds` of a clock's time."""

    def __init__(self, layer: nn.Module, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.layer, self.clock, self.seconds = layer, clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds
        return self.layer(x)


def slowed(name: str, clock: Clock, seconds: float) -> AdapterKind:
    def build(base: nn.Linear, generator: torch.Generator) -> Candidate:
        return Candidate(Slowed(base, clock, seconds), "layer.weight", "layer.bias")

    return AdapterKind(name, name, build)


def outcomes_of(
    case: Case, *kinds: AdapterKind, plan: Plan = FEW_ROUNDS, stopwatch=None
) -> dict[str, Outcome]:
    outcomes = measure(
        case,
        layer.entries_of(kinds),
        lambda: LayerProblem(case, CPU),
        SOMEWHERE,
        plan,
        device=CPU,
        stopwatch=stopwatch,
    )
    return {outcome.key: outcome for outcome in outcomes}


# -------------------------------------------------------------------------------- the real ones


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_adapter_passes_the_gate_and_is_timed(dtype: str) -> None:
    outcomes = outcomes_of(SMALL[dtype], *PLAIN)
    assert len(outcomes) == len(PLAIN)
    for key, outcome in outcomes.items():
        row = outcome.row
        if row.provider.endswith("_16bit") and dtype == "fp32":
            assert outcome.skipped
            assert "16 bit only, not over float32" in row.error
            continue
        assert (row.gate, row.error) == ("passed", None), key
        assert row.rounds == len(outcome.samples) == 5
        assert 0 < row.wall_ms_p20 <= row.wall_ms_p50 <= row.wall_ms_p80
        assert row.device_ms_p50 is None  # the CPU has no clock of its own
        assert row.ratio_to_frozen_wall > 0
        assert row.shape == (48, 64, 96)
    assert outcomes[BASELINE].row.ratio_to_frozen_wall == 1.0


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_direction_alone_is_checked_and_timed(direction: str) -> None:
    outcomes = outcomes_of(replace(SMALL["fp32"], direction=direction), *PLAIN)
    for outcome in outcomes.values():
        assert outcome.skipped or outcome.row.gate == "passed"
        assert outcome.row.direction == direction


@pytest.mark.slow
def test_compiled_adapters_pass_the_gate() -> None:
    compiled = [kind for kind in ADAPTERS if kind.compiled]
    assert [kind.name for kind in compiled] == ["frozen_compiled", "dcft_compiled"]
    for outcome in outcomes_of(SMALL["fp32"], *compiled).values():
        assert (outcome.row.gate, outcome.row.error) == ("passed", None)


@pytest.mark.parametrize("of", ["dcft", "published"])
def test_variants_have_the_sizes_that_their_rows_say(of: str) -> None:
    kinds = adapters.variants(ranks=(1, 3), kernel_sizes=(4, 16), strides=(2, 8), of=of)
    assert [kind.variant for kind in kinds] == ["", "k3", "d4", "d16", "s2", ""]
    problem = LayerProblem(Case("layer", 8, 64, 64, "fp32"), CPU)
    for kind in kinds:
        made = kind.layer(problem.base(), problem.generator).layer
        A, C = (made.dcft_A, made.dcft_C) if of == "dcft" else (made.A, made.C)
        assert tuple(C.shape) == (kind.d, kind.d)
        assert tuple(A.shape) == (kind.k, (64 - kind.d) // kind.stride + 1)
    for outcome in outcomes_of(SQUARE, *kinds[1:5]).values():
        assert outcome.row.gate == "passed", outcome.row.error


def test_lokr_is_a_second_oracle() -> None:
    """Of a square layer, peft's LoKr with these factors is DCFT: same output, same gradients."""
    problem = LayerProblem(SQUARE, CPU)
    kind = BY_NAME["lokr"]
    lokr = kind.layer(problem.base(), problem.generator).layer
    own = dict(lokr.named_parameters())
    names = ("lokr_w1_b.default", "lokr_w1_a.default", "lokr_w2.default")
    A, B, C = (own[name] for name in names)
    assert (tuple(A.shape), tuple(B.shape), tuple(C.shape)) == ((kind.k, 16), (16, kind.k), (8, 8))
    x, g = problem.x.double(), problem.g.double()
    lokr.double()
    A, B, C = (own[name] for name in names)
    y = lokr(x)
    expected = (y, *torch.autograd.grad(y, (x, A, B, C), g))
    factors = [factor.detach().clone().requires_grad_() for factor in (A, B, C)]
    weight, bias = problem.weight.double(), problem.bias.double()
    ours = dcft_linear(x, weight, bias, *factors)
    found = (ours, *torch.autograd.grad(ours, (x, *factors), g))
    for theirs, mine in zip(expected, found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["dcft", "published", "published_merged", "lora_r1", "lora_autograd", "lokr", "dora"]
)
def test_increment_is_as_large_as_the_base(name: str) -> None:
    # Otherwise the gate could not tell a missing adapter from rounding.
    problem = LayerProblem(SMALL["bf16"], CPU)
    candidate = BY_NAME[name].layer(problem.base(), problem.generator)
    weight, _ = candidate.dense(dict(candidate.layer.named_parameters()))
    base = problem.weight.float()
    assert (weight.float() - base).std().item() == pytest.approx(base.std().item(), rel=0.3)


def test_base_is_shared_and_frozen_but_for_full_fine_tuning() -> None:
    problem = LayerProblem(SMALL["bf16"], CPU)
    for kind in PLAIN:
        candidate = kind.layer(problem.base(), problem.generator)
        weight = dict(candidate.layer.named_parameters())[candidate.weight]
        shares = weight.data_ptr() == problem.weight.data_ptr()
        assert shares == (not weight.requires_grad) == (kind.name != "full"), kind.name


def test_every_provider_has_one_name_and_one_key() -> None:
    for level in LEVELS.values():
        for case in level.cases(Scope("cuda", "full")):
            keys = [entry.key for entry in level.entries(case)]
            assert len(keys) == len(set(keys)), case


# ----------------------------------------------------------------------------- planted wrong ones


def _cropped(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    return y[:, :-1]


def _detached_adapter(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    return nn.functional.linear(x, layer.weight + layer.delta_weight().detach()) + layer.bias


WRONG = {
    **selftest.WRONG,
    "cropped": (_cropped, "RuntimeError: "),
    "no gradient of the adapter": (_detached_adapter, "gradient of layer.dcft_A: missing"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_provider_is_caught_and_not_timed(what: str) -> None:
    spoil, expected = WRONG[what]
    wrong = selftest.planted("wrong", spoil)
    outcomes = outcomes_of(SMALL["fp32"], BY_NAME["frozen"], wrong, BY_NAME["dcft"])
    row = outcomes["wrong"].row
    assert row.error.startswith(expected), row.error
    assert not outcomes["wrong"].skipped
    assert row.gate == ("failed" if not expected.startswith("RuntimeError") else None)
    assert (row.rounds, row.wall_ms_p50, row.ratio_to_frozen_wall) == (0, None, None)
    assert not outcomes["wrong"].samples
    assert outcomes["dcft"].row.rounds == 5  # the others go on


def test_one_wrong_element_is_named() -> None:
    spoil, _ = selftest.WRONG["one element"]
    row = outcomes_of(SMALL["fp32"], selftest.planted("wrong", spoil))["wrong"].row
    assert " at (3, 5), budget " in row.error


@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_is_a_small_multiple_of_what_right_layers_need(dtype: str) -> None:
    expected = torch.randn(48, 96, dtype=torch.float64)
    rms_budget, max_budget = gate.budgets(DTYPES[dtype], expected, terms=64 + 96 + 48)
    unit = torch.finfo(DTYPES[dtype]).eps / 2
    assert 2 * unit < rms_budget < 40 * unit
    assert rms_budget < max_budget < 200 * unit


def test_a_peer_sets_the_budget_of_what_is_no_single_layer() -> None:
    truth = {"y": torch.linspace(-1, 1, 512, dtype=torch.float64)}
    peer = {"y": truth["y"].bfloat16()}
    assert gate.check_beside(peer, peer, truth, torch.bfloat16) is None
    off = {"y": truth["y"] * 1.02}
    assert "y: error 0.02 at (0,)" in gate.check_beside(off, peer, truth, torch.bfloat16)
    assert gate.check_beside({}, peer, truth, torch.bfloat16) == "y: missing"
    # In a model, where errors move together, the peer's counts four times as much.
    far = {"y": truth["y"] + 11 * (peer["y"].double() - truth["y"])}
    assert gate.check_beside(far, peer, truth, torch.bfloat16, together=True) is None
    assert gate.check_beside(far, peer, truth, torch.bfloat16) is not None
    assert gate.check_beside(off, peer, truth, torch.bfloat16, together=True) is not None


def test_self_test_passes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--device", "cpu"]) == 0
    assert "7 wrong providers were caught" in capsys.readouterr().out


def test_self_test_says_what_was_not_caught() -> None:
    outcomes = selftest.run(CPU)
    assert selftest.faults(outcomes, selftest.delay_ms(CPU)) == []
    missed = outcomes | {"slightly off": replace(outcomes["dcft"], key="slightly off")}
    found = selftest.faults(missed, selftest.delay_ms(CPU))
    assert found == [
        "'slightly off' was not caught: None",
        "'slightly off' is wrong and was timed",
    ]
    assert "slower by 2000.0 ms was measured as" in selftest.faults(outcomes, 2000.0)[0]


def test_wrong_baseline_leaves_the_others_without_a_ratio() -> None:
    def build(base: nn.Linear, generator: torch.Generator) -> Candidate:
        return Candidate(base, "weight", "bias", lambda p: p["weight"] + 1)

    outcomes = outcomes_of(SMALL["fp32"], AdapterKind(BASELINE, "", build), BY_NAME["dcft"])
    assert outcomes[BASELINE].row.gate == "failed"
    assert outcomes["dcft"].row.wall_ms_p50 > 0
    assert outcomes["dcft"].row.ratio_to_frozen_wall is None


# ------------------------------------------------------------------------------ planted slow ones


def test_slow_provider_shows_its_ratio() -> None:
    clock = Clock()
    planted = (slowed(BASELINE, clock, 0.5), slowed("slow", clock, 1.5))
    outcomes = outcomes_of(SMALL["fp32"], *planted, stopwatch=clock.stopwatch)
    assert outcomes["slow"].row.gate == "passed"
    assert outcomes["slow"].row.ratio_to_frozen_wall == pytest.approx(3.0)
    assert outcomes["slow"].row.wall_ms_p50 == pytest.approx(1500)
    assert outcomes[BASELINE].row.wall_ms_p50 == pytest.approx(500)


def test_ratio_is_taken_within_rounds() -> None:
    # The machine gets five times slower half-way: medians of times would say 3 / 1 or worse.
    baseline, other = [1, 1, 5, 5, 5], [2, 2, 10, 10, 10]
    assert timing.median_ratio(other, baseline) == 2


def test_percentiles_are_milliseconds() -> None:
    assert timing.percentiles([0.001, 0.002, 0.003, 0.004, 0.005, 0.006]) == pytest.approx(
        (2, 3.5, 5)
    )


def test_everybody_runs_once_in_every_round_and_at_every_place() -> None:
    names = ["a", "b", "c", "d"]
    orders = [timing.order(names, number) for number in range(8)]
    assert all(sorted(order) == names for order in orders)
    assert sorted(order[0] for order in orders) == sorted(names * 2)
    assert sorted(order[-1] for order in orders) == sorted(names * 2)
    followers = {pair for order in orders for pair in itertools.pairwise(order)}
    assert len(followers) == 8  # after either neighbour, clockwise or not


@pytest.mark.parametrize(
    ("plan", "rounds"),
    [
        (Plan(budget_s=100, max_rounds=7), 7),
        (Plan(budget_s=12, max_rounds=7), 6),  # 2 s a round
        (Plan(budget_s=9, max_rounds=7), 5),  # four rounds fit in, and the first one counts too
        (Plan(budget_s=1, max_rounds=7), 1),  # none fits in: the first one is all there is
    ],
)
def test_rounds_keep_to_the_plan(plan: Plan, rounds: int) -> None:
    clock = Clock()
    problem = LayerProblem(SMALL["fp32"], CPU)
    steps = {}
    for name in ("a", "b"):
        candidate = slowed(name, clock, 1.0).layer(problem.base(), problem.generator)
        steps[name] = LayerStep(problem, candidate, candidate.layer)
    first = {name: timing.timed(step, clock.stopwatch) for name, step in steps.items()}
    found = timing.paired_rounds(steps, first, plan, clock.stopwatch, now=lambda: clock.now)
    assert len(found) == rounds
    assert all(set(samples) == {"a", "b"} for samples in found)


class Counted:
    """A step that does nothing, of several repeats."""

    def prepare(self) -> None: ...

    def run(self) -> None: ...

    def release(self) -> None: ...


def counted(**values) -> Entry:
    return Entry("counted", "", lambda problem: Subject(Counted(), lambda: None, **values))


def two_clocks(step: Step) -> Sample:
    step.run()
    return Sample(0.8, 0.2 if isinstance(step, Replayed) else 0.4)


class Replayed(Counted):
    """In place of a CUDA graph."""

    def __init__(self, step: Step) -> None: ...


def test_rates_are_of_one_repeat_and_the_device_clock() -> None:
    entry = counted(moved_bytes=10**9, flops=2 * 10**12, repeats=4)
    (outcome,) = measure(
        SQUARE, [entry], lambda: None, SOMEWHERE, FEW_ROUNDS, device=CPU, stopwatch=two_clocks
    )
    row = outcome.row
    assert (row.wall_ms_p50, row.device_ms_p50) == (200.0, 100.0)
    assert row.gb_per_s == pytest.approx(10.0)
    assert row.tflop_per_s == pytest.approx(20.0)
    assert row.milliseconds == 100.0


def measured_with_graphs(replay: type, **values) -> list[Row]:
    plan = replace(FEW_ROUNDS, graph_s=1.0)
    entries = [replace(counted(**values), name=name) for name in (BASELINE, "other")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.measure.Replay", replay)
        outcomes = measure(
            SQUARE, entries, lambda: None, SOMEWHERE, plan, device=CPU, stopwatch=two_clocks
        )
    assert all(len(o.samples) == o.row.rounds == 5 for o in outcomes)
    return [outcome.row for outcome in outcomes]


def test_graphs_are_timed_beside() -> None:
    rows_ = measured_with_graphs(Replayed)
    assert [(r.device_ms_p50, r.graph_ms_p50) for r in rows_] == [(400.0, 200.0)] * 2
    assert rows_[1].ratio_to_frozen_graph == 1.0
    assert measured_with_graphs(Replayed, graphable=False)[1].graph_ms_p50 is None
    assert measured_with_graphs(Replayed, repeats=2)[1].graph_ms_p50 == 100.0


def test_a_graph_that_cannot_be_captured_is_noted() -> None:
    class Fails(Replayed):
        def __init__(self, step: Step) -> None:
            raise RuntimeError("a synchronisation\nin a capture")

    row = measured_with_graphs(Fails)[1]
    assert (row.graph_ms_p50, row.graph_error) == (None, "RuntimeError: a synchronisation")
    assert (row.error, row.ratio_to_frozen_device) == (None, 1.0)


def test_a_graph_that_fails_in_its_rounds_has_no_times() -> None:
    class FailsThirdTime(Replayed):
        runs = 0

        def run(self) -> None:
            type(self).runs += 1
            if self.runs == 7:  # of the second: both were checked once, and ran twice
                raise RuntimeError("a launch failed")

    found = [row for row in measured_with_graphs(FailsThirdTime) if row.graph_error is not None]
    assert len(found) == 1
    assert (found[0].graph_ms_p50, found[0].graph_error) == (None, "RuntimeError: a launch failed")
    assert found[0].error is None


def test_a_graph_that_computes_something_else_is_not_timed() -> None:
    checks = itertools.cycle([None, None, "y: error", "y: error"])  # of both, then of their graphs

    def build(problem: None) -> Subject:
        return Subject(Counted(), lambda: next(checks))

    entries = [replace(counted(), name=n, build=build) for n in (BASELINE, "other")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.measure.Replay", Replayed)
        plan = replace(FEW_ROUNDS, graph_s=1.0)
        outcomes = measure(
            SQUARE, entries, lambda: None, SOMEWHERE, plan, device=CPU, stopwatch=two_clocks
        )
    for outcome in outcomes:
        assert outcome.row.gate == "passed"
        assert (outcome.row.graph_ms_p50, outcome.row.graph_error) == (None, "wrong: y: error")


def test_a_step_of_more_launches_than_a_queue_holds_has_no_device_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.footprint.launches", lambda step, device: 2 * 1001)
    monkeypatch.setattr("benchmarks.footprint.peak_bytes", lambda step, device: 0)
    plan = replace(FEW_ROUNDS, extras=True)
    for repeats, device_ms in ((1, None), (2, None), (4, 100.0)):
        (outcome,) = measure(
            SQUARE, [counted(repeats=repeats)], lambda: None, SOMEWHERE, plan,
            device=CPU, stopwatch=two_clocks,
        )  # fmt: skip
        assert outcome.row.launches == 2002 // repeats
        assert outcome.row.device_ms_p50 == device_ms, repeats


def test_a_provider_that_fails_while_it_is_timed_leaves_the_rounds() -> None:
    class FailsThirdTime(Counted):
        runs = 0

        def run(self) -> None:
            self.runs += 1
            if self.runs == 3:
                raise torch.OutOfMemoryError("out of memory")

    failing = replace(
        counted(), name="failing", build=lambda p: Subject(FailsThirdTime(), lambda: None)
    )
    written: list[Row] = []
    outcomes = measure(
        SQUARE, [replace(counted(), name=BASELINE), failing, counted()], lambda: None, SOMEWHERE,
        FEW_ROUNDS, device=CPU, stopwatch=timing.host_stopwatch, record=written.append,
    )  # fmt: skip
    assert [o.row.rounds for o in outcomes] == [5, 0, 5]
    row = outcomes[1].row
    assert row.error == "while timing: OutOfMemoryError: out of memory"
    assert (row.wall_ms_p50, row.ratio_to_frozen_wall) == (None, None)
    assert {r.provider for r in written} == {BASELINE, "failing", "counted"}


def test_a_lost_device_leaves_rows_and_stops_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(key: str, error: Exception, device: torch.device) -> None:
        raise DeviceLostError(key, RuntimeError("CUDA error: an illegal memory access"))

    monkeypatch.setattr("benchmarks.measure._raise_if_lost", lost)
    broken = replace(counted(), name="broken", build=lambda p: 1 / 0)
    written: list[Row] = []
    with pytest.raises(DeviceLostError, match="broken broke the device: CUDA error") as lost_:
        measure(
            SQUARE, [replace(counted(), name=BASELINE), broken, counted()], lambda: None,
            SOMEWHERE, FEW_ROUNDS, device=CPU, record=written.append,
        )  # fmt: skip
    assert lost_.value.key == "broken"
    errors = {r.provider: r.error for r in written}
    assert errors == {
        "broken": "ZeroDivisionError: division by zero",
        BASELINE: "not run: broken broke the device: CUDA error: an illegal memory access",
        "counted": "not run: broken broke the device: CUDA error: an illegal memory access",
    }


def test_after_a_lost_device_a_new_process_goes_on_without_what_broke_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(case: Case, entries, *rest) -> list[Outcome]:
        if any(entry.key == "dcft" for entry in entries) and case.n == 32:
            raise DeviceLostError("dcft", RuntimeError("an illegal memory access"))
        seen.append((case.n, [entry.key for entry in entries]))
        return []

    class ReplacedError(Exception):
        pass

    def execv(program: str, arguments: list[str]) -> None:
        assert arguments[:3] == [sys.executable, "-m", "benchmarks.run"]
        raise ReplacedError(arguments[3:])

    seen: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(run, "measure_case", lost)
    monkeypatch.setattr("os.execv", execv)
    arguments = ["--levels", "layer", "--shapes", "8x16x16", "8x32x32", "8x64x64", "--device"]
    arguments += [
        "cpu",
        "--providers",
        "dcft",
        "lora_r1",
        "--without",
        "dcft-k4",
        "--out",
        str(tmp_path),
    ]
    with pytest.raises(ReplacedError) as replaced:
        run.main(arguments)
    assert seen == [(16, [BASELINE, "dcft", "lora_r1"])]
    run.main(replaced.value.args[0])
    assert seen[1:] == [(32, [BASELINE, "lora_r1"]), (64, [BASELINE, "lora_r1"])]


# --------------------------------------------------------------------- providers that cannot run


def raising(error: Exception) -> AdapterKind:
    def build(base: nn.Linear, generator: torch.Generator) -> Candidate:
        raise error

    return AdapterKind("absent", "absent", build)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'x'"), UnavailableError("no x")]
)
def test_what_cannot_run_is_a_row_that_says_so(error: Exception) -> None:
    outcome = outcomes_of(SMALL["fp32"], BY_NAME["frozen"], raising(error))["absent"]
    assert outcome.skipped
    assert outcome.row.error == f"cannot run: {error}"
    assert outcome.row.gate is None


def test_error_is_a_row_of_one_line_and_the_run_goes_on() -> None:
    broken = raising(torch.OutOfMemoryError("out of memory\nand a long tale"))
    outcomes = outcomes_of(SMALL["fp32"], broken, BY_NAME["frozen"])
    assert outcomes["absent"].row.error == "OutOfMemoryError: out of memory"
    assert not outcomes["absent"].skipped
    assert outcomes[BASELINE].row.rounds == 5


def test_input_that_cannot_be_made_is_a_row_of_every_provider() -> None:
    def problem() -> None:
        raise torch.OutOfMemoryError("out of memory")

    entries = layer.entries_of(PLAIN[:2])
    outcomes = measure(SQUARE, entries, problem, SOMEWHERE, FEW_ROUNDS, device=CPU)
    assert [o.row.error for o in outcomes] == ["OutOfMemoryError: out of memory"] * 2


@pytest.mark.parametrize("name", ["dcft_row_block", "dcft_fused", "dcft_scratch"])
def test_kernels_without_a_gpu_say_why(name: str) -> None:
    outcome = outcomes_of(SMALL["fp32"], BY_NAME[name])[name]
    assert outcome.skipped
    assert outcome.row.error.startswith("cannot run: backend='triton': the tensors are on 'cpu'")


@pytest.mark.parametrize("name", ["lycoris_lokr", "unsloth_lora", "liger"])
def test_other_libraries_run_or_say_why(name: str) -> None:
    row = outcomes_of(SMALL["fp32"], BY_NAME[name])[name].row
    assert row.gate == "passed" or row.error.startswith("cannot run: ")


def test_first_round_that_takes_too_long_leaves_out_the_last_providers() -> None:
    clock = Clock()
    planted = [slowed(name, clock, 200.0) for name in (BASELINE, "second", "third")]
    plan = Plan(budget_s=1, first_round_s=300, extras=False)
    outcomes = outcomes_of(SMALL["fp32"], *planted, plan=plan, stopwatch=clock.stopwatch)
    assert [outcome.row.rounds for outcome in outcomes.values()] == [1, 1, 0]
    assert outcomes["third"].skipped
    assert outcomes["third"].row.error == (
        "not run: the providers before it took 400 s for a first step each"
    )


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_saved_bytes_are_exact(dtype: str) -> None:
    case = SMALL[dtype]
    size = DTYPES[dtype].itemsize
    x = case.T * case.n * size
    outcomes = outcomes_of(case, *PLAIN)
    saved = {key: outcome.row.saved_bytes for key, outcome in outcomes.items()}
    assert saved["frozen"] == 0
    assert saved["full"] == x
    assert saved["dcft"] == x + case.T * 8 * size  # U, T*d*k elements
    # peft casts a 16-bit x to float32 for its float32 adapter and keeps the copy.
    assert saved["lora_r8"] == case.T * case.n * 4 + case.T * 8 * 4
    # By hand: x, what it was shrunk to, and 16-bit copies of the factors.
    copies = 0 if dtype == "fp32" else 8 * (case.n + case.m) * size
    assert saved["lora_autograd"] == x + case.T * 8 * size + copies
    assert saved["published"] > x + case.n * case.m * size


def test_saved_storage_counts_once_and_parameters_do_not() -> None:
    x = torch.randn(6, 10, requires_grad=True)
    weight = nn.Parameter(torch.randn(10, 10))

    def forward() -> Tensor:
        doubled = x * 2
        return (doubled[:3] @ weight) * (doubled[3:] @ weight)

    # Two views of `doubled`, and the two factors of the product.
    assert footprint.saved_bytes(forward, [weight]) == 6 * 10 * 4 + 2 * 3 * 10 * 4


class Allocating:
    """Holds two tensors at once, of three that it makes."""

    def __init__(self) -> None:
        self.x = torch.ones(1000)

    def prepare(self) -> None: ...

    def run(self) -> None:
        doubled = self.x * 2
        tripled = doubled * 3
        del doubled
        self.y = tripled * 4

    def release(self) -> None:
        self.y = None


def test_peak_bytes_count_what_is_held_at_once() -> None:
    held = 2 * 1000 * 4
    assert held <= footprint.peak_bytes(Allocating(), CPU) < held + 200
    assert footprint.launches(Allocating(), CPU) is None


def test_what_cannot_be_counted_costs_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(step: Step, device: torch.device) -> None:
        raise RuntimeError("the profiler is not permitted")

    monkeypatch.setattr("benchmarks.footprint.launches", refused)
    plan = replace(FEW_ROUNDS, extras=True)
    row = outcomes_of(SMALL["fp32"], BY_NAME["dcft"], plan=plan)["dcft"].row
    assert (row.error, row.launches, row.rounds) == (None, None, 5)
    assert row.footprint_error == "RuntimeError: the profiler is not permitted"
    assert row.peak_bytes > 0


def test_peak_of_a_step_is_in_its_row() -> None:
    plan = replace(FEW_ROUNDS, extras=True)
    outcomes = outcomes_of(SMALL["fp32"], BY_NAME["frozen"], BY_NAME["published"], plan=plan)
    y_and_gx = (48 * 96 + 48 * 64) * 4
    assert y_and_gx <= outcomes["frozen"].row.peak_bytes < y_and_gx + 1024
    assert outcomes["published"].row.peak_bytes > y_and_gx + 64 * 96 * 4


# -------------------------------------------------------------------------------------------- rows


def row(**values) -> Row:
    base = dict.fromkeys(("model", "d", "k", "stride", "triton", "peft"))
    base |= {"provider": "dcft", "level": "layer", "direction": "fwd+bwd", "dtype": "fp32"}
    base |= {"T": 8, "n": 16, "m": 16, "device": "some device", "torch": "2.0"}
    base |= {"commit": "abc1234", "time": "2025-01-01T00:00:00+00:00"}
    return Row(**(base | values))


def test_rows_are_appended_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    written = [row(), row(provider="lora_r8", wall_ms_p50=1.25, gate="passed")]
    for one in written:
        rows.append(file, one)
    assert rows.read(file) == written
    assert len(file.read_text().splitlines()) == 2


def test_a_line_that_a_killed_run_left_unfinished_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows.append(file, row())
    with file.open("a") as handle:
        handle.write('{"provider": "dc')
    assert rows.read(file) == [row()]
    rows.append(file, row(provider="lora_r8"))
    assert [one.provider for one in rows.read(file)] == ["dcft", "lora_r8"]


def test_row_names_are_those_of_the_project() -> None:
    expected = (
        "provider, level, model, direction, dtype, T, n, m, d, k, stride, device_ms_p20, "
        "device_ms_p50, device_ms_p80, wall_ms_p20, wall_ms_p50, wall_ms_p80, "
        "ratio_to_frozen_device, ratio_to_frozen_wall, peak_bytes, saved_bytes, launches, gate, "
        "error, device, torch, triton, commit, time"
    )
    assert set(row().as_dict()) >= set(expected.split(", "))


@pytest.mark.parametrize("line", ["{", "[]", '{"provider": "dcft"}', '{"speed": 1}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    rows.append(file, row())
    with file.open("a") as handle:
        handle.write(line + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not a result row"):
        rows.read(file)


def test_latest_takes_whole_runs_of_a_case() -> None:
    old = [row(provider=name, time="2025-01-01") for name in ("frozen", "dcft", "lora_r8")]
    new = [row(provider=name, time="2025-01-02") for name in ("frozen", "dcft")]
    other = [row(T=99, time="2025-01-01"), row(sweep="rank", time="2025-01-01")]
    assert rows.latest([*old, *other, *new]) == [*new, *other]


# ------------------------------------------------------------------------------------- environment


def test_commit_tells_whether_measured_code_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, timeout=60)

    assert environment.commit(tmp_path) == "unknown"
    code = tmp_path / "benchmarks" / "code.py"
    code.parent.mkdir()
    code.write_text("1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    clean = environment.commit(tmp_path)
    assert clean.isalnum()
    for harmless in ("notes.txt", "benchmarks/results/a/rows.jsonl", "benchmarks/README.md"):
        (tmp_path / harmless).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / harmless).write_text("2\n")
        assert environment.commit(tmp_path) == clean, harmless
    code.write_text("2\n")
    assert environment.commit(tmp_path) == f"{clean}-dirty"


def test_slug_is_a_folder_name() -> None:
    described = Environment("Some CPU (2 cores, AVX2)", "2.0", None, None, "abc")
    assert described.slug == "some-cpu-2-cores-avx2"
    assert environment.device_name(CPU)


# ------------------------------------------------------------------------------ what is measured


def test_sweeps_are_those_of_the_project() -> None:
    cases = LEVELS["layer"].cases(Scope("cuda", "full"))
    tokens = {case.T for case in cases if case.sweep == "tokens"}
    assert (min(tokens), max(tokens)) == (1, 65536)
    widths = {(case.n, case.m) for case in cases if case.sweep == "widths"}
    sizes = {size for pair in widths for size in pair}
    assert sizes >= {768, 1024, 1536, 2048, 3072, 4096, 8192, 11008, 14336}
    assert (4096, 1024) in widths  # grouped-query keys and values
    assert {case.dtype for case in cases} == set(DTYPES)
    assert {case.direction for case in cases} == {"fwd", "bwd", "fwd+bwd"}
    varied = [kind for name in ("kernel_size", "rank", "stride") for kind in layer.kinds(name)]
    assert {kind.d for kind in varied} >= {2, 4, 6, 8, 12, 16, 32}
    assert {kind.k for kind in varied} >= {1, 2, 4, 8, 16}
    assert {kind.stride for kind in varied if kind.d == 8} >= set(range(1, 9))
    # The goals' shapes come first: a run that is cut off has them.
    assert [case.sizes for case in cases[:2]] == [(8192, 4096, 4096), (4096, 768, 768)]
    tokens = [c.T for c in LEVELS["block"].cases(Scope("cuda", "full")) if "llama" in c.model]
    assert (min(tokens), max(tokens)) == (2048, 32768)
    models = {case.model for case in LEVELS["step"].cases(Scope("cuda", "main"))}
    assert models == {"deberta-v3-base", "roberta-large", "llama-3-8b-4-layers"}


@pytest.mark.parametrize("size", ["main", "full"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_cases_are_distinct(device_type: str, size: str) -> None:
    cases = [c for level in LEVELS.values() for c in level.cases(Scope(device_type, size))]
    assert len(cases) == len(set(cases))
    assert all(case.level in LEVELS for case in cases)


@pytest.mark.parametrize("text", ["4096", "4096x768", "0x768x768", "axbxc", "1x2x3x4", ""])
def test_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"shape: expected tokens, features in and out such as"):
        parse_shape(text)


def test_shapes_are_written_in_two_ways() -> None:
    assert parse_shape("4096x768->3072") == parse_shape("4096x768x3072") == (4096, 768, 3072)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["ceiling", "merge", "optimizer", "load"])
def test_other_levels_pass_their_gates(tmp_path: Path, level: str) -> None:
    arguments = ["--levels", level, "--size", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    stored = rows.read(tmp_path / "rows.jsonl")
    assert {r.level for r in stored} == {level}
    for one in stored:
        assert one.gate == "passed", one
        assert one.moved_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("level", ["block", "step"])
def test_models_pass_their_gates(tmp_path: Path, level: str) -> None:
    providers = ["dcft", "dcft_grouped", "lora_r1", "lora_autograd", "full", "dora", "published"]
    arguments = ["--levels", level, "--size", "tiny", "--device", "cpu", "--sweeps", "main"]
    arguments += ["--out", str(tmp_path), "--models", "tiny-bert", "--providers", *providers]
    assert run.main(arguments) == 0
    stored = {r.provider: r for r in rows.read(tmp_path / "rows.jsonl")}
    assert set(stored) == {BASELINE, *providers}
    assert all(r.gate == "passed" and r.model == "tiny-bert" for r in stored.values())


def test_an_unmerge_that_had_nothing_to_undo_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.levels import merge

    case = Case("merge", None, 64, 96, "fp32", "unmerge")
    (entry,) = (entry for entry in merge.entries(case) if entry.key == "dcft_in_place")
    monkeypatch.setattr(merge, "add_delta_weight_", lambda weight, *factors, scaling: weight)
    subject = entry.build(merge.MergeProblem(case, CPU))
    subject.step.prepare()
    subject.step.run()
    assert subject.check().startswith("weight before it was unmerged: error")


def test_a_model_with_a_wrong_layer_is_caught() -> None:
    from benchmarks.levels import model

    case = Case("block", 16, 96, 96, "fp32", model="tiny-bert")
    spoil, _ = selftest.WRONG["slightly off"]
    for kind, reason in (
        (BY_NAME["dcft"], None),
        (selftest.planted("wrong", spoil), "y: error"),
    ):
        problem = model.ModelProblem(case, CPU)
        subject = model.subject_of(problem, kind)
        subject.step.prepare()
        subject.step.run()
        found = subject.check()
        assert found is None if reason is None else found.startswith(reason), found


def test_kernel_level_without_a_gpu_says_why(tmp_path: Path) -> None:
    assert LEVELS["kernel"].cases(Scope("cpu", "main")) == []
    arguments = ["--levels", "kernel", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    stored = rows.read(tmp_path / "rows.jsonl")
    assert stored
    assert all("Triton kernels need a GPU" in r.error for r in stored)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--providers", "nobody"], "--providers: expected some of copy, product, frozen, dcft"),
        (["--shapes", "12"], "shape: expected tokens, features in and out"),
        (["--levels", "layers"], "invalid choice: 'layers'"),
        (["--dtypes", "fp8"], "invalid choice: 'fp8'"),
        (["--sweeps", "colours"], "nothing to measure"),
        (["--models", "gpt-5"], "--models: expected some of deberta-v3-base, roberta-large"),
        pytest.param(
            ["--device", "cuda"],
            "--device: expected a GPU that PyTorch finds",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run.main([*arguments, "--out", str(tmp_path)] if "layers" not in arguments else arguments)
    assert exit_.value.code == 2
    assert error in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_keeps_what_it_has_when_its_budget_is_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--levels", "layer", "--shapes", "8x16x16", "8x32x32", "--device", "cpu"]
    arguments += ["--providers", "dcft", "--case-budget", "0.1", "--out", str(tmp_path)]
    assert run.main([*arguments, "--budget", "0.001"]) == 0
    stored = rows.read(tmp_path / "rows.jsonl")
    assert {r.n for r in stored} == {16}
    assert "not measured: layer 8x32->32" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- the suite


@pytest.mark.slow
def test_suite_fills_the_table_the_rows_and_the_json_from_the_same_samples(tmp_path: Path) -> None:
    dtypes = ("fp32", "bf16")
    command = [sys.executable, "-m", "pytest", "--benchmark-only", "--size", "tiny"]
    command += ["--results", str(tmp_path), "--device", "cpu"]
    for dtype in dtypes:
        case = f"layer-main-32x64->64-{dtype}-fwd+bwd-dcft"
        command.append(f"benchmarks/bench_suite.py::bench_provider[{case}]")
    # A worker of pytest-xdist tells pytest-benchmark, by its environment, to measure nothing.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    finished = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:xdist"],
        env=outside,
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (folder,) = tmp_path.iterdir()
    stored = {(r.dtype, r.provider): r for r in rows.read(folder / "rows.jsonl")}
    # The frozen layer is measured although nobody selected it.
    assert set(stored) == {(dtype, name) for dtype in dtypes for name in ("frozen", "dcft")}
    written = json.loads((folder / "pytest-benchmark.json").read_text())
    assert "node" not in written["machine_info"]
    assert len(written["benchmarks"]) == 2
    for entry in written["benchmarks"]:
        one = stored[(entry["extra_info"]["dtype"], "dcft")]
        assert entry["group"] == f"layer 32x64->64 {one.dtype} fwd+bwd (main)"
        assert entry["stats"]["rounds"] == one.rounds
        assert entry["stats"]["median"] * 1e3 == pytest.approx(one.wall_ms_p50)
        baseline = entry["extra_info"]["baseline_seconds"]
        paired = [a / b for a, b in zip(entry["stats"]["data"], baseline, strict=True)]
        assert math.isclose(sorted(paired)[len(paired) // 2], one.ratio_to_frozen_wall, rel_tol=0.5)


def test_dcft_is_the_layer_that_users_have() -> None:
    kind = BY_NAME["dcft"]
    assert (kind.d, kind.k, kind.stride) == (8, 1, 8)
    problem = LayerProblem(SMALL["fp32"], CPU)
    assert isinstance(kind.layer(problem.base(), problem.generator).layer, DCFTLinear)
