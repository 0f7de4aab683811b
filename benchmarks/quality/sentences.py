"""Sentence classification and regression: GLUE and files like it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.metrics import METRICS, Values
from benchmarks.quality.prepared import Feature, Prepared
from benchmarks.quality.tasks import Task
from benchmarks.quality.text_files import Example, Splits

# Neighbours in a file may come from one source: they stay on one side of the slice, in blocks.
_BLOCK = 30
_SLICE_OF = 5


def slice_of_train(splits: Splits) -> Splits:
    """A fifth of the training examples takes the place of the dev split, which is not looked at.

    Raises:
        QualityError: too few training examples.
    """
    count = len(splits.train)
    if count < 2:
        raise QualityError(
            f"--lr: a search needs at least 2 training examples, got {count}; pass a number"
        )
    # Of few examples a fifth, too.
    block = max(1, min(_BLOCK, count // _SLICE_OF))
    held = [place // block % _SLICE_OF == 0 for place in range(count)]
    paired = list(zip(splits.train, held, strict=True))
    return Splits([e for e, out in paired if not out], [e for e, out in paired if out])


def prepare(
    task: Task, splits: Splits, tokenizer: Any, max_tokens: int, digest: str | None = None
) -> Prepared:
    """Tokenise both splits; the scored one in order of length, so that little of it is padding."""
    from transformers import DataCollatorWithPadding

    train = _features(splits.train, task, tokenizer, max_tokens)
    evaluation = _features(splits.dev, task, tokenizer, max_tokens)
    evaluation.sort(key=lambda feature: len(feature["input_ids"]))
    labels = np.array([feature["labels"] for feature in evaluation])

    def score(outputs: Any, truth: Any) -> Mapping[str, float]:
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        # The largest of numbers that are none would be class 0.
        if not np.isfinite(outputs).all():
            raise DivergedError("the model gave outputs that are not finite")
        if task.kind == "regression":
            predictions = np.asarray(outputs).reshape(len(truth))
        else:
            predictions = np.asarray(outputs).argmax(-1)
        return _scores(task, predictions, np.asarray(truth))

    return Prepared(
        train=train,
        evaluation=evaluation,
        collate=DataCollatorWithPadding(tokenizer),
        score=score,
        constant_score=_scores(task, np.full(len(labels), _constant(task, splits.train)), labels),
        outputs=max(1, len(task.labels)),
        digest=digest or splits.digest(),
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
