"""Markdown tables from stored rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.cases import DTYPES
from benchmarks.providers import BASELINE, PROVIDERS
from benchmarks.rows import Row

CaseKey = tuple[str, tuple[int, int, int]]  # dtype, shape
Cases = dict[CaseKey, dict[str, Row]]

GOAL_RATIO = 1.10
GOAL_SPEEDUP = 2.5


def by_case(rows: Iterable[Row]) -> Cases:
    """Rows by case and provider, in the order of the dtypes and of the sizes."""
    cases: Cases = {}
    for row in rows:
        cases.setdefault((row.dtype, row.shape), {})[row.provider] = row
    dtypes = list(DTYPES)
    return dict(sorted(cases.items(), key=lambda item: (dtypes.index(item[0][0]), _size(item[0]))))


def _size(key: CaseKey) -> tuple[int, CaseKey]:
    T, n, m = key[1]
    return (T * n * m, key)


def ratio(row: Row | None) -> float | None:
    """The headline of a row: its ratio to the frozen layer, in device time where there is one."""
    if row is None:
        return None
    if row.ratio_to_frozen_device is not None:
        return row.ratio_to_frozen_device
    return row.ratio_to_frozen_wall


def milliseconds(row: Row) -> float | None:
    """The median that `ratio` goes with."""
    return row.wall_ms_p50 if row.device_ms_p50 is None else row.device_ms_p50


def provenance(rows: Sequence[Row]) -> str:
    """Hardware, versions, commits and days behind some rows, in a line."""

    def distinct(values: Iterable[str | None]) -> str:
        return ", ".join(sorted({value for value in values if value is not None}))

    parts = [distinct(row.device for row in rows), f"torch {distinct(row.torch for row in rows)}"]
    for package in ("triton", "peft"):
        versions = distinct(getattr(row, package) for row in rows)
        if versions:
            parts.append(f"{package} {versions}")
    parts.append(f"commit {distinct(row.commit for row in rows)}")
    parts.append(distinct(row.time[:10] for row in rows))
    return "; ".join(parts)


def ratios(cases: Cases) -> str:
    """Median ratio to the frozen layer; a dash is a provider without a time, listed below."""

    def cell(row: Row | None) -> str:
        value = ratio(row)
        return "–" if value is None else f"{value:.2f}"

    return _table(cases, cell, before={"frozen, ms": _baseline_ms}, after={"rounds": _rounds})


def saved(cases: Cases) -> str:
    """MiB saved for backward, parameters not counted."""
    return _table(
        cases,
        lambda row: "–" if row is None or row.saved_bytes is None else _mib(row.saved_bytes),
    )


def goals(cases: Cases) -> str:
    """The project's goals for the layer, evaluated case by case; a miss is marked."""
    lines = _header(
        "case",
        f"DCFT / frozen, goal ≤ {GOAL_RATIO:.2f}",
        "DCFT / LoRA r=8, goal ≤ 1",
        f"published / DCFT, goal ≥ {GOAL_SPEEDUP}",
    )
    for key, rows in cases.items():
        dcft, lora, published = (ratio(rows.get(p)) for p in ("dcft", "lora_r8", "published"))
        to_lora = None if dcft is None or lora is None else dcft / lora
        speedup = None if dcft is None or published is None else published / dcft
        cells = (
            _judged(dcft, lambda value: value <= GOAL_RATIO),
            _judged(to_lora, lambda value: value <= 1),
            _judged(speedup, lambda value: value >= GOAL_SPEEDUP),
        )
        lines.append(_line(_name(key), *cells))
    return "\n".join(lines)


def failures(rows: Iterable[Row]) -> str:
    """A list of the providers without a time, and why; empty if there are none."""
    return "\n".join(
        f"- {row.provider}, {_name((row.dtype, row.shape))}: {row.error}"
        for row in rows
        if row.error is not None
    )


def _judged(value: float | None, reached: Callable[[float], bool]) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if reached(value) else f"**{value:.2f}, missed**"


def _table(
    cases: Cases,
    cell: Callable[[Row | None], str],
    before: dict[str, Callable[[dict[str, Row]], str]] | None = None,
    after: dict[str, Callable[[dict[str, Row]], str]] | None = None,
) -> str:
    before, after = before or {}, after or {}
    seen = {name for rows in cases.values() for name in rows} - ({BASELINE} if before else set())
    providers = [provider for provider in PROVIDERS if provider.name in seen]
    lines = _header("case", *before, *(provider.label for provider in providers), *after)
    for key, rows in cases.items():
        lines.append(
            _line(
                _name(key),
                *(column(rows) for column in before.values()),
                *(cell(rows.get(provider.name)) for provider in providers),
                *(column(rows) for column in after.values()),
            )
        )
    return "\n".join(lines)


def _baseline_ms(rows: dict[str, Row]) -> str:
    value = milliseconds(rows[BASELINE]) if BASELINE in rows else None
    return "–" if value is None else f"{value:,.1f}"


def _rounds(rows: dict[str, Row]) -> str:
    return str(max(row.rounds for row in rows.values()))


def _name(key: CaseKey) -> str:
    dtype, (T, n, m) = key
    return f"{T}x{n}->{m} {dtype}"


def _mib(size: int) -> str:
    return "0" if size == 0 else f"{size / 2**20:.2f}"


def _header(*titles: str) -> list[str]:
    return [_line(*titles), _line("---", *("---:" for _ in titles[1:]))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
