"""Report on stored results: `python -m benchmarks.quality.report [--results FOLDER]`.

Writes `report.md`, on every study that has results. Nothing is trained here.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev, variance

import numpy as np

from benchmarks.quality.errors import QualityError
from benchmarks.quality.metrics import LOWER_IS_BETTER
from benchmarks.quality.runs import FOLDER, RUNS_FILE, by_key, read
from benchmarks.quality.studies import STUDIES, Cell, Found, Variant
from benchmarks.tables import table

REPORT = "report.md"
NONE = "-"
Column = tuple[str, str]  # a task and a metric
Line = tuple[str, Callable[[str, str], str]]  # a label, and the text for each column

_DIFFERENCES = (
    "Differences, paired by seed: mean ± standard error. It is that of the seeds, and where rows "
    "have jackknife values also that of the dev examples, which are paired too; with one seed it "
    "is the examples' alone."
)
_NOISE = (
    "The same seeds with another dropout stream: the root mean square difference, "
    "√2 times the standard deviation of one run."
)
_BEST = (
    "Best of all evaluations on dev minus the last one: what choosing a checkpoint by its score on "
    "dev would add. Mean over seeds. No other table has such a choice."
)
_TRIALS = "Mean scores of the trials on the slice of the training split; the chosen rate is bold."


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; 2 for a mistake that the caller can fix."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.report")
    parser.add_argument("--results", type=Path, default=FOLDER, help=f"folder with {RUNS_FILE}")
    parser.add_argument("--out", type=Path, help="folder for the report (the same)")
    options = parser.parse_args(arguments)
    try:
        write(options.results, options.out or options.results)
    except QualityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(results: Path, out: Path) -> None:
    """Write the report on the results of a folder into the folder `out`."""
    stored = by_key(read(results / RUNS_FILE))
    studies = [Found.of(stored, study) for study in STUDIES.values()]
    found = [study for study in studies if study.seeds]
    if not found:
        raise QualityError(
            f"--results: expected results of a study in {results / RUNS_FILE}; "
            "`python -m benchmarks.quality --study NAME --data DIR` makes some"
        )
    out.mkdir(parents=True, exist_ok=True)
    file = Path(os.path.relpath(results / RUNS_FILE, out)).as_posix()
    parts = [_introduction(found, len(stored), file), *(p for one in found for p in _study(one))]
    trials = [(one.study.name, trials_table(one)) for one in found]
    parts += ["## Learning rates", _TRIALS]
    parts += [f"### Study `{name}`\n\n{shown}" for name, shown in trials if shown]
    (out / REPORT).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {out / REPORT}")


def _introduction(found: Sequence[Found], stored: int, file: str) -> str:
    used = list({r.run.key(): r for one in found for r in one.results}.values())
    versions = {f"{name} {v}" for result in used for name, v in result.versions.items()}
    days = sorted({result.time[:10] for result in used})
    provenance = (
        f"{_distinct(r.device for r in used)}; {_distinct(versions)}; "
        f"commit {_distinct(r.commit for r in used)}; "
        f"model {_distinct(r.run.model for r in used)}; {days[0]} to {days[-1]}"
    )
    template = Path(__file__).with_name("report_introduction.md").read_text(encoding="utf-8")
    return template.strip().format(
        file=file,
        count=len(used),
        others=stored - len(used),
        provenance=provenance,
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
    if any(cell.trials for cell in found.cells.values()):
        trials = f"{study.trial_steps or run.steps} steps, {study.trial_seeds} per rate"
        setting += f" Learning rates are chosen by the {study.chosen_by} of trials ({trials})."
    parts = [f"## {study.question}", setting, results_table(found)]
    tables = [(_DIFFERENCES, difference_table), (_NOISE, noise_table), (_BEST, best_table)]
    parts += [f"{text}\n\n{shown}" for text, build in tables if (shown := build(found))]
    return [*parts, parity(found)] if study.paired else parts


def results_table(found: Found) -> str:
    """One line per variant, and one for the constant answer."""
    study = found.study
    done = [r for cell in found.cells.values() for r in cell.results]
    constants = {(r.run.task, r.metric): _figure(r.metric, r.constant_value) for r in done}
    lines = []
    for variant in study.variants:
        cells = [found.cells[variant.label, task] for task in study.tasks]
        done = [r for cell in cells for r in cell.results if r.value is not None]
        counts = " / ".join(f"{n:,}" for n in sorted({r.trainable_parameters for r in done}))
        values = [_value(found, variant, *column) for column in found.columns()]
        rates = list(map(_rate, cells))
        rate = rates[0] if len(set(rates)) == 1 else " / ".join(rates)
        seconds = f"{fmean(r.seconds for r in done):.0f}" if done else NONE
        lines.append([variant.label, counts or NONE, *values, rate, seconds])
    known = [constants.get(column, NONE) for column in found.columns()]
    lines.append(["constant answer", "0", *known, NONE, NONE])
    names = f" ({' / '.join(study.tasks)})" if len(study.tasks) > 1 else ""
    titles = _titles(found.columns())
    heads = ["method", "parameters", *titles, f"learning rate{names}", "seconds per run"]
    return table(heads, lines)


def _value(found: Found, variant: Variant, task: str, metric: str) -> str:
    """Mean and deviation; bold where it looks the best."""
    cell = found.cells[variant.label, task]
    mean = cell.mean(metric)
    if cell.failed or mean is None:
        return "failed" if cell.failed else NONE
    values = cell.values(metric)
    shown = _figures(found, metric, values, stdev(values) if len(values) > 1 else None)
    means = [found.cells[other.label, task].mean(metric) for other in found.study.variants]
    best = min if metric in LOWER_IS_BETTER else max
    is_best = _figure(metric, mean) == _figure(metric, best(m for m in means if m is not None))
    return f"**{shown}**" if is_best else shown


def _rate(cell: Cell) -> str:
    if cell.learning_rate is None or not cell.results:
        return NONE
    tried = sorted(cell.scores)
    at_edge = len(tried) > 1 and cell.learning_rate in (tried[0], tried[-1])
    return f"{cell.learning_rate:g}" + "†" * at_edge


def _titles(columns: Sequence[Column]) -> list[str]:
    unit = {True: " (lower is better)", False: ", %"}
    return [f"{task}, {metric}{unit[metric in LOWER_IS_BETTER]}" for task, metric in columns]


def _figure(metric: str, value: float, sign: str = "") -> str:
    """In percent, or unscaled where lower is better."""
    decimals = LOWER_IS_BETTER.get(metric)
    return f"{100 * value:{sign}.1f}" if decimals is None else f"{value:{sign}.{decimals}f}"


def _figures(
    found: Found, metric: str, values: Sequence[float], error: float | None, sign: str = ""
) -> str:
    """The mean of values and an error; how many values, where it is not all seeds."""
    count = len(values)
    shown = "" if error is None else f" ± {_figure(metric, error)}"
    seeds = f" ({count} seed{'s' * (count != 1)})" if count != len(found.seeds) else ""
    return f"{_figure(metric, fmean(values), sign)}{shown}{seeds}"


def _by_column(columns: Sequence[Column], head: str, lines: Sequence[Line]) -> str:
    """A table with a line per label, without empty lines; "" if all are empty."""
    filled = [[label, *(value_of(*column) for column in columns)] for label, value_of in lines]
    shown = [line for line in filled if any(value != NONE for value in line[1:])]
    return table([head, *_titles(columns)], shown) if shown else ""


def difference_table(found: Found) -> str:
    """The study's differences, paired by seed."""
    pairs = found.study.differences
    lines = [(f"{one} − {two}", partial(_difference, found, one, two)) for one, two in pairs]
    return _by_column(found.columns(), "difference", lines)


def _difference(found: Found, one: str, other: str, task: str, metric: str) -> str:
    pairs = [p for p in found.pairs(one, other, task) if all(metric in r.values for r in p)]
    if not pairs:
        return NONE
    differences = [a.values[metric] - b.values[metric] for a, b in pairs]
    errors = [variance(differences) / len(pairs)] if len(pairs) > 1 else []
    if all(metric in result.jackknife for pair in pairs for result in pair):
        left_out = [np.subtract(a.jackknife[metric], b.jackknife[metric]) for a, b in pairs]
        groups = np.mean(left_out, axis=0)
        errors.append((len(groups) - 1) * float(np.var(groups)))
    return _figures(found, metric, differences, sum(errors) ** 0.5 if errors else None, "+")


def noise_table(found: Found) -> str:
    """How much runs differ that share everything except the dropout stream."""
    replicates = [v for v in found.study.variants if v.settings.get("replicate") and v.rates_of]
    lines = [(v.label, partial(_noise, found, v)) for v in replicates]
    return _by_column(found.columns(), "replicate", lines)


def _noise(found: Found, variant: Variant, task: str, metric: str) -> str:
    original = variant.rates_of or variant
    pairs = found.pairs(variant.label, original.label, task)
    squares = [(a.values[metric] - b.values[metric]) ** 2 for a, b in pairs]
    return _figure(metric, fmean(squares) ** 0.5) if squares else NONE


def best_table(found: Found) -> str:
    """What the best of several evaluations on dev adds to the last one."""
    lines = [(v.label, partial(_best_minus_last, found, v)) for v in found.study.variants]
    return _by_column(found.columns(others=False), "best − last", lines)


def _best_minus_last(found: Found, variant: Variant, task: str, metric: str) -> str:
    best = min if metric in LOWER_IS_BETTER else max
    results = found.cells[variant.label, task].results
    curves = [[value for _, value in result.value_curve] for result in results]
    gains = [best(curve) - curve[-1] for curve in curves if len(curve) > 1]
    return _figures(found, metric, gains, None, "+") if gains else NONE


def trials_table(found: Found) -> str:
    """Every candidate's score on the slice of train, the chosen one bold; "" without trials."""
    lines = [(v.label, partial(_trials, found, v)) for v in found.study.variants if not v.rates_of]
    columns = [(task, found.study.criterion(task)) for task in found.study.tasks]
    return _by_column(columns, "rate → score", lines)


def _trials(found: Found, variant: Variant, task: str, metric: str) -> str:
    cell, shown = found.cells[variant.label, task], []
    for rate, value in cell.scores.items():
        score = "failed" if value is None else _figure(metric, value)
        bold = "**" * (rate == cell.learning_rate)
        shown.append(f"{bold}{rate:g} → {score}{bold}")
    return ", ".join(shown) or NONE


def parity(found: Found) -> str:
    """What the losses of a study's two variants differ by."""
    one, other = (variant.label for variant in found.study.variants)
    pairs = [pair for task in found.study.tasks for pair in found.pairs(one, other, task)]
    curves = [zip(a.loss_curve, b.loss_curve, strict=True) for a, b in pairs]
    largest = max((abs(x - y) for curve in curves for (_, x), (_, y) in curve), default=math.nan)
    return f"The losses (rounded to 8 decimals) differ by at most {largest:.1e} at a stored step."


if __name__ == "__main__":
    sys.exit(main())
