"""The stored rows of a device's folder, by case: what reports are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import labels, rows
from benchmarks.cases import DIRECTIONS, Case
from benchmarks.entries import BASELINE
from benchmarks.rows import Row

ROWS = rows.FILE

# Of a GPU, the usual one first; see benchmarks/README.md.
CLOCKS = ("device", "wall", "graph", "host")

# Sweeps of single cases that are compared with each other, as against the points of a curve.
COMPARED = ("main", "asked")


@dataclass(frozen=True)
class Group:
    """The rows of one case, which were measured together, in the order of their level."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """For what all rows of a case have in common."""
        return self.rows[0]

    @property
    def shape(self) -> str:
        """Such as `2048x768->768`, or a model with its tokens."""
        row = self.first
        return Case(row.level, row.T, row.n, row.m, row.dtype, row.direction, row.model).shape

    @property
    def name(self) -> str:
        """Such as `2048x768->768 fp32`."""
        name = f"{self.shape} {self.first.dtype}"
        return f"{name} (asked)" if self.first.sweep == "asked" else name

    @property
    def size(self) -> tuple[int, ...]:
        """Sorts cases by how much there is to compute."""
        T, n, m = (size or 0 for size in self.first.shape)
        return ((T or 1) * n * m, T, n, m)

    @property
    def rounds(self) -> int:
        """Of the provider that has most."""
        return max(row.rounds for row in self.rows)

    def of(self, provider: str) -> Row | None:
        """The row of a provider at its usual sizes."""
        return next(
            (r for r in self.rows if r.provider == provider and not labels.unusual_sizes(r)), None
        )

    def ratio(self, provider: str, clock: str | None = None) -> float | None:
        """A provider's ratio to the frozen layer, by the device's clock if it has one."""
        return ratio(self.of(provider), clock)

    def frozen_ms(self, clock: str | None = None) -> float | None:
        """The frozen layer's median."""
        return milliseconds(self.of(BASELINE), clock)


def ratio(row: Row | None, clock: str | None = None) -> float | None:
    """The ratio to the frozen layer by a clock of `CLOCKS`, or the usual one."""
    if row is None:
        return None
    value: float | None = row.ratio if clock is None else getattr(row, f"ratio_to_frozen_{clock}")
    return value


def milliseconds(row: Row | None, clock: str | None = None) -> float | None:
    """The median by a clock, or the usual one."""
    if row is None:
        return None
    value: float | None = row.milliseconds if clock is None else getattr(row, f"{clock}_ms_p50")
    return value


@dataclass(frozen=True)
class Stored:
    """The latest rows of every case in a device's folder."""

    folder: Path
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        """The device's name."""
        return ", ".join(distinct(row.device for row in self.rows))

    @property
    def gpu(self) -> bool:
        """Whether a device's own clock was read."""
        return any(row.device_ms_p50 is not None for row in self.rows)

    @property
    def clocks(self) -> tuple[str, ...]:
        """The clocks that ratios are told by, the usual one first."""
        return CLOCKS if self.gpu else ("wall",)

    def groups(
        self,
        level: str,
        *,
        sweeps: Collection[str] | None = None,
        direction: str | None = None,
        where: Callable[[Row], bool] = lambda row: True,
    ) -> list[Group]:
        """Cases of a level, by dtype in the order of the file, then by size."""
        cases: dict[tuple[object, ...], list[Row]] = {}
        dtypes: dict[str, int] = {}
        for row in self.rows:
            if row.level != level or (sweeps is not None and row.sweep not in sweeps):
                continue
            if (direction is not None and row.direction != direction) or not where(row):
                continue
            dtypes.setdefault(row.dtype, len(dtypes))
            key = (row.sweep, row.model, row.direction, row.dtype, row.shape)
            cases.setdefault(key, []).append(row)
        found = [Group(tuple(sorted(together, key=labels.order))) for together in cases.values()]
        return sorted(found, key=lambda g: (dtypes[g.first.dtype], g.size))

    def directions(self, level: str) -> list[str]:
        """The directions that a level has rows of, whole passes first."""
        present = {row.direction for row in self.rows if row.level == level}
        usual = sorted(DIRECTIONS, key=lambda name: "+" not in name)
        return [name for name in usual if name in present] + sorted(present - set(usual))


def load(folder: Path) -> Stored:
    """The rows of a folder.

    Raises:
        ValueError: no such folder, no rows in it, or a line that is not a row.
    """
    file = folder / ROWS
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with {ROWS}, and there is no such folder")
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; `python -m benchmarks.run --out {folder}` measures one"
        )
    try:
        found = rows.read(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected lines of JSON in UTF-8: {error}") from error
    if not found:
        raise ValueError(f"{file}: expected rows, and there are none")
    return Stored(folder, tuple(rows.latest(found)))


def distinct(values: Iterable[str | None]) -> list[str]:
    """Sorted, each once, without those that are missing."""
    return sorted({value for value in values if value is not None})


def provenance(found: Sequence[Row]) -> str:
    """Hardware, versions, commits and days behind some rows, in a line."""
    parts = [", ".join(distinct(row.device for row in found))]
    for package in ("torch", "triton", "peft", "commit"):
        versions = distinct(getattr(row, package) for row in found)
        if versions:
            parts.append(f"{package} {', '.join(versions)}")
    return "; ".join([*parts, ", ".join(distinct(row.time[:10] for row in found))])
