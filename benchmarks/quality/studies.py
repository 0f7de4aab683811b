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
from typing import Any, Literal

from benchmarks.quality import errors, tasks
from benchmarks.quality.methods.table import by_name as method_by_name
from benchmarks.quality.runs import SLICE, Run


@dataclass(frozen=True)
class Variant:
    """A method with its options, and the learning rates to choose from.

    A single rate is used without a search; without rates the method has its own. `rates_of` is a
    variant whose trials choose the rate of this one too.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "ALL"
    rates: tuple[float, ...] | None = None
    rates_of: Variant | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `Run`, instead of the study's
    seeds: int | None = None  # fewer than the study's


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
    metrics: tuple[str, ...] = ()  # shown next to the one that is compared
    # How a learning rate is chosen on a slice of train: by the mean over the trials' seeds.
    chosen_by: Literal["loss", "metric"] = "loss"
    trial_seeds: int = 2
    trial_steps: int | None = None  # None for the run's own
    trial_size: int = 600  # at most so many examples are scored

    def run(self, task: str, variant: Variant) -> Run:
        """A variant's run on a task, with the settings' seed and learning rate."""
        method, options, targets = variant.method, dict(variant.options), variant.targets
        run = replace(self.settings, task=task, method=method, options=options, targets=targets)
        return replace(run, **variant.settings)

    def runs(self, task: str, variant: Variant, learning_rate: float) -> list[Run]:
        """A variant's runs on a task, one per seed."""
        run = replace(self.run(task, variant), learning_rate=learning_rate)
        count = min(self.seeds, variant.seeds or self.seeds)
        return [replace(run, seed=seed) for seed in range(count)]

    def rates(self, variant: Variant) -> tuple[float, ...]:
        """The candidates for a variant's learning rate."""
        chooser = variant.rates_of or variant
        return chooser.rates or method_by_name(chooser.method).learning_rates

    def trials(self, task: str, variant: Variant, learning_rate: float) -> list[Run]:
        """The trials of a candidate, which leave a slice of train out and score it."""
        run = self.run(task, variant.rates_of or variant)
        run = replace(run, scored=SLICE, scored_size=self.trial_size, evaluations=1, stopping=False)
        run = replace(run, steps=self.trial_steps or run.steps, learning_rate=learning_rate)
        return [replace(run, seed=seed) for seed in range(self.trial_seeds)]

    def criterion(self, task: str) -> str:
        """The metric that learning rates are chosen by."""
        known = tasks.of_run(task)
        return known.loss if self.chosen_by == "loss" else known.metric


def by_name(name: str) -> Study:
    """The study of that name."""
    if name not in STUDIES:
        raise errors.unknown("--study", name, STUDIES)
    return STUDIES[name]


def _study(entry: Mapping[str, Any]) -> Study:
    variants: dict[str, Variant] = {}
    for line in entry["variants"]:  # `rates_of` names one of those before it
        rates, chooser = line.get("rates"), line.get("rates_of")
        given = {"rates": rates and tuple(rates), "rates_of": chooser and variants[chooser]}
        variants[line["label"]] = Variant(**{**line, **given})
    parsed = {
        "variants": tuple(variants.values()),
        "tasks": tuple(entry["tasks"]),
        "settings": Run(task="", method="", **entry["settings"]),
        "differences": tuple(map(tuple, entry.get("differences", ()))),
        "metrics": tuple(entry.get("metrics", ())),
    }
    return Study(**{**entry, **parsed})


_ENTRIES = json.loads(Path(__file__).with_name("studies.json").read_text(encoding="utf-8"))
STUDIES: Mapping[str, Study] = {entry["name"]: _study(entry) for entry in _ENTRIES}
"""All studies by name."""
