"""Forward plus backward of one layer, as a pytest-benchmark suite.

    pytest benchmarks --benchmark-only [--quick] [-k "fp32 and (dcft or lora)"]

pytest-benchmark runs one test's rounds after the other's, which on a busy machine compares
different moments. Here the first test of a case measures all selected providers (and the frozen
layer in any case) in interleaved rounds; each test then plays its provider's samples back to
pytest-benchmark through a clock that advances by them. So its table, statistics and JSON are those
of the interleaved samples, and the rows in `layer.jsonl` come from the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, rows
from benchmarks.cases import Case, layer_cases
from benchmarks.layer import Outcome, measure
from benchmarks.providers import BASELINE, PROVIDERS, Provider
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


class LayerSuite:
    """Measures a case when the first of its tests asks, and stores its rows."""

    def __init__(
        self,
        selected: dict[Case, list[Provider]],
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

    def outcome(self, case: Case, provider: Provider) -> Outcome:
        if case not in self._outcomes:
            self._outcomes[case] = self._measure(case)
        return self._outcomes[case][provider.name]

    def _measure(self, case: Case) -> dict[str, Outcome]:
        wanted = {BASELINE, *(provider.name for provider in self.selected[case])}
        providers = [provider for provider in PROVIDERS if provider.name in wanted]
        self.report(f"{case}: measuring {len(providers)} providers")
        start = time.perf_counter()
        described = environment.describe(self.device.type)
        outcomes = measure(case, providers, described, self.plan, device=self.device)
        for outcome in outcomes:
            rows.append(self.file, outcome.row)
        count = max(outcome.row.rounds for outcome in outcomes)
        self.report(f"{case}: {count} rounds in {time.perf_counter() - start:.0f} s")
        return {outcome.row.provider: outcome for outcome in outcomes}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = layer_cases(quick=metafunc.config.getoption("--quick"))
    metafunc.parametrize(
        ("case", "provider"),
        [
            pytest.param(case, provider, id=f"{case.shape}-{case.dtype}-{provider.name}")
            for case in cases
            for provider in PROVIDERS
        ],
    )


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest, device_folder: Path) -> LayerSuite:
    config = request.config
    selected: dict[Case, list[Provider]] = {}
    for item in request.session.items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "case" in parameters and "provider" in parameters:
            selected.setdefault(parameters["case"], []).append(parameters["provider"])
    plan = Plan(budget_s=2.0, max_rounds=3) if config.getoption("--quick") else Plan()
    budget: float | None = config.getoption("--budget")
    if budget is not None:
        plan = replace(plan, budget_s=budget)
    device = torch.device(config.getoption("--device"))
    say = _say(config)
    warning = environment.busy()
    if warning is not None:
        say(warning)
    return LayerSuite(selected, device_folder / "layer.jsonl", plan, device, say)


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
def bench_layer(benchmark: Any, suite: LayerSuite, case: Case, provider: Provider) -> None:
    outcome = suite.outcome(case, provider)
    row = outcome.row
    if outcome.skipped:
        pytest.skip(f"{provider.name}: {row.error}")
    if row.error is not None:
        pytest.fail(f"{provider.name} on {case}: {row.error}", pytrace=False)
    benchmark.group = str(case)
    benchmark.extra_info.update(row.as_dict())
    PLAYBACK.load([sample.wall for sample in outcome.samples])
    benchmark.pedantic(PLAYBACK.play, rounds=len(outcome.samples))
