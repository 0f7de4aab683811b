"""Report on stored results: `python -m benchmarks.quality.report [--results FOLDER]`.

Writes `report.md` and its plots, on every study that has results. Nothing is trained here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.quality import metrics, plots
from benchmarks.quality.errors import QualityError
from benchmarks.quality.found import Cell, Found, Stored
from benchmarks.quality.runs import FILE, FOLDER, Result, read
from benchmarks.quality.studies import STUDIES, Study, Variant
from benchmarks.tables import table

REPORT = "report.md"
NONE = "-"
EDGE = "†"

_WHAT = """\
# Learning quality

Written by `python -m benchmarks.quality.report`; do not edit. A pretrained model is fine-tuned on \
real tasks with DCFT and with other methods, and scored on the dev split by the task's official \
metric.

From [`{file}`]({file}), {count} runs: {provenance}.{left_out}

Data by digest: {digests}.

Values are the mean over seeds ± the sample standard deviation. The best value of a task is bold. \
The constant answer is the best that ignores the input. Parameters are a method's own, without the \
task's head, which every method trains. `-` was not run. Curves are means over seeds. Seconds are \
what a run took here, while other work ran on the machine: equal runs differ by up to a factor of \
two. `python -m benchmarks` compares speed.

A method's learning rate is chosen per task: each candidate is scored with seed 0 on a slice of \
the training split that these trials do not train on. The dev split is never used for it. † marks \
a rate that is the highest or the lowest candidate. Every trial is under \
[Learning rates](#learning-rates). If a study states a single rate, there is no search.

To repeat: `python -m benchmarks.quality --study NAME --data DIR`, where NAME is one of {names} \
and DIR holds the tasks' files (for `language` one .txt file); stored runs are not repeated \
(`--results FOLDER` stores elsewhere). A seed determines the new head, the method's random numbers \
and the order of the batches, so all methods see the same batches."""
_TRIALS = (
    "Scores on the slice of the training split; the chosen rate is bold. Seed 0 only, so a choice "
    "between close rates is a matter of chance."
)
_DIFFERENCES = "Differences, paired by seed: mean ± standard error."
_PAIRED = (
    "The same runs with different arithmetic: the largest difference over all seeds, of the loss "
    "at any stored point (rounded to 8 decimals) and of the final metric (not in percent)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; 2 for a mistake that the caller can fix."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.report")
    add = parser.add_argument
    add("--results", type=Path, default=FOLDER, help=f"folder that holds {FILE} ({FOLDER})")
    add("--out", type=Path, help="folder for the report and its plots (the same)")
    options = parser.parse_args(arguments)
    try:
        write(options.results, options.out or options.results)
    except (QualityError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(results: Path, out: Path, asked: Iterable[Study] = tuple(STUDIES.values())) -> None:
    """Write the report and its plots on the results of a folder into the folder `out`."""
    stored = Stored(read(results / FILE))
    found = [study for study in (Found.of(stored, study) for study in asked) if study.results]
    if not found:
        raise QualityError(
            f"--results: expected results of a study in {results / FILE}; "
            "`python -m benchmarks.quality --study NAME --data DIR` makes some"
        )
    out.mkdir(parents=True, exist_ok=True)
    for one in found:
        plots.curves(one, out / _plot(one.study))
    file = os.path.relpath(results / FILE, out).replace(os.sep, "/")
    (out / REPORT).write_text(text(found, stored, file), encoding="utf-8")
    print(f"wrote {out / REPORT} and {len(found)} plots")


def _plot(study: Study) -> str:
    return f"{study.name}_curves.png"


def text(found: Sequence[Found], stored: Stored, file: str) -> str:
    """The report as Markdown."""
    used = list({r.run.key(): r for one in found for r in one.results}.values())
    others = len(stored.results) - len(used)
    parts = [
        _WHAT.format(
            file=file,
            count=len(used),
            provenance=_provenance(used),
            left_out=f" {others} more do not belong to a study and are left out." * bool(others),
            digests=", ".join(
                f"{task} {' and '.join(_distinct(r.data for r in used if r.run.task == task))}"
                for task in _distinct(r.run.task for r in used)
            ),
            names=", ".join(f"`{one.study.name}`" for one in found),
        )
    ]
    for one in found:
        parts += _study(one)
    trials = [(one, trials_table(one)) for one in found]
    parts += ["## Learning rates", _TRIALS]
    parts += [f"### Study `{one.study.name}`\n\n{shown}" for one, shown in trials if shown]
    return "\n\n".join(parts) + "\n"


def _provenance(results: Sequence[Result]) -> str:
    """Devices, versions, commits, models and days of results."""
    parts = [", ".join(_distinct(result.device for result in results))]
    for package in _distinct(name for result in results for name in result.versions):
        known = _distinct(r.versions[package] for r in results if package in r.versions)
        parts.append(f"{package} {', '.join(known)}")
    parts.append(f"commit {', '.join(_distinct(result.commit for result in results))}")
    parts.append(f"model {', '.join(_distinct(result.run.model for result in results))}")
    days = _distinct(result.time[:10] for result in results)
    return "; ".join([*parts, days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"])


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def _study(found: Found) -> list[str]:
    """A question and its answer."""
    study, run = found.study, found.study.settings
    seeds = f"{len(found.seeds)} seed{'s' * (len(found.seeds) != 1)}"
    scored = f", {run.scored_size} examples scored" if run.scored_size else ""
    setting = (
        f"Study `{study.name}`: {seeds} ({', '.join(map(str, found.seeds))}), {run.steps} steps of "
        f"{run.batch_size} examples, model {run.model}{scored}, texts truncated at "
        f"{run.max_tokens} tokens."
    )
    parts = [f"## {study.question}", setting, results_table(found)]
    if differences := difference_table(found):
        parts.append(f"{_DIFFERENCES}\n\n{differences}")
    if study.paired and (paired := paired_table(found)):
        parts.append(f"{_PAIRED}\n\n{paired}")
    return [*parts, f"![Learning curves]({_plot(study)})"]


def results_table(found: Found) -> str:
    """One line per variant, and one for the constant answer."""
    study = found.study
    best = {task: _best(found, task) for task in study.tasks}
    lines = []
    for variant in study.variants:
        cells = {task: found.cell(variant, task) for task in study.tasks}
        done = [r for cell in cells.values() for r in cell.results if r.value is not None]
        counts = " / ".join(f"{n:,}" for n in sorted({r.trainable_parameters for r in done}))
        values = [_value(found, cell, task, best[task]) for task, cell in cells.items()]
        rates = [_rate(cell) for cell in cells.values()]
        rate = rates[0] if len(set(rates)) == 1 else " / ".join(rates)
        seconds = f"{statistics.fmean(r.seconds for r in done):.0f}" if done else NONE
        lines.append([variant.label, counts or NONE, *values, rate, seconds])
    constants = [
        next((_figure(r.metric, r.constant_value) for r in found.dev_results(task)), NONE)
        for task in study.tasks
    ]
    lines.append(["constant answer", "0", *constants, NONE, NONE])
    names = f" ({' / '.join(study.tasks)})" if len(study.tasks) > 1 else ""
    heads = ["method", "parameters", *_titles(found), f"learning rate{names}", "seconds per run"]
    return table(heads, lines)


def _best(found: Found, task: str) -> str | None:
    """The best mean as it is shown: equal figures are equally good."""
    metric = found.metric(task)
    means = [found.cell(variant, task).mean for variant in found.study.variants]
    known = [mean for mean in means if mean is not None]
    lowest = metric in metrics.LOWER_IS_BETTER
    return _figure(metric, min(known) if lowest else max(known)) if known else None


def _value(found: Found, cell: Cell, task: str, best: str | None) -> str:
    if cell.failures:
        return "failed"
    if cell.mean is None:
        return NONE
    metric, count = found.metric(task), len(cell.results)
    mean = _figure(metric, cell.mean)
    deviation = statistics.stdev(cell.values.values()) if count > 1 else None
    shown = _with_error(found, metric, mean, deviation, count)
    return f"**{shown}**" if mean == best else shown


def _rate(cell: Cell) -> str:
    if cell.learning_rate is None or not cell.results:
        return NONE
    return f"{cell.learning_rate:g}" + EDGE * cell.at_edge


def _titles(found: Found) -> list[str]:
    return [f"{task}, {plots.unit(found.metric(task))}" for task in found.study.tasks]


def _figure(metric: str, value: float, sign: str = "") -> str:
    digits = 2 if metric in metrics.LOWER_IS_BETTER else 1
    return f"{plots.in_units(metric, value):{sign}.{digits}f}"


def _with_error(found: Found, metric: str, mean: str, error: float | None, count: int) -> str:
    """A mean over seeds; with their number where it differs from the study's."""
    seeds = f" ({count} seed{'s' * (count != 1)})" if count != len(found.seeds) else ""
    return mean + (f" ± {_figure(metric, error)}" if error is not None else "") + seeds


def _by_task(found: Found, head: str, lines: Sequence[tuple[str, Callable[[str], str]]]) -> str:
    """A table of lines with a cell per task; empty lines are left out, an empty table is ""."""
    filled = [[label, *map(cell_of, found.study.tasks)] for label, cell_of in lines]
    shown = [line for line in filled if any(cell != NONE for cell in line[1:])]
    return table([head, *_titles(found)], shown) if shown else ""


def difference_table(found: Found) -> str:
    """The study's differences, paired by seed: those it names, or DCFT minus LoRA r=1."""

    def cell_of(variant: Variant, other: Variant, task: str) -> str:
        ours, theirs = found.cell(variant, task).values, found.cell(other, task).values
        differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if not differences:
            return NONE
        metric, count = found.metric(task), len(differences)
        mean = _figure(metric, statistics.fmean(differences), "+")
        error = statistics.stdev(differences) / count**0.5 if count > 1 else None
        return _with_error(found, metric, mean, error, count)

    lines = [
        (
            f"{one.label} − {other.label}",
            lambda task, one=one, other=other: cell_of(one, other, task),
        )
        for one, other in _compared(found.study)
    ]
    return _by_task(found, "difference", lines)


def _compared(study: Study) -> list[tuple[Variant, Variant]]:
    by_label = {variant.label: variant for variant in study.variants}
    if study.differences:
        return [(by_label[one], by_label[other]) for one, other in study.differences]
    lora = by_label.get("LoRA r=1")
    return [(v, lora) for v in study.variants if lora is not None and plots.is_dcft(v)]


def trials_table(found: Found) -> str:
    """Every candidate's score on the slice of train, the chosen one bold; "" without trials."""

    def cell_of(variant: Variant, task: str) -> str:
        cell, shown = found.cell(variant, task), []
        for trial in cell.trials:
            score = "failed" if trial.value is None else _figure(trial.metric, trial.value)
            one = f"{trial.run.learning_rate:g} → {score}"
            shown.append(f"**{one}**" if trial.run.learning_rate == cell.learning_rate else one)
        return ", ".join(shown) or NONE

    lines = [
        (variant.label, lambda task, variant=variant: cell_of(variant, task))
        for variant in found.study.variants
    ]
    return _by_task(found, "rate → score", lines)


def paired_table(found: Found) -> str:
    """The largest differences from the variant that the reference backend computes."""
    reference = next(v for v in found.study.variants if v.options.get("backend") == "reference")
    lines = []
    for variant in found.study.variants:
        for task in found.study.tasks if variant is not reference else ():
            others = {r.run.seed: r for r in found.cell(reference, task).results}
            runs = found.cell(variant, task).results
            pairs = [(r, others[r.run.seed]) for r in runs if r.run.seed in others]
            losses = [
                (loss, other)
                for one, two in pairs
                for (_, loss), (_, other) in zip(one.loss_curve, two.loss_curve, strict=False)
            ]
            values = [(a.value, b.value) for a, b in pairs if None not in (a.value, b.value)]
            if losses and values:
                name = f"{variant.label} − {reference.label}, {task}"
                lines.append([name, str(len(pairs)), *_largest(losses), *_largest(values)])
    heads = ["difference", "seeds", "loss", "loss, relative", "metric", "metric, relative"]
    return table(heads, lines) if lines else ""


def _largest(pairs: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """The largest absolute and relative difference."""
    absolute = max(abs(value - other) for value, other in pairs)
    relative = max((abs(value / other - 1) for value, other in pairs if other), default=0.0)
    return _small(absolute), _small(relative)


def _small(number: float) -> str:
    return f"{number:.1e}" if number else "0"


if __name__ == "__main__":
    sys.exit(main())
