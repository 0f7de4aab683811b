"""Markdown tables, and numbers as they stand in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NONE = "–"


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    head = [_line(titles), _line(["---", *("---:" for _ in titles[1:])])]
    return "\n".join([*head, *(_line(cells) for cells in lines)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def ratio(value: float | None) -> str:
    """A ratio; large ones without decimals, which would be noise."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def milliseconds(value: float | None) -> str:
    """A time with about three digits."""
    if value is None:
        return NONE
    if value >= 10:
        return f"{value:,.1f}"
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def mib(size: int | None) -> str:
    """MiB of bytes."""
    if size is None:
        return NONE
    return "0" if size == 0 else f"{size / 2**20:,.2f}"
