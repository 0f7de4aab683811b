"""Progress: one bar over the runs, one over the steps of the present run, a line a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.quality.runs import Result, Run


class RunsBar:
    """How many of a table's runs are over."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self._progress = progress
        self._bar = bar

    def done(self, result: Result) -> None:
        """One is over: a step further, and its line."""
        self._progress.advance(self._bar)
        line = escape(_line(result))
        self._progress.console.print(line, highlight=False, soft_wrap=True)

    def passed_over(self, count: int) -> None:
        """So many will not be run."""
        self._progress.advance(self._bar, count)

    def remove(self) -> None:
        self._progress.remove_task(self._bar)


class Bars:
    """A context in which `runs` and `steps` show their progress."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def runs(self, total: int, study: str) -> Iterator[RunsBar]:
        """A bar over so many runs."""
        bar = RunsBar(self._progress, self._progress.add_task(escape(study), total=total, note=""))
        try:
            yield bar
        finally:
            bar.remove()

    @contextmanager
    def steps(self, run: Run) -> Iterator[Callable[[int, float], None]]:
        """A bar over the steps of a run; the function that it yields takes a step and its loss."""
        bar = self._progress.add_task(escape(run.label()), total=run.steps, note="")
        mean: float | None = None

        def advance(step: int, loss: float) -> None:
            nonlocal mean
            mean = loss if mean is None else 0.9 * mean + 0.1 * loss
            self._progress.update(bar, completed=step, note=f"loss {mean:.3f}")

        try:
            yield advance
        finally:
            self._progress.remove_task(bar)


def _line(result: Result) -> str:
    run = result.run
    start = f"{run.label()} seed {run.seed} ({run.scored}): "
    if result.value is None:
        return f"{start}failed: {result.error}"
    return (
        f"{start}{result.metric} {result.value:.4f} (constant answer "
        f"{result.constant_value:.4f}), {result.trainable_parameters:,} parameters, "
        f"{result.seconds:.0f} s"
    )
