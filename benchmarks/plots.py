"""Plots of stored rows: the same rows give the same files, byte for byte."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals, labels, roofline
from benchmarks.entries import BASELINE
from benchmarks.stored import Group, Stored, provenance

# Okabe and Ito's palette, which colour-blind readers can tell apart; DCFT alone is saturated red.
COLOURS = {
    "dcft": "#D55E00",
    "lora_r8": "#0072B2",
    "lora_r1": "#56B4E9",
    "lora_autograd": "#CC79A7",
    "published": "#E69F00",
    "lokr": "#009E73",
    "dora": "#F0E442",
    "full": "#999999",
}
_MARKERS = {"dcft": "o", "lora_r8": "s", "lora_r1": "D", "lora_autograd": "^", "published": "v"}
_OURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442")
_BASES = ("black", "#777777", "#BBBBBB")
_SHAPES = "osD^vP*Xhp"

# Higher bars are cut off here and marked with an arrow: differences near 1 are the point.
_CUT = 5.0
_CASES_ACROSS = 4  # more, and the numbers over the bars run into each other

_MEMORY = {"saved_bytes": "saved for backward", "peak_bytes": "peak of a step"}

# What a curve runs over: a sweep, or the tokens of all cases of one width.
_SIZES = {"rank": "k", "kernel_size": "d", "stride": "stride"}
_AXES = {"k": "rank k", "d": "kernel size d", "stride": "stride", "T": "tokens T"}


def layer(stored: Stored, stem: Path) -> bool:
    """Bars of the ratio to the frozen layer, forward and backward; False without such rows."""
    cases = [g for g in goals.layer_cases(stored) if any(g.ratio(name) for name in COLOURS)]
    if not cases:
        return False
    panels = _in_panels(cases)
    plt = _pyplot()
    figure, rows = plt.subplots(
        len(panels),
        1,
        figsize=(2 + 2.4 * len(panels[0]), 1.5 + 2.7 * len(panels)),
        squeeze=False,
        layout="constrained",
    )
    for axes, shown in zip(rows[:, 0], panels, strict=True):
        _ratio_bars(axes, shown, stored)
        axes.set_xlim(-0.5, len(panels[0]) - 0.5)  # bars of one width throughout
    clock = "device time" if stored.gpu else "time"
    figure.supylabel(f"{clock} / frozen nn.Linear")
    _finish(
        figure,
        stored,
        "forward + backward of one linear layer, tokens x in -> out; lower is faster",
    )
    _save(figure, stem)
    return True


def _in_panels(cases: Sequence[Group]) -> list[Sequence[Group]]:
    """Cases in as few panels as hold them, about as many in each."""
    count = -(-len(cases) // _CASES_ACROSS)
    across = -(-len(cases) // count)
    return [cases[start : start + across] for start in range(0, len(cases), across)]


def _ratio_bars(axes: Any, cases: Sequence[Group], stored: Stored) -> None:
    names = [name for name in COLOURS if any(case.of(name) for case in cases)]
    width = 0.88 / len(names)
    top = 1.3
    for index, name in enumerate(names):
        places = [i + (index - (len(names) - 1) / 2) * width for i in range(len(cases))]
        values = [case.ratio(name) for case in cases]
        heights = [min(value or 0.0, _CUT) for value in values]
        axes.bar(places, heights, width * 0.92, color=COLOURS[name], label=_label(cases, name))
        for place, value, height in zip(places, values, heights, strict=True):
            _over_bar(axes, place, height, _ratio_text(value), bold=name == "dcft")
        top = max(top, *heights)
    axes.axhline(1.0, color="black", linewidth=1, label="frozen nn.Linear = 1")
    for goal in goals.frozen_goals(stored.gpu):
        shown = [i for i, case in enumerate(cases) if goal.applies(case)]
        # A goal for another clock than the bars' has no place among them.
        if goal.clock == stored.clocks[0]:
            for i in shown:
                label = f"goal, {goal.limit:.2f}" if i == shown[0] else None
                ends = (i - 0.46, i + 0.46)
                axes.hlines(goal.limit, *ends, "black", linestyle="--", linewidth=0.9, label=label)
    ticks = [f"{case.name}\n{_rounds(case.rounds)}" for case in cases]
    axes.set_xticks(range(len(cases)), ticks, fontsize=8)
    axes.set_ylim(0, top * 1.12)
    _bare(axes)


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count != 1)}"


def _ratio_text(value: float | None) -> str:
    if value is None:
        return "none"
    return f"↑{value:.1f}" if value > _CUT else f"{value:.2f}"


def roofs(stored: Stored, stem: Path) -> bool:
    """Achieved rates under the measured ceilings, a panel a dtype; False without either."""
    best = {k: c for k, c in roofline.ceilings(stored).items() if c.attainable(1.0) is not None}
    found = [point for point in roofline.points(stored) if point.row.dtype in best]
    if not found:
        return False
    dtypes = list(dict.fromkeys(point.row.dtype for point in found))
    names = list(dict.fromkeys(point.name for point in found))
    cases = list(dict.fromkeys(point.case.shape for point in found))
    bases = {point.name for point in found if point.base}
    ours = [name for name in names if name not in bases]
    colours = dict(zip(ours, itertools.cycle(_OURS), strict=False))
    colours |= dict(zip(sorted(bases), itertools.cycle(_BASES), strict=False))
    shapes = dict(zip(cases, itertools.cycle(_SHAPES), strict=False))
    plt = _pyplot()
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(3.2 + 4.6 * len(dtypes), 5.2), squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        shown = [point for point in found if point.row.dtype == dtype]
        _roof(axes, best[dtype], [point.intensity for point in shown])
        for point in shown:
            axes.plot(
                point.intensity,
                point.tflop_per_s,
                shapes[point.case.shape],
                color=colours[point.name],
                markersize=8,
                markeredgecolor="white",
                markeredgewidth=0.7,
            )
        axes.set_title(dtype, loc="left", fontweight="bold")
    keys = [plt.Line2D([], [], ls="", marker="o", color=c, label=n) for n, c in colours.items()]
    keys += [
        plt.Line2D([], [], ls="", marker=marker, color="black", markerfacecolor="none", label=case)
        for case, marker in shapes.items()
    ]
    figure.legend(handles=keys, loc="outside right upper", frameon=False, fontsize=8)
    figure.supylabel("achieved TFLOP/s")
    _finish(figure, stored, "operations for each byte that has to move", legend=False)
    _save(figure, stem)
    return True


def _roof(axes: Any, ceiling: roofline.Ceiling, intensities: Sequence[float]) -> None:
    """The two ceilings, and room for what lies under them."""
    bandwidth, peak = ceiling.gb_per_s or 0.0, ceiling.tflop_per_s or 0.0
    knee = 1e3 * peak / bandwidth
    left, right = min(knee, *intensities) / 3, max(knee, *intensities) * 3
    axes.plot(
        [left, knee, right], [bandwidth * left / 1e3, peak, peak], color="black", linewidth=1.2
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.annotate(
        f"product, {roofline.rate(peak)} TFLOP/s\ncopy, {roofline.rate(bandwidth)} GB/s",
        (0.03, 0.97),
        xycoords="axes fraction",
        va="top",
        fontsize=8,
    )
    axes.margins(y=0.12)
    axes.grid(alpha=0.25, linewidth=0.6)
    _bare(axes)


def memory(stored: Stored, stem: Path) -> bool:
    """Bars of what a step keeps and takes, a panel a case; False without such rows."""
    kinds = {
        field: title
        for field, title in _MEMORY.items()
        if any(_sizes(case, field) for case in goals.layer_cases(stored))
    }
    cases = [c for c in goals.layer_cases(stored) if any(_sizes(c, field) for field in kinds)]
    cases = cases[:_CASES_ACROSS]
    if not cases:
        return False
    plt = _pyplot()
    figure, panels = plt.subplots(
        len(kinds),
        len(cases),
        figsize=(1 + 2.9 * len(cases), 1.6 + 2.3 * len(kinds)),
        squeeze=False,
        layout="constrained",
    )
    names = [name for name in COLOURS if any(case.of(name) for case in cases)]
    for row, (field, title) in zip(panels, kinds.items(), strict=True):
        for axes, case in zip(row, cases, strict=True):
            sizes = _sizes(case, field)
            frozen = case.of(BASELINE)
            floor = getattr(frozen, field) if frozen is not None else None
            if floor:
                axes.axhline(floor / 2**20, color="black", linewidth=1, label="frozen nn.Linear")
            for place, name in enumerate(names):
                mib = sizes.get(name, 0) / 2**20
                label = _label(cases, name)
                axes.bar(place, mib, 0.85, color=COLOURS[name], label=label)
                text = _short(mib) if name in sizes else "none"
                _over_bar(axes, place, mib, text, bold=name == "dcft")
            axes.set_xticks([])
            axes.margins(y=0.14)
            _bare(axes)
        row[0].set_ylabel(f"{title}, MiB")
    for axes, case in zip(panels[0], cases, strict=True):
        axes.set_title(case.name, loc="left", fontweight="bold")
    _finish(figure, stored, "forward + backward of one linear layer, parameters not counted")
    _save(figure, stem)
    return True


def _sizes(case: Group, field: str) -> dict[str, int]:
    """Bytes by provider, of those that the plots show."""
    found = {name: getattr(row, field) for name in COLOURS if (row := case.of(name)) is not None}
    return {name: size for name, size in found.items() if size is not None}


def _short(mib: float) -> str:
    return f"{mib:.{0 if mib >= 100 else 1 if mib >= 10 else 2}f}"


Curves = dict[str, tuple[str, list[tuple[int, float]]]]  # by provider: its label, its points


def scaling(stored: Stored, stem: Path) -> bool:
    """Curves of the ratio to the frozen layer over sizes; False without such rows."""
    panels: list[tuple[str, str, Curves]] = []
    for sweep, size in _SIZES.items():
        for group in stored.groups("layer", sweeps=[sweep]):
            panels.append((size, group.name, _curves([group], size)))
    for name, groups in by_width(stored).items():
        panels.append(("T", name, _curves(groups, "T")))
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return False
    plt = _pyplot()
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, grid = plt.subplots(
        down,
        across,
        figsize=(1 + 3.6 * across, 1.4 + 2.9 * down),
        squeeze=False,
        layout="constrained",
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        _curve_panel(axes, *panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    clock = "device time" if stored.gpu else "time"
    figure.supylabel(f"{clock} / frozen nn.Linear")
    _finish(figure, stored, "forward + backward of one linear layer; lower is faster")
    _save(figure, stem)
    return True


def by_width(stored: Stored) -> dict[str, list[Group]]:
    """The cases of the sweep over tokens, by the layer that they are of."""
    found: dict[str, list[Group]] = {}
    for group in stored.groups("layer", sweeps=["tokens"], direction="fwd+bwd"):
        row = group.first
        found.setdefault(f"{row.n}->{row.m} {row.dtype}", []).append(group)
    return {name: sorted(groups, key=lambda g: g.first.T or 0) for name, groups in found.items()}


def _curves(groups: Sequence[Group], size: str) -> Curves:
    curves: Curves = {}
    for row in (row for group in groups for row in group.rows):
        value: int | None = getattr(row, size)
        if row.provider in _MARKERS and value is not None and row.ratio is not None:
            _, points = curves.setdefault(row.provider, (labels.provider_label(row), []))
            points.append((value, row.ratio))
    return curves


def _curve_panel(axes: Any, size: str, title: str, curves: Curves) -> None:
    values: set[int] = set()
    for name, (label, points) in curves.items():
        axes.plot(
            *zip(*sorted(points), strict=True),
            marker=_MARKERS[name],
            color=COLOURS[name],
            label=label,
            linewidth=2.4 if name == "dcft" else 1.4,
            markersize=5.5,
            zorder=3 if name == "dcft" else 2,
        )
        values |= {value for value, _ in points}
    axes.axhline(1.0, color="black", linewidth=1, label="frozen nn.Linear = 1")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), [_count(value) for value in sorted(values)], fontsize=8)
    axes.minorticks_off()
    highest = max(value for _, points in curves.values() for _, value in points)
    if highest > _CUT:
        axes.set_yscale("log")
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if t < 1.6 * highest]
        lowest = min(1.0, *(value for _, points in curves.values() for _, value in points))
        shown = [tick for tick in ticks if tick > lowest / 1.6]
        axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
        axes.minorticks_off()
    axes.set_xlabel(_AXES[size])
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    _bare(axes)


def _count(value: int) -> str:
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "dcft_kernels"  # ids of elements, random otherwise
    mpl.rcParams |= {"font.size": 9, "figure.labelsize": 9, "axes.titlesize": 9}
    from matplotlib import pyplot as plt

    return plt


def _label(cases: Sequence[Group], name: str) -> str:
    found = (case.of(name) for case in cases)
    return next((labels.label(row) for row in found if row is not None), name)


def _over_bar(axes: Any, place: float, height: float, text: str, *, bold: bool) -> None:
    from matplotlib import patheffects

    axes.annotate(
        text,
        (place, height),
        # Lines at 1 and at the goal run behind numbers, not through them.
        path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        fontsize=7,
        fontweight="bold" if bold else "normal",
    )


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, stored: Stored, caption: str, *, legend: bool = True) -> None:
    """The legend of all panels, each label once, and what the plot is of."""
    if legend:
        keys: dict[str, Any] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                keys.setdefault(label, handle)
        place = "outside upper center"
        figure.legend(keys.values(), keys, loc=place, ncols=5, frameon=False, fontsize=8)
    figure.supxlabel(f"{caption}\n{provenance(stored.rows)}", fontsize=8)


def _save(figure: Any, stem: Path) -> None:
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    _pyplot().close(figure)
