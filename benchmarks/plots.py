"""Plots of stored rows, as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.rows import Row
from benchmarks.stored import LABELS, Group, Stored, provenance

# Okabe and Ito's colours, which colour-blind readers can tell apart; only DCFT is saturated red.
_COLOURS = {
    "dcft": "#D55E00",
    "lora_r8": "#0072B2",
    "lora_r1": "#56B4E9",
    "lora_by_hand": "#CC79A7",
    "published": "#E69F00",
    "lokr": "#009E73",
    "dora": "#F0E442",
    "full": "#999999",
}
_MARKERS = {"dcft": "o", "lora_r8": "s", "lora_r1": "D", "lora_by_hand": "^", "published": "v"}

# Higher bars are cut off and marked with an arrow: differences near 1 matter most.
_CUT = 5.0
_CASES = 4  # more, and the numbers over the bars overlap

_SIZES = {"rank": "k", "kernel_size": "d", "stride": "stride", "tokens": "T"}
_AXES = {"k": "rank k", "d": "kernel size d", "stride": "stride", "T": "tokens T"}


def draw(stored: Stored) -> list[str]:
    """Draw what there are rows for into the device's folder, and remove other plots; the names."""
    drawn = []
    plots: dict[str, Callable[[Stored], Any]] = {"layer": layer, "scaling": scaling}
    for name, plot in plots.items():
        file = stored.folder / f"{name}.png"
        figure = plot(stored)
        if figure is None:
            file.unlink(missing_ok=True)
            continue
        drawn.append(name)
        figure.savefig(file, dpi=150)
        _pyplot().close(figure)
    return drawn


def layer(stored: Stored) -> Any:
    """Bars of the ratio to the frozen layer, forward and backward; None without such rows."""
    cases = [g for g in stored.layers() if any(_ratio(g, name) for name in _COLOURS)]
    if not cases:
        return None
    panels = [cases[i : i + _CASES] for i in range(0, len(cases), _CASES)]
    figure, grid = _pyplot().subplots(
        len(panels), 1, figsize=(11.5, 1.5 + 2.7 * len(panels)), squeeze=False, layout="constrained"
    )
    for axes, shown in zip(grid[:, 0], panels, strict=True):
        _ratio_bars(axes, shown)
    _finish(figure, stored, "forward + backward of one layer, tokens x in -> out")
    return figure


def _ratio(case: Group, provider: str) -> float | None:
    row = case.of(provider)
    return None if row is None else row.ratio()


def _ratio_bars(axes: Any, cases: Sequence[Group]) -> None:
    names = [name for name in _COLOURS if any(_ratio(case, name) for case in cases)]
    width = 0.88 / len(names)
    for index, name in enumerate(names):
        found = {i: ratio for i, case in enumerate(cases) if (ratio := _ratio(case, name))}
        places = [i + (index - (len(names) - 1) / 2) * width for i in found]
        heights = [min(ratio, _CUT) for ratio in found.values()]
        texts = [f"↑{ratio:.1f}" if ratio > _CUT else f"{ratio:.2f}" for ratio in found.values()]
        bars = axes.bar(places, heights, width * 0.92, color=_COLOURS[name], label=LABELS[name])
        weight = "bold" if name == "dcft" else "normal"
        axes.bar_label(bars, texts, padding=2, fontsize=7, fontweight=weight)
    axes.axhline(1.0, color="black", linewidth=1, label="frozen nn.Linear = 1")
    ticks = [f"{case.name}\n{case.rounds} rounds" for case in cases]
    axes.set_xticks(range(len(cases)), ticks, fontsize=8)
    axes.set_xlim(-0.5, _CASES - 0.5)  # bars of one width throughout
    axes.margins(y=0.12)


def scaling(stored: Stored) -> Any:
    """Curves of the ratio to the frozen layer over sizes; None without such rows."""
    by_panel: dict[tuple[str, str], list[Row]] = {}
    for sweep, size in _SIZES.items():
        for group in stored.groups("layer", sweep):
            row = group.first
            name = f"{row.n}->{row.m} {row.dtype}" if size == "T" else group.name
            by_panel.setdefault((size, name), []).extend(group.rows)
    panels = [(*key, points) for key, rows in by_panel.items() if (points := _points(rows, key[0]))]
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, grid = _pyplot().subplots(
        down,
        across,
        figsize=(1 + 3.6 * across, 1.4 + 2.9 * down),
        squeeze=False,
        layout="constrained",
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        _curves(axes, *panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    _finish(figure, stored, "forward + backward of one layer")
    return figure


def _points(rows: Sequence[Row], size: str) -> dict[str, list[tuple[int, float]]]:
    """Size and ratio by provider."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        value: int | None = getattr(row, size)
        ratio = row.ratio()
        if row.provider in _MARKERS and value is not None and ratio is not None:
            points.setdefault(row.provider, []).append((value, ratio))
    return points


def _curves(axes: Any, size: str, title: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in curves.items():
        axes.plot(
            *zip(*sorted(points), strict=True),
            marker=_MARKERS[name],
            color=_COLOURS[name],
            label=LABELS[name],
            linewidth=2.4 if name == "dcft" else 1.4,
            markersize=5.5,
            zorder=3 if name == "dcft" else 2,
        )
    axes.axhline(1.0, color="black", linewidth=1, label="frozen nn.Linear = 1")
    values = sorted({value for points in curves.values() for value, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values], fontsize=8)
    if max(ratio for points in curves.values() for _, ratio in points) > _CUT:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel(_AXES[size])
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams |= {"font.size": 9, "figure.labelsize": 9, "axes.titlesize": 9}
    mpl.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot as plt

    return plt


def _finish(figure: Any, stored: Stored, caption: str) -> None:
    """One legend for all panels, and what the plot shows."""
    clock = "device time" if stored.gpu else "time"
    figure.supylabel(f"{clock} / frozen nn.Linear; lower is faster")
    keys: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            keys.setdefault(text, handle)
    place = "outside upper center"
    figure.legend(keys.values(), keys, loc=place, ncols=5, frameon=False, fontsize=8)
    figure.supxlabel(f"{caption}\n{provenance(stored.rows)}", fontsize=8)
