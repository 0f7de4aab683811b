"""What `benchmarks.host` has stored, and the table of it in a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.adapters.table import ADAPTERS
from benchmarks.rows import finished_lines

FILE = "host.jsonl"
"""In the folder of a device."""

HostRow = dict[str, Any]


def latest(folder: Path) -> list[HostRow]:
    """The rows of the latest run that a folder holds; none if there was none."""
    file = folder / FILE
    if not file.is_file():
        return []
    rows: list[HostRow] = [json.loads(line) for line in finished_lines(file)]
    return [row for row in rows if row["time"] == rows[-1]["time"]]


def table(rows: Sequence[HostRow]) -> str:
    """Microseconds of the processor by provider and case, as Markdown; empty without rows."""
    if not rows:
        return ""
    cases = list(dict.fromkeys((row["direction"], row["x"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    names = {kind.name: kind.label for kind in ADAPTERS}
    found = {(row["provider"], row["direction"], row["x"]): row["microseconds"] for row in rows}
    return tables.table(
        ["provider", *(f"{direction}, x {shape}" for direction, shape in cases)],
        (
            [
                names.get(provider, provider),
                *(f"{found[provider, direction, x]:.0f}" for direction, x in cases),
            ]
            for provider in providers
        ),
    )


def source(rows: Sequence[HostRow]) -> str:
    """Where the table is from."""
    one = rows[0]
    return (
        f"From [`{FILE}`]({FILE}): {one['device']}, one thread; torch {one['torch']}; triton "
        f"{one['triton']}; peft {one['peft']}; commit {one['commit']}; {one['time'][:10]}."
    )
