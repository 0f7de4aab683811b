"""One fine-tuning run: everything that is needed to repeat it, and what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SLICE, DEV = "slice", "dev"
"""What is scored: a slice of the training split, for choices; or the dev split, for results."""


@dataclass(frozen=True)
class Run:
    """What is trained, how, and on what it is scored.

    Attributes:
        learning_rate: of the method's own parameters.
        head_learning_rate: of the task's fresh head, the same for all methods.
        warm_up: share of the steps in which the learning rate rises; it then falls to zero.
        train_size: how many training examples are used, evenly spread; None for all.
        scored_size: likewise of the examples that are scored.
        max_tokens: where texts are cut, at the latest at the task's own length; None for that, or
            for what the model reads if that is less.
        evaluations: how many times the model is scored, the last time at the end.
    """

    task: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "ALL"
    model: str = "all-MiniLM-L6-v2"
    seed: int = 0
    scored: str = DEV
    steps: int = 250
    batch_size: int = 32
    learning_rate: float = 1e-3
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warm_up: float = 0.06
    train_size: int | None = None
    scored_size: int | None = None
    max_tokens: int | None = None
    precision: str = "fp32"
    evaluations: int = 1

    def key(self) -> str:
        """The same for the same settings, and for no others."""
        settings = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    def label(self) -> str:
        """One line for a progress bar."""
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.task} {self.method} {options}".strip() + f" lr {self.learning_rate:g}"


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        key: of the run, by which it is found again.
        study: the collection that asked for it first.
        value: the task's figure `metric` at the end.
        values: all figures at the end.
        constant_value: `metric` of the best constant answer.
        trainable_parameters: the method's own, without the head's.
        loss_curve: mean training loss up to a step, pairs.
        value_curve: `metric` after a step, pairs.
        error: why there is no value.
    """

    key: str
    study: str
    run: Run
    metric: str
    value: float | None
    values: Mapping[str, float]
    constant_value: float
    trainable_parameters: int
    head_parameters: int
    loss_curve: list[tuple[int, float]]
    value_curve: list[tuple[int, float]]
    seconds: float
    data: str
    device: str
    versions: Mapping[str, str]
    commit: str
    time: str
    error: str | None = None

    def as_line(self) -> dict[str, Any]:
        """Flat: the run's settings beside its outcome."""
        line = dataclasses.asdict(self)
        return {"key": line.pop("key"), "study": line.pop("study"), **line.pop("run"), **line}

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Result:
        """The inverse of `as_line`.

        Raises:
            TypeError: a field that is missing or unknown, or something else than fields.
        """
        if not isinstance(line, Mapping):
            raise TypeError(f"expected an object, got {line!r}")
        names = {entry.name for entry in dataclasses.fields(Run)}
        run = Run(**{name: value for name, value in line.items() if name in names})
        rest = {name: value for name, value in line.items() if name not in names}
        result = cls(run=run, **rest)
        return dataclasses.replace(
            result,
            loss_curve=[(step, loss) for step, loss in result.loss_curve],
            value_curve=[(step, value) for step, value in result.value_curve],
        )
