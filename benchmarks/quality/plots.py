"""Plots of training losses: equal results give equal files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.quality.found import Found
from benchmarks.quality.metrics import LOWER_IS_BETTER
from benchmarks.quality.studies import Variant

MOST_LINES = 8
"""More of them cannot be told apart."""

SMOOTHED_OVER = 5
"""Stored points."""

# Okabe and Ito's palette, which colour-blind readers can tell apart, with grey for yellow; the
# first colour is the first DCFT's.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#999999")
_YARDSTICKS = ("lora", "full", "head")

Curve = Sequence[tuple[int, float]]


def is_dcft(variant: Variant) -> bool:
    """Whether a variant is DCFT, alone or combined."""
    return "dcft" in variant.method.split("_")


def curves(found: Found, path: Path) -> None:
    """Draw the training loss of a study's main variants, a panel for each task."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # draws with Agg, whatever the backend

    lines = main_lines(found)
    colours = {variant.label: colour for variant, colour in zip(lines, _COLOURS, strict=False)}
    across = len(found.study.tasks)
    with mpl.rc_context({"font.size": 9, "figure.labelsize": 9, "axes.titlesize": 9}):
        figure = Figure(figsize=(max(6.6, 1.0 + 3.3 * across), 4.0), layout="constrained")
        panels = figure.subplots(1, across, squeeze=False)[0]
        handles = {}
        for task, axes in zip(found.study.tasks, panels, strict=True):
            axes.set_title(task, loc="left", fontweight="bold")
            axes.set_xlim(0, found.study.settings.steps * 1.02)
            axes.grid(axis="y", alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            for variant in lines:
                if curve := smooth(_mean_loss(found, variant, task)):
                    x, y = zip(*curve, strict=True)
                    (handle,) = axes.plot(x, y, color=colours[variant.label], linewidth=1.3)
                    handles[variant.label] = handle
        panels[0].set_ylabel("training loss")
        caption = f"steps\nmean over seeds, smoothed over {SMOOTHED_OVER} stored points"
        if len(lines) == MOST_LINES:
            caption += "; DCFT, LoRA and the best of the others"
        figure.supxlabel(caption, fontsize=8)
        figure.legend(
            handles.values(),
            handles,
            loc="outside upper center",
            ncols=3,
            frameon=False,
            fontsize=8,
        )
        figure.savefig(path, dpi=150)


def main_lines(found: Found) -> list[Variant]:
    """At most `MOST_LINES` variants: DCFT, what it is compared with, the best on the first task."""
    task = found.study.tasks[0]
    sign = 1 if found.metric(task) in LOWER_IS_BETTER else -1

    def order(variant: Variant) -> tuple[bool, bool, float]:
        mean = found.cell(variant, task).mean
        worst = float("inf") if mean is None else sign * mean
        return (not is_dcft(variant), variant.method not in _YARDSTICKS, worst)

    return sorted(found.study.variants, key=order)[:MOST_LINES]


def _mean_loss(found: Found, variant: Variant, task: str) -> Curve:
    """The mean over the seeds that finished."""
    results = [r for r in found.cell(variant, task).results if r.value is not None]
    return [
        (step, fmean(curve[place][1] for curve in (r.loss_curve for r in results)))
        for place, (step, _) in enumerate(results[0].loss_curve if results else ())
    ]


def smooth(curve: Curve) -> Curve:
    """The mean of each point and its neighbours, equally many on both sides."""
    smoothed = []
    for place, (step, _) in enumerate(curve):
        reach = min(SMOOTHED_OVER // 2, place, len(curve) - 1 - place)
        near = [value for _, value in curve[place - reach : place + reach + 1]]
        smoothed.append((step, fmean(near)))
    return smoothed
