"""Report on stored results: `python -m benchmarks.quality.report [--results FOLDER]`.

Writes `report.md` and its plots, of every study that has results. Nothing is trained here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.quality import report_plots, report_tables
from benchmarks.quality.errors import QualityError
from benchmarks.quality.found import Found, Stored
from benchmarks.quality.results import FILE, FOLDER, read
from benchmarks.quality.runs import Result, Run
from benchmarks.quality.studies import STUDIES, Study

REPORT = "report.md"

_PLOTS: dict[str, Callable[[Found, Path], bool]] = {
    "curves": report_plots.curves,
    "paired": lambda found, stem: found.study.paired and report_plots.paired(found, stem),
}

_WHAT = (
    "Written by `python -m benchmarks.quality.report`; do not edit. A pretrained model is "
    "fine-tuned on real tasks by DCFT and by other methods, and scored on the dev split by the "
    "figure that is official for the task."
)
_READING = (
    "Values are the mean over seeds ± the standard deviation (of the sample). The best of a task "
    "is bold; the constant answer is the best that can be had without reading the input. "
    "Parameters are a method's own, without the head that every method trains. "
    f"`{report_tables.NONE}` was not run. Curves are means over seeds too. Seconds say what a run "
    "costs here and no more: other work ran beside many of these, so that equal runs differ by up "
    "to a factor of two; how methods compare in time is measured by `python -m benchmarks.run`."
)
_RATES = (
    "A method's learning rate is chosen for each task among its candidates: a run at each, seed 0, "
    "is scored on a slice of the training split that these runs do not train on. The dev split is "
    "never looked at for it. Where a study states a single rate, that is taken as it is. "
    f"{report_tables.EDGE} marks a rate that is the highest or the lowest of its candidates. Every "
    "trial is under [Learning rates](#learning-rates)."
)
_TRIALS = (
    "Scores on the slice of the training split; the chosen rate is bold. Seed 0 only, so that "
    "a choice between rates that are close is a matter of luck."
)
_DIFFERENCES = "Differences, paired by seed: their mean ± its standard error."
_PAIRED = (
    "The same run by different arithmetic: the largest difference over all seeds, of the loss at "
    "any stored point (points are rounded to 8 decimals) and of the final metric, as it is, not "
    "in percent."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; 2 for something that the caller can put right."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results", type=Path, default=FOLDER, metavar="FOLDER", help=f"holds {FILE} ({FOLDER})"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the report and its plots (beside the rows)"
    )
    options = parser.parse_args(arguments)
    try:
        write(options.results, options.out or options.results)
    except (QualityError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(results: Path, out: Path, asked: Iterable[Study] = tuple(STUDIES.values())) -> None:
    """The report and its plots on the results of a folder, into the folder `out`.

    Raises:
        QualityError: no results, none of a study, or a line that is no result.
    """
    stored, studies = _stored(results), list(asked)
    found = [study for study in (Found.of(stored, study) for study in studies) if study.results]
    if not found:
        raise QualityError(
            f"--results: {results / FILE} holds {len(stored.results)} results, none with the "
            f"settings of a study; {_command(results)} makes some"
        )
    out.mkdir(parents=True, exist_ok=True)
    drawn = _draw(studies, found, out)
    file = os.path.relpath(results / FILE, out).replace(os.sep, "/")
    (out / REPORT).write_text(text(found, stored, file, drawn), encoding="utf-8")
    plots = f"{len(drawn)} plot{'s' * (len(drawn) != 1)}"
    print(f"wrote {out / REPORT} and {plots}")


def _stored(results: Path) -> Stored:
    stored = Stored(read(results / FILE))
    if not stored.results:
        state = "holds no results" if (results / FILE).exists() else "is not there"
        raise QualityError(f"--results: {results / FILE} {state}; {_command(results)} makes some")
    return stored


def _command(results: Path = FOLDER) -> str:
    elsewhere = "" if results == FOLDER else f" --results {shlex.quote(str(results))}"
    return f"`python -m benchmarks.quality --study NAME --data DIR{elsewhere}`"


def _draw(studies: Sequence[Study], found: Sequence[Found], out: Path) -> set[str]:
    """Draw what there are results for; the names of the plots. Those without are removed."""
    by_name = {one.study.name: one for one in found}
    drawn = set()
    for study in studies:
        for kind, draw in _PLOTS.items():
            stem = out / _plot(study, kind)
            if study.name in by_name and draw(by_name[study.name], stem):
                drawn.add(stem.name)
            else:
                for suffix in (".png", ".svg"):
                    stem.with_suffix(suffix).unlink(missing_ok=True)
    return drawn


def _plot(study: Study, kind: str) -> str:
    return f"{study.name}_{kind}"


def text(found: Sequence[Found], stored: Stored, file: str, drawn: set[str]) -> str:
    """The report as Markdown, with the plots that are there."""
    parts = ["# Learning quality", *_head(found, stored, file)]
    for one in found:
        parts += _study(one, drawn)
    trials = [(one, table) for one in found if (table := report_tables.trials_table(one))]
    if trials:
        parts += ["## Learning rates", _TRIALS]
    for one, table in trials:
        parts += [f"### Study `{one.study.name}`", table]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Sequence[Found], stored: Stored, file: str) -> list[str]:
    """What this is, what it was made with, and how to repeat it."""
    used = list({r.run.key(): r for one in found for r in one.results}.values())
    others = len(stored.results) - len(used)
    left_out = f" {others} more are of no study's settings and left out." if others else ""
    return [
        _WHAT,
        f"From [`{file}`]({file}), {len(used)} runs: {_provenance(used)}.{left_out}",
        f"Data by digest: {_digests(used)}.",
        _READING,
        _RATES,
        _repeat(found),
    ]


def _repeat(found: Sequence[Found]) -> str:
    names = ", ".join(f"`{one.study.name}`" for one in found)
    return (
        f"To repeat: {_command()}, where NAME is one of {names} and DIR holds the tasks' files "
        "(for `language` one .txt file); runs that are stored are not repeated (`--results FOLDER` "
        "stores elsewhere). Seeds count from 0. A seed decides on the fresh head, the method's "
        "random numbers and the order of the batches, so that all methods see the same batches."
    )


def _provenance(results: Sequence[Result]) -> str:
    """Devices, versions, commits, models and days behind results, in a line."""
    parts = [", ".join(_distinct(result.device for result in results))]
    for package in _distinct(name for result in results for name in result.versions):
        known = _distinct(r.versions[package] for r in results if package in r.versions)
        parts.append(f"{package} {', '.join(known)}")
    parts.append(f"commit {', '.join(_distinct(result.commit for result in results))}")
    parts.append(f"model {', '.join(_distinct(result.run.model for result in results))}")
    days = _distinct(result.time[:10] for result in results)
    return "; ".join([*parts, days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"])


def _digests(results: Sequence[Result]) -> str:
    return ", ".join(
        f"{task} {' and '.join(_distinct(r.data for r in results if r.run.task == task))}"
        for task in _distinct(result.run.task for result in results)
    )


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def _study(found: Found, drawn: set[str]) -> list[str]:
    """A question and its answer."""
    study = found.study
    plot = {
        kind: f"![{title}]({_plot(study, kind)}.png)"
        for kind, title in (
            ("curves", "Learning curves"),
            ("paired", "Curves on each other, and their difference"),
        )
        if _plot(study, kind) in drawn
    }
    table, notes = report_tables.results_table(found)
    numbered = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, start=1))
    difference = report_tables.difference_table(found)
    paired = report_tables.paired_table(found) if study.paired else ""
    return [
        f"## {study.question}",
        _setting(found),
        table,
        f"Failed:\n\n{numbered}" if notes else "",
        f"{_DIFFERENCES}\n\n{difference}" if difference else "",
        f"{_PAIRED}\n\n{paired}" if paired else "",
        plot.get("paired", ""),
        plot.get("curves", ""),
    ]


def _setting(found: Found) -> str:
    """How many seeds and steps, and what else is not as usual."""
    run, usual, seeds = found.study.settings, Run(task="", method=""), found.seeds
    named = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}" if seeds else "no seed as yet"
    if seeds:
        named += f" ({', '.join(map(str, seeds))})"
    parts = [named, f"{run.steps} steps of {run.batch_size} examples", f"model {run.model}"]
    if run.train_size is not None:
        parts.append(f"{run.train_size} training examples")
    if run.scored_size is not None:
        parts.append(f"{run.scored_size} examples scored")
    if run.max_tokens != usual.max_tokens:
        parts.append(f"texts cut at {run.max_tokens} tokens")
    if run.precision != usual.precision:
        parts.append(f"precision {run.precision}")
    return f"Study `{found.study.name}`: {', '.join(parts)}."


if __name__ == "__main__":
    sys.exit(main())
