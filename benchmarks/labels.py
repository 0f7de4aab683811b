"""What a stored row is called, and where it stands among others, by the levels' own tables."""

from __future__ import annotations

import functools

from benchmarks.adapters.table import KERNEL_SIZE, RANK
from benchmarks.cases import Case
from benchmarks.levels import LEVELS
from benchmarks.rows import Row

_LAST = 10**6


def label(row: Row) -> str:
    """Such as `DCFT`, or `DCFT, k=4` where sizes are not the usual ones."""
    return ", ".join([provider_label(row), *unusual_sizes(row)])


def provider_label(row: Row) -> str:
    """The same without sizes."""
    return _entry(row)[1]


def unusual_sizes(row: Row) -> list[str]:
    """The sizes in which a DCFT differs from rank 1, kernel size 8 without overlap."""
    if row.stride is None:  # not one of DCFT, whose ranks its name tells
        return []
    parts = [f"k={row.k}"] if row.k != RANK else []
    parts += [f"d={row.d}"] if row.d != KERNEL_SIZE else []
    return parts + ([f"stride={row.stride}"] if row.stride != row.d else [])


def order(row: Row) -> tuple[int, int, int, int]:
    """A key that sorts providers as their level lists them, and variants by size."""
    return (_entry(row)[0], row.k or 0, row.d or 0, row.stride or 0)


def _entry(row: Row) -> tuple[int, str]:
    known = _entries(row.level, row.direction, row.sweep)
    # A provider that is no longer there keeps the name it was stored under.
    return known.get(row.provider, (_LAST, row.provider))


@functools.cache
def _entries(level: str, direction: str, sweep: str) -> dict[str, tuple[int, str]]:
    """Place and label by a provider's name."""
    if level not in LEVELS:
        return {}
    case = Case(level, None, None, None, "fp32", direction, sweep=sweep)
    found: dict[str, tuple[int, str]] = {}
    for place, entry in enumerate(LEVELS[level].entries(case)):
        found.setdefault(entry.name, (place, entry.label))
    return found
