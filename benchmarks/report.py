"""Report on stored rows: `python -m benchmarks.report [FOLDER ...]`.

Writes `report.md` and its plot into every folder that holds a `rows.jsonl`, by default all under
benchmarks/results. Nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import cpu_sweep, plots, rows
from benchmarks.environment import RESULTS
from benchmarks.rows import Row
from benchmarks.speed.levels.layer import CPU_SWEEP
from benchmarks.speed.provider import BASELINE
from benchmarks.stored import MAIN_SWEEPS, Group, StoredRows, label, load, order, provenance
from benchmarks.tables import NONE, mib, milliseconds, ratio, table

REPORT_FILE = "report.md"

_PREFACE = (
    "Written by `python -m benchmarks.report`; do not edit. Ratios are medians, over the rounds of "
    f"a case, of the ratio to the frozen `nn.Linear` in the same round; {NONE} is not measured."
)
# The last three are of earlier versions and have stored rows.
_LEVELS = {
    "layer": "Layers",
    "block": "Blocks",
    "step": "Training steps",
    "kernel": "Kernels",
    "merge": "Merging",
    "load": "Adapter files",
    "optimizer": "AdamW over the adapters of a model",
    "ceiling": "Copy and matrix product",
}
_DIRECTIONS = {
    "fwd+bwd": "Forward + backward",
    "fwd": "Forward",
    "bwd": "Backward",
    "step": "Training step",
}
_CLOCKS = {
    "device": "Ratio to the frozen layer, device time",
    "wall": "Ratio to the frozen layer, wall time",
    "graph": "Ratio to the frozen layer, device time of the step as a CUDA graph",
    "host": "Ratio to the frozen layer, host overhead",
}


def report(stored: StoredRows, *, plotted: bool = False) -> str:
    """A device's report as Markdown, with its plot if there is one."""
    parts = [f"# {stored.device}", _PREFACE, _source(stored)]
    parts += [f"![layer]({plots.PLOT_FILE})"] if plotted else []
    for level, title in _LEVELS.items():
        sections = []
        cases = stored.cases(level)
        for direction, sweep in cases:
            if sweep == CPU_SWEEP:
                continue
            heading = _DIRECTIONS.get(direction, direction.capitalize())
            found = list(_tables(stored, stored.groups(level, sweep, direction)))
            if found:
                sections += [f"### {heading}" + f", by {sweep}" * (sweep != "main"), *found]
        swept = [stored.groups(level, CPU_SWEEP, each) for each, s in cases if s == CPU_SWEEP]
        sections += cpu_sweep.sections([g for groups in swept for g in groups]) if swept else []
        parts += [f"## {title}", *sections] if sections else []
    failed = [r for r in stored.rows if r.error is not None and r.milliseconds() is None]
    ungraphed = [r for r in stored.rows if r.graph_error is not None]
    parts += ["## Without a time", _reasons(failed)] if failed else []
    parts += ["## Not captured as a CUDA graph", _reasons(ungraphed)] if ungraphed else []
    return "\n\n".join(parts) + "\n"


def _source(stored: StoredRows) -> str:
    return f"From [`{rows.ROWS_FILE}`]({rows.ROWS_FILE}): {provenance(stored.rows)}."


def _tables(stored: StoredRows, groups: Sequence[Group]) -> Iterator[str]:
    """What there is to say of cases that differ in shape and dtype alone."""
    first = groups[0].first
    for clock in stored.clocks:
        text = _ratios(groups, clock)
        if text:
            yield f"{_CLOCKS[clock]}:"
            yield text
    metrics: dict[str, Callable[[Row], str]] = {}
    if first.level == "kernel" or not any(group.of(BASELINE) for group in groups):
        metrics["Milliseconds"] = lambda row: milliseconds(row.milliseconds())
    if first.sweep in MAIN_SWEEPS and first.direction in ("fwd+bwd", "step"):
        metrics |= {
            "Saved for backward, MiB, parameters not counted": lambda row: mib(row.saved_bytes),
            "Peak of a step above what was held before it, MiB": lambda row: mib(row.peak_bytes),
            "Kernels launched": lambda row: str(row.launches or NONE),
        }
    if first.level in ("kernel", "merge", "ceiling"):
        metrics["GB/s, counted"] = lambda row: ratio(row.gb_per_s)
    if first.level == "load":
        metrics = {
            "Milliseconds": metrics["Milliseconds"],
            "MiB on disk": lambda row: mib(row.moved_bytes),
        }
    for title, cell in metrics.items():
        text = _matrix(groups, cell)
        if text:
            yield f"{title}:"
            yield text


def _ratios(groups: Sequence[Group], clock: str) -> str:
    """Median ratios to the frozen layer, and its times."""

    def cell(row: Row) -> str:
        return NONE if row.provider == BASELINE else ratio(row.ratio(clock))

    def frozen(group: Group) -> str:
        row = group.of(BASELINE)
        return NONE if row is None else milliseconds(row.milliseconds(clock))

    return _matrix(groups, cell, {"frozen, ms": frozen, "rounds": lambda group: str(group.rounds)})


def _matrix(
    groups: Sequence[Group],
    cell: Callable[[Row], str],
    sums: dict[str, Callable[[Group], str]] | None = None,
) -> str:
    """A line for every provider, a column for every case.

    Args:
        groups: the cases.
        cell: the text of a row.
        sums: by title, the text of a whole case.

    Returns:
        A table without empty providers and cases, or an empty text if nothing is left.
    """
    texts = [{row.variant: cell(row) for row in group.rows} for group in groups]
    kept = [i for i, of_case in enumerate(texts) if any(t != NONE for t in of_case.values())]
    lines = [[title, *(text(groups[i]) for i in kept)] for title, text in (sums or {}).items()]
    variants = {row.variant: row for i in kept for row in groups[i].rows}
    for row in sorted(variants.values(), key=order):
        cells = [texts[i].get(row.variant, NONE) for i in kept]
        if any(text != NONE for text in cells):
            lines.append([label(row), *cells])
    return table(["provider", *(groups[i].name for i in kept)], lines) if kept else ""


def _reasons(found: Sequence[Row]) -> str:
    """A list of who and why, and in how many cases."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in sorted(found, key=lambda row: (row.level, order(row))):
        wrong = "wrong result: " if row.gate == "failed" else ""
        key = (row.level, label(row), f"{wrong}{row.error or row.graph_error}")
        counts[key] = counts.get(key, 0) + 1
    return "\n".join(
        f"- {name} ({level}, {count} case{'s' * (count != 1)}): {_as_text(error)}"
        for (level, name, error), count in counts.items()
    )


def _as_text(error: str) -> str:
    """An error as Markdown that shows it unchanged."""
    return " ".join(error.split()).replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def write(stored: StoredRows) -> None:
    """Report and plot, into the device's folder."""
    file = stored.folder / REPORT_FILE
    file.write_text(report(stored, plotted=plots.draw(stored)), encoding="utf-8")
    print(f"wrote {file}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write reports; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    folders = options.folders or sorted(f.parent for f in RESULTS.glob(f"*/{rows.ROWS_FILE}"))
    try:
        for folder in folders:
            write(load(folder))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
