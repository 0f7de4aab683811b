"""What a text task is: examples, a held-out split, and the figure that scores predictions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

_VALIDATION_BLOCK = 30


class DemoError(Exception):
    """Something the person running the demo can put right; shown without a traceback."""


class Example(NamedTuple):
    """One sentence, or a sentence pair, with its class index or (for regression) its score."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Metric:
    """A named score of predictions against labels (both `[N]`); higher is better, 1 is perfect."""

    name: str
    score: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class TextTask:
    """Training and held-out examples; `label_names` is empty when the label is a real number."""

    name: str
    description: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    label_names: tuple[str, ...]
    metric: Metric
    max_tokens: int

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def outputs(self) -> int:
        """Width of the head: one score, or one logit a class."""
        return max(1, len(self.label_names))

    def constant_baseline(self) -> float:
        """Score of always answering the training split's commonest class (or its mean)."""
        labels = [example.label for example in self.train]
        if self.is_regression:
            constant = sum(labels) / len(labels)
        else:
            constant = Counter(labels).most_common(1)[0][0]
        truth = torch.tensor([example.label for example in self.held_out])
        return self.metric.score(torch.full_like(truth, constant), truth)

    def limited(self, train_size: int | None, held_out_size: int | None = None) -> TextTask:
        """The same task with at most so many examples, spread evenly over each split."""
        return replace(
            self,
            train=_spread(self.train, train_size),
            held_out=_spread(self.held_out, held_out_size),
        )

    def for_validation(self) -> TextTask:
        """Score on a fifth of the training examples; the held-out split is not touched.

        Neighbours in the training split may come from one source: they stay together, in blocks.
        """
        fifth = [index // _VALIDATION_BLOCK % 5 == 0 for index in range(len(self.train))]
        return replace(
            self,
            description=f"{self.description}; scored on a slice of the training split",
            train=[example for example, held in zip(self.train, fifth, strict=True) if not held],
            held_out=[example for example, held in zip(self.train, fifth, strict=True) if held],
        )


def _spread(examples: Sequence[Example], size: int | None) -> Sequence[Example]:
    if size is None or size >= len(examples):
        return examples
    return [examples[index * len(examples) // size] for index in range(size)]


def _accuracy(predictions: Tensor, labels: Tensor) -> float:
    return (predictions == labels).double().mean().item()


def _matthews(predictions: Tensor, labels: Tensor) -> float:
    """Matthews correlation of two classes; 0 by convention when a class is never seen."""
    return _pearson(predictions, labels)


def _pearson(predictions: Tensor, labels: Tensor) -> float:
    """Pearson correlation; 0 by convention when either side is constant."""
    p = predictions.double() - predictions.double().mean()
    t = labels.double() - labels.double().mean()
    spread = math.sqrt((p.square().sum() * t.square().sum()).item())
    return (p * t).sum().item() / spread if spread > 0 else 0.0


ACCURACY = Metric("accuracy", _accuracy)
MATTHEWS = Metric("Matthews correlation", _matthews)
PEARSON = Metric("Pearson correlation", _pearson)
