"""Report on stored results: `python -m benchmarks.quality.report [--results FOLDER]`.

Writes `report.md`, on every study that has results. Nothing is trained here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.quality.errors import QualityError
from benchmarks.quality.found import Cell, Found, StoredRuns
from benchmarks.quality.metrics import LOWER_IS_BETTER
from benchmarks.quality.runs import FOLDER, RUNS_FILE, read
from benchmarks.quality.studies import STUDIES, Variant
from benchmarks.tables import table

REPORT = "report.md"
NONE = "-"

_DIFFERENCES = "Differences, paired by seed: mean ± standard error."
_PAIRED = (
    "The same runs with different arithmetic: the largest difference over all seeds, of the loss "
    "at any stored point (rounded to 8 decimals) and of the final metric (not in percent)."
)
_TRIALS = (
    "Scores on the slice of the training split; the chosen rate is bold. Seed 0 only, so a choice "
    "between close rates is a matter of chance."
)


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
    stored = StoredRuns(read(results / RUNS_FILE))
    studies = [Found.of(stored, study) for study in STUDIES.values()]
    found = [study for study in studies if study.results]
    if not found:
        raise QualityError(
            f"--results: expected results of a study in {results / RUNS_FILE}; "
            "`python -m benchmarks.quality --study NAME --data DIR` makes some"
        )
    out.mkdir(parents=True, exist_ok=True)
    parts = [
        _introduction(found, stored, Path(os.path.relpath(results / RUNS_FILE, out)).as_posix())
    ]
    for one in found:
        parts += _study(one)
    trials = [(one.study.name, trials_table(one)) for one in found]
    parts += ["## Learning rates", _TRIALS]
    parts += [f"### Study `{name}`\n\n{shown}" for name, shown in trials if shown]
    (out / REPORT).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {out / REPORT}")


def _introduction(found: Sequence[Found], stored: StoredRuns, file: str) -> str:
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
    template = Path(__file__).with_name("report_introduction.md").read_text(encoding="utf-8")
    return template.strip().format(
        file=file,
        count=len(used),
        others=len(stored) - len(used),
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
    return parts


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
    tried = sorted(cell.scores)
    at_edge = len(tried) > 1 and cell.learning_rate in (tried[0], tried[-1])
    return f"{cell.learning_rate:g}" + "†" * at_edge


def _titles(found: Found) -> list[str]:
    metrics = [(task, found.metric(task)) for task in found.study.tasks]
    unit = {True: " (lower is better)", False: ", %"}
    return [f"{task}, {metric}{unit[metric in LOWER_IS_BETTER]}" for task, metric in metrics]


def _figure(metric: str, value: float, sign: str = "") -> str:
    """In percent, or unscaled where lower is better."""
    return f"{value:{sign}.2f}" if metric in LOWER_IS_BETTER else f"{100 * value:{sign}.1f}"


def _with_error(
    found: Found, metric: str, values: Sequence[float], scale: float, sign: str = ""
) -> str:
    """The mean of values and their deviation over `scale`; how many, where it is not all seeds."""
    count = len(values)
    error = f" ± {_figure(metric, stdev(values) / scale)}" if count > 1 else ""
    seeds = f" ({count} seed{'s' * (count != 1)})" if count != len(found.seeds) else ""
    return f"{_figure(metric, fmean(values), sign)}{error}{seeds}"


def _by_task(found: Found, head: str, lines: Sequence[tuple[str, Callable[[str], str]]]) -> str:
    """A table with a column per task, without empty lines; "" if all are empty."""
    filled = [[label, *map(cell_of, found.study.tasks)] for label, cell_of in lines]
    shown = [line for line in filled if any(cell != NONE for cell in line[1:])]
    return table([head, *_titles(found)], shown) if shown else ""


def difference_table(found: Found) -> str:
    """The study's differences, paired by seed: those it names, or DCFT minus LoRA r=1."""
    variants = found.study.variants
    lora = [variant.label for variant in variants if variant.label == "LoRA r=1"]
    dcft = [variant.label for variant in variants if "dcft" in variant.method.split("_")]
    pairs = found.study.differences or [(one, other) for one in dcft for other in lora]
    lines = [(f"{one} − {two}", partial(_difference, found, one, two)) for one, two in pairs]
    return _by_task(found, "difference", lines)


def _difference(found: Found, one: str, other: str, task: str) -> str:
    ours, theirs = found.cells[one, task].values, found.cells[other, task].values
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return NONE
    return _with_error(found, found.metric(task), differences, len(differences) ** 0.5, "+")


def trials_table(found: Found) -> str:
    """Every candidate's score on the slice of train, the chosen one bold; "" without trials."""
    lines = [(v.label, partial(_trials, found, v)) for v in found.study.variants if not v.rates_of]
    return _by_task(found, "rate → score", lines)


def _trials(found: Found, variant: Variant, task: str) -> str:
    cell, shown = found.cell(variant, task), []
    for rate, value in cell.scores.items():
        score = "failed" if value is None else _figure(found.study.criterion(task), value)
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
        if pairs and label != reference.label:
            losses = [p for a, b in pairs for p in zip(a.loss_curve, b.loss_curve, strict=False)]
            largest = _largest([(loss, other) for (_, loss), (_, other) in losses])
            largest += _largest([(a.value or 0.0, b.value or 0.0) for a, b in pairs])
            lines.append([f"{label} − {reference.label}, {task}", str(len(pairs)), *largest])
    heads = ["difference", "seeds", "loss", "loss, relative", "metric", "metric, relative"]
    return table(heads, lines) if lines else ""


def _largest(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """The largest absolute and relative difference."""
    absolute = max(abs(value - other) for value, other in pairs)
    relative = max(abs(value - other) / abs(other) if other else 0.0 for value, other in pairs)
    return [f"{number:.1e}" if number else "0" for number in (absolute, relative)]


if __name__ == "__main__":
    sys.exit(main())
