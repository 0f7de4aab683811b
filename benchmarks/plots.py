"""Plots of stored rows, as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from benchmarks.speed.provider import BASELINE
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

_MEMORY = {"saved_bytes": "saved for backward", "peak_bytes": "peak of a step"}
_SIZES = {"rank": "k", "kernel_size": "d", "stride": "stride"}
_AXES = {"k": "rank k", "d": "kernel size d", "stride": "stride", "T": "tokens T"}


def draw(stored: Stored) -> list[str]:
    """Draw what there are rows for into the device's folder, and remove other plots; the names."""
    drawn = []
    plots: dict[str, Callable[[Stored], Any]] = {
        "layer": layer,
        "memory": memory,
        "scaling": scaling,
    }
    for name, plot in plots.items():
        file = stored.folder / f"{name}.png"
        figure = plot(stored)
        if figure is None:
            file.unlink(missing_ok=True)
            continue
        drawn.append(name)
        _save(figure, file)
    return drawn


def layer(stored: Stored) -> Any:
    """Bars of the ratio to the frozen layer, forward and backward; None without such rows."""
    cases = [g for g in stored.layers() if any(g.ratio(name) for name in _COLOURS)]
    if not cases:
        return None
    rows = -(-len(cases) // _CASES)
    across = -(-len(cases) // rows)
    figure, panels = _pyplot().subplots(
        rows,
        1,
        figsize=(2 + 2.4 * across, 1.5 + 2.7 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axes, start in zip(panels[:, 0], range(0, len(cases), across), strict=True):
        _ratio_bars(axes, cases[start : start + across])
        axes.set_xlim(-0.5, across - 0.5)  # bars of one width throughout
    figure.supylabel(f"{_clock(stored)} / frozen nn.Linear")
    _finish(figure, stored, "forward + backward of one layer, tokens x in -> out; lower is faster")
    return figure


def _ratio_bars(axes: Any, cases: Sequence[Group]) -> None:
    names = [name for name in _COLOURS if any(case.of(name) for case in cases)]
    width = 0.88 / len(names)
    for index, name in enumerate(names):
        places = [i + (index - (len(names) - 1) / 2) * width for i in range(len(cases))]
        values = [case.ratio(name) for case in cases]
        heights = [min(value or 0.0, _CUT) for value in values]
        axes.bar(places, heights, width * 0.92, color=_COLOURS[name], label=LABELS[name])
        for place, value, height in zip(places, values, heights, strict=True):
            text = "none" if value is None else f"↑{value:.1f}" if value > _CUT else f"{value:.2f}"
            _over_bar(axes, place, height, text, bold=name == "dcft")
    axes.axhline(1.0, color="black", linewidth=1, label="frozen nn.Linear = 1")
    ticks = [f"{case.name}\n{case.rounds} rounds" for case in cases]
    axes.set_xticks(range(len(cases)), ticks, fontsize=8)
    axes.margins(y=0.12)
    _bare(axes)


def memory(stored: Stored) -> Any:
    """Bars of what a step saves and needs, a panel per case; None without such rows."""

    def sizes(case: Group, field: str) -> dict[str, int]:
        found = {name: getattr(case.of(name), field, None) for name in _COLOURS}
        return {name: size for name, size in found.items() if size is not None}

    kinds = {f: t for f, t in _MEMORY.items() if any(sizes(c, f) for c in stored.layers())}
    cases = [c for c in stored.layers() if any(sizes(c, field) for field in kinds)][:_CASES]
    if not cases:
        return None
    figure, panels = _pyplot().subplots(
        len(kinds),
        len(cases),
        figsize=(1 + 2.9 * len(cases), 1.6 + 2.3 * len(kinds)),
        squeeze=False,
        layout="constrained",
    )
    names = [name for name in _COLOURS if any(case.of(name) for case in cases)]
    for row, (field, title) in zip(panels, kinds.items(), strict=True):
        for axes, case in zip(row, cases, strict=True):
            found = sizes(case, field)
            for place, name in enumerate(names):
                mib = found.get(name, 0) / 2**20
                axes.bar(place, mib, 0.85, color=_COLOURS[name], label=LABELS[name])
                text = f"{mib:.{0 if mib >= 100 else 1}f}" if name in found else "none"
                _over_bar(axes, place, mib, text, bold=name == "dcft")
            frozen = getattr(case.of(BASELINE), field, None)
            if frozen:
                axes.axhline(frozen / 2**20, color="black", linewidth=1, label="frozen nn.Linear")
            axes.set_xticks([])
            axes.margins(y=0.14)
            _bare(axes)
        row[0].set_ylabel(f"{title}, MiB")
    for axes, case in zip(panels[0], cases, strict=True):
        axes.set_title(case.name, loc="left", fontweight="bold")
    _finish(figure, stored, "forward + backward of one layer, parameters not counted")
    return figure


def scaling(stored: Stored) -> Any:
    """Curves of the ratio to the frozen layer over sizes; None without such rows."""
    panels: list[tuple[str, str, dict[str, list[tuple[int, float]]]]] = []
    for sweep, size in _SIZES.items():
        for group in stored.groups("layer", sweeps=[sweep]):
            panels.append((size, group.name, _points(group.rows, size)))
    for name, groups in by_width(stored).items():
        panels.append(("T", name, _points([r for group in groups for r in group.rows], "T")))
    panels = [panel for panel in panels if panel[2]]
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
    figure.supylabel(f"{_clock(stored)} / frozen nn.Linear")
    _finish(figure, stored, "forward + backward of one layer; lower is faster")
    return figure


def by_width(stored: Stored) -> dict[str, list[Group]]:
    """The cases of the sweep over tokens, by layer."""
    found: dict[str, list[Group]] = {}
    for group in stored.groups("layer", sweeps=["tokens"], direction="fwd+bwd"):
        row = group.first
        found.setdefault(f"{row.n}->{row.m} {row.dtype}", []).append(group)
    return found


def _points(rows: Sequence[Row], size: str) -> dict[str, list[tuple[int, float]]]:
    """Size and ratio by provider."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        value: int | None = getattr(row, size)
        if row.provider in _MARKERS and value is not None and row.ratio is not None:
            points.setdefault(row.provider, []).append((value, row.ratio))
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
    _bare(axes)


def _clock(stored: Stored) -> str:
    return "device time" if stored.gpu else "time"


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams |= {"font.size": 9, "figure.labelsize": 9, "axes.titlesize": 9}
    from matplotlib import pyplot as plt

    return plt


def _over_bar(axes: Any, place: float, height: float, text: str, *, bold: bool) -> None:
    from matplotlib import patheffects

    axes.annotate(
        text,
        (place, height),
        path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        fontsize=7,
        fontweight="bold" if bold else "normal",
    )


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, stored: Stored, caption: str) -> None:
    """One legend for all panels, and what the plot shows."""
    keys: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            keys.setdefault(text, handle)
    place = "outside upper center"
    figure.legend(keys.values(), keys, loc=place, ncols=5, frameon=False, fontsize=8)
    figure.supxlabel(f"{caption}\n{provenance(stored.rows)}", fontsize=8)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=150)
    _pyplot().close(figure)
