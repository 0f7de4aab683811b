"""Sentence classification and regression: GLUE, and files like it.

    DIR/<task>/train.tsv, DIR/<task>/dev.tsv        each may be gzipped: train.tsv.gz

The first line names the columns: `sentence1`, for pairs `sentence2`, and `label`. A folder that
holds such files itself is a classification task with the labels 0, 1, ...
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality import tasks
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.metrics import METRICS, Values
from benchmarks.quality.tasks import Feature, Prepared, Splits, Task
from examples.finetune import read_tsv

# STS-B's scores are 0 to 5; the model predicts 0 to 1. Correlations do not change.
_HIGHEST_SCORE = 5.0

# The slice of train is a fifth of it, in blocks: neighbours in a file may share their source.
_SLICE_OF = 5
_BLOCK = 30


class Example(NamedTuple):
    """A sentence or a pair, with its class or its score from 0 to 1."""

    texts: tuple[str, ...]
    label: float


def own_task(folder: Path) -> Task:
    """The task that a folder with train.tsv and dev.tsv defines."""
    path = _find(folder, "train")
    try:
        rows, columns = read_tsv(path, ("sentence1", "sentence2", "label")), 2
    except ValueError:
        rows, columns = _rows(path, ("sentence1", "label")), 1
    labels = {row[-1] for row in rows}
    expected = [str(number) for number in range(max(2, len(labels)))]
    if labels != set(expected):
        raise QualityError(
            f"--task: {path} has the labels {', '.join(sorted(labels)[:10]) or 'none'}; expected "
            "classes 0, 1, ... without a gap, at least two"
        )
    names = ("sentence1", "sentence2")[:columns]
    return Task(folder.name, "classification", names, ("accuracy",), tuple(expected))


def read(task: Task, folder: Path | None) -> Splits[Example]:
    """Both splits from a folder, or without one from the Hugging Face hub."""
    if folder is None:
        return _splits(_from_hub(task, "train"), _from_hub(task, task.dev_split))
    if not folder.is_dir() or (folder.name in tasks.TASKS and folder.name != task.name):
        # Another task's files may look the same, and its labels may fit.
        problem = "is not a folder" if not folder.is_dir() else "is another task's folder"
        raise QualityError(
            f"--data: {folder} {problem}; expected one that holds {task.name}/train.tsv and "
            f"{task.name}/dev.tsv"
        )
    inside = folder / task.name
    place = inside if inside.is_dir() else folder
    return _splits(_from_file(_find(place, "train"), task), _from_file(_find(place, "dev"), task))


def _splits(train: Sequence[Example], dev: Sequence[Example]) -> Splits[Example]:
    digest = hashlib.sha256()
    for split in (train, dev):
        digest.update(f"{len(split)} ".encode())
        for example in split:
            digest.update(repr(tuple(example)).encode())
    return Splits(train, dev, digest.hexdigest()[:12])


def _find(folder: Path, split: str) -> Path:
    for name in (f"{split}.tsv", f"{split}.tsv.gz"):
        if (folder / name).is_file():
            return folder / name
    held = ", ".join(sorted(child.name for child in folder.iterdir())[:10]) or "nothing"
    raise QualityError(f"--data: {folder} lacks {split}.tsv (or {split}.tsv.gz); it holds {held}")


def _rows(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    try:
        return read_tsv(path, columns)
    except (ValueError, csv.Error, OSError, EOFError) as error:
        raise QualityError(f"--data: {path} could not be read: {error}") from error


def _from_file(path: Path, task: Task) -> list[Example]:
    columns = (*("sentence1", "sentence2")[: len(task.columns)], "label")
    return _examples(task, _rows(path, columns), str(path))


def _from_hub(task: Task, split: str) -> list[Example]:
    columns = (*task.columns, "label")
    rows = [tuple(str(row[name]) for name in columns) for row in tasks.read_hub(task, split)]
    return _examples(task, rows, f"{task.name}, {split}")


def _examples(task: Task, rows: Sequence[tuple[str, ...]], source: str) -> list[Example]:
    if not rows:
        raise QualityError(f"--data: {source} holds no examples")
    return [
        Example(row[:-1], _label(task, row[-1], f"{source}, row {number}"))
        for number, row in enumerate(rows, start=1)
    ]


def _label(task: Task, text: str, where: str) -> float:
    """The number of a class, or a score scaled to 0..1."""
    try:
        label = float(text)
    except ValueError:
        label = float("nan")
    if task.kind == "regression":
        if 0.0 <= label <= _HIGHEST_SCORE:
            return label / _HIGHEST_SCORE
        expected = f"a number from 0 to {_HIGHEST_SCORE:g}"
    else:
        if label in range(len(task.labels)):
            return label
        classes = ", ".join(f"{number} ({name})" for number, name in enumerate(task.labels))
        expected = f"one of {classes}"
    raise QualityError(f"--data: {where}: expected the label to be {expected}, got {text!r}")


def slice_of_train(splits: Splits[Example]) -> Splits[Example]:
    """Splits whose dev split is a fifth of the training examples; the real one is not used."""
    count = len(splits.train)
    if count < 2:
        raise QualityError(
            f"--lr: a search needs at least 2 training examples, got {count}; pass a number"
        )
    block = max(1, min(_BLOCK, count // _SLICE_OF))
    return splits.hold_out([place // block % _SLICE_OF == 0 for place in range(count)])


def prepare(task: Task, splits: Splits[Example], tokenizer: Any, max_tokens: int) -> Prepared:
    """Tokenize both splits; the scored one is sorted by length, which leaves little padding."""
    from transformers import DataCollatorWithPadding

    train = _features(splits.train, task, tokenizer, max_tokens)
    evaluation = _features(splits.dev, task, tokenizer, max_tokens)
    evaluation.sort(key=lambda feature: len(feature["input_ids"]))
    kind = np.float32 if task.kind == "regression" else np.int64  # what the model's labels are
    labels = np.array([feature["labels"] for feature in evaluation], dtype=kind)

    def score(logits: list[Any]) -> Mapping[str, float]:
        outputs = np.stack(logits)
        if not np.isfinite(outputs).all():  # argmax would take NaN for a class
            raise DivergedError("the model's outputs are not finite")
        regression = task.kind == "regression"
        predictions = outputs.reshape(len(labels)) if regression else outputs.argmax(-1)
        return _scores(task, predictions, labels)

    return Prepared(
        train=train,
        evaluation=evaluation,
        collate=DataCollatorWithPadding(tokenizer),
        reduce=lambda output, _: list(output.logits.float().cpu().numpy()),
        score=score,
        constant_score=_scores(task, np.full(len(labels), _constant(task, splits.train)), labels),
        outputs=max(1, len(task.labels)),
        digest=splits.digest,
    )


def _features(
    examples: Sequence[Example], task: Task, tokenizer: Any, max_tokens: int
) -> list[Feature]:
    texts = [list(column) for column in zip(*(e.texts for e in examples), strict=True)]
    encoded = tokenizer(*texts, truncation=True, max_length=max_tokens)
    labels = [e.label if task.kind == "regression" else int(e.label) for e in examples]
    return [
        {**{key: column[place] for key, column in encoded.items()}, "labels": label}
        for place, label in enumerate(labels)
    ]


def _constant(task: Task, train: Sequence[Example]) -> float:
    labels = [example.label for example in train]
    if task.kind == "regression":
        return sum(labels) / len(labels)
    return Counter(labels).most_common(1)[0][0]


def _scores(task: Task, predictions: Values, labels: Values) -> dict[str, float]:
    return {metric: METRICS[metric](predictions, labels) for metric in task.metrics}
