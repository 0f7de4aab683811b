"""Tables of a study's stored results, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality import metrics
from benchmarks.quality.found import Cell, Found, mean_and_spread
from benchmarks.quality.runs import Result
from benchmarks.quality.studies import Study, Variant
from benchmarks.tables import table

NONE = "-"
"""What was not run."""

EDGE = "†"
"""Beside a learning rate that is the highest or the lowest of those tried."""


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
    if cell.unchosen:
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
    rates = [_rate(cell) for cell in cells]
    seconds = [r.seconds for cell in cells for r in cell.results if r.value is not None]
    return (
        rates[0] if len(set(rates)) == 1 else " / ".join(rates),
        f"{statistics.fmean(seconds):.0f}" if seconds else NONE,
    )


def _rate(cell: Cell) -> str:
    """The learning rate, marked where one beyond those tried might have been better."""
    if cell.learning_rate is None or not cell.results:
        return NONE
    return f"{cell.learning_rate:g}" + EDGE * cell.at_edge


def _constant(found: Found, task: str) -> str:
    for variant in found.study.variants:
        for result in found.cell(variant, task).results:
            return _figure(result.metric, result.constant_value)
    return NONE


# One method minus another


def is_dcft(variant: Variant) -> bool:
    """Whether a variant is DCFT, by itself or with another method."""
    return "dcft" in variant.method.split("_")


def difference_table(found: Found) -> str:
    """The study's differences, by seed: those that it names, or DCFT minus LoRA of rank 1; empty
    for a study without."""
    study = found.study
    lines = []
    for variant, other in _compared(study):
        cells = [_difference(found, variant, other, task) for task in study.tasks]
        if any(cell != NONE for cell in cells):
            lines.append([f"{variant.label} − {other.label}", *cells])
    titles = [f"{task}, {unit(found.metric(task))}" for task in study.tasks]
    return table(["difference", *titles], lines) if lines else ""


def _compared(study: Study) -> list[tuple[Variant, Variant]]:
    if study.differences:
        by_label = {variant.label: variant for variant in study.variants}
        return [(by_label[label], by_label[other]) for label, other in study.differences]
    beside = [(variant, _lora(study, variant)) for variant in study.variants if is_dcft(variant)]
    return [(variant, lora) for variant, lora in beside if lora is not None]


def _lora(study: Study, variant: Variant) -> Variant | None:
    """The LoRA of rank 1 that a variant is compared with: if there is one, on the same layers and
    at the same learning rates."""
    known = [v for v in study.variants if v.method == "lora" and v.options.get("r", 1) == 1]
    return min(
        known, key=lambda v: (v.targets != variant.targets, v.rates != variant.rates), default=None
    )


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
