"""The questions that were asked, as tables of runs that anyone can repeat: see `studies.json`.

A study has tasks, settings that all its runs share, and variants, the lines of its table. The
options of a variant state the initialization, so that a stored run names it even if the default
changes. Equal runs of different studies are stored once. `Found` looks a study's results up.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.quality import errors, tasks
from benchmarks.quality.methods.table import by_name as method_by_name
from benchmarks.quality.metrics import LOWER_IS_BETTER
from benchmarks.quality.runs import SLICE, Result, Run


@dataclass(frozen=True)
class Variant:
    """A method with its options, and the learning rates to choose from.

    A single rate is used without a search; without rates the method has its own. `rates_of` is a
    variant whose trials choose the rate of this one too.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "ALL"
    rates: tuple[float, ...] | None = None
    rates_of: Variant | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `Run`, instead of the study's
    seeds: int | None = None  # fewer than the study's


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it."""

    name: str
    question: str
    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]
    seeds: int
    settings: Run
    paired: bool = False  # whether the variants differ only in rounding; their losses are compared
    differences: tuple[tuple[str, str], ...] = ()  # of labels
    metrics: tuple[str, ...] = ()  # shown next to the one that is compared
    # How a learning rate is chosen on a slice of train: by the mean over the trials' seeds.
    chosen_by: Literal["loss", "metric"] = "loss"
    trial_seeds: int = 2
    trial_steps: int | None = None  # None for the run's own
    trial_size: int = 600  # at most so many examples are scored

    def run(self, task: str, variant: Variant) -> Run:
        """A variant's run on a task, with the settings' seed and learning rate."""
        method, options, targets = variant.method, dict(variant.options), variant.targets
        run = replace(self.settings, task=task, method=method, options=options, targets=targets)
        return replace(run, **variant.settings)

    def runs(self, task: str, variant: Variant, learning_rate: float) -> list[Run]:
        """A variant's runs on a task, one per seed."""
        run = replace(self.run(task, variant), learning_rate=learning_rate)
        count = min(self.seeds, variant.seeds or self.seeds)
        return [replace(run, seed=seed) for seed in range(count)]

    def rates(self, variant: Variant) -> tuple[float, ...]:
        """The candidates for a variant's learning rate."""
        chooser = variant.rates_of or variant
        return chooser.rates or method_by_name(chooser.method).learning_rates

    def trials(self, task: str, variant: Variant, learning_rate: float) -> list[Run]:
        """The trials of a candidate, which leave a slice of train out and score it."""
        run = self.run(task, variant.rates_of or variant)
        run = replace(run, scored=SLICE, scored_size=self.trial_size, evaluations=1, stopping=False)
        run = replace(run, steps=self.trial_steps or run.steps, learning_rate=learning_rate)
        return [replace(run, seed=seed) for seed in range(self.trial_seeds)]

    def criterion(self, task: str) -> str:
        """The metric that learning rates are chosen by."""
        known = tasks.of_run(task)
        return known.loss if self.chosen_by == "loss" else known.metric


def by_name(name: str) -> Study:
    """The study of that name."""
    if name not in STUDIES:
        raise errors.unknown("--study", name, STUDIES)
    return STUDIES[name]


def _study(entry: Mapping[str, Any]) -> Study:
    variants: dict[str, Variant] = {}
    for line in entry["variants"]:  # `rates_of` names one of those before it
        rates, chooser = line.get("rates"), line.get("rates_of")
        given = {"rates": rates and tuple(rates), "rates_of": chooser and variants[chooser]}
        variants[line["label"]] = Variant(**{**line, **given})
    parsed = {
        "variants": tuple(variants.values()),
        "tasks": tuple(entry["tasks"]),
        "settings": Run(task="", method="", **entry["settings"]),
        "differences": tuple(map(tuple, entry.get("differences", ()))),
        "metrics": tuple(entry.get("metrics", ())),
    }
    return Study(**{**entry, **parsed})


_ENTRIES = json.loads(Path(__file__).with_name("studies.json").read_text(encoding="utf-8"))
STUDIES: Mapping[str, Study] = {entry["name"]: _study(entry) for entry in _ENTRIES}
"""All studies by name."""


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

    def values(self, metric: str) -> list[float]:
        """A metric of every run that has it."""
        return [r.values[metric] for r in self.results if metric in r.values]

    def mean(self, metric: str) -> float | None:
        """The mean over seeds; None if there is no result or one lacks the metric."""
        values = self.values(metric)
        return statistics.fmean(values) if values and len(values) == len(self.results) else None


def find(stored: Mapping[str, Result], study: Study, task: str, variant: Variant) -> Cell:
    """Look up a variant on a task, with exactly the study's settings, in results by key."""

    def of(runs: Sequence[Run]) -> list[Result]:
        return [stored[key] for key in (run.key() for run in runs) if key in stored]

    rates, criterion = study.rates(variant), study.criterion(task)
    trials: list[Result] = []
    scores: dict[float, float | None] = {}
    chosen: float | None = rates[0]
    if len(rates) > 1:
        for rate in rates:
            runs = study.trials(task, variant, rate)
            # A trial from before its criterion was measured does not count.
            found = [r for r in of(runs) if r.error or criterion in r.values]
            if len(found) == len(runs):
                values = [r.values[criterion] for r in found if not r.error]
                scores[rate] = statistics.fmean(values) if len(values) == len(runs) else None
            trials += found
        best = min if criterion in LOWER_IS_BETTER else max  # of equal ones the first
        valued = {rate: score for rate, score in scores.items() if score is not None}
        complete = valued and len(scores) == len(rates)
        chosen = best(valued, key=valued.__getitem__) if complete else None
    results = of(study.runs(task, variant, chosen)) if chosen is not None else []
    return Cell(results, trials, scores, chosen)


@dataclass(frozen=True)
class Found:
    """A study with its stored results."""

    study: Study
    cells: Mapping[tuple[str, str], Cell]  # by the variant's label and the task

    @classmethod
    def of(cls, stored: Mapping[str, Result], study: Study) -> Found:
        """Look up every variant on every task, in results by key."""
        pairs = [(variant, task) for variant in study.variants for task in study.tasks]
        return cls(study, {(v.label, t): find(stored, study, t, v) for v, t in pairs})

    @property
    def results(self) -> list[Result]:
        """All that is stored of the study, trials included."""
        return [r for cell in self.cells.values() for r in (*cell.results, *cell.trials)]

    @property
    def seeds(self) -> list[int]:
        """The seeds of any results."""
        return sorted({r.run.seed for cell in self.cells.values() for r in cell.results})

    def columns(self, *, others: bool = True) -> list[tuple[str, str]]:
        """Every task with the metric that it is compared by, and with the others that are shown."""
        known = {(r.run.task, metric) for r in self.results for metric in r.values}
        columns = []
        for task in self.study.tasks:
            shown = [(task, metric) for metric in self.study.metrics if others]
            columns += [(task, tasks.of_run(task).metric), *(c for c in shown if c in known)]
        return columns

    def pairs(self, one: str, other: str, task: str) -> list[tuple[Result, Result]]:
        """The finished runs of two variants with the same seeds."""
        ours, theirs = (self.cells[variant, task].results for variant in (one, other))
        same = [(a, b) for a in ours for b in theirs if a.run.seed == b.run.seed]
        return [(a, b) for a, b in same if not a.error and not b.error]
