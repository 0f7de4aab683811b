"""Result rows: one measurement a line, JSON, appended and flushed as soon as it is known."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One provider's result on one input, or the reason why there is none.

    Times are milliseconds and sizes bytes. A value that does not apply or was not measured is null.
    """

    provider: str
    level: str  # what is measured: "layer"
    model: str | None  # the model whose shape this is, where there is one
    direction: str  # "fwd", "bwd" or "fwd+bwd"
    dtype: str
    T: int
    n: int
    m: int
    d: int | None
    k: int | None
    stride: int | None
    device: str
    torch: str
    triton: str | None
    peft: str | None
    commit: str
    time: str  # start of the case: rows of one case with the same time were measured together
    rounds: int = 0
    device_ms_p20: float | None = None
    device_ms_p50: float | None = None
    device_ms_p80: float | None = None
    wall_ms_p20: float | None = None
    wall_ms_p50: float | None = None
    wall_ms_p80: float | None = None
    ratio_to_frozen_device: float | None = None  # median of the ratios within each round
    ratio_to_frozen_wall: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    launches: int | None = None
    gate: str | None = None  # "passed", "failed", or null when it was not reached
    error: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.T, self.n, self.m)

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def append(path: Path, row: Row) -> None:
    """Add a row to a file, on disk when this returns; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row.as_dict(), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        ValueError: a line that is not a row, by its number.
    """
    return list(_parse(path, path.read_text(encoding="utf-8").splitlines()))


def _parse(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        try:
            yield Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a result row: {error}") from error


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of every case the rows of its latest run, so that what is compared was measured together."""
    cases: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.level, row.model, row.direction, row.dtype, row.shape)
        together = cases.setdefault(key, [])
        if together and together[0].time < row.time:
            together.clear()
        if not together or together[0].time == row.time:
            together.append(row)
    return [row for together in cases.values() for row in together]
