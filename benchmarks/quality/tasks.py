"""The tasks by name: what their examples hold and which figure scores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.quality import errors

Kind = Literal["classification", "regression", "answers", "language"]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        kind: what is predicted: a class, a number, a span of a text, or the next token.
        columns: the texts of an example.
        labels: the classes in the order of their numbers; empty for other kinds.
        metrics: the official figures, the one that is compared first.
        hub: the dataset's name and configuration on the Hugging Face hub.
        max_tokens: where texts are cut.
        dev_split: the hub's name of the split that is scored.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    hub: tuple[str, str | None] | None
    max_tokens: int
    dev_split: str = "validation"

    @property
    def metric(self) -> str:
        return self.metrics[0]


_ENTAILS = ("entailment", "not_entailment")
_SAME = ("not_equivalent", "equivalent")
_TWO_SENTENCES = ("sentence1", "sentence2")


def _glue(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    max_tokens: int = 128,
    dev_split: str = "validation",
) -> Task:
    kind: Kind = "classification" if labels else "regression"
    return Task(name, kind, columns, labels, metrics, ("glue", name), max_tokens, dev_split)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy"), 64),
        _glue("sst2", ("sentence",), ("negative", "positive"), max_tokens=64),
        _glue("mrpc", _TWO_SENTENCES, _SAME, ("accuracy", "f1")),
        _glue("qqp", ("question1", "question2"), _SAME, ("accuracy", "f1")),
        _glue("stsb", _TWO_SENTENCES, (), ("pearson",)),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            dev_split="validation_matched",  # the mismatched one is not scored
        ),
        _glue("qnli", ("question", "sentence"), _ENTAILS, max_tokens=256),
        _glue("rte", _TWO_SENTENCES, _ENTAILS, max_tokens=256),
        _glue("wnli", _TWO_SENTENCES, _ENTAILS[::-1]),
        Task(
            "squad", "answers", ("question", "context"), (), ("f1", "exact"), ("squad", None), 384
        ),
        Task(
            "squad_v2",
            "answers",
            ("question", "context"),
            (),
            ("f1", "exact"),
            ("squad_v2", None),
            384,
        ),
        Task("shakespeare", "language", ("text",), (), ("perplexity",), None, 128),
    )
}

# Scores of sentence pairs are 0 to 5; trained as 0 to 1, where a fresh head starts. Correlations do
# not notice.
HIGHEST_SCORE = 5.0


def by_name(name: str) -> Task:
    """The task of that name, upper case and hyphens forgiven ("SST-2").

    Raises:
        QualityError: an unknown name.
    """
    known = {task.replace("_", ""): task for task in TASKS}
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in known:
        raise errors.unknown("--task", name, TASKS)
    return TASKS[known[plain]]
