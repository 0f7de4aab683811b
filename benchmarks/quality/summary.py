"""Results of a study as one table: a line a variant, a column a task."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.quality.runs import Result
from benchmarks.quality.studies import Study, Variant


def results_of(results: Sequence[Result], task: str, variant: Variant) -> list[Result]:
    """The results of a variant on a task, one a seed."""
    return [
        result
        for result in results
        if result.run.task == task
        and result.run.method == variant.method
        and result.run.targets == variant.targets
        and _same(result.run.options, variant.options)
    ]


def _same(options: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether options are the same once stored, where tuples are lists."""
    return json.dumps(dict(options), sort_keys=True) == json.dumps(dict(others), sort_keys=True)


def mean_and_spread(results: Sequence[Result]) -> tuple[float, float] | None:
    """Mean and standard deviation over the seeds (0 for a single one); None if one failed."""
    values = [result.value for result in results if result.value is not None]
    if not values or len(values) < len(results):
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def summary_table(study: Study, results: Sequence[Result]) -> Table:
    """For the terminal."""
    table = Table(title=study.question or None)
    table.add_column("method")
    table.add_column("parameters", justify="right")
    for task in study.tasks:
        metric = next((r.metric for r in results if r.run.task == task), "")
        table.add_column(f"{task}\n{metric}", justify="right")
    table.add_column("seconds", justify="right")
    for variant in study.variants:
        cells, seconds, parameters = [], 0.0, 0
        for task in study.tasks:
            found = results_of(results, task, variant)
            spread = mean_and_spread(found)
            cells.append("failed" if spread is None else f"{spread[0]:.4f} ± {spread[1]:.4f}")
            seconds += sum(result.seconds for result in found) / max(1, len(found))
            parameters = max((r.trainable_parameters for r in found), default=parameters)
        table.add_row(variant.label, f"{parameters:,}", *cells, f"{seconds:.0f}")
    constants = [
        next((f"{r.constant_value:.4f}" for r in results if r.run.task == task), "")
        for task in study.tasks
    ]
    table.add_row("constant answer", "0", *constants, "")
    return table
