"""A task made ready for a model: features to train on, features to score, and how to score them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Feature = dict[str, Any]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Prepared:
    """What training needs of a task.

    Attributes:
        train: features in the order of the file.
        evaluation: features that are scored.
        collate: makes a batch of features.
        score: the task's figures of what the model gave for all of `evaluation`, in its order.
        constant_score: the figures of the best answer that does not look at the input: the
            commonest class, the mean, tokens as often as in a text.
        outputs: width of the head.
        digest: what tells the data from others.
        label_names: the features that are labels.
        reduce: of a batch's outputs and labels what `score` needs, where outputs are too large to
            be kept.
    """

    train: Sequence[Feature]
    evaluation: Sequence[Feature]
    collate: Callable[[list[Feature]], Any]
    score: Callable[[Any, Any], Mapping[str, float]]
    constant_score: Mapping[str, float]
    outputs: int
    digest: str
    label_names: tuple[str, ...] = ("labels",)
    reduce: Callable[[Any, Any], Any] | None = None


def spread(items: Sequence[_Item], size: int | None) -> Sequence[_Item]:
    """At most so many items, spread evenly over the sequence."""
    if size is None or size >= len(items):
        return items
    return [items[place * len(items) // size] for place in range(size)]
