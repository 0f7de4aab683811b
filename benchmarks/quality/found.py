"""The stored results of a study, looked up by its settings: one cell per variant and task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality import tasks
from benchmarks.quality.metrics import LOWER_IS_BETTER
from benchmarks.quality.runs import Result, Run
from benchmarks.quality.studies import Study, Variant


class StoredRuns:
    """Results by their settings; of equal runs the last one counts."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._by_key = {result.run.key(): result for result in results}

    def __len__(self) -> int:
        return len(self._by_key)

    def of(self, runs: Iterable[Run]) -> list[Result]:
        """The results of those runs that have one."""
        return [self._by_key[run.key()] for run in runs if run.key() in self._by_key]


@dataclass(frozen=True)
class Cell:
    """What is stored of a variant on a task."""

    results: Sequence[Result]  # by seed, at the learning rate that was chosen
    trials: Sequence[Result]  # of all candidates for it, each scored on a slice of train
    scores: Mapping[float, float | None]  # means of a candidate's trials; None if one failed
    learning_rate: float | None  # None until all candidates were tried, and if all of them failed

    @property
    def failed(self) -> bool:
        """Whether a run failed, or every candidate did."""
        runs = [result.value is None for result in self.results]
        return any(runs) or bool(self.scores and all(s is None for s in self.scores.values()))

    @property
    def values(self) -> dict[int, float]:
        """The metric by seed, without failed runs."""
        return {r.run.seed: r.value for r in self.results if r.value is not None}

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None if there is no result or one failed."""
        values = self.values.values()
        return statistics.fmean(values) if values and len(values) == len(self.results) else None


def find(stored: StoredRuns, study: Study, task: str, variant: Variant) -> Cell:
    """Look up a variant on a task, with exactly the study's settings."""
    rates, criterion = study.rates(variant), study.criterion(task)
    trials: list[Result] = []
    scores: dict[float, float | None] = {}
    chosen: float | None = rates[0]
    if len(rates) > 1:
        for rate in rates:
            runs = study.trials(task, variant, rate)
            # A trial from before its criterion was measured does not count.
            found = [r for r in stored.of(runs) if r.error or criterion in r.values]
            if len(found) == len(runs):
                values = [r.values[criterion] for r in found if not r.error]
                scores[rate] = statistics.fmean(values) if len(values) == len(runs) else None
            trials += found
        chosen = _best(scores, criterion) if len(scores) == len(rates) else None
    results = stored.of(study.runs(task, variant, chosen)) if chosen is not None else []
    return Cell(results, trials, scores, chosen)


def _best(scores: Mapping[float, float | None], metric: str) -> float | None:
    """The rate with the best score, of equal ones the first; None if all failed."""
    valued = {rate: score for rate, score in scores.items() if score is not None}
    choose = min if metric in LOWER_IS_BETTER else max  # both return the first of equal ones
    return choose(valued, key=valued.__getitem__) if valued else None


@dataclass(frozen=True)
class Found:
    """A study with its stored results."""

    study: Study
    cells: Mapping[tuple[str, str], Cell]

    @classmethod
    def of(cls, stored: StoredRuns, study: Study) -> Found:
        """Look up every variant on every task."""
        pairs = [(variant, task) for variant in study.variants for task in study.tasks]
        return cls(study, {(v.label, t): find(stored, study, t, v) for v, t in pairs})

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
        return tasks.of_run(task).metric
