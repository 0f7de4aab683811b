"""Fine-tune and score: `python -m benchmarks.quality --task cola --method dcft --seeds 3`."""

from __future__ import annotations

import argparse
import ast
import fnmatch
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.quality import report, studies, tasks
from benchmarks.quality.errors import QualityError
from benchmarks.quality.methods.table import METHODS, by_name
from benchmarks.quality.models import PACKAGED, TARGETS
from benchmarks.quality.runs import FOLDER, RUNS_FILE, Run, by_key, read
from benchmarks.quality.session import Session
from benchmarks.quality.studies import Found, Study, Variant


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a run diverged and 2 for a mistake that the caller can fix."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    try:
        asked = _studies(options, parser)
        path = options.results / RUNS_FILE
        session = Session(options.data, path, console)
        for study in asked:
            session.study(study)
    except QualityError as error:
        console.print(f"error: {error}", style="red")
        return 2
    found = [Found.of(by_key(read(path)), study) for study in asked]
    for one in found:
        console.print(f"\n{report.results_table(one)}\n")
    console.print(f"stored in {path}")
    return 1 if any(cell.failed for one in found for cell in one.cells.values()) else 0


def _studies(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Study]:
    """The named studies, or the one that the other arguments describe."""
    if options.study:
        for name in ("method", "option", "lr", "targets"):
            if getattr(options, name) != parser.get_default(name):
                raise QualityError(f"--{name}: --study sets it; leave one of them out")
        return [_overridden(studies.by_name(name), options) for name in options.study.split(",")]
    if not options.task:
        raise QualityError("--task: expected a task, or --study with a study's name, got neither")
    variants = []
    for name in options.method.split(","):
        given = _options_of(name, options)
        known = by_name(name).options
        if "init" in known:
            given.setdefault("init", known["init"])  # stored by name: the default may change
        rates = None if options.lr == "search" else (options.lr,)
        variants.append(Variant(name, name, given, options.targets, rates))
    study = Study("", "", tuple(variants), (), seeds=1, settings=Run(task="", method=""))
    return [_overridden(study, options)]


def _options_of(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """The `name=value` options for all methods and, as in `lora.r=8`, for this one.

    A value is a Python number, boolean, None or tuple, or else text.
    """
    found: dict[str, Any] = {}
    for pair in options.option:
        name, equals, text = pair.partition("=")
        owner, _, option = name.rpartition(".")
        if not option or not equals:
            raise QualityError(f"--option: expected name=value, got {pair!r}")
        if owner and owner not in options.method.split(","):
            raise QualityError(f"--option: {pair} is for {owner!r}, which is not in --method")
        if owner in ("", method):
            try:
                found[option] = ast.literal_eval(text)
                json.dumps(found[option])  # it is stored with the results
            except (ValueError, SyntaxError, TypeError):
                found[option] = text
    return found


def _overridden(study: Study, options: argparse.Namespace) -> Study:
    """The study with the command line's tasks, seeds, variants and settings."""
    patterns = options.variants.split(",")
    variants = [v for v in study.variants if any(fnmatch.fnmatch(v.label, p) for p in patterns)]
    if not variants:
        labels = ", ".join(variant.label for variant in study.variants)
        raise QualityError(f"--variants: {options.variants!r} matches none of {labels}")
    # Folders stay as they are; a task is stored by its name, sst2 for "SST-2".
    names = [
        name if name not in tasks.TASKS and Path(name).is_dir() else tasks.by_name(name).name
        for name in (options.task.split(",") if options.task else study.tasks)
    ]
    of_a_run = {entry.name for entry in fields(Run)} - {"task", "method", "targets"}
    given = {name: value for name, value in vars(options).items() if name in of_a_run}
    changes = {name: value for name, value in given.items() if value is not None}
    study = replace(study, settings=replace(study.settings, **changes), variants=tuple(variants))
    return replace(study, tasks=tuple(names), seeds=options.seeds or study.seeds)


def _positive(kind: type[float]) -> Callable[[str], float]:
    def positive_number(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text!r}")
        return number

    return positive_number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        allow_abbrev=False,
        description="Fine-tune a pretrained model with several methods and store the scores. "
        "Stored runs are not repeated; interrupted ones resume.",
    )
    add, count, rate = parser.add_argument, _positive(int), _positive(float)
    names = f"{', '.join(tasks.TASKS)}, or a folder with train.tsv and dev.tsv"
    add("--task", help=f"comma-separated: {names}")
    add("--method", default="dcft", help=f"comma-separated: {', '.join(METHODS)}")
    add("--option", action="append", default=[], help="NAME=VALUE for all methods, or "
        "METHOD.NAME=VALUE for one")  # fmt: skip
    add("--study", help=f"comma-separated: {', '.join(studies.STUDIES)}")
    add("--variants", default="*", help="only these lines of the study, * as a wildcard (*)")
    add("--seeds", type=count, help="how many, from 0 (1)")
    add("--lr", type=lambda text: text if text == "search" else rate(text), default="search",
        help="a learning rate, or the best one on a slice of train (search)")  # fmt: skip
    add("--data", type=Path, help="the folder or the text file of the task")
    add("--model", help=f"from PyPI packages {', '.join(PACKAGED)}; a folder, or a name on the hub")
    add("--targets", default="ALL", help=f"layers: {', '.join(TARGETS)} (ALL)")
    add("--steps", type=count, help="optimizer steps (250)")
    add("--batch-size", type=count, help="examples per step (32)")
    add("--head-lr", dest="head_learning_rate", type=rate, help="of the task's head (1e-3)")
    add("--train-size", type=count, help="number of training examples, evenly spread (all)")
    add("--scored-size", type=count, help="number of scored examples, evenly spread (all)")
    add("--max-tokens", type=count, help="truncate texts there (the task's own limit)")
    add("--evaluations", type=count, help="how often to score, the last time at the end (1)")
    add("--weight-decay", type=float, help="AdamW's, of all that is trained (0)")
    add("--replicate", type=int, help="number of another dropout stream of the same seeds (0)")
    add("--stopping", action="store_const", const=True, help="score at the evaluation with the "
        "lowest loss on a slice of train, which is left out")  # fmt: skip
    add("--precision", choices=("fp32", "bf16"), help="bf16: autocast (fp32)")
    add("--results", type=Path, default=FOLDER, help=f"folder of the results ({FOLDER})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
