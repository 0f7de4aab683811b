"""Every level as a pytest-benchmark suite, grouped by shape.

    pytest benchmarks --benchmark-only [--size tiny|main|full] [-k "layer and fp32 and dcft"]

pytest-benchmark runs one test's rounds after the other's, which on a busy machine compares
different moments. Here the first test of a case measures all selected providers (and the frozen
layer in any case) in interleaved rounds; each test then plays its provider's samples back to
pytest-benchmark through a clock that advances by them. So its table, statistics and JSON are those
of the interleaved samples, and the rows in `rows.jsonl` come from the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, rows
from benchmarks.cases import Case, Scope
from benchmarks.entries import BASELINE, AnyEntry
from benchmarks.levels import LEVELS
from benchmarks.measure import Outcome
from benchmarks.run import TINY_PLAN, measure_case, prepare_torch
from benchmarks.timing import Plan


class Playback:
    """A clock for pytest-benchmark: `play` advances it by the next recorded duration."""

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: Iterator[float] = iter(())

    def load(self, durations: Sequence[float]) -> None:
        self._durations = iter(durations)

    def play(self) -> None:
        self._now += next(self._durations, 0.0)

    def recorded_wall_time(self) -> float:
        return self._now


PLAYBACK = Playback()


class Suite:
    """Measures a case when the first of its tests asks, and stores its rows."""

    def __init__(
        self,
        selected: dict[Case, list[AnyEntry]],
        file: Path,
        plan: Plan,
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        self.selected = selected
        self.file = file
        self.plan = plan
        self.device = device
        self.report = report
        self._outcomes: dict[Case, dict[str, Outcome]] = {}

    def outcomes(self, case: Case) -> dict[str, Outcome]:
        """By key, the outcomes of all providers that are measured of a case."""
        if case not in self._outcomes:
            wanted = {BASELINE, *(entry.key for entry in self.selected[case])}
            entries = [e for e in LEVELS[case.level].entries(case) if e.key in wanted]
            measured = measure_case(case, entries, self.file, self.plan, self.device, self.report)
            self._outcomes[case] = {outcome.key: outcome for outcome in measured}
        return self._outcomes[case]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    scope = Scope(option("--device"), option("--size"))
    metafunc.parametrize(
        ("case", "entry"),
        [
            pytest.param(
                case,
                entry,
                id=f"{case.level}-{case.sweep}-{case.shape}-{case.dtype}-{case.direction}-{entry.key}",
            )
            for level in LEVELS.values()
            for case in level.cases(scope)
            for entry in level.entries(case)
        ],
    )


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest, device_folder: Path) -> Suite:
    config = request.config
    selected: dict[Case, list[AnyEntry]] = {}
    for item in request.session.items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "case" in parameters and "entry" in parameters:
            selected.setdefault(parameters["case"], []).append(parameters["entry"])
    plan = TINY_PLAN if config.getoption("--size") == "tiny" else Plan()
    budget: float | None = config.getoption("--case-budget")
    if budget is not None:
        plan = replace(plan, budget_s=budget)
    prepare_torch()
    say = _say(config)
    warning = environment.busy()
    if warning is not None:
        say(warning)
    device = torch.device(config.getoption("--device"))
    return Suite(selected, device_folder / rows.FILE, plan, device, say)


def _say(config: pytest.Config) -> Callable[[str], None]:
    """Print at once, past pytest's capture: a case can take minutes."""
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    capture: Any = config.pluginmanager.get_plugin("capturemanager")

    def say(text: str) -> None:
        if terminal is not None and capture is not None:
            with capture.global_and_fixture_disabled():
                terminal.write_line(text)

    return say


@pytest.mark.benchmark(timer=PLAYBACK.recorded_wall_time)
def bench_provider(benchmark: Any, suite: Suite, case: Case, entry: AnyEntry) -> None:
    outcomes = suite.outcomes(case)
    outcome = outcomes[entry.key]
    row = outcome.row
    if outcome.skipped:
        pytest.skip(f"{entry.key}: {row.error}")
    if not outcome.samples:
        pytest.fail(f"{entry.key} on {case}: {row.error}", pytrace=False)
    benchmark.group = str(case)
    benchmark.extra_info.update(row.as_dict())
    benchmark.extra_info.update(_clocks(outcome, outcomes.get(BASELINE)))
    PLAYBACK.load([sample.wall for sample in outcome.samples])
    benchmark.pedantic(PLAYBACK.play, rounds=len(outcome.samples))


def _clocks(outcome: Outcome, baseline: Outcome | None) -> dict[str, list[float | None]]:
    """What `benchmarks.compare` pairs: the samples of the same rounds, by clock."""
    found: dict[str, list[float | None]] = {}
    if any(sample.device is not None for sample in outcome.samples):
        found["device_seconds"] = [sample.device for sample in outcome.samples]
    if baseline is not None and baseline.samples:
        found["baseline_seconds"] = [sample.wall for sample in baseline.samples]
        if "device_seconds" in found:
            found["baseline_device_seconds"] = [sample.device for sample in baseline.samples]
    return found
