"""Progress bars of the demo: one line a phase, with elapsed and remaining time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fine_tuning import Advance


class ProgressBars:
    """A context in which `phase` shows one bar after the other."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def phase(self, description: str, total: int) -> Iterator[Advance]:
        """A bar of `total` units; the function that it yields moves it on."""
        bar = self._progress.add_task(f"{description:<34}", total=total, loss="")
        mean_loss: float | None = None

        def advance(amount: int, loss: float | None = None) -> None:
            nonlocal mean_loss
            if loss is not None:
                mean_loss = loss if mean_loss is None else 0.9 * mean_loss + 0.1 * loss
                self._progress.update(bar, loss=f"loss {mean_loss:.3f}")
            self._progress.advance(bar, amount)

        yield advance
        self._progress.update(bar, completed=total)
