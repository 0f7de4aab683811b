"""Sentence classification and regression: GLUE, and files like it.

    DIR/<task>/train.tsv, DIR/<task>/dev.tsv        each may be gzipped: train.tsv.gz

The first line names the columns: `sentence1`, for pairs `sentence2`, and `label`. A folder that
holds such files itself is a classification task with the labels 0, 1, ...
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality import tasks
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.metrics import METRICS, Values, mse, of_logits
from benchmarks.quality.tasks import Feature, Prepared, Splits, Task

# STS-B's scores are 0 to 5; the model predicts 0 to 1. Correlations do not change.
_HIGHEST_SCORE = 5.0

# The slice of train is a fifth of it, in blocks: neighbours in a file may share their source.
_SLICE_OF = 5
_BLOCK = 30


class Example(NamedTuple):
    """A sentence or a pair, with its class or its score from 0 to 1."""

    texts: tuple[str, ...]
    label: float


def read_tsv(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Read columns of a tab-separated file with a header. Quotes are text; .gz is unpacked."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header, rows = reader.fieldnames or [], []
        for column in columns:
            if column not in header:
                raise ValueError(f"{path}: no column {column!r}; it has {', '.join(header)}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: expected {len(header)} fields")
            rows.append(tuple(row[column] for column in columns))
    return rows


def own_task(folder: Path) -> Task:
    """The task that a folder with train.tsv and dev.tsv defines."""
    path, sentences = _find(folder, "train"), 2
    try:
        rows = read_tsv(path, _columns(sentences))
    except ValueError:
        sentences = 1
        rows = _rows(path, sentences)
    labels = {row[-1] for row in rows}
    classes = max(2, len(labels))
    if labels != {str(number) for number in range(classes)}:
        raise QualityError(
            f"--task: {path} has the labels {', '.join(sorted(labels)[:10]) or 'none'}; expected "
            "classes 0, 1, ... without a gap, at least two"
        )
    return Task(folder.name, "classification", classes=classes, sentences=sentences)


def read(task: Task, folder: Path) -> Splits[Example]:
    """Both splits from a folder."""
    if not folder.is_dir() or (folder.name in tasks.TASKS and folder.name != task.name):
        # Another task's files may look the same, and its labels may fit.
        raise QualityError(
            f"--data: expected a folder with {task.name}/train.tsv and {task.name}/dev.tsv, got "
            f"{folder}"
        )
    place = folder / task.name if (folder / task.name).is_dir() else folder
    train, dev = (_examples(task, _find(place, split)) for split in ("train", "dev"))
    digest = hashlib.sha256()
    for examples in (train, dev):
        digest.update(f"{len(examples)} ".encode())
        for example in examples:
            digest.update(repr(tuple(example)).encode())
    return Splits(train, dev, digest.hexdigest()[:12])


def _find(folder: Path, split: str) -> Path:
    for name in (f"{split}.tsv", f"{split}.tsv.gz"):
        if (folder / name).is_file():
            return folder / name
    held = ", ".join(sorted(child.name for child in folder.iterdir())[:10]) or "nothing"
    raise QualityError(f"--data: {folder} lacks {split}.tsv (or {split}.tsv.gz); it holds {held}")


def _columns(sentences: int) -> tuple[str, ...]:
    return (*("sentence1", "sentence2")[:sentences], "label")


def _rows(path: Path, sentences: int) -> list[tuple[str, ...]]:
    try:
        return read_tsv(path, _columns(sentences))
    except (ValueError, csv.Error, OSError, EOFError) as error:
        raise QualityError(f"--data: {path} could not be read: {error}") from error


def _examples(task: Task, path: Path) -> list[Example]:
    rows = enumerate(_rows(path, task.sentences), start=1)
    found = [Example(row[:-1], _label(task, row[-1], f"{path}, row {n}")) for n, row in rows]
    if not found:
        raise QualityError(f"--data: {path} holds no examples")
    return found


def _label(task: Task, text: str, where: str) -> float:
    """The number of a class, or a score scaled to 0..1."""
    try:
        label = float(text)
    except ValueError:
        label = math.nan
    if task.kind == "regression" and 0.0 <= label <= _HIGHEST_SCORE:
        return label / _HIGHEST_SCORE
    if label in range(task.classes):
        return label
    expected = f"one of 0 to {task.classes - 1}" if task.classes else "a score from 0 to 5"
    raise QualityError(f"--data: {where}: expected the label to be {expected}, got {text!r}")


def slice_of_train(splits: Splits[Example]) -> Splits[Example]:
    """Splits whose dev split is a fifth of the training examples; the real one is not used."""
    count = len(splits.train)
    if count < 2:
        raise QualityError(f"--lr: a search needs at least 2 training examples, got {count}")
    block = max(1, min(_BLOCK, count // _SLICE_OF))
    return splits.hold_out([place // block % _SLICE_OF == 0 for place in range(count)])


def prepare(task: Task, splits: Splits[Example], tokenizer: Any, max_tokens: int) -> Prepared:
    """Tokenize both splits; the scored one is sorted by length, which leaves little padding."""
    from transformers import DataCollatorWithPadding

    regression = task.kind == "regression"
    train, evaluation = (
        _features(examples, tokenizer, max_tokens, float if regression else int)
        for examples in (splits.train, splits.dev)
    )
    evaluation.sort(key=lambda feature: len(feature["input_ids"]))
    kind = np.float32 if regression else np.int64  # what the model's labels are
    labels = np.array([feature["labels"] for feature in evaluation], dtype=kind)
    known = [example.label for example in splits.train]
    constant = sum(known) / len(known) if regression else Counter(known).most_common(1)[0][0]

    def scores_of(predictions: Values, labels: Values) -> dict[str, float]:
        return {metric: METRICS[metric](predictions, labels) for metric in task.metrics}

    def score(logits: list[Any], kept: Any = slice(None)) -> Mapping[str, float]:
        outputs, expected = np.stack(logits).astype(np.float64)[kept], labels[kept]
        if not np.isfinite(outputs).all():  # argmax would take NaN for a class
            raise DivergedError("the model's outputs are not finite")
        if regression:
            predictions = outputs.reshape(len(expected))
            return {**scores_of(predictions, expected), "mse": mse(predictions, expected)}
        official = scores_of(outputs.argmax(-1), expected)
        return {**official, **of_logits(outputs, expected, known.count(1) / len(known))}

    return Prepared(
        train=train,
        evaluation=evaluation,
        collate=DataCollatorWithPadding(tokenizer),
        reduce=lambda output, _: list(output.logits.float().cpu().numpy()),
        score=score,
        constant_score=scores_of(np.full(len(labels), constant), labels),
        outputs=max(1, task.classes),
        digest=splits.digest,
    )


def _features(
    examples: Sequence[Example], tokenizer: Any, max_tokens: int, kind: type[float]
) -> list[Feature]:
    texts = [list(column) for column in zip(*(e.texts for e in examples), strict=True)]
    encoded = tokenizer(*texts, truncation=True, max_length=max_tokens)
    return [
        {**{key: column[place] for key, column in encoded.items()}, "labels": kind(example.label)}
        for place, example in enumerate(examples)
    ]
