"""Result rows: JSON lines, one measurement each, appended and flushed as soon as it is known."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROWS_FILE = "rows.jsonl"
"""In a device's folder."""

# Providers of stored rows that have another name since.
_RENAMED = {"lora_autograd": "lora_by_hand"}


@dataclass(frozen=True)
class Row:
    """One provider's result on one input, or the reason why there is none.

    Times are milliseconds and sizes bytes. A value that does not apply or was not measured is null.
    """

    provider: str
    level: str  # a key of benchmarks.speed.levels.LEVELS, or of an earlier version's
    model: str | None  # whose shape this is, if it is a model's
    direction: (
        str  # "fwd", "bwd", "fwd+bwd", "inference", or what else the level times, such as "merge"
    )
    dtype: str
    T: int | None
    n: int | None
    m: int | None
    d: int | None
    k: int | None
    stride: int | None
    device: str
    torch: str
    triton: str | None
    peft: str | None
    commit: str
    time: str  # start of the case: rows of a case with the same time were measured together
    sweep: str = "main"  # what varies from case to case or from provider to provider
    threads: int | None = None  # intra-op, where the case sets them
    neighbour: bool = False  # whether another process kept one core busy
    processor: str | None = None  # with family and model: cloud providers hide the name
    native_bf16: bool | None = None  # whether it has instructions for products in bf16
    rounds: int = 0
    device_ms_p20: float | None = None
    device_ms_p50: float | None = None
    device_ms_p80: float | None = None
    wall_ms_p20: float | None = None
    wall_ms_p50: float | None = None
    wall_ms_p80: float | None = None
    graph_ms_p20: float | None = None  # device time of the step as a CUDA graph
    graph_ms_p50: float | None = None
    graph_ms_p80: float | None = None
    host_ms_p20: float | None = None  # until all launches of the step are queued
    host_ms_p50: float | None = None
    host_ms_p80: float | None = None
    ratio_to_frozen_device: float | None = None  # median of the ratios within the rounds
    ratio_to_frozen_wall: float | None = None
    ratio_to_frozen_graph: float | None = None
    ratio_to_frozen_host: float | None = None
    peak_bytes: int | None = None  # above what was held before the step
    saved_bytes: int | None = None  # for the backward pass, parameters not counted
    launches: int | None = None
    moved_bytes: int | None = None  # counted: every tensor read or written once
    flops: int | None = None  # counted: a multiply-add is two
    gb_per_s: float | None = None  # moved_bytes over the median
    tflop_per_s: float | None = None  # flops over the median
    footprint_error: str | None = None  # why peak_bytes or launches are missing
    graph_error: str | None = None  # why a short step has no graph times
    gate: str | None = None  # "passed", "failed", or null if it was not reached
    error: str | None = None  # why there are no times

    @property
    def shape(self) -> tuple[int | None, int | None, int | None]:
        return (self.T, self.n, self.m)

    @property
    def variant(self) -> tuple[str, int | None, int | None, int | None]:
        """Identifies a row among those of its case."""
        return (self.provider, self.d, self.k, self.stride)

    def milliseconds(self, clock: str | None = None) -> float | None:
        """The median by a clock; by default device time, or wall time where there is none."""
        found: float | None = getattr(self, f"{clock or self.clock}_ms_p50")
        return found

    def ratio(self, clock: str | None = None) -> float | None:
        """The ratio to the frozen layer, by a clock."""
        found: float | None = getattr(self, f"ratio_to_frozen_{clock or self.clock}")
        return found

    @property
    def clock(self) -> str:
        return "wall" if self.device_ms_p50 is None else "device"

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def append(path: Path, row: Row) -> None:
    """Add a row to a file, on disk when this returns."""
    append_line(path, row.as_dict())


def append_line(path: Path, values: dict[str, object]) -> None:
    """Add a line of JSON to a file, on disk when this returns.

    A last line that a killed run left unfinished is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not _ends_a_line(path):
        os.truncate(path, len(_finished(path.read_bytes())))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All rows of a file, except a last line that a killed run left unfinished.

    Raises:
        ValueError: a line that is not a row, by its number.
    """
    return list(_parse(path, finished_lines(path)))


def finished_lines(path: Path) -> list[str]:
    """The lines of a file, except a last one that a killed run left unfinished."""
    return _finished(path.read_bytes()).decode("utf-8").splitlines()


def _ends_a_line(path: Path) -> bool:
    """Whether a file is empty or ends in a line feed."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _finished(content: bytes) -> bytes:
    """The lines that end in a line feed."""
    return content[: content.rfind(b"\n") + 1]


def _parse(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            values["provider"] = _RENAMED.get(values["provider"], values["provider"])
            yield Row(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not a result row: {error}") from error


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of every case the rows of its latest run, which were measured together.

    Of a provider that has several of them, the last one has all that became known.
    """
    cases: dict[tuple[object, ...], dict[object, Row]] = {}
    for row in rows:
        of = (row.sweep, row.level, row.model, row.direction, row.dtype, row.shape)
        key = (*of, row.threads, row.neighbour)
        together = cases.setdefault(key, {})
        time = next((other.time for other in together.values()), row.time)
        if time < row.time:
            together.clear()
        if time <= row.time:
            together[row.variant] = row
    return [row for together in cases.values() for row in together.values()]
