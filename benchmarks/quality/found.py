"""The stored results of a study, looked up by its settings: one cell per variant and task."""

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


class StoredRuns:
    """Results by their settings; of equal runs the last one counts."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.results = list({result.run.key(): result for result in results}.values())
        self._by_settings: dict[str, list[Result]] = {}
        for result in self.results:
            self._by_settings.setdefault(_settings(result.run), []).append(result)

    def like(self, run: Run) -> list[Result]:
        """The results that differ from `run` only in the seed and the learning rate."""
        return self._by_settings.get(_settings(run), [])


def _settings(run: Run) -> str:
    settings = dataclasses.asdict(run)
    # Trials on the slice of train have their own size and are scored once.
    trial = ("scored_size", "evaluations") if run.scored == SLICE else ()
    for name in ("seed", "learning_rate", *trial):
        del settings[name]
    return json.dumps(settings, sort_keys=True)


@dataclass(frozen=True)
class Cell:
    """What is stored of a variant on a task."""

    results: Sequence[Result]  # by seed, at the learning rate that was chosen
    trials: Sequence[Result]  # the candidates for it, each scored on a slice of train
    learning_rate: float | None  # None until all candidates were tried, and if all of them failed

    @property
    def failed(self) -> bool:
        """Whether a run failed, or all trials did."""
        runs = [result.value is None for result in self.results]
        return any(runs) or bool(self.trials and all(t.value is None for t in self.trials))

    @property
    def values(self) -> dict[int, float]:
        """The metric by seed, without failed runs."""
        return {r.run.seed: r.value for r in self.results if r.value is not None}

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None if there is no result or one failed."""
        values = self.values.values()
        return statistics.fmean(values) if values and len(values) == len(self.results) else None


def _cell(stored: StoredRuns, run: Run, variant: Variant) -> Cell:
    rates = variant.rates or by_name(variant.method).learning_rates
    trials: list[Result] = []
    chosen: float | None = rates[0]
    if len(rates) > 1:
        found = stored.like(dataclasses.replace(run, scored=SLICE))
        by_rate = {r.run.learning_rate: r for r in found if r.run.seed == run.seed}
        trials = [by_rate[rate] for rate in rates if rate in by_rate]
        best = best_of(trials) if len(trials) == len(rates) else None
        chosen = None if best is None else best.run.learning_rate
    results = [r for r in stored.like(run) if r.run.learning_rate == chosen]
    return Cell(sorted(results, key=lambda r: r.run.seed), trials, chosen)


def best_of(trials: Sequence[Result]) -> Result | None:
    """The best result, of equal ones the first; None if all failed."""
    valued = [(trial.value, trial) for trial in trials if trial.value is not None]
    if not valued:
        return None
    lowest = valued[0][1].metric in metrics.LOWER_IS_BETTER
    choose = min if lowest else max  # both return the first of equal ones
    return choose(valued, key=lambda pair: pair[0])[1]


@dataclass(frozen=True)
class Found:
    """A study with its stored results."""

    study: Study
    cells: Mapping[tuple[str, str], Cell]

    @classmethod
    def of(cls, stored: StoredRuns, study: Study) -> Found:
        """Look up every variant on every task, with exactly the study's settings."""
        pairs = [(variant, task) for variant in study.variants for task in study.tasks]
        return cls(study, {(v.label, t): _cell(stored, study.run(t, v), v) for v, t in pairs})

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
        """The metric that a task is compared by."""
        known = tasks.TASKS.get(task)
        return known.metric if known else "accuracy"  # of a folder
