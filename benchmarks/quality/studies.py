"""The questions that were asked, as tables of runs that anyone can repeat: see `studies.json`.

A study has tasks, settings that all its runs share (fields of `Run`), and variants, the lines of
its table: a method with its options, and the learning rates that are tried. The options state the
initialization, so that a stored run names it even if the default changes. Equal runs of different
studies are stored once.
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
    """One line of a study's table.

    Attributes:
        label: the line's name.
        rates: the learning rates that are tried on a slice of train; a single one is used without
            a search; None for the method's own candidates.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "ALL"
    rates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        settings: what all its runs share.
        paired: whether its variants differ only in rounding; their loss curves are then compared.
        differences: pairs of labels whose difference is shown; by default DCFT minus LoRA r=1.
    """

    name: str
    question: str
    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]
    seeds: int
    settings: Run
    paired: bool = False
    differences: tuple[tuple[str, str], ...] = ()

    def run(self, task: str, variant: Variant) -> Run:
        """A variant's run on a task, with the settings' seed and learning rate."""
        return replace(
            self.settings,
            task=task,
            method=variant.method,
            options=dict(variant.options),
            targets=variant.targets,
        )


def by_name(name: str) -> Study:
    """The study of that name."""
    if name not in STUDIES:
        raise errors.unknown("--study", name, STUDIES)
    return STUDIES[name]


def _study(entry: Mapping[str, Any]) -> Study:
    variants = (Variant(**{**line, "rates": tuple(line["rates"])}) for line in entry["variants"])
    return Study(
        **{
            **entry,
            "variants": tuple(variants),
            "tasks": tuple(entry["tasks"]),
            "settings": Run(task="", method="", **entry["settings"]),
            "differences": tuple(map(tuple, entry.get("differences", ()))),
        }
    )


_FILE = Path(__file__).with_name("studies.json")
STUDIES: Mapping[str, Study] = {
    entry["name"]: _study(entry) for entry in json.loads(_FILE.read_text(encoding="utf-8"))
}
"""All studies by name."""
