"""Plots of learning curves: the same results give the same files, byte for byte."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.quality import metrics
from benchmarks.quality.found import Found, mean_and_spread
from benchmarks.quality.report_tables import (
    Pair,
    in_units,
    is_dcft,
    pairs,
    reference_of,
    unit,
)
from benchmarks.quality.runs import Result
from benchmarks.quality.studies import Variant

MOST_LINES = 8
"""More of them cannot be told apart."""

SMOOTHED_OVER = 5
"""Stored points."""

# Okabe and Ito's palette, which colour-blind readers can tell apart, grey for its yellow; the first
# is the first DCFT's.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#999999")
# Beside DCFT these say how good a result is.
_YARDSTICKS = ("lora", "full", "head")

_PANEL = (3.3, 2.5)
_MARGIN = (1.0, 1.5)
_NARROWEST = 6.6

Curve = list[tuple[int, float]]


def curves(found: Found, stem: Path) -> bool:
    """Training loss, and the metric where it was scored on the way; False without results."""
    shown = [task for task in found.study.tasks if any(_curves(found, task, _losses).values())]
    if not shown:
        return False
    lines = main_lines(found)
    evaluated = any(
        len(curve) > 1 for task in shown for curve in _curves(found, task, _values).values()
    )
    with _figure(1 + evaluated, len(shown)) as (figure, panels):
        for task, axes in zip(shown, panels[0], strict=True):
            axes.set_title(task, loc="left", fontweight="bold")
            _draw(axes, found, lines, _smooth_curves(found, task))
        panels[0][0].set_ylabel("training loss")
        for task, axes in zip(shown, panels[1] if evaluated else [], strict=evaluated):
            metric = found.metric(task)
            scored = _curves(found, task, _values)
            drawn = {
                name: [(step, in_units(metric, value)) for step, value in curve]
                for name, curve in scored.items()
            }
            _draw(axes, found, lines, drawn, marker="o")
            axes.set_ylabel(unit(metric))
        _finish(figure, _caption(found, lines))
        _save(figure, stem)
    return True


def _caption(found: Found, lines: Sequence[Variant]) -> str:
    caption = (
        f"mean over the seeds that came to an end; loss smoothed over {SMOOTHED_OVER} stored points"
    )
    known = len(_with_values(found))
    if len(lines) == known:
        return caption
    return f"{caption}\n{len(lines)} of {known}: DCFT and what it is measured by, then the best"


def _with_values(found: Found) -> list[Variant]:
    return [
        variant
        for variant in found.study.variants
        if any(found.cell(variant, task).values for task in found.study.tasks)
    ]


def main_lines(found: Found) -> list[Variant]:
    """The variants that are drawn, at most `MOST_LINES`, in the order of the study.

    Of more, DCFT and what it is measured by, then those that are best over all tasks.
    """
    known = _with_values(found)
    places = {variant.label: 0 for variant in known}
    for task in found.study.tasks:
        for place, label in enumerate(_ranking(found, known, task)):
            places[label] += place
    first = sorted(
        known,
        key=lambda v: (not is_dcft(v), v.method not in _YARDSTICKS, places[v.label]),
    )
    kept = {variant.label for variant in first[:MOST_LINES]}
    return [variant for variant in known if variant.label in kept]


def _ranking(found: Found, variants: Sequence[Variant], task: str) -> list[str]:
    """Labels, the best first; those without a value last."""
    sign = 1 if found.metric(task) in metrics.LOWER_IS_BETTER else -1

    def place(variant: Variant) -> tuple[bool, float]:
        spread = mean_and_spread(found.cell(variant, task).results)
        return (True, 0.0) if spread is None else (False, sign * spread[0])

    return [variant.label for variant in sorted(variants, key=place)]


def _losses(result: Result) -> Curve:
    return result.loss_curve


def _values(result: Result) -> Curve:
    return result.value_curve


def _curves(found: Found, task: str, curve_of: Callable[[Result], Curve]) -> dict[str, Curve]:
    """By variant, the mean curve of the seeds that came to an end."""
    return {
        variant.label: _mean(
            [curve_of(r) for r in found.cell(variant, task).results if r.value is not None]
        )
        for variant in found.study.variants
    }


def _mean(several: Sequence[Curve]) -> Curve:
    """At the steps that all curves have."""
    by_step = [dict(curve) for curve in several]
    return [
        (step, statistics.fmean(curve[step] for curve in by_step))
        for step in sorted(by_step[0] if by_step else ())
        if all(step in curve for curve in by_step)
    ]


def _smooth_curves(found: Found, task: str) -> dict[str, Curve]:
    return {name: smooth(curve) for name, curve in _curves(found, task, _losses).items()}


def smooth(curve: Curve) -> Curve:
    """The mean of each point and its neighbours, as many on either side; fewer near the ends."""
    smoothed = []
    for place, (step, _) in enumerate(curve):
        reach = min(SMOOTHED_OVER // 2, place, len(curve) - 1 - place)
        near = [value for _, value in curve[place - reach : place + reach + 1]]
        smoothed.append((step, statistics.fmean(near)))
    return smoothed


def _draw(
    axes: Any,
    found: Found,
    lines: Sequence[Variant],
    drawn: dict[str, Curve],
    marker: str = "",
) -> None:
    colours = _colours(lines)
    for variant in lines:
        curve = drawn[variant.label]
        if curve:
            ours = is_dcft(variant) and colours[variant.label] == _COLOURS[0]
            axes.plot(
                *zip(*curve, strict=True),
                color=colours[variant.label],
                label=variant.label,
                marker=marker,
                markersize=4,
                linewidth=2.0 if ours else 1.2,
                zorder=3 if ours else 2,
            )
    _dress(axes, found)


def _colours(lines: Sequence[Variant]) -> dict[str, str]:
    """The first colour is the first DCFT's; the others are dealt out in order."""
    first = next((variant.label for variant in lines if is_dcft(variant)), None)
    others = [variant.label for variant in lines if variant.label != first]
    free = _COLOURS[1:] if first is not None else (*_COLOURS[1:], _COLOURS[0])
    colours = dict(zip(others, free, strict=False))
    return colours if first is None else {first: _COLOURS[0], **colours}


def paired(found: Found, stem: Path) -> bool:
    """Loss curves on each other, every seed, and their difference; False without pairs."""
    reference = reference_of(found.study)
    others = [variant for variant in found.study.variants if variant is not reference]
    drawn = others[: MOST_LINES - 1]
    shown = {
        task: {variant.label: pairs(found, variant, task) for variant in drawn}
        for task in found.study.tasks
    }
    shown = {
        task: by_label
        for task, by_label in shown.items()
        if any(pair.losses for several in by_label.values() for pair in several)
    }
    if not shown:
        return False
    with _figure(2, len(shown)) as (figure, panels):
        for task, above, below in zip(shown, *panels, strict=True):
            above.set_title(task, loc="left", fontweight="bold")
            _pairs_on_each_other(above, reference.label, shown[task])
            _differences(below, shown[task])
            for axes in (above, below):
                _dress(axes, found)
        panels[0][0].set_ylabel("training loss")
        panels[1][0].set_ylabel("|difference|")
        _finish(figure, "every seed; points that are equal have no place on a log scale")
        _save(figure, stem)
    return True


def _pairs_on_each_other(axes: Any, reference: str, by_label: dict[str, list[Pair]]) -> None:
    under: dict[int, Curve] = {}
    for several in by_label.values():
        for pair in several:
            under[pair.reference.run.seed] = pair.reference.loss_curve
    for curve in under.values():
        axes.plot(*zip(*curve, strict=True), color="#BBBBBB", linewidth=3.5, label=reference)
    for (label, several), colour in zip(by_label.items(), _COLOURS, strict=False):
        for pair in several:
            curve = [(step, loss) for step, loss, _ in pair.losses]
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1, label=label)


def _differences(axes: Any, by_label: dict[str, list[Pair]]) -> None:
    some = False
    for (label, several), colour in zip(by_label.items(), _COLOURS, strict=False):
        for pair in several:
            apart = [(step, abs(a - b)) for step, a, b in pair.losses if a != b]
            if apart:
                some = True
                axes.plot(
                    *zip(*apart, strict=True),
                    color=colour,
                    linewidth=0.8,
                    marker=".",
                    markersize=3,
                    label=label,
                )
    if some:
        axes.set_yscale("log")
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "equal at every point", ha="center", transform=axes.transAxes)


@contextmanager
def _figure(down: int, across: int) -> Iterator[tuple[Any, Any]]:
    """A figure with panels; it has to be saved inside, where the settings are that it needs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # draws with Agg, whatever backend is set

    settings = {
        "svg.hashsalt": "dcft_kernels",  # ids of elements, random otherwise
        "font.size": 9,
        "figure.labelsize": 9,
        "axes.titlesize": 9,
    }
    width = max(_NARROWEST, _MARGIN[0] + _PANEL[0] * across)
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, _MARGIN[1] + _PANEL[1] * down), layout="constrained")
        yield figure, figure.subplots(down, across, squeeze=False)


def _dress(axes: Any, found: Found) -> None:
    axes.set_xlim(0, found.study.settings.steps * 1.02)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, caption: str) -> None:
    """The legend of all panels, each label once, and what the plot is of."""
    keys: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            keys.setdefault(label, handle)
    columns = max(2, int(figure.get_figwidth() / 2.2))
    place = "outside upper center"
    figure.legend(keys.values(), keys, loc=place, ncols=columns, frameon=False, fontsize=8)
    figure.supxlabel(f"steps\n{caption}", fontsize=8)


def _save(figure: Any, stem: Path) -> None:
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
