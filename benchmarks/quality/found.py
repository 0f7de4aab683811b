"""The stored results of a study, found by its settings: a cell a variant and task."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality import metrics, tasks
from benchmarks.quality.methods.table import by_name
from benchmarks.quality.runs import SLICE, Result, Run
from benchmarks.quality.studies import Study, Variant

# What runs of one line and task differ in, and what trials on a slice of train have of their own.
_OF_A_RUN = ("seed", "learning_rate")
_OF_A_TRIAL = ("scored_size", "evaluations")


class Stored:
    """Results by their settings; of those with the same settings the last counts."""

    def __init__(self, results: Iterable[Result]) -> None:
        latest: dict[str, Result] = {}
        for result in results:
            key = result.run.key()
            latest.pop(key, None)
            latest[key] = result
        self.results = list(latest.values())
        self._by_settings: dict[str, list[Result]] = {}
        for result in self.results:
            self._by_settings.setdefault(_settings(result.run), []).append(result)

    def like(self, run: Run) -> list[Result]:
        """The results that differ from `run` in nothing but the seed and the learning rate."""
        return self._by_settings.get(_settings(run), [])


def _settings(run: Run) -> str:
    """All settings of a run but those that its siblings differ in, as they are once stored."""
    left_out = _OF_A_RUN + (_OF_A_TRIAL if run.scored == SLICE else ())
    settings = {k: v for k, v in dataclasses.asdict(run).items() if k not in left_out}
    return json.dumps(settings, sort_keys=True)


@dataclass(frozen=True)
class Cell:
    """What is stored of a variant on a task.

    Attributes:
        results: one a seed, by seed, at the learning rate that was chosen.
        trials: the candidates for it, each scored on a slice of train, in the variant's order.
        candidates: how many learning rates there are to choose from.
        learning_rate: the one that was chosen; None before all were tried, and if all failed.
    """

    results: tuple[Result, ...] = ()
    trials: tuple[Result, ...] = ()
    candidates: int = 1
    learning_rate: float | None = None

    @property
    def unchosen(self) -> bool:
        """Whether every learning rate was tried and none has a value."""
        return len(self.trials) == self.candidates and self.learning_rate is None

    @property
    def at_edge(self) -> bool:
        """Whether the learning rate is the highest or the lowest of those tried: one beyond might
        have been better."""
        rates = [trial.run.learning_rate for trial in self.trials]
        return len(rates) > 1 and self.learning_rate in (min(rates), max(rates))

    @property
    def failures(self) -> int:
        """How many runs have no value; that no learning rate could be chosen counts as one."""
        return self.unchosen + sum(result.value is None for result in self.results)

    @property
    def values(self) -> dict[int, float]:
        """The metric by seed, of the runs that have one."""
        return {r.run.seed: r.value for r in self.results if r.value is not None}


def match(stored: Stored, study: Study, task: str, variant: Variant) -> Cell:
    """The stored results of a variant on a task: those of exactly the study's settings.

    A variant with one learning rate was run at that one. Of several, it is the one that did best
    on the slice of train, once all of them were tried there.
    """
    run = study.run(task, variant)
    rates = variant.rates or by_name(variant.method).learning_rates
    results = stored.like(run)
    trials: tuple[Result, ...] = ()
    if len(rates) == 1:
        chosen: float | None = rates[0]
    else:
        trials = _trials(stored.like(dataclasses.replace(run, scored=SLICE)), run.seed, rates)
        best = best_of(trials) if len(trials) == len(rates) else None
        chosen = None if best is None else best.run.learning_rate
    kept = [result for result in results if result.run.learning_rate == chosen]
    return Cell(tuple(sorted(kept, key=lambda r: r.run.seed)), trials, len(rates), chosen)


def _trials(results: Sequence[Result], seed: int, rates: Sequence[float]) -> tuple[Result, ...]:
    by_rate = {r.run.learning_rate: r for r in results if r.run.seed == seed}
    return tuple(by_rate[rate] for rate in rates if rate in by_rate)


def best_of(trials: Sequence[Result]) -> Result | None:
    """The best result, of equals the first; None if none has a value."""
    best: tuple[float, Result] | None = None
    for trial in trials:
        value = trial.value
        if value is not None and (best is None or metrics.better(trial.metric, value, best[0])):
            best = (value, trial)
    return None if best is None else best[1]


@dataclass(frozen=True)
class Found:
    """A study with its stored results."""

    study: Study
    cells: Mapping[tuple[str, str], Cell]

    @classmethod
    def of(cls, stored: Stored, study: Study) -> Found:
        """Look up every variant on every task."""
        return cls(
            study,
            {
                (variant.label, task): match(stored, study, task, variant)
                for variant in study.variants
                for task in study.tasks
            },
        )

    def cell(self, variant: Variant, task: str) -> Cell:
        """What is stored of a variant on a task."""
        return self.cells[variant.label, task]

    @property
    def results(self) -> list[Result]:
        """All that is stored of the study, trials included."""
        return [r for cell in self.cells.values() for r in (*cell.results, *cell.trials)]

    @property
    def seeds(self) -> list[int]:
        """The seeds of any results."""
        return sorted({r.run.seed for cell in self.cells.values() for r in cell.results})

    def metric(self, task: str) -> str:
        """The figure that a task is compared by; empty for an unknown task without results."""
        named = (r.metric for r in self.results if r.run.task == task)
        known = tasks.TASKS.get(task)
        return next(named, "" if known is None else known.metric)


def mean_and_spread(results: Sequence[Result]) -> tuple[float, float] | None:
    """Mean and standard deviation over the seeds (0 for a single one); None if one failed."""
    values = [result.value for result in results if result.value is not None]
    if not values or len(values) < len(results):
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
