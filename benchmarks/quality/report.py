"""Report on stored results: `python -m benchmarks.quality.report [--results FOLDER]`.

Writes `report.md` and its plots, on every study that has results. Nothing is trained here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.quality import plots
from benchmarks.quality.errors import QualityError
from benchmarks.quality.found import Cell, Found, Stored
from benchmarks.quality.metrics import LOWER_IS_BETTER
from benchmarks.quality.runs import FILE, FOLDER, read
from benchmarks.quality.studies import STUDIES, Study, Variant
from benchmarks.tables import table

REPORT = "report.md"
NONE = "-"

_INTRODUCTION = """\
# Learning quality

Written by `python -m benchmarks.quality.report`; do not edit. A pretrained model is fine-tuned on \
real tasks with DCFT and with other methods, and scored on the dev split by the task's official \
metric.

From [`{file}`]({file}), {count} runs: {provenance}. {others} more do not belong to a study.

Data by digest: {digests}.

Values are the mean over seeds ± the sample standard deviation. The best value of a task is bold. \
The constant answer is the best that ignores the input. Parameters are a method's own, without the \
task's head, which every method trains. `-` was not run. Curves are means over seeds. Seconds are \
what a run took here, while other work ran on the machine: equal runs differ by up to a factor of \
two.

A method's learning rate is chosen per task: each candidate is scored with seed 0 on a slice of \
the training split that these trials do not train on. The dev split is never used for it. † marks \
a rate that is the highest or the lowest candidate. Every trial is under \
[Learning rates](#learning-rates). If a study states a single rate, there is no search.

To repeat: `python -m benchmarks.quality --study NAME --data DIR`, where NAME is one of {names} \
and DIR holds the tasks' files (for `language` one .txt file); stored runs are not repeated \
(`--results FOLDER` stores elsewhere). A seed determines the new head, the method's random numbers \
and the order of the batches, so all methods see the same batches."""
_DIFFERENCES = "Differences, paired by seed: mean ± standard error."
_PAIRED = (
    "The same runs with different arithmetic: the largest difference over all seeds, of the loss "
    "at any stored point (rounded to 8 decimals) and of the final metric (not in percent)."
)
_TRIALS = """\
## Learning rates

Scores on the slice of the training split; the chosen rate is bold. Seed 0 only, so a choice \
between close rates is a matter of chance."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; 2 for a mistake that the caller can fix."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.report")
    add = parser.add_argument
    add("--results", type=Path, default=FOLDER, help=f"folder that holds {FILE} ({FOLDER})")
    add("--out", type=Path, help="folder for the report and its plots (the same)")
    options = parser.parse_args(arguments)
    try:
        write(options.results, options.out or options.results)
    except QualityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(results: Path, out: Path) -> None:
    """Write the report and its plots on the results of a folder into the folder `out`."""
    stored = Stored(read(results / FILE))
    studies = [Found.of(stored, study) for study in STUDIES.values()]
    found = [study for study in studies if study.results]
    if not found:
        raise QualityError(
            f"--results: expected results of a study in {results / FILE}; "
            "`python -m benchmarks.quality --study NAME --data DIR` makes some"
        )
    out.mkdir(parents=True, exist_ok=True)
    for one in found:
        plots.curves(one, out / _plot(one.study))
    file = os.path.relpath(results / FILE, out).replace(os.sep, "/")
    parts = [_introduction(found, stored, file)]
    for one in found:
        parts += _study(one)
    trials = [(one.study.name, trials_table(one)) for one in found]
    parts += [_TRIALS, *(f"### Study `{name}`\n\n{shown}" for name, shown in trials if shown)]
    (out / REPORT).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {out / REPORT} and {len(found)} plots")


def _plot(study: Study) -> str:
    return f"{study.name}_curves.png"


def _introduction(found: Sequence[Found], stored: Stored, file: str) -> str:
    used = list({r.run.key(): r for one in found for r in one.results}.values())
    versions = {f"{name} {v}" for result in used for name, v in result.versions.items()}
    days = sorted({result.time[:10] for result in used})
    provenance = [
        _distinct(result.device for result in used),
        _distinct(versions),
        f"commit {_distinct(result.commit for result in used)}",
        f"model {_distinct(result.run.model for result in used)}",
        f"{days[0]} to {days[-1]}",
    ]
    return _INTRODUCTION.format(
        file=file,
        count=len(used),
        others=len(stored.results) - len(used),
        provenance="; ".join(provenance),
        digests=_distinct(f"{result.run.task} {result.data}" for result in used),
        names=", ".join(f"`{one.study.name}`" for one in found),
    )


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _study(found: Found) -> list[str]:
    """A question and its answer."""
    study, run, seeds = found.study, found.study.settings, found.seeds
    counted = f"{len(seeds)} seed{'s' * (len(seeds) != 1)} ({', '.join(map(str, seeds))})"
    scored = f", {run.scored_size} examples scored" if run.scored_size else ""
    setting = (
        f"Study `{study.name}`: {counted}, {run.steps} steps of {run.batch_size} examples, "
        f"model {run.model}{scored}, texts truncated at {run.max_tokens} tokens."
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
    dev_runs = [r for cell in found.cells.values() for r in cell.results]
    constants = {r.run.task: _figure(r.metric, r.constant_value) for r in dev_runs}
    lines = []
    for variant in study.variants:
        cells = [found.cell(variant, task) for task in study.tasks]
        done = [r for cell in cells for r in cell.results if r.value is not None]
        counts = " / ".join(f"{n:,}" for n in sorted({r.trainable_parameters for r in done}))
        values = [_value(found, variant, task) for task in study.tasks]
        rates = list(map(_rate, cells))
        rate = rates[0] if len(set(rates)) == 1 else " / ".join(rates)
        seconds = f"{fmean(r.seconds for r in done):.0f}" if done else NONE
        lines.append([variant.label, counts or NONE, *values, rate, seconds])
    known = [constants.get(task, NONE) for task in study.tasks]
    lines.append(["constant answer", "0", *known, NONE, NONE])
    names = f" ({' / '.join(study.tasks)})" if len(study.tasks) > 1 else ""
    heads = ["method", "parameters", *_titles(found), f"learning rate{names}", "seconds per run"]
    return table(heads, lines)


def _value(found: Found, variant: Variant, task: str) -> str:
    """Mean and deviation; bold where it looks the best."""
    cell, metric = found.cell(variant, task), found.metric(task)
    if cell.failed or cell.mean is None:
        return "failed" if cell.failed else NONE
    values = list(cell.values.values())
    shown = _with_error(found, metric, values, 1.0)
    means = [found.cell(other, task).mean for other in found.study.variants]
    best = min if metric in LOWER_IS_BETTER else max
    is_best = _figure(metric, cell.mean) == _figure(metric, best(m for m in means if m is not None))
    return f"**{shown}**" if is_best else shown


def _rate(cell: Cell) -> str:
    if cell.learning_rate is None or not cell.results:
        return NONE
    return f"{cell.learning_rate:g}" + "†" * cell.at_edge


def _titles(found: Found) -> list[str]:
    metrics = [(task, found.metric(task)) for task in found.study.tasks]
    unit = {True: " (lower is better)", False: ", %"}
    return [f"{task}, {metric}{unit[metric in LOWER_IS_BETTER]}" for task, metric in metrics]


def _figure(metric: str, value: float, sign: str = "") -> str:
    """In percent, or as it is where lower is better."""
    return f"{value:{sign}.2f}" if metric in LOWER_IS_BETTER else f"{100 * value:{sign}.1f}"


def _with_error(
    found: Found, metric: str, values: Sequence[float], scale: float, sign: str = ""
) -> str:
    """The mean of values and their deviation over `scale`; how many, where it is not all seeds."""
    count = len(values)
    error = f" ± {_figure(metric, stdev(values) / scale)}" if count > 1 else ""
    seeds = f" ({count} seed{'s' * (count != 1)})" if count != len(found.seeds) else ""
    return f"{_figure(metric, fmean(values), sign)}{error}{seeds}"


def _by_task(found: Found, head: str, lines: Iterable[list[str]]) -> str:
    """A table with a column per task, without empty lines; "" if all are empty."""
    shown = [line for line in lines if any(cell != NONE for cell in line[1:])]
    return table([head, *_titles(found)], shown) if shown else ""


def difference_table(found: Found) -> str:
    """The study's differences, paired by seed: those it names, or DCFT minus LoRA r=1."""
    by_label = {variant.label: variant for variant in found.study.variants}
    compared = [(by_label[one], by_label[other]) for one, other in found.study.differences]
    lora = by_label.get("LoRA r=1")
    if not compared and lora:
        compared = [(v, lora) for v in found.study.variants if plots.is_dcft(v)]
    return _by_task(
        found,
        "difference",
        (
            [
                f"{one.label} − {other.label}",
                *(_difference(found, one, other, t) for t in found.study.tasks),
            ]
            for one, other in compared
        ),
    )


def _difference(found: Found, one: Variant, other: Variant, task: str) -> str:
    ours, theirs = found.cell(one, task).values, found.cell(other, task).values
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return NONE
    return _with_error(found, found.metric(task), differences, len(differences) ** 0.5, "+")


def trials_table(found: Found) -> str:
    """Every candidate's score on the slice of train, the chosen one bold; "" without trials."""
    tasks = found.study.tasks
    lines = (
        [v.label, *(_trials(found.cell(v, task)) for task in tasks)] for v in found.study.variants
    )
    return _by_task(found, "rate → score", lines)


def _trials(cell: Cell) -> str:
    shown = []
    for trial in cell.trials:
        rate = trial.run.learning_rate
        score = "failed" if trial.value is None else _figure(trial.metric, trial.value)
        bold = "**" * (rate == cell.learning_rate)
        shown.append(f"{bold}{rate:g} → {score}{bold}")
    return ", ".join(shown) or NONE


def paired_table(found: Found) -> str:
    """The largest differences from the variant that the reference backend computes."""
    reference = next(v for v in found.study.variants if v.options.get("backend") == "reference")
    lines = []
    for (label, task), cell in found.cells.items():
        others = {r.run.seed: r for r in found.cell(reference, task).results}
        pairs = [(r, others[r.run.seed]) for r in cell.results if r.run.seed in others]
        if label == reference.label or not pairs:
            continue
        losses = [
            (loss, other)
            for one, two in pairs
            for (_, loss), (_, other) in zip(one.loss_curve, two.loss_curve, strict=False)
        ]
        values = [
            (a.value, b.value) for a, b in pairs if a.value is not None and b.value is not None
        ]
        name = f"{label} − {reference.label}, {task}"
        lines.append([name, str(len(pairs)), *_largest(losses), *_largest(values)])
    heads = ["difference", "seeds", "loss", "loss, relative", "metric", "metric, relative"]
    return table(heads, lines) if lines else ""


def _largest(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """The largest absolute and relative difference."""
    absolute = max((abs(value - other) for value, other in pairs), default=0.0)
    relative = max(
        (abs(value - other) / abs(other) for value, other in pairs if other), default=0.0
    )
    return [f"{number:.1e}" if number else "0" for number in (absolute, relative)]


if __name__ == "__main__":
    sys.exit(main())
