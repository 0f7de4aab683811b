"""The stored results of a study, found by its settings, and tables of them as Markdown."""

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
from benchmarks.quality.summary import mean_and_spread
from benchmarks.tables import table

NONE = "-"
"""What was not run."""

# What runs of one line and task differ in, and what trials on a slice of train have of their own.
_OF_A_RUN = ("seed", "learning_rate")
_OF_A_TRIAL = ("scored_size", "evaluations")


# Stored results by line and task


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
        learning_rate: the one that was chosen; None where nothing was run or every trial failed.
    """

    results: tuple[Result, ...] = ()
    trials: tuple[Result, ...] = ()
    learning_rate: float | None = None

    @property
    def values(self) -> dict[int, float]:
        """The metric by seed, of the runs that have one."""
        return {r.run.seed: r.value for r in self.results if r.value is not None}


def match(stored: Stored, study: Study, task: str, variant: Variant) -> Cell:
    """The stored results of a variant on a task: those of exactly the study's settings.

    A variant with one learning rate was run at that one. Of several, it is the one that did best
    on the slice of train; where no trial is stored, that of the newest result.
    """
    run = dataclasses.replace(
        study.settings,
        task=task,
        method=variant.method,
        options=dict(variant.options),
        targets=variant.targets,
    )
    rates = variant.rates or by_name(variant.method).learning_rates
    results = stored.like(run)
    trials: tuple[Result, ...] = ()
    if len(rates) == 1:
        chosen: float | None = rates[0]
    else:
        trials = _trials(stored.like(dataclasses.replace(run, scored=SLICE)), run.seed, rates)
        if trials:
            best = best_of(trials)
            chosen = None if best is None else best.run.learning_rate
        else:
            newest = max(reversed(results), key=lambda result: result.time, default=None)
            chosen = None if newest is None else newest.run.learning_rate
    kept = [result for result in results if result.run.learning_rate == chosen]
    return Cell(tuple(sorted(kept, key=lambda r: r.run.seed)), trials, chosen)


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


# Numbers


def in_units(metric: str, value: float) -> float:
    """A figure as it is shown: in percent, or as it is where lower is better."""
    return value if metric in metrics.LOWER_IS_BETTER else 100 * value


def unit(metric: str) -> str:
    """The metric's name with its unit."""
    return f"{metric} (lower is better)" if metric in metrics.LOWER_IS_BETTER else f"{metric}, %"


def _figure(metric: str, value: float, sign: str = "") -> str:
    digits = 2 if metric in metrics.LOWER_IS_BETTER else 1
    return f"{in_units(metric, value):{sign}.{digits}f}"


def _with_error(figure: str, error: str | None, count: int, usual: int) -> str:
    """A mean over seeds, and how many they are where that is unusual."""
    seeds = f" ({count} seed{'s' * (count != 1)})" if count != usual else ""
    return figure + (f" ± {error}" if error is not None else "") + seeds


def _bold(text: str) -> str:
    return f"**{text}**"


# The table of a study


def results_table(found: Found) -> tuple[str, list[str]]:
    """A line a variant; and why there are lines without a value, a note each."""
    study, notes = found.study, []
    titles = [f"{task}, {unit(found.metric(task))}" for task in study.tasks]
    best = {task: _best_figure(found, task) for task in study.tasks}
    lines = []
    for variant in study.variants:
        cells = []
        for task in study.tasks:
            text, note = _result(found, variant, task, best[task])
            if note:
                notes.append(note)
                text = f"{text} ({len(notes)})"
            cells.append(text)
        lines.append(
            [variant.label, _parameters(found, variant), *cells, *_rates_and_time(found, variant)]
        )
    constants = [_constant(found, task) for task in study.tasks]
    lines.append(["constant answer", "0", *constants, NONE, NONE])
    names = f" ({' / '.join(study.tasks)})" if len(study.tasks) > 1 else ""
    heads = ["method", "parameters", *titles, f"learning rate{names}", "seconds a run"]
    return table(heads, lines), notes


def _best_figure(found: Found, task: str) -> str | None:
    """The best mean, as it is shown: what looks the same counts as the same."""
    metric, best = found.metric(task), None
    for variant in found.study.variants:
        spread = mean_and_spread(found.cell(variant, task).results)
        if spread and (best is None or metrics.better(metric, spread[0], best)):
            best = spread[0]
    return None if best is None else _figure(metric, best)


def _result(found: Found, variant: Variant, task: str, best: str | None) -> tuple[str, str]:
    """A variant on a task, and if it failed, why."""
    cell, metric = found.cell(variant, task), found.metric(task)
    reasons: dict[str, list[int]] = {}
    for result in cell.results:
        if result.value is None:
            reasons.setdefault(_reason(result), []).append(result.run.seed)
    if reasons:
        seeds = [
            f"{'seeds' if len(failed) > 1 else 'seed'} {', '.join(map(str, failed))}: {reason}"
            for reason, failed in reasons.items()
        ]
        return "failed", f"{variant.label} on {task}, {'; '.join(seeds)}"
    if cell.trials and best_of(cell.trials) is None:
        reason = _reason(cell.trials[-1])
        return "failed", f"{variant.label} on {task}, at every learning rate tried: {reason}"
    spread = mean_and_spread(cell.results)
    if spread is None:
        return NONE, ""
    mean, count = _figure(metric, spread[0]), len(cell.results)
    deviation = _figure(metric, spread[1]) if count > 1 else None
    text = _with_error(mean, deviation, count, len(found.seeds))
    return _bold(text) if mean == best else text, ""


def _reason(result: Result) -> str:
    """Why a run failed, in a line; where its checkpoint was is of no use to others."""
    parts = " ".join((result.error or "no value").split()).split("; ")
    return "; ".join(part for part in parts if "checkpoint" not in part)


def _parameters(found: Found, variant: Variant) -> str:
    counts = {
        result.trainable_parameters
        for task in found.study.tasks
        for result in found.cell(variant, task).results
        if result.value is not None
    }
    return " / ".join(f"{count:,}" for count in sorted(counts)) or NONE


def _rates_and_time(found: Found, variant: Variant) -> tuple[str, str]:
    cells = [found.cell(variant, task) for task in found.study.tasks]
    rates = [
        NONE if cell.learning_rate is None or not cell.results else f"{cell.learning_rate:g}"
        for cell in cells
    ]
    seconds = [r.seconds for cell in cells for r in cell.results if r.value is not None]
    return (
        rates[0] if len(set(rates)) == 1 else " / ".join(rates),
        f"{statistics.fmean(seconds):.0f}" if seconds else NONE,
    )


def _constant(found: Found, task: str) -> str:
    for variant in found.study.variants:
        for result in found.cell(variant, task).results:
            return _figure(result.metric, result.constant_value)
    return NONE


# DCFT beside LoRA


def is_dcft(variant: Variant) -> bool:
    """Whether a variant is DCFT, by itself or with another method."""
    return "dcft" in variant.method.split("_")


def difference_table(found: Found) -> str:
    """DCFT minus LoRA of rank 1, by seed; empty for a study without both."""
    study = found.study
    lines = []
    for variant in study.variants:
        other = _lora(study, variant) if is_dcft(variant) else None
        if other is not None:
            cells = [_difference(found, variant, other, task) for task in study.tasks]
            if any(cell != NONE for cell in cells):
                lines.append([f"{variant.label} − {other.label}", *cells])
    titles = [f"{task}, {unit(found.metric(task))}" for task in study.tasks]
    return table(["difference", *titles], lines) if lines else ""


def _lora(study: Study, variant: Variant) -> Variant | None:
    """The LoRA of rank 1 that a variant is compared with: on the same layers, if there is one."""
    known = [v for v in study.variants if v.method == "lora" and v.options.get("r", 1) == 1]
    return min(known, key=lambda v: v.targets != variant.targets, default=None)


def _difference(found: Found, variant: Variant, other: Variant, task: str) -> str:
    """Mean and standard error over the seeds that both have."""
    ours, theirs = found.cell(variant, task).values, found.cell(other, task).values
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return NONE
    metric, count = found.metric(task), len(differences)
    error = statistics.stdev(differences) / count**0.5 if count > 1 else None
    return _with_error(
        _figure(metric, statistics.fmean(differences), "+"),
        None if error is None else _figure(metric, error),
        count,
        len(found.seeds),
    )


# Learning rates


def trials_table(found: Found) -> str:
    """Every candidate's score on the slice of train, the chosen one bold; empty without trials."""
    lines = []
    for variant in found.study.variants:
        cells = [_trial_scores(found.cell(variant, task)) for task in found.study.tasks]
        if any(cell != NONE for cell in cells):
            lines.append([variant.label, *cells])
    titles = [f"{task}, {unit(found.metric(task))}" for task in found.study.tasks]
    return table(["rate → score", *titles], lines) if lines else ""


def _trial_scores(cell: Cell) -> str:
    shown = []
    for trial in cell.trials:
        score = "failed" if trial.value is None else _figure(trial.metric, trial.value)
        text = f"{trial.run.learning_rate:g} → {score}"
        shown.append(_bold(text) if trial.run.learning_rate == cell.learning_rate else text)
    return ", ".join(shown) or NONE


# The same run by different arithmetic


@dataclass(frozen=True)
class Pair:
    """Two runs that differ in nothing but arithmetic."""

    result: Result
    reference: Result

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        """Step, loss and the reference's loss, at the steps that both have."""
        reference = dict(self.reference.loss_curve)
        return [
            (step, loss, reference[step])
            for step, loss in self.result.loss_curve
            if step in reference
        ]

    @property
    def values(self) -> list[tuple[float, float]]:
        """The final figure and the reference's, if both have one."""
        value, other = self.result.value, self.reference.value
        return [] if value is None or other is None else [(value, other)]


def reference_of(study: Study) -> Variant:
    """What a paired study's other variants are compared with: the reference, else the first."""
    named = (v for v in study.variants if v.options.get("backend") == "reference")
    return next(named, study.variants[0])


def pairs(found: Found, variant: Variant, task: str) -> list[Pair]:
    """A variant's runs beside the reference's of the same seed and learning rate."""
    known = found.cell(reference_of(found.study), task).results
    references = {(r.run.seed, r.run.learning_rate): r for r in known}
    return [
        Pair(result, references[result.run.seed, result.run.learning_rate])
        for result in found.cell(variant, task).results
        if (result.run.seed, result.run.learning_rate) in references
    ]


def paired_table(found: Found) -> str:
    """The largest differences from the reference, over all seeds; empty without pairs."""
    reference = reference_of(found.study)
    lines = []
    for variant in found.study.variants:
        for task in found.study.tasks:
            paired = [] if variant is reference else pairs(found, variant, task)
            losses = [(loss, other) for pair in paired for _, loss, other in pair.losses]
            values = [value for pair in paired for value in pair.values]
            if losses or values:
                name = f"{variant.label} − {reference.label}, {task}"
                lines.append([name, str(len(paired)), *_largest(losses), *_largest(values)])
    heads = ["difference", "seeds", "loss", "loss, relative", "metric", "metric, relative"]
    return table(heads, lines) if lines else ""


def _largest(compared: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """The largest absolute and relative difference."""
    absolute = [abs(value - reference) for value, reference in compared]
    relative = [
        difference / abs(reference)
        for difference, (_, reference) in zip(absolute, compared, strict=True)
        if reference
    ]
    return _small(max(absolute, default=None)), _small(max(relative, default=None))


def _small(number: float | None) -> str:
    return NONE if number is None else f"{number:.1e}" if number else "0"
