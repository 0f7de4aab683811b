"""The official figure of every task, from predictions and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]


def accuracy(predictions: Values, labels: Values) -> float:
    """The share of labels that were predicted."""
    return float(np.mean(predictions == labels))


def pearson(predictions: Values, labels: Values) -> float:
    """Pearson correlation; 0 where either side is constant."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions.astype(np.float64), labels.astype(np.float64))[0, 1])


def matthews(predictions: Values, labels: Values) -> float:
    """Matthews correlation of two classes, which is their Pearson correlation; 0 by convention
    where only one class is predicted."""
    return pearson(predictions, labels)


def f1(predictions: Values, labels: Values) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where neither side has one."""
    both = float(np.sum((predictions == 1) & (labels == 1)))
    either = float(np.sum(predictions == 1) + np.sum(labels == 1))
    return 2 * both / either if either else 0.0


METRICS: Mapping[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "pearson": pearson,
    "f1": f1,
}
"""Of one prediction an example; higher is better, 1 is perfect."""

LOWER_IS_BETTER = frozenset({"perplexity"})


def better(metric: str, value: float, other: float) -> bool:
    """Whether `value` beats `other`."""
    return value < other if metric in LOWER_IS_BETTER else value > other
