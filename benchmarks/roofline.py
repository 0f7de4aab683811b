"""Achieved rates beside what the same run measured as the device's best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import labels, tables
from benchmarks.entries import BASELINE
from benchmarks.rows import Row
from benchmarks.stored import COMPARED, Group, Stored


@dataclass(frozen=True)
class Ceiling:
    """What a device reaches in one dtype."""

    dtype: str
    gb_per_s: float | None  # of a copy
    tflop_per_s: float | None  # of the vendor's product

    def attainable(self, intensity: float) -> float | None:
        """TFLOP/s at so many operations a byte, if the less of both is known."""
        if self.gb_per_s is None or self.tflop_per_s is None:
            return None
        return min(self.gb_per_s * intensity / 1e3, self.tflop_per_s)


@dataclass(frozen=True)
class Point:
    """A row whose bytes and operations are counted, and which has a time."""

    row: Row
    name: str  # what ran
    case: Group
    base: bool  # without an adapter
    intensity: float  # operations a byte
    tflop_per_s: float
    gb_per_s: float


def ceilings(stored: Stored) -> dict[str, Ceiling]:
    """By dtype, of those that were measured."""
    found: dict[str, dict[str, Row]] = {}
    for row in stored.rows:
        if row.level == "ceiling" and row.milliseconds is not None:
            found.setdefault(row.dtype, {})[row.direction] = row
    return {
        dtype: Ceiling(
            dtype,
            rows["copy"].gb_per_s if "copy" in rows else None,
            rows["product"].tflop_per_s if "product" in rows else None,
        )
        for dtype, rows in found.items()
    }


def points(stored: Stored) -> list[Point]:
    """The kernels, and the frozen layers, whose counts do not depend on the way they are run."""
    kernels = stored.groups("kernel")
    layers = stored.groups(
        "layer",
        sweeps=COMPARED,
        direction="fwd+bwd",
        where=lambda row: row.provider == BASELINE,
    )
    found = [_point(row, group) for group in [*kernels, *layers] for row in group.rows]
    return [point for point in found if point is not None]


def _point(row: Row, group: Group) -> Point | None:
    if not row.moved_bytes or not row.flops or not row.milliseconds:
        return None
    seconds = row.milliseconds / 1e3
    return Point(
        row,
        labels.label(row),
        group,
        row.provider == BASELINE or row.provider.startswith("base"),
        row.flops / row.moved_bytes,
        row.flops / seconds / 1e12,
        row.moved_bytes / seconds / 1e9,
    )


def ceiling_table(found: dict[str, Ceiling]) -> str:
    """What the device reaches, by dtype."""
    lines = [[c.dtype, rate(c.gb_per_s), rate(c.tflop_per_s)] for c in found.values()]
    return tables.table(["dtype", "copy, GB/s", "product, TFLOP/s"], lines)


def point_table(found: Sequence[Point], best: dict[str, Ceiling]) -> str:
    """Rates, and their share of the ceiling: of memory or of arithmetic, whichever is lower."""
    lines = []
    for point in found:
        ceiling = best.get(point.row.dtype)
        attainable = None if ceiling is None else ceiling.attainable(point.intensity)
        lines.append(
            [
                f"{point.name}, {point.case.name}",
                tables.time(point.row.milliseconds),
                tables.number(point.row.ratio),
                rate(point.gb_per_s),
                rate(point.tflop_per_s),
                f"{point.intensity:,.1f}",
                _bound(ceiling, point),
                share(point.tflop_per_s, attainable),
            ]
        )
    titles = ["", "ms", "/ base", "GB/s", "TFLOP/s", "FLOP/byte", "bound by", "% of ceiling"]
    return tables.table(titles, lines)


def rate(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return tables.NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def share(value: float, best: float | None) -> str:
    """A percentage."""
    return tables.NONE if not best else f"{100 * value / best:.0f}"


def _bound(ceiling: Ceiling | None, point: Point) -> str:
    if ceiling is None or ceiling.gb_per_s is None or ceiling.tflop_per_s is None:
        return tables.NONE
    memory = ceiling.gb_per_s * point.intensity / 1e3 < ceiling.tflop_per_s
    return "memory" if memory else "arithmetic"
