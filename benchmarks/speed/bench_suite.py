"""Every level as a pytest-benchmark suite, grouped by case.

    pytest benchmarks/speed --benchmark-only [--tiny] [-k "layer and fp32 and dcft"]

pytest-benchmark runs one test's rounds after the other's, which on a busy machine compares
different moments. Here the first test of a case measures all selected providers (and always the
baseline) in interleaved rounds; each test then plays its provider's samples back to
pytest-benchmark through a clock that advances by them. Its table, statistics and JSON are those of
the interleaved samples, and `rows.jsonl` holds the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import rows
from benchmarks.__main__ import (
    TINY_PLAN,
    add_launches,
    measure_case,
    measurement_name,
    results_folder,
)
from benchmarks.speed.cases import Case, Scope
from benchmarks.speed.levels import LEVELS
from benchmarks.speed.measure import Outcome
from benchmarks.speed.provider import BASELINE, Provider
from benchmarks.speed.timing import Plan


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    scope = Scope(option("--device"), option("--tiny"))
    metafunc.parametrize(
        ("case", "provider"),
        [
            pytest.param(case, provider, id=measurement_name(case, provider))
            for level in LEVELS.values()
            for case in level.cases(scope)
            for provider in level.providers(case)
        ],
    )


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[Case], dict[str, Outcome]]]:
    """Measures a case when it is first asked for, and stores its rows; outcomes by key."""
    option = request.config.getoption
    wanted: dict[Case, set[str]] = {}
    for item in request.session.items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "case" in parameters and "provider" in parameters:
            chosen = wanted.setdefault(parameters["case"], {BASELINE})
            chosen.add(parameters["provider"].key)
    plan = TINY_PLAN if option("--tiny") else Plan()
    if option("--case-budget") is not None:
        plan = replace(plan, budget_s=option("--case-budget"))
    folder = results_folder(option("--results"), option("--device"), tiny=option("--tiny"))
    device = torch.device(option("--device"))
    say = _say(request.config)
    measured: dict[Case, dict[str, Outcome]] = {}

    def measure(case: Case) -> dict[str, Outcome]:
        if case not in measured:
            providers = [p for p in LEVELS[case.level].providers(case) if p.key in wanted[case]]
            found = measure_case(case, providers, folder / rows.ROWS_FILE, plan, device, say)
            measured[case] = {outcome.key: outcome for outcome in found}
        return measured[case]

    yield measure
    for case, found in measured.items():
        add_launches(case, list(found.values()), folder / rows.ROWS_FILE, device)


def _say(config: pytest.Config) -> Callable[[str], None]:
    """Print immediately, past pytest's capture: a case can take minutes."""
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    capture: Any = config.pluginmanager.get_plugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.write_line(text)

    return say


@pytest.mark.benchmark(timer=PLAYBACK.recorded_wall_time)
def bench_provider(benchmark: Any, outcomes: Any, case: Case, provider: Provider) -> None:
    outcome: Outcome = outcomes(case)[provider.key]
    if outcome.skipped:
        pytest.skip(f"{provider.key}: {outcome.row.error}")
    if not outcome.samples:
        pytest.fail(f"{provider.key} on {case}: {outcome.row.error}", pytrace=False)
    benchmark.group = str(case)
    benchmark.extra_info.update(outcome.row.as_dict())
    PLAYBACK.load([sample.wall for sample in outcome.samples])
    benchmark.pedantic(PLAYBACK.play, rounds=len(outcome.samples))
