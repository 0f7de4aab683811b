"""The plot of a device's stored rows, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.stored import LABELS, Group, StoredRows, provenance

PLOT_FILE = "layer.png"

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

# Higher bars are cut off and marked with an arrow: differences near 1 matter most.
_CUT = 5.0
_CASES = 4  # more, and the numbers over the bars overlap


def draw(stored: StoredRows) -> bool:
    """Draw the ratios to the frozen layer, forward and backward; False if there are none."""
    file = stored.folder / PLOT_FILE
    cases = [g for g in stored.layers() if any(_ratio(g, name) for name in _COLOURS)]
    if not cases:
        file.unlink(missing_ok=True)
        return False
    import matplotlib as mpl
    from matplotlib.figure import Figure  # draws with Agg, whatever the backend

    panels = [cases[i : i + _CASES] for i in range(0, len(cases), _CASES)]
    style = {"font.size": 9, "figure.labelsize": 9, "axes.titlesize": 9}
    with mpl.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11.5, 1.5 + 2.7 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False)
        for axes, shown in zip(grid[:, 0], panels, strict=True):
            _bars(axes, shown)
        clock = "device time" if stored.gpu else "time"
        figure.supylabel(f"{clock} / frozen nn.Linear; lower is faster")
        keys: dict[str, Any] = {}  # one legend for all panels
        for axes in grid[:, 0]:
            handles, texts = axes.get_legend_handles_labels()
            keys |= dict(zip(texts, handles, strict=True))
        place = "outside upper center"
        figure.legend(keys.values(), keys, loc=place, ncols=5, frameon=False, fontsize=8)
        caption = "forward + backward of one layer, tokens x in -> out"
        figure.supxlabel(f"{caption}\n{provenance(stored.rows)}", fontsize=8)
        figure.savefig(file, dpi=150)
    return True


def _ratio(case: Group, provider: str) -> float | None:
    row = case.of(provider)
    return None if row is None else row.ratio()


def _bars(axes: Any, cases: Sequence[Group]) -> None:
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
