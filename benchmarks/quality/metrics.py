"""The metrics of every task, from predictions and labels."""

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
    x, y = predictions.astype(np.float64), labels.astype(np.float64)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


def f1(predictions: Values, labels: Values) -> float:
    """F1 of class 1; 0 if it is neither predicted nor a label."""
    both = float(np.sum((predictions == 1) & (labels == 1)))
    either = float(np.sum(predictions == 1) + np.sum(labels == 1))
    return 2 * both / either if either else 0.0


def of_logits(logits: Values, labels: Values, prior: float) -> dict[str, float]:
    """Metrics of class logits `[examples, classes]`: the NLL, and for two classes two more.

    `prior` is class 1's share of the training split, the threshold of `matthews_at_prior`.
    """
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, labels[:, None], -1)[:, 0]
    found = {"nll": float(np.mean(np.log(np.exp(shifted).sum(-1)) - chosen))}
    if logits.shape[1] == 2:
        margin = logits[:, 1] - logits[:, 0]
        probability = 0.5 * (1.0 + np.tanh(0.5 * margin))
        found["auc"] = auc(margin, labels)
        found["matthews_at_prior"] = pearson(probability > prior, labels)
    return found


def auc(scores: Values, labels: Values) -> float:
    """Area under the ROC curve of class 1, ties counted half; 0.5 if there is only one class."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - 0.5 * (counts - 1))[places]
    ones = labels == 1
    positive, negative = int(ones.sum()), int((~ones).sum())
    if not positive or not negative:
        return 0.5
    above = ranks[ones].sum() - 0.5 * positive * (positive + 1)
    return float(above / (positive * negative))


def mse(predictions: Values, labels: Values) -> float:
    """Mean squared error."""
    return float(np.mean((predictions - labels) ** 2))


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

LOWER_IS_BETTER: Mapping[str, int] = {"perplexity": 2, "nll": 3, "mse": 4}
"""The losses, with the decimals that a report shows."""
