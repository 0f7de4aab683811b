"""Report on the sweep `cpu`: the goals for a CPU, then a table of ratios per setting."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.rows import Row
from benchmarks.speed.provider import BASELINE
from benchmarks.stored import LABELS, Group, label
from benchmarks.tables import NONE, milliseconds, ratio, table

_DIRECTIONS = {"fwd+bwd": "training", "inference": "inference"}
_PEFT = ("lora_r1", "lora_r8")
_SUMMARY = (
    "A goal's line counts the cases that miss it and names the worst. A busy neighbour is another "
    "process that multiplies matrices in one thread."
)


def sections(groups: Sequence[Group]) -> list[str]:
    """Markdown: the goals, and for every setting a line per shape and a column per provider."""
    parts = ["### CPU sweep", _SUMMARY, _goals(groups)]
    for setting, found in _by(groups, _setting).items():
        parts += [f"#### {setting}", _ratios(found)]
    return parts


def _by(groups: Iterable[Group], key: Callable[[Row], str]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(key(group.first), []).append(group)
    return found


def _setting(row: Row) -> str:
    return f"{row.dtype} {_DIRECTIONS[row.direction]}, {_conditions(row)}"


def _conditions(row: Row) -> str:
    threads = f"{row.threads} thread{'s' * (row.threads != 1)}"
    return f"{threads}, busy neighbour" if row.neighbour else threads


def _ratios(groups: Sequence[Group]) -> str:
    variants = {row.variant: row for group in groups for row in group.rows}
    shown = [row for row in variants.values() if row.provider != BASELINE]
    lines = []
    for group in sorted(groups, key=lambda g: (g.first.n or 0, g.first.T or 0)):
        of = {row.variant: row for row in group.rows}
        base = group.of(BASELINE)
        time = milliseconds(None if base is None else base.milliseconds())
        cells = [ratio(of[row.variant].ratio()) if row.variant in of else NONE for row in shown]
        lines.append([f"{group.first.T}x{group.first.n}", time, *cells, str(group.rounds)])
    return table(["tokens x width", "frozen, ms", *map(label, shown), "rounds"], lines)


def _goals(groups: Sequence[Group]) -> str:
    """A line per goal; columns per dtype, idle and with a busy neighbour."""
    columns = _by(groups, lambda row: row.dtype + ", busy neighbour" * row.neighbour)

    def line(title: str, cell: Callable[[list[Group]], str]) -> list[str]:
        return [title, *(cell(found) for found in columns.values())]

    def training(found: Iterable[Group], tokens: int, width: int) -> list[Group]:
        rows = [(g, g.first) for g in found if g.first.direction == "fwd+bwd"]
        return [g for g, row in rows if (row.T or 0) >= tokens and (row.n or 0) >= width]

    def token(found: Iterable[Group]) -> list[Group]:
        rows = [(g, g.first) for g in found if g.first.direction == "inference"]
        return [g for g, row in rows if (row.T, row.n) == (1, 768)]

    lines = [
        line(
            "training, T >= 128: slower than the quicker of peft's LoRA r=1 and r=8",
            lambda found: _worst(training(found, 128, 1), _PEFT, limit=1.0),
        ),
        line(
            "training, T >= 128: over 3% slower than LoRA by hand",
            lambda found: _worst(training(found, 128, 1), ["lora_by_hand"], limit=1.03),
        ),
        line(
            "training, T >= 512, width >= 768: ratio to frozen",
            lambda found: _worst(training(found, 512, 768), [BASELINE]),
        ),
        line("inference, 1x768: ratio to frozen", lambda found: _worst(token(found), [BASELINE])),
    ]
    idle = [group for group in groups if not group.first.neighbour]
    for name in ("dcft", *_PEFT):
        title = f"median slowdown with a busy neighbour: {LABELS[name]}"
        lines.append([title, *(_slowdown(name, found, idle) for found in columns.values())])
    return table(["DCFT", *columns], lines)


def _worst(groups: Iterable[Group], others: Sequence[str], limit: float | None = None) -> str:
    """DCFT's largest ratio to the quickest of others, `3 of 24; worst 1.08, 2048x768, 2 threads`.

    Args:
        groups: the cases.
        others: providers.
        limit: count the cases above it.
    """
    found = []
    for group in groups:
        ratios = {row.provider: value for row in group.rows if (value := row.ratio()) is not None}
        theirs = [ratios[name] for name in others if name in ratios]
        if "dcft" in ratios and theirs:
            found.append((ratios["dcft"] / min(theirs), group.first))
    if not found:
        return NONE
    value, row = max(found, key=lambda pair: pair[0])
    worst = f"worst {ratio(value)}, {row.T}x{row.n}, {_conditions(row)}"
    above = sum(value > limit for value, _ in found) if limit is not None else 0
    return worst if limit is None else f"{above} of {len(found)}; {worst}"


def _slowdown(provider: str, found: Iterable[Group], idle: Iterable[Group]) -> str:
    """A provider's time with a busy neighbour, relative to idle: the median over the cases."""

    def times(groups: Iterable[Group]) -> dict[object, float]:
        rows = [row for group in groups if (row := group.of(provider)) is not None]
        return {
            (row.dtype, row.direction, row.shape, row.threads): time
            for row in rows
            if (time := row.milliseconds()) is not None
        }

    idle_times = times(idle)
    busy_times = times(group for group in found if group.first.neighbour)
    slowdowns = [time / idle_times[case] for case, time in busy_times.items() if case in idle_times]
    return ratio(statistics.median(slowdowns)) if slowdowns else NONE
