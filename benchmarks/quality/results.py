"""Stored results: one finished run a line, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import rows
from benchmarks.environment import RESULTS
from benchmarks.quality.errors import QualityError
from benchmarks.quality.runs import Result, Run

FOLDER = RESULTS / "quality"
FILE = "runs.jsonl"


class Store:
    """The results of a folder; a run that is there is not repeated."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.path = folder / FILE
        read(self.path)  # a line that is no result is told before anything is trained

    def find(self, run: Run) -> Result | None:
        """The stored result of these very settings; one that failed does not count.

        The file is read anew, so that of two processes none repeats what the other has done.
        """
        key = run.key()
        found = [result for result in read(self.path) if result.run.key() == key]
        return found[-1] if found and not found[-1].error else None

    def add(self, result: Result) -> None:
        """Keep a result; it is on disk when this returns."""
        rows.append_line(self.path, result.as_line())


def read(path: Path) -> list[Result]:
    """All results of a file; empty where there is none.

    Raises:
        QualityError: a line that is no result, by its number.
    """
    return list(_parse(path)) if path.exists() else []


def _parse(path: Path) -> Iterator[Result]:
    for number, line in enumerate(rows.finished_lines(path), start=1):
        try:
            yield Result.from_line(json.loads(line))
        except (ValueError, TypeError) as error:
            raise QualityError(f"{path}, line {number}: not a result: {error}") from error
