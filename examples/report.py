"""What the demo leaves behind: a table on the screen, a picture, and the figures as JSON."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from comparison import DCFT, HEAD_ONLY, LORA, PUBLISHED, Method, Outcome
from text_task import TextTask

_NOT_APPLICABLE = "-"
_COLOURS = {HEAD_ONLY: "#8c8c8c", DCFT: "#1b6ca8", PUBLISHED: "#c44e52", LORA: "#dd8452"}


def table(task: TextTask, model: str, outcome: Outcome) -> Table:
    """The whole outcome: one column a method, one line a property."""
    methods, fidelity = outcome.methods, outcome.fidelity
    result = Table(
        title=(
            f"{model} on '{task.name}': {task.description}\n"
            f"{outcome.train_size} training and {outcome.held_out_size} held-out texts, "
            f"{_answers(task)}; {outcome.device}"
        ),
        caption=_caption(task, outcome),
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("")
    for name in methods:
        result.add_column(name, justify="right", style="bold" if name == DCFT else None)

    def line(label: str, cell: Callable[[Method], str]) -> None:
        result.add_row(label, *(cell(method) for method in methods.values()))

    def dcft_line(label: str, text: str) -> None:
        result.add_row(label, *(text if name == DCFT else "" for name in methods))

    line("trainable adapter parameters", lambda m: _or_dash(m.adapter_parameters, "{:,}"))
    line("adapter on disk", lambda m: _or_dash(_kilobytes(m.adapter_bytes), "{:.1f} kB"))
    line(f"held-out {task.metric.name}", lambda m: _mean_and_spread(m.scores))
    line("  each seed", lambda m: "  ".join(f"{s:.3f}" for s in m.scores) or _NOT_APPLICABLE)
    line("training step", lambda m: f"{m.step.milliseconds:.1f} ms" if m.step else _NOT_APPLICABLE)
    line("  beside the frozen model", lambda m: f"{m.step.ratio:.2f}x" if m.step else "")
    result.add_section()
    dcft_line("logits off the reference, at most", f"{fidelity.reference_difference:.1e}")
    dcft_line("  off the reference in float64", f"{fidelity.torch_error:.1e}")
    dcft_line("merged: predictions changed", _changed(fidelity.merged_changes, fidelity.texts))
    dcft_line("  logits moved, at most", f"{fidelity.merged_difference:.1e}")
    dcft_line("  base after unmerging", "bit for bit" if fidelity.unmerged_is_exact else "DIFFERS")
    dcft_line("reloaded: predictions changed", _changed(fidelity.reloaded_changes, fidelity.texts))
    dcft_line("  logits moved, at most", f"{fidelity.reloaded_difference:.1e}")
    return result


def write_json(path: Path, model: str, task: TextTask, outcome: Outcome, options: object) -> None:
    """Store every measured figure, the options and the versions."""
    record = {
        "model": model,
        "task": task.name,
        "metric": task.metric.name,
        "options": options,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "outcome": asdict(outcome),
    }
    path.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def draw(path: Path, model: str, task: TextTask, outcome: Outcome) -> None:
    """Training curves, score against adapter size, and step time, side by side in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, quality, cost) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    figure.suptitle(f"{model}, task '{task.name}', {outcome.device}", fontsize=11)

    for name, method in outcome.methods.items():
        if method.losses:
            mean = [statistics.fmean(step) for step in zip(*method.losses, strict=True)]
            curves.plot(_smooth(mean), color=_COLOURS[name], label=name)
    curves.set(xlabel="step", ylabel="training loss (smoothed)", title="Training")
    curves.legend(frameon=False)

    scored = {name: method for name, method in outcome.methods.items() if method.scores}
    for place, (name, method) in enumerate(scored.items()):
        quality.bar(place, statistics.fmean(method.scores), color=_COLOURS[name], width=0.6)
        quality.plot([place] * len(method.scores), method.scores, "o", color="black", markersize=4)
    labels = [f"{name}\n{m.adapter_parameters or 0:,} params" for name, m in scored.items()]
    quality.set_xticks(range(len(scored)), labels)
    quality.axhline(outcome.constant_baseline, color="black", linestyle=":", linewidth=1)
    quality.set(
        ylabel=task.metric.name,
        title=f"Held-out {task.metric.name}\ndots: seeds; dotted: one answer for all",
    )

    timed = {name: method.step for name, method in outcome.methods.items() if method.step}
    bars = cost.barh(
        list(timed),
        [step.milliseconds for step in timed.values()],
        color=[_COLOURS[name] for name in timed],
        height=0.6,
    )
    cost.bar_label(bars, [f"{step.ratio:.2f}x" for step in timed.values()], padding=3)
    cost.margins(x=0.18)
    cost.invert_yaxis()
    cost.set(xlabel="milliseconds", title="Training step, beside the frozen model")

    for axes in (curves, quality, cost):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _caption(task: TextTask, outcome: Outcome) -> str:
    return (
        f"One answer for all texts scores {outcome.constant_baseline:.3f}. "
        "Scores are mean ± standard deviation over seeds.\n"
        f"All methods start from the same head and see the same batches; '{HEAD_ONLY}' trains the "
        "head alone.\n"
        f"'{PUBLISHED}' is DCFT with backend=\"reference\": the same function, by way of the full "
        "weight update.\n"
        "Training step: forward, backward and optimizer, median of steps taken in turns."
    )


def _answers(task: TextTask) -> str:
    return "a score" if task.is_regression else f"{len(task.label_names)} classes"


def _kilobytes(size: int | None) -> float | None:
    return None if size is None else size / 1000


def _or_dash(value: float | None, form: str) -> str:
    return _NOT_APPLICABLE if value is None else form.format(value)


def _mean_and_spread(scores: Sequence[float]) -> str:
    if not scores:
        return _NOT_APPLICABLE
    mean = f"{statistics.fmean(scores):.3f}"
    return mean if len(scores) == 1 else f"{mean} ± {statistics.stdev(scores):.3f}"


def _changed(changes: int, texts: int) -> str:
    return f"{changes} of {texts}"


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential average, corrected for its start."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed
