"""Results of a study as a table for the terminal: a line a variant, a column a task."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from benchmarks.quality.found import Found, mean_and_spread
from benchmarks.quality.runs import Result


def summary_table(found: Found) -> Table:
    """Means and standard deviations over the seeds."""
    study = found.study
    table = Table(title=study.question or None)
    table.add_column("method")
    table.add_column("parameters", justify="right")
    for task in study.tasks:
        table.add_column(f"{task}\n{found.metric(task)}", justify="right")
    table.add_column("seconds a run", justify="right")
    for variant in study.variants:
        cells: list[str] = []
        results: list[Result] = []
        for task in study.tasks:
            cell = found.cell(variant, task)
            results += cell.results
            cells.append(_figure(cell.results))
        parameters = max((r.trainable_parameters for r in results), default=0)
        seconds = statistics.fmean(r.seconds for r in results) if results else 0.0
        table.add_row(variant.label, f"{parameters:,}", *cells, f"{seconds:.0f}")
    constants = [
        next((f"{r.constant_value:.4f}" for r in found.results if r.run.task == task), "")
        for task in study.tasks
    ]
    table.add_row("constant answer", "0", *constants, "")
    return table


def _figure(results: Sequence[Result]) -> str:
    spread = mean_and_spread(results)
    if spread is None:
        return "failed"
    deviation = f" ± {spread[1]:.4f}" if len(results) > 1 else ""
    return f"{spread[0]:.4f}{deviation}"
