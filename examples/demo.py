"""Fine-tune a pretrained text encoder with DCFT and compare it: `make demo`.

By default the encoder is all-MiniLM-L6-v2 and the task is to tell which standard-library module a
docstring comes from; nothing is downloaded. `--task cola --data DIR` reads GLUE instead, and
`--model NAME` takes any encoder from the Hugging Face hub. Prints one table and writes, to
`--output`, `demo.png`, `results.json`, and the trained adapters. Exits with 1 if a check fails and
with 2 if something it needs is missing.

    text_task, docstring_task, glue_task   what is learnt
    backbone, text_classifier, adapters    what learns it
    fine_tuning                            how
    comparison, fidelity, step_timing      what is measured
    report, progress_bars                  what is shown
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console

from adapters import DCFTSettings
from backbone import MINILM, load_backbone
from comparison import Experiment, compare
from docstring_task import docstring_task
from fine_tuning import Recipe
from glue_task import GLUE_TASKS, glue_task
from progress_bars import ProgressBars
from report import draw, table, write_json
from text_task import DemoError, TextTask

DOCSTRINGS = "docstrings"
_PLAIN_WIDTH = 110
_QUICK_TRAIN, _QUICK_HELD_OUT = 192, 96


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    # Announcements of transformers and peft to their own maintainers.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        failures = _run(options, console)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"demo: check failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _run(options: argparse.Namespace, console: Console) -> list[str]:
    device = _device(options.device)
    task = _task(options)
    backbone = load_backbone(options.model)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = DCFTSettings(options.rank, options.kernel_size, options.alpha, options.init)
    recipe = Recipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        dcft_lr=options.lr,
        lora_lr=options.lora_lr,
        head_lr=options.head_lr,
    )
    experiment = Experiment(
        task=task,
        backbone=backbone,
        settings=settings,
        recipe=recipe,
        seeds=options.seeds,
        timing_rounds=options.timing_rounds,
        device=device,
        output=options.output,
    )
    with ProgressBars(console) as bars:
        outcome = compare(experiment, bars)
    record = {
        "command": vars(options),
        "dcft": dataclasses.asdict(settings),
        "recipe": dataclasses.asdict(recipe),
    }
    write_json(options.output / "results.json", backbone.name, task, outcome, record)
    draw(options.output / "demo.png", backbone.name, task, outcome)
    console.print(table(task, backbone.name, outcome))
    console.print(f"Picture, figures and adapters: {options.output}/")
    return outcome.fidelity.failures()


def _task(options: argparse.Namespace) -> TextTask:
    if options.task == DOCSTRINGS:
        if options.data is not None:
            raise DemoError(
                f"--data: got {options.data}, but the task {DOCSTRINGS!r} reads no files; "
                f"add --task, one of {', '.join(GLUE_TASKS)}"
            )
        task = docstring_task()
    else:
        task = glue_task(options.task, options.data)
    if options.validate:
        task = task.for_validation()
    task = task.limited(options.train_size)
    return task.limited(_QUICK_TRAIN, _QUICK_HELD_OUT) if options.quick else task


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(
            f"--device: {name!r} cannot be used here: {reason}; pass cpu, or leave it out"
        ) from None
    return device


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    recipe, settings = Recipe(), DCFTSettings()
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description="Fine-tune a pretrained text encoder with DCFT and compare it with LoRA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_argument_group("what to train")
    add = what.add_argument
    add("--task", choices=(DOCSTRINGS, *GLUE_TASKS), default=DOCSTRINGS, help="what to learn")
    add("--data", type=Path, help="for a GLUE task: the folder with TASK/train.tsv and dev.tsv")
    add("--model", default=MINILM, help="encoder: a name on the Hugging Face hub, or a folder")
    add("--train-size", type=_positive, help="training texts to use, all if left out")
    add("--validate", action="store_true", help="score on a fifth of the training split")
    how = parser.add_argument_group("how to train it")
    add = how.add_argument
    add("--rank", type=_positive, default=settings.rank, help="rank of DCFT")
    add("--kernel-size", type=_positive, default=settings.kernel_size, help="kernel size of DCFT")
    add("--alpha", type=_number, default=settings.alpha, help="scaling of DCFT, times its rank")
    add("--init", choices=("balanced", "zero", "paper"), default=settings.init, help="DCFT's start")
    add("--lr", type=_number, default=recipe.dcft_lr, help="learning rate of DCFT")
    add("--lora-lr", type=_number, default=recipe.lora_lr, help="learning rate of LoRA")
    add("--head-lr", type=_number, default=recipe.head_lr, help="learning rate of all heads")
    add("--epochs", type=_positive, default=recipe.epochs, help="passes over the training texts")
    add("--batch-size", type=_positive, default=recipe.batch_size, help="texts in a step")
    add("--seeds", type=_positive, default=2, help="number of runs, with seeds 0, 1, ...")
    add("--timing-rounds", type=_positive, default=12, help="timed steps of each method")
    add("--device", help="cpu or cuda; a GPU where there is one if left out")
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke run: few texts, one seed")
    add("--output", type=Path, default=Path("outputs/demo"), help="folder for what it writes")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.timing_rounds = 1, 3
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
