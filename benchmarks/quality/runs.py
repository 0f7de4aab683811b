"""A fine-tuning run, its result, and the file that results are stored in."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.environment import RESULTS
from benchmarks.quality.errors import QualityError

SLICE, DEV = "slice", "dev"
"""What is scored: a slice of the training split to choose a learning rate, or the dev split."""

FOLDER = RESULTS / "quality"
RUNS_FILE = "runs.jsonl"


@dataclass(frozen=True)
class Run:
    """Everything that is needed to repeat a run."""

    task: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "ALL"
    model: str = "all-MiniLM-L6-v2"
    seed: int = 0
    scored: str = DEV
    steps: int = 250
    batch_size: int = 32
    learning_rate: float = 1e-3  # of the method's own parameters
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warm_up: float = 0.06  # fraction of the steps in which the rate rises; then it falls to zero
    train_size: int | None = None  # so many training examples, evenly spread; None for all
    scored_size: int | None = None  # so many scored examples, evenly spread
    max_tokens: int | None = None  # None for the task's or the model's own limit
    precision: str = "fp32"
    evaluations: int = 1  # the last one is at the end
    replicate: int = 0  # another dropout stream with the same head, factors and batches
    stopping: bool = False  # hold out a slice of train; its lowest loss decides what is scored

    def key(self) -> str:
        """A digest of the settings, without those that are newer than the first results."""
        values = dataclasses.asdict(self)
        for name in ("replicate", "stopping"):
            if not values[name]:
                del values[name]
        settings = json.dumps(values, sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    def label(self) -> str:
        """One line for the terminal."""
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.task} {self.method} {options}".strip() + f" lr {self.learning_rate:g}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run; `value` is the task's `metric`, None if the run failed.

    Values are those at the end, or with `Run.stopping` those after `scored_step`.
    """

    key: str
    study: str  # that asked for it first
    run: Run
    metric: str
    value: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)  # all metrics
    # Each metric without one of the groups of scored examples, for every group.
    jackknife: Mapping[str, list[float]] = field(default_factory=dict)
    scored_step: int | None = None  # None in older results
    constant_value: float  # of the best constant answer
    trainable_parameters: int = 0  # the method's own, without the head's
    head_parameters: int = 0
    loss_curve: list[tuple[int, float]] = field(default_factory=list)  # step, mean loss up to it
    value_curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    data: str  # digest of the data
    device: str
    versions: Mapping[str, str]
    commit: str
    time: str
    error: str | None = None

    def as_line(self) -> dict[str, Any]:
        """Flat: the run's settings next to its outcome."""
        line = dataclasses.asdict(self)
        return {"key": line.pop("key"), "study": line.pop("study"), **line.pop("run"), **line}

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Result:
        """The inverse of `as_line`; TypeError for a missing or unknown field."""
        names = {entry.name for entry in dataclasses.fields(Run)}
        run = Run(**{name: value for name, value in line.items() if name in names})
        rest = {name: value for name, value in line.items() if name not in names}
        for curve in ("loss_curve", "value_curve"):
            rest[curve] = [(step, value) for step, value in rest[curve]]
        return cls(run=run, **rest)


def add(path: Path, result: Result) -> None:
    """Append a result to a file; it is on disk when this returns. Processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows.append_line(path, result.as_line())


def read(path: Path) -> list[Result]:
    """All results of a file; QualityError for a line that is not a result."""
    results = []
    for number, line in enumerate(rows.finished_lines(path) if path.exists() else [], start=1):
        try:
            results.append(Result.from_line(json.loads(line)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise QualityError(f"{path}, line {number}: not a result: {error}") from error
    return results


def by_key(results: Iterable[Result]) -> dict[str, Result]:
    """Results by their settings; of equal runs the last one counts."""
    return {result.run.key(): result for result in results}
