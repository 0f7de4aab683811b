"""The questions that were asked, as tables of runs that anyone can repeat: see `studies.json`.

A study has tasks, settings that all its runs share, and variants, the lines of its table. The
options of a variant state the initialization, so that a stored run names it even if the default
changes. Equal runs of different studies are stored once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.quality import errors
from benchmarks.quality.runs import Run


@dataclass(frozen=True)
class Variant:
    """A method with its options, and the learning rates to choose from.

    A single rate is used without a search; without rates the method has its own.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "ALL"
    rates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it."""

    name: str
    question: str
    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]
    seeds: int
    settings: Run
    paired: bool = False  # whether the variants differ only in rounding; their losses are compared
    differences: tuple[tuple[str, str], ...] = ()  # labels; by default DCFT minus LoRA r=1

    def run(self, task: str, variant: Variant) -> Run:
        """A variant's run on a task, with the settings' seed and learning rate."""
        method, options, targets = variant.method, dict(variant.options), variant.targets
        return replace(self.settings, task=task, method=method, options=options, targets=targets)


def by_name(name: str) -> Study:
    """The study of that name."""
    if name not in STUDIES:
        raise errors.unknown("--study", name, STUDIES)
    return STUDIES[name]


def _study(entry: Mapping[str, Any]) -> Study:
    variants = [Variant(**{**line, "rates": tuple(line["rates"])}) for line in entry["variants"]]
    parsed = {
        "variants": tuple(variants),
        "tasks": tuple(entry["tasks"]),
        "settings": Run(task="", method="", **entry["settings"]),
        "differences": tuple(map(tuple, entry.get("differences", ()))),
    }
    return Study(**{**entry, **parsed})


_ENTRIES = json.loads(Path(__file__).with_name("studies.json").read_text(encoding="utf-8"))
STUDIES: Mapping[str, Study] = {entry["name"]: _study(entry) for entry in _ENTRIES}
"""All studies by name."""
