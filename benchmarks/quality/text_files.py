"""Labelled sentences and sentence pairs, from tab-separated files or the Hugging Face hub.

    DIR/<task>/train.tsv, DIR/<task>/dev.tsv        each may be gzipped: train.tsv.gz

The first line names the columns: `sentence1`, for pairs `sentence2`, and `label`. Quotes are text.
A folder that holds such files itself is a task of its own, with classes 0, 1, ... as labels.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks.quality import hub, tasks
from benchmarks.quality.errors import QualityError
from benchmarks.quality.tasks import HIGHEST_SCORE, Task

TRAIN, DEV = "train", "dev"
_LABEL = "label"


class Example(NamedTuple):
    """One sentence, or a pair, with its class or its score from 0 to 1."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Splits:
    """A task's examples."""

    train: Sequence[Example]
    dev: Sequence[Example]

    def digest(self) -> str:
        """What tells these examples from others."""
        content = hashlib.sha256()
        for split in (self.train, self.dev):
            content.update(f"{len(split)} ".encode())
            for example in split:
                content.update(repr(tuple(example)).encode())
        return content.hexdigest()[:12]


def own_task(folder: Path) -> Task:
    """The task that a folder with train.tsv and dev.tsv is.

    Raises:
        QualityError: a file that is missing or not what it should be.
    """
    columns = _header(_find(folder, TRAIN))
    names = tuple(name for name in ("sentence1", "sentence2") if name in columns)
    required = (*(names or ("sentence1",)), _LABEL)
    classes = {number for _, number in _classes(_find(folder, TRAIN), required)}
    missing = next(number for number in range(len(classes) + 1) if number not in classes)
    if classes and missing < max(2, len(classes)):
        raise QualityError(
            f"--task: {folder} has no example with the label {missing}; expected classes 0, 1, ... "
            "without a gap, at least two"
        )
    dev = _find(folder, DEV)
    for line, number in _classes(dev, required):
        if classes and number not in classes:
            raise QualityError(
                f"--task: {dev} line {line} has the label {number}, which no training example has; "
                f"expected one of {', '.join(map(str, sorted(classes)))}"
            )
    labels = tuple(str(number) for number in range(len(classes)))
    return Task(folder.name, "classification", names, labels, ("accuracy",), None, 128)


def _classes(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Lines by number, each with its class."""
    for line, row in _rows(path, columns):
        text = row[_LABEL]
        if not text.isdecimal():
            raise QualityError(
                f"--task: {path} line {line} has the label {text!r}; expected the number of "
                "a class, 0, 1, ..."
            )
        yield line, int(text)


def read_folder(task: Task, folder: Path) -> Splits:
    """Both splits from files.

    Raises:
        QualityError: the folder, a file or a column is missing, a split is empty, or a label is
            none of the task's.
    """
    if not folder.is_dir():
        raise QualityError(
            f"--data: {folder} is not a folder; expected one that holds {task.name}/train.tsv and "
            f"{task.name}/dev.tsv"
        )
    inside = folder / task.name
    if not inside.is_dir() and folder.name in tasks.TASKS and folder.name != task.name:
        # Its files may look alike, and their labels may pass.
        raise QualityError(
            f"--data: {folder} is the folder of the task {folder.name}; expected one that holds "
            f"{task.name}/train.tsv and {task.name}/dev.tsv"
        )
    place = inside if inside.is_dir() else folder
    return Splits(_read(_find(place, TRAIN), task), _read(_find(place, DEV), task))


def read_hub(task: Task) -> Splits:
    """Both splits from the Hugging Face hub.

    Raises:
        QualityError: the package `datasets` is missing, or the hub cannot be reached.
    """
    load = hub.loader(task, f"{task.name}/train.tsv and {task.name}/dev.tsv")
    return Splits(
        _from_hub(load("train"), task, "train"), _from_hub(load(task.dev_split), task, DEV)
    )


def _from_hub(rows: Any, task: Task, split: str) -> list[Example]:
    examples = []
    for line, row in enumerate(rows):
        texts = tuple(str(row[column]) for column in task.columns)
        examples.append(Example(texts, _label(task, str(row[_LABEL]), f"{split} row {line}")))
    return _not_empty(examples, f"{task.name}, {split}")


def _read(path: Path, task: Task) -> list[Example]:
    columns = tuple(f"sentence{place + 1}" for place in range(len(task.columns)))
    examples = [
        Example(
            tuple(row[column] for column in columns),
            _label(task, row[_LABEL], f"{path} line {line}"),
        )
        for line, row in _rows(path, (*columns, _LABEL))
    ]
    return _not_empty(examples, str(path))


def _not_empty(examples: list[Example], where: str) -> list[Example]:
    if not examples:
        raise QualityError(f"--data: {where} holds no examples")
    return examples


def _label(task: Task, text: str, where: str) -> float:
    """A class's number, or a score brought to 0..1."""
    try:
        label = float(text)
    except ValueError:
        label = float("nan")
    if task.kind == "regression":
        if 0.0 <= label <= HIGHEST_SCORE:
            return label / HIGHEST_SCORE
        expected = f"a number from 0 to {HIGHEST_SCORE:g}"
    else:
        if label in range(len(task.labels)):
            return label
        classes = ", ".join(f"{number} ({name})" for number, name in enumerate(task.labels))
        expected = f"one of {classes}"
    raise QualityError(f"--data: {where} has the label {text!r}; expected {expected}")


def _find(folder: Path, split: str) -> Path:
    for suffix in (".tsv", ".tsv.gz"):
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return path
    held = ", ".join(sorted(child.name for child in folder.iterdir())[:10]) or "nothing"
    raise QualityError(
        f"--data: {folder} lacks {split}.tsv (or {split}.tsv.gz); it holds {held}; the tasks are "
        f"{', '.join(tasks.TASKS)}"
    )


def _header(path: Path) -> list[str]:
    with _open(path) as file:
        return next(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), [])


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines by number, with the columns that are asked for."""
    with _open(path) as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = list(reader.fieldnames or ())
        missing = [column for column in columns if column not in header]
        if missing:
            raise QualityError(
                f"--data: {path} lacks the column {', '.join(missing)}; its first line is "
                f"{', '.join(header) or 'empty'}; expected {', '.join(columns)}, separated by tabs"
            )
        for row in reader:
            # The reader puts fields beyond the header's at None, and None where there are too few.
            if None in row or any(row[column] is None for column in columns):
                which = "more" if None in row else "fewer"
                raise QualityError(
                    f"--data: {path} line {reader.line_num} has {which} fields than the first line"
                )
            yield reader.line_num, {column: row[column] for column in columns}


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    """The file as text; what makes it unreadable is the caller's to put right."""
    how = gzip.open if path.suffix == ".gz" else open
    try:
        with how(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (UnicodeDecodeError, csv.Error, EOFError, OSError, zlib.error) as error:
        raise QualityError(
            f"--data: {path} could not be read: {error}; expected UTF-8 text, separated by tabs"
        ) from error
