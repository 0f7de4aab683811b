"""The tasks by name, their splits, and what training needs of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from benchmarks.quality import errors

Feature = dict[str, Any]
Item = TypeVar("Item")

GROUPS = 50
"""How many groups of scored examples the jackknife leaves out, one at a time."""


@dataclass(frozen=True)
class Task:
    """A task; the first of its metrics is the one that is compared."""

    name: str
    kind: Literal["classification", "regression", "answers", "language"]
    metrics: tuple[str, ...] = ("accuracy",)
    classes: int = 0
    sentences: int = 2  # per example
    max_tokens: int = 128  # where texts are truncated

    @property
    def metric(self) -> str:
        """The metric that is compared."""
        return self.metrics[0]

    @property
    def loss(self) -> str:
        """The metric that learning rates are chosen by; without a loss, the one compared."""
        losses = {"classification": "nll", "regression": "mse", "language": "perplexity"}
        return losses.get(self.kind, self.metric)


_CLASSES: Literal["classification"] = "classification"
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("cola", _CLASSES, ("matthews", "accuracy"), 2, sentences=1, max_tokens=64),
        Task("sst2", _CLASSES, classes=2, sentences=1, max_tokens=64),
        Task("mrpc", _CLASSES, ("accuracy", "f1"), 2),
        Task("qqp", _CLASSES, ("accuracy", "f1"), 2),
        Task("stsb", "regression", ("pearson",)),
        Task("mnli", _CLASSES, classes=3),
        Task("qnli", _CLASSES, classes=2, max_tokens=256),
        Task("rte", _CLASSES, classes=2, max_tokens=256),
        Task("wnli", _CLASSES, classes=2),
        Task("squad", "answers", ("f1", "exact"), max_tokens=384),
        Task("squad_v2", "answers", ("f1", "exact"), max_tokens=384),
        Task("shakespeare", "language", ("perplexity",)),
    )
}


def by_name(name: str) -> Task:
    """The task of that name; case, hyphens and underscores do not matter ("SST-2")."""
    known = {task.replace("_", ""): task for task in TASKS}
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in known:
        raise errors.unknown("--task", name, TASKS)
    return TASKS[known[plain]]


def of_run(name: str) -> Task:
    """The task of a stored run, which may be a folder."""
    return TASKS.get(name, Task(name, "classification"))


@dataclass(frozen=True)
class Splits(Generic[Item]):
    """A task's examples; `digest` identifies the files, whatever is left out afterwards."""

    train: Sequence[Item]
    dev: Sequence[Item]
    digest: str

    def hold_out(self, held: Sequence[bool]) -> Splits[Item]:
        """The marked training examples replace the dev split, which is not used."""
        train = [item for item, out in zip(self.train, held, strict=True) if not out]
        dev = [item for item, out in zip(self.train, held, strict=True) if out]
        return Splits(train, dev, self.digest)


@dataclass(frozen=True)
class Prepared:
    """A task that was prepared for a model."""

    train: Sequence[Feature]  # in the order of the file
    evaluation: Sequence[Feature]  # what is scored
    collate: Callable[[list[Feature]], Any]
    # What `score` needs of the model's output on a batch, for each of its features ...
    reduce: Callable[[Any, Sequence[Feature]], list[Any]]
    # ... and the task's metrics, of `evaluation` or of the examples that a second argument marks.
    score: Callable[..., Mapping[str, float]]
    # The metrics of the best answer that ignores the input: the most common class, the mean.
    constant_score: Mapping[str, float]
    outputs: int  # width of the head
    digest: str
    by_example: bool = True  # whether `score` takes the second argument
    held_out: Prepared | None = None  # decides when to stop: `evaluation` is then not in `train`

    def jackknife(self, outputs: list[Any]) -> dict[str, list[float]]:
        """The metrics without each group of examples in turn; {} if they cannot be left out."""
        if not self.by_example or len(outputs) < 2:
            return {}
        group = np.random.default_rng(0).permutation(len(outputs)) % GROUPS
        scores = [self.score(outputs, group != n) for n in range(min(GROUPS, len(outputs)))]
        return {name: [round(score[name], 6) for score in scores] for name in scores[0]}


def spread(items: Sequence[Item], size: int | None) -> Sequence[Item]:
    """At most `size` items, spread evenly over the sequence."""
    if size is None or size >= len(items):
        return items
    return [items[place * len(items) // size] for place in range(size)]
