"""The tasks by name, and what training needs of a task that was prepared for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, Literal, TypeVar

from benchmarks.quality import errors
from benchmarks.quality.errors import QualityError

Kind = Literal["classification", "regression", "answers", "language"]
Feature = dict[str, Any]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        columns: the hub's columns with an example's texts.
        metrics: the official metrics, the one that is compared first.
        labels: the names of the classes.
        max_tokens: where texts are truncated.
        hub: the dataset's name and configuration on the Hugging Face hub.
        dev_split: the hub's name of the split that is scored.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    max_tokens: int = 128
    hub: tuple[str, ...] = ()
    dev_split: str = "validation"

    @property
    def metric(self) -> str:
        """The metric that is compared."""
        return self.metrics[0]


_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")
_SAME = ("not_equivalent", "equivalent")
_ACCURACY = ("accuracy",)


def _glue(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = _ACCURACY,
    max_tokens: int = 128,
    dev_split: str = "validation",
) -> Task:
    kind: Kind = "classification" if labels else "regression"
    return Task(name, kind, columns, metrics, labels, max_tokens, ("glue", name), dev_split)


def _squad(name: str) -> Task:
    columns, metrics = ("question", "context"), ("f1", "exact")
    return Task(name, "answers", columns, metrics, max_tokens=384, hub=(name,))


_MNLI = ("entailment", "neutral", "contradiction")
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy"), 64),
        _glue("sst2", ("sentence",), ("negative", "positive"), max_tokens=64),
        _glue("mrpc", _PAIR, _SAME, ("accuracy", "f1")),
        _glue("qqp", ("question1", "question2"), _SAME, ("accuracy", "f1")),
        _glue("stsb", _PAIR, (), ("pearson",)),
        _glue("mnli", ("premise", "hypothesis"), _MNLI, dev_split="validation_matched"),
        _glue("qnli", ("question", "sentence"), _ENTAILS, max_tokens=256),
        _glue("rte", _PAIR, _ENTAILS, max_tokens=256),
        _glue("wnli", _PAIR, _ENTAILS[::-1]),
        _squad("squad"),
        _squad("squad_v2"),
        Task("shakespeare", "language", ("text",), ("perplexity",)),
    )
}


def by_name(name: str) -> Task:
    """The task of that name; case, hyphens and underscores do not matter ("SST-2")."""
    known = {task.replace("_", ""): task for task in TASKS}
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in known:
        raise errors.unknown("--task", name, TASKS)
    return TASKS[known[plain]]


def read_hub(task: Task, split: str) -> Any:
    """The rows of a split from the Hugging Face hub, which needs the package `datasets`."""
    try:
        load_dataset = import_module("datasets").load_dataset
    except ImportError:
        raise QualityError(
            f"--data: expected a folder with the files of {task.name}, got nothing; to read it "
            "from the Hugging Face hub instead: pip install datasets"
        ) from None
    try:
        return load_dataset(*task.hub, split=split)
    except Exception as error:
        raise QualityError(
            f"--data: {task.name} could not be read from the hub: {error}; pass a folder"
        ) from error


@dataclass(frozen=True)
class Splits(Generic[_Item]):
    """A task's examples; `digest` identifies the files, whatever is left out afterwards."""

    train: Sequence[_Item]
    dev: Sequence[_Item]
    digest: str

    def hold_out(self, held: Sequence[bool]) -> Splits[_Item]:
        """The marked training examples take the place of the dev split, which is not used."""
        train = [item for item, out in zip(self.train, held, strict=True) if not out]
        dev = [item for item, out in zip(self.train, held, strict=True) if out]
        return Splits(train, dev, self.digest)


@dataclass(frozen=True)
class Prepared:
    """A task that was prepared for a model.

    Attributes:
        train: features in the order of the file.
        evaluation: features that are scored.
        collate: makes a batch of features.
        reduce: what `score` needs of the model's output on a batch, for each of its features.
        score: the task's metrics, of what `reduce` gave for all of `evaluation`.
        constant_score: the metrics of the best answer that ignores the input: the most common
            class, the mean score, unigram frequencies.
        outputs: width of the head.
        digest: identifies the data.
    """

    train: Sequence[Feature]
    evaluation: Sequence[Feature]
    collate: Callable[[list[Feature]], Any]
    reduce: Callable[[Any, Sequence[Feature]], list[Any]]
    score: Callable[[list[Any]], Mapping[str, float]]
    constant_score: Mapping[str, float]
    outputs: int
    digest: str


def spread(items: Sequence[_Item], size: int | None) -> Sequence[_Item]:
    """At most `size` items, spread evenly over the sequence."""
    if size is None or size >= len(items):
        return items
    return [items[place * len(items) // size] for place in range(size)]
