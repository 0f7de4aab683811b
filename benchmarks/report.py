"""Report on stored rows: `python -m benchmarks.report [FOLDER ...]`.

Writes `report.md` and its plots into every folder that holds a `rows.jsonl`, by default all under
benchmarks/results. Nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import plots, rows
from benchmarks.environment import RESULTS
from benchmarks.rows import Row
from benchmarks.speed.provider import BASELINE
from benchmarks.stored import (
    LABELS,
    Group,
    Stored,
    label,
    load,
    milliseconds,
    order,
    provenance,
    ratio,
)
from benchmarks.tables import NONE, mib, table
from benchmarks.tables import milliseconds as ms
from benchmarks.tables import ratio as number

FILE = "report.md"

_PREFACE = (
    "Written by `python -m benchmarks.report`; do not edit. Ratios are medians, over the rounds of "
    f"a case, of the ratio to the frozen `nn.Linear` in the same round; {NONE} is not measured."
)
_CLOCKS = {
    "device": "Device time",
    "wall": "Wall time",
    "graph": "Device time of the step as a CUDA graph",
    "host": "Host overhead: until all launches are queued",
}
_DIRECTIONS = {
    "fwd+bwd": "Forward + backward",
    "fwd": "Forward",
    "bwd": "Backward",
    "step": "Forward, backward and AdamW",
}
_CURVES = {"rank": "k", "kernel_size": "d", "stride": "stride"}


class _Section(NamedTuple):
    """A part of a report; left out if it has no paragraphs."""

    title: str
    rows: Sequence[Row]  # where its numbers are from
    paragraphs: Sequence[str]  # empty ones are left out


def report(stored: Stored, drawn: Sequence[str] = ()) -> str:
    """A device's report, with the plots that were drawn, as Markdown."""
    plot = {name: f"![{name}]({name}.png)" for name in drawn}
    sections = [
        _ratios("Layers", "layer", stored, plot.get("layer", "")),
        _memory(stored, plot.get("memory", "")),
        _scaling(stored, plot.get("scaling", "")),
        _ratios("Blocks", "block", stored),
        _ratios("Training steps", "step", stored),
        _times("Kernels", "kernel", stored, against=BASELINE),
        _times("Merging", "merge", stored, against="copy"),
        _times("Adapter files", "files", stored),
        # Levels of earlier versions, which have stored rows.
        _times("AdamW over the adapters of a model", "optimizer", stored),
        _times("Copy and matrix product", "ceiling", stored),
        _failures(stored),
    ]
    parts = [f"# {stored.device}", _PREFACE]
    for section in sections:
        paragraphs = [paragraph for paragraph in section.paragraphs if paragraph]
        if paragraphs:
            source = f"From [`{rows.FILE}`]({rows.FILE}): {provenance(section.rows)}."
            parts += [f"## {section.title}", source, *paragraphs]
    return "\n\n".join(parts) + "\n"


def _level(stored: Stored, *levels: str) -> list[Row]:
    return [row for row in stored.rows if row.level in levels]


def _by_clock(stored: Stored, show: Callable[[str], str]) -> list[str]:
    """A table for each clock, with its name where there are several."""
    found = [(clock, text) for clock in stored.clocks if (text := show(clock))]
    if not stored.gpu:
        return [text for _, text in found]
    return [part for clock, text in found for part in (f"{_CLOCKS[clock]}:", text)]


def _ratios(title: str, level: str, stored: Stored, plot: str = "") -> _Section:
    paragraphs = [plot]
    found = _level(stored, level)
    sweeps = [s for s in dict.fromkeys(r.sweep for r in found) if s not in (*_CURVES, "tokens")]
    for direction in stored.directions(level):
        for sweep in sweeps:
            groups = stored.groups(level, sweeps=[sweep], direction=direction)
            shown = _by_clock(stored, partial(_ratio_table, groups))
            if shown:
                heading = _DIRECTIONS.get(direction, direction)
                paragraphs += [f"### {heading}" + f" ({sweep})" * (sweep != "main"), *shown]
            launches = _matrix(groups, lambda group, row: str(row.launches or NONE))
            paragraphs += ["Kernels launched:", launches] if launches else []
    return _Section(title, found, paragraphs)


def _memory(stored: Stored, plot: str) -> _Section:
    paragraphs, used = [plot], []
    for title, level in (("Layers", "layer"), ("Blocks", "block"), ("Training steps", "step")):
        direction = "step" if level == "step" else "fwd+bwd"
        groups = stored.groups(level, sweeps=("main", "asked"), direction=direction)
        saved = _matrix(groups, lambda group, row: mib(row.saved_bytes))
        peak = _matrix(groups, lambda group, row: mib(row.peak_bytes))
        if saved or peak:
            used += [row for group in groups for row in group.rows]
            paragraphs.append(f"### {title}")
        if saved:
            paragraphs += ["Saved for backward, MiB, parameters not counted:", saved]
        if peak:
            paragraphs += ["Peak of a step above what was held before it, MiB:", peak]
    return _Section("Memory", used, paragraphs)


def _scaling(stored: Stored, plot: str) -> _Section:
    paragraphs = []
    for sweep, size in _CURVES.items():
        for group in stored.groups("layer", sweeps=[sweep]):
            shown = _by_clock(stored, partial(_curve, group, size))
            if shown:
                frozen = f"Frozen {ms(group.frozen_ms())} ms, {group.rounds} rounds."
                paragraphs += [f"### By {sweep.replace('_', ' ')}, {group.name}", frozen, *shown]
    for name, groups in plots.by_width(stored).items():
        shown = _by_clock(stored, partial(_ratio_table, groups))
        if shown:
            paragraphs += [f"### By tokens, {name}", *shown]
    used = [row for row in _level(stored, "layer") if row.sweep in (*_CURVES, "tokens")]
    return _Section("Scaling", used, [plot, *paragraphs] if paragraphs else [])


def _times(title: str, level: str, stored: Stored, against: str | None = None) -> _Section:
    """Milliseconds, and ratios to another provider in the same case."""
    paragraphs = []

    def over(group: Group, row: Row) -> str:
        own, base = milliseconds(row), milliseconds(group.of(against or ""))
        return NONE if own is None or not base else number(own / base)

    for direction in stored.directions(level):
        groups = stored.groups(level, direction=direction)
        shown = _matrix(groups, lambda group, row: ms(milliseconds(row)))
        if not shown:
            continue
        paragraphs += [f"### {direction.capitalize()}", "Milliseconds:", shown]
        ratios = _matrix(groups, over)
        if against and ratios:
            paragraphs += [f"Ratio to `{against}`:", ratios]
        rates = _matrix(groups, lambda group, row: number(row.gb_per_s))
        if level in ("kernel", "merge", "ceiling") and rates:
            paragraphs += ["GB/s, counted:", rates]
    if level == "files":
        sizes = _matrix(
            stored.groups(level, direction="save"),
            lambda group, row: (
                NONE if row.moved_bytes is None else f"{row.moved_bytes / 1024:,.1f}"
            ),
        )
        paragraphs += ["### Size", "KiB on disk:", sizes] if sizes else []
    return _Section(title, _level(stored, level), paragraphs)


def _failures(stored: Stored) -> _Section:
    failed = [r for r in stored.rows if r.error is not None and r.milliseconds is None]
    ungraphed = [r for r in stored.rows if r.graph_error is not None]
    paragraphs = [
        _reasons(failed, lambda r: f"{'wrong result: ' if r.gate == 'failed' else ''}{r.error}")
    ]
    if ungraphed:
        paragraphs += [
            "Not captured as a CUDA graph:",
            _reasons(ungraphed, lambda r: str(r.graph_error)),
        ]
    return _Section("Without a time", [*failed, *ungraphed], paragraphs)


def _reasons(found: Sequence[Row], reason: Callable[[Row], str]) -> str:
    """A list of who and why, and in how many cases."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in sorted(found, key=lambda row: (row.level, order(row))):
        key = (row.level, label(row), reason(row))
        counts[key] = counts.get(key, 0) + 1
    return "\n".join(
        f"- {name} ({level}, {count} case{'s' * (count != 1)}): {_as_text(error)}"
        for (level, name, error), count in counts.items()
    )


def _as_text(error: str) -> str:
    """An error as Markdown that shows it unchanged."""
    return " ".join(error.split()).replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


Cell = Callable[[Group, Row], str]


def _matrix(
    groups: Sequence[Group],
    cell: Cell,
    sums: Sequence[tuple[str, Callable[[Group], str]]] = (),
) -> str:
    """A cell for every provider in every case; whichever are more run down the page.

    Args:
        groups: the cases.
        cell: the text of a row.
        sums: titles and texts of what is known of a whole case.

    Returns:
        A table without empty providers and cases, or an empty text if nothing is left.
    """
    variants = {row.variant: row for group in groups for row in group.rows}
    cells = {
        variant: [
            next((cell(group, r) for r in group.rows if r.variant == variant), NONE)
            for group in groups
        ]
        for variant in variants
    }
    shown = [
        row
        for row in sorted(variants.values(), key=order)
        if any(text != NONE for text in cells[row.variant])
    ]
    kept = [
        index
        for index, _ in enumerate(groups)
        if any(cells[row.variant][index] != NONE for row in shown)
    ]
    if not kept:
        return ""
    names = [groups[index].name for index in kept]
    columns = [[text(groups[index]) for index in kept] for _, text in sums]
    columns += [[cells[row.variant][index] for index in kept] for row in shown]
    titles = [title for title, _ in sums] + [label(row) for row in shown]
    if len(kept) > len(shown):
        lines = [[name, *across] for name, *across in zip(names, *columns, strict=True)]
        return table(["case", *titles], lines)
    lines = [[title, *column] for title, column in zip(titles, columns, strict=True)]
    return table(["provider", *names], lines)


def _ratio_table(groups: Sequence[Group], clock: str) -> str:
    """Median ratios to the frozen layer."""

    def cell(group: Group, row: Row) -> str:
        return NONE if row.provider == BASELINE else number(ratio(row, clock))

    return _matrix(
        groups,
        cell,
        sums=[
            ("frozen, ms", lambda group: ms(group.frozen_ms(clock))),
            ("rounds", lambda group: str(group.rounds)),
        ],
    )


def _curve(group: Group, size: str, clock: str) -> str:
    """Ratio to the frozen layer by one of DCFT's sizes."""
    points: dict[int, dict[str, str]] = {}
    for row in group.rows:
        value = getattr(row, size)
        if row.provider != BASELINE and value is not None and ratio(row, clock) is not None:
            points.setdefault(value, {})[row.provider] = number(ratio(row, clock))
    names = list(dict.fromkeys(name for of_size in points.values() for name in of_size))
    lines = [
        [str(value), *(points[value].get(name, NONE) for name in names)] for value in sorted(points)
    ]
    return table([size, *(LABELS.get(name, name) for name in names)], lines) if points else ""


def write(stored: Stored) -> None:
    """Report and plots, into the device's folder."""
    drawn = plots.draw(stored)
    file = stored.folder / FILE
    file.write_text(report(stored, drawn), encoding="utf-8")
    print(f"wrote {file} and {len(drawn)} plots")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write reports; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    folders = options.folders or sorted(f.parent for f in RESULTS.glob(f"*/{rows.FILE}"))
    try:
        for folder in folders:
            write(load(folder))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
