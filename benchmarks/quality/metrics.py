"""The official metric of every task, from predictions and labels."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]


def accuracy(predictions: Values, labels: Values) -> float:
    """The fraction of labels that were predicted."""
    return float(np.mean(predictions == labels))


def pearson(predictions: Values, labels: Values) -> float:
    """Pearson correlation; 0 if either side is constant."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions.astype(np.float64), labels.astype(np.float64))[0, 1])


def f1(predictions: Values, labels: Values) -> float:
    """F1 of class 1; 0 if it is neither predicted nor a label."""
    both = float(np.sum((predictions == 1) & (labels == 1)))
    either = float(np.sum(predictions == 1) + np.sum(labels == 1))
    return 2 * both / either if either else 0.0


def answers(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], may_be_empty: bool
) -> dict[str, float]:
    """SQuAD's F1 and exact match: of each question the best over its answers.

    Args:
        may_be_empty: whether an empty prediction is right where there is no answer, as in v2.0.
    """
    found = []
    for prediction, expected in zip(predictions, answers, strict=True):
        given, known = normalized(prediction), [normalized(answer) for answer in expected]
        if may_be_empty:
            known = [answer for answer in known if answer] or [""]
        exact = float(given in known)
        f1 = max(_word_f1(given, answer) for answer in known)
        found.append((exact if may_be_empty and not given else f1, exact))
    f1, exact = np.mean(found, axis=0)
    return {"f1": float(f1), "exact": float(exact)}


def normalized(answer: str) -> str:
    """What SQuAD compares: the words, without case, punctuation and articles."""
    plain = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", plain).split())


def _word_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, with multiplicity."""
    given, expected = prediction.split(), answer.split()
    common = sum((Counter(given) & Counter(expected)).values())
    return 2 * common / (len(given) + len(expected)) if common else 0.0


METRICS: Mapping[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "matthews": pearson,  # of two classes the Matthews correlation is the Pearson correlation
    "pearson": pearson,
    "f1": f1,
}
"""Higher is better, 1 is perfect."""

LOWER_IS_BETTER = frozenset({"perplexity"})
