"""Plots of learning curves: equal results give equal files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import metrics
from benchmarks.quality.found import Found
from benchmarks.quality.studies import Variant

MOST_LINES = 8
"""More of them cannot be told apart."""

SMOOTHED_OVER = 5
"""Stored points."""

# Okabe and Ito's palette, which colour-blind readers can tell apart, with grey for yellow; the
# first colour is the first DCFT's.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#999999")
_YARDSTICKS = ("lora", "full", "head")

Curve = list[tuple[int, float]]


def in_units(metric: str, value: float) -> float:
    """In percent, or as it is where lower is better."""
    return value if metric in metrics.LOWER_IS_BETTER else 100 * value


def unit(metric: str) -> str:
    """The metric's name with its unit."""
    return f"{metric} (lower is better)" if metric in metrics.LOWER_IS_BETTER else f"{metric}, %"


def is_dcft(variant: Variant) -> bool:
    """Whether a variant is DCFT, alone or combined."""
    return "dcft" in variant.method.split("_")


def curves(found: Found, path: Path) -> None:
    """Draw the training loss of a study's main variants, a panel for each task."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # draws with Agg, whatever the backend

    lines = main_lines(found)
    first = next((variant for variant in lines if is_dcft(variant)), None)
    others = iter(_COLOURS if first is None else _COLOURS[1:])
    colours = {v.label: _COLOURS[0] if v is first else next(others) for v in lines}
    across = len(found.study.tasks)
    with mpl.rc_context({"font.size": 9, "figure.labelsize": 9, "axes.titlesize": 9}):
        figure = Figure(figsize=(max(6.6, 1.0 + 3.3 * across), 4.0), layout="constrained")
        panels = figure.subplots(1, across, squeeze=False)[0]
        handles = {}
        for task, axes in zip(found.study.tasks, panels, strict=True):
            axes.set_title(task, loc="left", fontweight="bold")
            for variant in lines:
                curve = smooth(_mean_loss(found, variant, task))
                if curve:
                    handles[variant.label], *_ = axes.plot(
                        *zip(*curve, strict=True),
                        color=colours[variant.label],
                        linewidth=2.0 if variant is first else 1.2,
                        zorder=3 if variant is first else 2,
                    )
            axes.set_xlim(0, found.study.settings.steps * 1.02)
            axes.grid(axis="y", alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("training loss")
        caption = f"steps\nmean over seeds, smoothed over {SMOOTHED_OVER} stored points"
        if len(lines) < len(found.study.variants):
            caption += f"\n{len(lines)} variants: DCFT, LoRA and the best of the others"
        figure.supxlabel(caption, fontsize=8)
        columns = max(2, int(figure.get_figwidth() / 2.2))
        place = "outside upper center"
        figure.legend(
            handles.values(), handles, loc=place, ncols=columns, frameon=False, fontsize=8
        )
        figure.savefig(path, dpi=150)


def main_lines(found: Found) -> list[Variant]:
    """At most `MOST_LINES` variants: DCFT, what it is compared with, then the best of the rest."""
    places = {variant.label: 0 for variant in found.study.variants}
    for task in found.study.tasks:
        sign = 1 if found.metric(task) in metrics.LOWER_IS_BETTER else -1
        means = {v.label: found.cell(v, task).mean for v in found.study.variants}
        ranking = sorted(
            means, key=lambda label: (means[label] is None, sign * (means[label] or 0))
        )
        for place, label in enumerate(ranking):
            places[label] += place
    known = [
        v for v in found.study.variants if any(found.cell(v, t).values for t in found.study.tasks)
    ]
    order = sorted(
        known, key=lambda v: (not is_dcft(v), v.method not in _YARDSTICKS, places[v.label])
    )
    return [variant for variant in known if variant in order[:MOST_LINES]]


def _mean_loss(found: Found, variant: Variant, task: str) -> Curve:
    """The mean over the seeds that finished, at the steps that all of them have."""
    results = found.cell(variant, task).results
    by_step = [dict(result.loss_curve) for result in results if result.value is not None]
    steps = set.intersection(*map(set, by_step)) if by_step else ()
    return [(step, statistics.fmean(curve[step] for curve in by_step)) for step in sorted(steps)]


def smooth(curve: Sequence[tuple[int, float]]) -> Curve:
    """The mean of each point and its neighbours, equally many on both sides."""
    smoothed = []
    for place, (step, _) in enumerate(curve):
        reach = min(SMOOTHED_OVER // 2, place, len(curve) - 1 - place)
        near = [value for _, value in curve[place - reach : place + reach + 1]]
        smoothed.append((step, statistics.fmean(near)))
    return smoothed
