"""The benchmarks themselves: what is wrong is not timed, what is slow looks slow, rows survive."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import environment, gate, plot, providers, rows, tables, timing
from benchmarks.cases import DTYPES, Case, Problem, layer_cases
from benchmarks.environment import Environment
from benchmarks.layer import Outcome, TrainingStep, measure
from benchmarks.providers import BASELINE, PROVIDERS, Candidate, Provider
from benchmarks.rows import Row
from benchmarks.saved_tensors import saved_bytes
from benchmarks.timing import Plan, Sample
from dcft_kernels import DCFTLinear

CPU = torch.device("cpu")
SOMEWHERE = Environment("some device", "2.0", None, "0.1", "abc1234")
BY_NAME = {provider.name: provider for provider in PROVIDERS}
SMALL = {dtype: Case(48, 64, 96, dtype) for dtype in DTYPES}
FEW_ROUNDS = Plan(budget_s=1e9, max_rounds=5)


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def stopwatch(self, step: Callable[[], None]) -> Sample:
        start = self.now
        step()
        return Sample(self.now - start)


class Slowed(nn.Module):
    """A layer that takes `seconds` of a clock's time."""

    def __init__(self, layer: nn.Module, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.layer, self.clock, self.seconds = layer, clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds
        return self.layer(x)


def slowed(name: str, clock: Clock, seconds: float) -> Provider:
    def build(problem: Problem) -> Candidate:
        layer = Slowed(problem.base(), clock, seconds)
        return Candidate(layer, "layer.weight", "layer.bias")

    return Provider(name, name, build)


def run(case: Case, *planted: Provider, plan: Plan = FEW_ROUNDS) -> dict[str, Outcome]:
    outcomes = measure(case, planted, SOMEWHERE, plan, device=CPU)
    return {outcome.row.provider: outcome for outcome in outcomes}


# -------------------------------------------------------------------------------- the real ones


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_provider_passes_the_gate_and_is_timed(dtype: str) -> None:
    outcomes = run(SMALL[dtype], *PROVIDERS)
    assert list(outcomes) == list(BY_NAME)
    for name, outcome in outcomes.items():
        row = outcome.row
        assert (row.gate, row.error) == ("passed", None), name
        assert row.rounds == len(outcome.samples) == 5
        assert 0 < row.wall_ms_p20 <= row.wall_ms_p50 <= row.wall_ms_p80
        assert row.device_ms_p50 is None  # the CPU has no clock of its own
        assert row.ratio_to_frozen_wall > 0
        assert row.shape == (48, 64, 96)
    assert outcomes[BASELINE].row.ratio_to_frozen_wall == 1.0


def test_lokr_has_the_factors_that_dcft_has() -> None:
    # decompose_factor = D // d: peft's first factor is [D/d, D/d], as F is, and the second [d, d].
    problem = Problem(Case(8, 64, 64, "fp32"), CPU)
    candidate = BY_NAME["lokr"].build(problem)
    shapes = {name: tuple(p.shape) for name, p in candidate.trained().items()}
    assert shapes["lokr_w1_a.default"] == (8, 1)
    assert shapes["lokr_w1_b.default"] == (1, 8)


@pytest.mark.parametrize("name", ["dcft", "published", "lora_r1", "lora_r8", "lokr"])
def test_increment_is_as_large_as_the_base(name: str) -> None:
    # Otherwise the gate could not tell a missing adapter from rounding.
    problem = Problem(SMALL["bf16"], CPU)
    candidate = BY_NAME[name].build(problem)
    increment = candidate.increment(dict(candidate.layer.named_parameters()))
    assert increment.std().item() == pytest.approx(problem.weight.float().std().item(), rel=0.1)


def test_base_is_shared_and_frozen_but_for_full_fine_tuning() -> None:
    problem = Problem(SMALL["fp32"], CPU)
    for provider in PROVIDERS:
        candidate = provider.build(problem)
        weight = dict(candidate.layer.named_parameters())[candidate.weight]
        shares = weight.data_ptr() == problem.weight.data_ptr()
        assert shares == (not weight.requires_grad) == (provider.name != "full"), provider.name


# ----------------------------------------------------------------------------- planted wrong ones


class Wrong(nn.Module):
    """A right layer with something done to its output."""

    def __init__(self, layer: nn.Module, spoil: Callable[[Tensor, Tensor, nn.Module], Tensor]):
        super().__init__()
        self.layer, self.spoil = layer, spoil

    def forward(self, x: Tensor) -> Tensor:
        return self.spoil(self.layer(x), x, self.layer)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.001 * g


def _poke(y: Tensor, value: float) -> Tensor:
    y = y.clone()
    y[3, 5] = value
    return y


def _swapped_blocks(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    return y.roll(8, dims=1)


WRONG = {
    "adapter missing": (lambda y, x, layer: nn.functional.linear(x, layer.weight), "y: error "),
    "slightly off": (lambda y, x, layer: y * 1.0001, "y: error "),
    "blocks in another order": (_swapped_blocks, "y: error "),
    "one element": (lambda y, x, layer: _poke(y, 0.0), r"y: error .* at \(3, 5\), budget "),
    "not finite": (lambda y, x, layer: _poke(y, math.nan), "y: not finite"),
    "cropped": (lambda y, x, layer: y[:, :-1], "RuntimeError: "),
    "gradient off": (lambda y, x, layer: _ScaledGradient.apply(y), "gradient of x: error "),
    "no gradient of the adapter": (
        lambda y, x, layer: (
            nn.functional.linear(x, layer.weight + layer.delta_weight().detach()) + layer.bias
        ),
        "gradient of layer.dcft_A: missing",
    ),
    "no gradient of x": (
        lambda y, x, layer: layer(x.detach()),
        "gradient of x: missing",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_provider_is_caught_and_not_timed(what: str) -> None:
    spoil, expected = WRONG[what]

    def build(problem: Problem) -> Candidate:
        right = BY_NAME["dcft"].build(problem)
        renamed = {name: f"layer.{name}" for name, _ in right.layer.named_parameters()}
        return Candidate(
            Wrong(right.layer, spoil),
            "layer.weight",
            "layer.bias",
            lambda p: right.increment({name: p[new] for name, new in renamed.items()}),
        )

    wrong = Provider("wrong", "wrong", build)
    outcomes = run(SMALL["fp32"], BY_NAME["frozen"], wrong, BY_NAME["dcft"])
    row = outcomes["wrong"].row
    assert row.error is not None
    assert not outcomes["wrong"].skipped
    assert re.match(expected, row.error), row.error
    assert row.gate == ("failed" if not expected.startswith("RuntimeError") else None)
    assert (row.rounds, row.wall_ms_p50, row.ratio_to_frozen_wall) == (0, None, None)
    assert not outcomes["wrong"].samples
    assert outcomes["dcft"].row.rounds == 5  # the others go on


@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_is_a_small_multiple_of_what_right_layers_need(dtype: str) -> None:
    problem = Problem(SMALL[dtype], CPU)
    expected = torch.randn(48, 96, dtype=torch.float64)
    rms_budget, max_budget = gate.budgets(problem, expected, terms=64 + 96 + 48)
    unit = torch.finfo(DTYPES[dtype]).eps / 2
    assert 2 * unit < rms_budget < 40 * unit
    assert rms_budget < max_budget < 200 * unit


def test_wrong_baseline_leaves_the_others_without_a_ratio() -> None:
    wrong = Provider(
        BASELINE, "", lambda problem: Candidate(nn.Linear(64, 96), "weight", "bias", _one_more)
    )
    outcomes = run(SMALL["fp32"], wrong, BY_NAME["dcft"])
    assert outcomes[BASELINE].row.gate == "failed"
    assert outcomes["dcft"].row.wall_ms_p50 > 0
    assert outcomes["dcft"].row.ratio_to_frozen_wall is None


def _one_more(parameters) -> Tensor:
    return torch.ones(96, 64, dtype=torch.float64)


# ------------------------------------------------------------------------------ planted slow ones


def test_slow_provider_shows_its_ratio() -> None:
    clock = Clock()
    planted = (slowed(BASELINE, clock, 0.5), slowed("slow", clock, 1.5))
    outcomes = measure(
        SMALL["fp32"], planted, SOMEWHERE, FEW_ROUNDS, device=CPU, stopwatch=clock.stopwatch
    )
    frozen, slow = (outcome.row for outcome in outcomes)
    assert slow.gate == "passed"
    assert slow.ratio_to_frozen_wall == pytest.approx(3.0)
    assert slow.wall_ms_p50 == pytest.approx(1500)
    assert frozen.wall_ms_p50 == pytest.approx(500)


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
    problem = Problem(SMALL["fp32"], CPU)
    steps = {
        name: TrainingStep(problem, slowed(name, clock, 1.0).build(problem)) for name in ("a", "b")
    }
    first = {name: timing.timed(step, clock.stopwatch) for name, step in steps.items()}
    found = timing.paired_rounds(steps, first, plan, clock.stopwatch, now=lambda: clock.now)
    assert len(found) == rounds
    assert all(set(samples) == {"a", "b"} for samples in found)


# --------------------------------------------------------------------- providers that cannot run


def _raise(error: Exception) -> Callable[[Problem], Candidate]:
    def build(problem: Problem) -> Candidate:
        raise error

    return build


def test_missing_package_is_a_row_that_says_so() -> None:
    absent = Provider("absent", "absent", _raise(ModuleNotFoundError("No module named 'absent'")))
    outcome = run(SMALL["fp32"], BY_NAME["frozen"], absent)["absent"]
    assert outcome.skipped
    assert outcome.row.error == "cannot run: No module named 'absent'"
    assert outcome.row.gate is None


def test_error_is_a_row_of_one_line_and_the_run_goes_on() -> None:
    broken = Provider("broken", "broken", _raise(RuntimeError("out of memory\nand a long tale")))
    outcomes = run(SMALL["fp32"], broken, BY_NAME["frozen"])
    assert outcomes["broken"].row.error == "RuntimeError: out of memory"
    assert not outcomes["broken"].skipped
    assert outcomes[BASELINE].row.rounds == 5


def test_first_round_that_takes_too_long_leaves_out_the_last_providers() -> None:
    clock = Clock()
    planted = [slowed(name, clock, 200.0) for name in (BASELINE, "second", "third")]
    plan = Plan(budget_s=1, first_round_s=300)
    outcomes = measure(
        SMALL["fp32"], planted, SOMEWHERE, plan, device=CPU, stopwatch=clock.stopwatch
    )
    assert [outcome.row.rounds for outcome in outcomes] == [1, 1, 0]
    assert outcomes[2].skipped
    assert outcomes[2].row.error == "not run: the providers before it took 400 s for one step each"


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_bytes_are_exact(dtype: str) -> None:
    case = SMALL[dtype]
    x = case.T * case.n * DTYPES[dtype].itemsize
    outcomes = run(case, *PROVIDERS)
    saved = {name: outcome.row.saved_bytes for name, outcome in outcomes.items()}
    assert saved["frozen"] == 0
    assert saved["full"] == x
    assert saved["dcft"] == x + case.T * 8 * DTYPES[dtype].itemsize  # U, T*d*k elements
    # peft casts a 16-bit x to float32 for its float32 adapter and keeps the copy.
    copy = case.T * case.n * 4
    assert saved["lora_r8"] == copy + case.T * 8 * 4
    assert saved["published"] > x + case.n * case.m * DTYPES[dtype].itemsize


def test_saved_storage_counts_once_and_parameters_do_not() -> None:
    x = torch.randn(6, 10, requires_grad=True)
    weight = nn.Parameter(torch.randn(10, 10))

    def forward() -> Tensor:
        doubled = x * 2
        return (doubled[:3] @ weight) * (doubled[3:] @ weight)

    # Two views of `doubled`, and the two factors of the product.
    assert saved_bytes(forward, [weight]) == 6 * 10 * 4 + 2 * 3 * 10 * 4


# -------------------------------------------------------------------------------------------- rows


def row(**values) -> Row:
    base = dict.fromkeys(("model", "d", "k", "stride", "triton", "peft"))
    base |= {"provider": "dcft", "level": "layer", "direction": "fwd+bwd", "dtype": "fp32"}
    base |= {"T": 8, "n": 16, "m": 16, "device": "some device", "torch": "2.0"}
    base |= {"commit": "abc1234", "time": "2025-01-01T00:00:00+00:00"}
    return Row(**(base | values))


def test_rows_are_appended_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "new" / "layer.jsonl"
    written = [row(), row(provider="lora_r8", wall_ms_p50=1.25, gate="passed")]
    for one in written:
        rows.append(file, one)
    assert rows.read(file) == written
    assert len(file.read_text().splitlines()) == 2


def test_row_names_are_those_of_the_project() -> None:
    expected = (
        "provider, level, model, direction, dtype, T, n, m, d, k, stride, device_ms_p20, "
        "device_ms_p50, device_ms_p80, wall_ms_p20, wall_ms_p50, wall_ms_p80, "
        "ratio_to_frozen_device, ratio_to_frozen_wall, peak_bytes, saved_bytes, launches, gate, "
        "error, device, torch, triton, commit, time, rounds, peft"
    )
    assert set(row().as_dict()) == set(expected.split(", "))


@pytest.mark.parametrize("line", ["{", "[]", '{"provider": "dcft"}', '{"speed": 1}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "layer.jsonl"
    rows.append(file, row())
    with file.open("a") as handle:
        handle.write(line + "\n")
    with pytest.raises(ValueError, match=r"layer.jsonl, line 2: not a result row"):
        rows.read(file)


def test_latest_takes_whole_runs_of_a_case() -> None:
    old = [row(provider=name, time="2025-01-01") for name in ("frozen", "dcft", "lora_r8")]
    new = [row(provider=name, time="2025-01-02") for name in ("frozen", "dcft")]
    other = row(T=99, time="2025-01-01")
    assert rows.latest([*old, other, *new]) == [*new, other]


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
    for harmless in ("notes.txt", "benchmarks/results/a/layer.jsonl", "benchmarks/README.md"):
        (tmp_path / harmless).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / harmless).write_text("2\n")
        assert environment.commit(tmp_path) == clean, harmless
    code.write_text("2\n")
    assert environment.commit(tmp_path) == f"{clean}-dirty"


def test_slug_is_a_folder_name() -> None:
    described = Environment("Some CPU (2 cores, AVX2)", "2.0", None, None, "abc")
    assert described.slug == "some-cpu-2-cores-avx2"
    assert environment.device_name(CPU)


# ----------------------------------------------------------------------------- tables and plots


def measured() -> list[Row]:
    ratios = {"frozen": 1.0, "dcft": 1.05, "lora_r8": 1.2, "published": 2.9, "lokr": 7.5}
    found = [
        row(provider=name, n=n, rounds=9, wall_ms_p50=20 * ratio, ratio_to_frozen_wall=ratio)
        for n in (16, 32)
        for name, ratio in ratios.items()
    ]
    return [*found, row(provider="lora_r1", error="cannot run: no peft")]


def test_tables_show_ratios_goals_and_what_is_missing() -> None:
    cases = tables.by_case(measured())
    assert "| 8x16->16 fp32 | 20.0 | 1.05 | 1.20 | 2.90 | – | 7.50 | 9 |" in tables.ratios(cases)
    assert "| 8x32->16 fp32 | 1.05 | 0.88 | 2.76 |" in tables.goals(cases)
    assert tables.failures(measured()) == "- lora_r1, 8x16->16 fp32: cannot run: no peft"
    slow = [
        row(provider=name, ratio_to_frozen_wall=r) for name, r in (("dcft", 1.2), ("lora_r8", 1.1))
    ]
    assert "| **1.20, missed** | **1.09, missed** | – |" in tables.goals(tables.by_case(slow))


def test_plot_draws_from_stored_rows_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    for one in measured():
        rows.append(results / "some-device" / "layer.jsonl", one)
    assert plot.main([str(results)]) == 0
    assert (results / "some-device" / "layer.png").read_bytes().startswith(b"\x89PNG")
    svg = (results / "some-device" / "layer.svg").read_text()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "### some device" in text
    assert "results/some-device/layer.jsonl" in text
    assert plot.main([str(results)]) == 0
    assert (results / "some-device" / "layer.svg").read_text() == svg
    assert readme.read_text() == text


def test_plot_without_rows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main([str(tmp_path)]) == 1
    assert "make bench" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- the suite


def test_cases_are_those_of_the_project() -> None:
    assert [str(case) for case in layer_cases()] == [
        f"{shape} {dtype}"
        for dtype in ("fp32", "bf16")
        for shape in ("2048x768->768", "2048x768->3072", "1024x4096->4096")
    ]


@pytest.mark.slow
def test_suite_fills_the_table_the_rows_and_the_json_from_the_same_samples(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--quick"]
    command += ["--results", str(tmp_path), "--device", "cpu", "-k", "dcft and not 128"]
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
    stored = {(r.dtype, r.provider): r for r in rows.read(folder / "layer.jsonl")}
    # The frozen layer is measured although nobody selected it.
    assert set(stored) == {(dtype, name) for dtype in DTYPES for name in ("frozen", "dcft")}
    written = json.loads((folder / "layer.pytest-benchmark.json").read_text())
    assert "node" not in written["machine_info"]
    assert len(written["benchmarks"]) == 2
    for entry in written["benchmarks"]:
        one = stored[(entry["extra_info"]["dtype"], "dcft")]
        assert entry["group"] == f"32x64->64 {one.dtype}"
        assert entry["stats"]["rounds"] == one.rounds
        assert entry["stats"]["median"] * 1e3 == pytest.approx(one.wall_ms_p50)


def test_providers_are_named_once() -> None:
    assert len(BY_NAME) == len(PROVIDERS)
    assert set(plot.COLOURS) == set(BY_NAME) - {BASELINE}
    assert (providers.DCFT_RANK, providers.DCFT_KERNEL) == (1, 8)
    assert isinstance(BY_NAME["dcft"].build(Problem(SMALL["fp32"], CPU)).layer, DCFTLinear)
