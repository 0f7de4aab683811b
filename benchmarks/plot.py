"""Draw the stored rows: `python -m benchmarks.plot [RESULTS]`.

For every device folder under RESULTS (`benchmarks/results`) that holds a `layer.jsonl`, writes
`layer.png` and `layer.svg` beside it, and puts the tables into the README next to RESULTS. Nothing
is measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows, tables
from benchmarks.environment import ROOT
from benchmarks.providers import BASELINE, PROVIDERS
from benchmarks.rows import Row
from benchmarks.tables import Cases

BEGIN = "<!-- results: written by `python -m benchmarks.plot`, do not edit -->"
END = "<!-- end of results -->"

# Okabe and Ito's palette, which colour-blind readers can tell apart; DCFT alone is saturated red.
COLOURS = {
    "dcft": "#D55E00",
    "lora_r8": "#0072B2",
    "lora_r1": "#56B4E9",
    "published": "#E69F00",
    "lokr": "#009E73",
    "full": "#999999",
}
# Higher bars are cut off here and marked with an arrow: differences near 1 are the point.
_CUT = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument(
        "results", nargs="?", type=Path, default=ROOT / "benchmarks" / "results", metavar="RESULTS"
    )
    results: Path = parser.parse_args(arguments).results
    devices = {
        file.parent: latest
        for file in sorted(results.glob("*/layer.jsonl"))
        if (latest := _load(file))
    }
    if not devices:
        print(f"no rows in {results}/*/layer.jsonl; `make bench` measures some", file=sys.stderr)
        return 1
    for folder, latest in devices.items():
        draw(latest, folder / "layer")
        print(f"wrote {folder / 'layer.png'} and .svg")
    readme = results.parent / "README.md"
    if readme.exists() and insert(readme, "\n\n".join(_section(*item) for item in devices.items())):
        print(f"updated {readme}")
    return 0


def _load(file: Path) -> list[Row]:
    return [row for row in rows.latest(rows.read(file)) if row.level == "layer"]


def draw(latest: Sequence[Row], stem: Path) -> None:
    """Bars of the ratio to the frozen layer, a panel a dtype, as `stem`.png and .svg."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "dcft_kernels"  # the same rows give the same file
    from matplotlib import pyplot as plt

    cases = tables.by_case(latest)
    dtypes = list(dict.fromkeys(dtype for dtype, _ in cases))
    figure, panels = plt.subplots(
        len(dtypes), 1, figsize=(10, 1.3 + 3.1 * len(dtypes)), squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(panels[:, 0], dtypes, strict=True):
        _panel(axes, {key: found for key, found in cases.items() if key[0] == dtype})
        axes.set_title(dtype, loc="left", fontweight="bold")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel(
        "forward + backward of one linear layer, tokens x in -> out; lower is faster\n"
        + tables.provenance(latest),
        fontsize=8,
    )
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def _panel(axes: Any, cases: Cases) -> None:
    shown = [provider for provider in PROVIDERS if provider.name != BASELINE]
    width = 0.86 / len(shown)
    top = 1.3
    for index, provider in enumerate(shown):
        offset = (index - (len(shown) - 1) / 2) * width
        values = [tables.ratio(found.get(provider.name)) for found in cases.values()]
        axes.bar(
            [place + offset for place in range(len(values))],
            [min(value or 0.0, _CUT) for value in values],
            width * 0.92,
            color=COLOURS[provider.name],
            label=provider.label,
        )
        for place, value in enumerate(values):
            text = "none" if value is None else f"{value:.2f}"
            height = min(value or 0.0, _CUT)
            if value is not None and value > _CUT:
                text = f"↑ {text}"
            axes.annotate(
                text,
                (place + offset, height),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                fontweight="bold" if provider.name == "dcft" else "normal",
            )
            top = max(top, height)
    axes.axhline(1.0, color="black", linewidth=1, label="frozen nn.Linear = 1")
    axes.axhline(
        tables.GOAL_RATIO,
        color="black",
        linewidth=0.8,
        linestyle="--",
        label=f"goal, {tables.GOAL_RATIO:.2f}",
    )
    axes.set_xticks(range(len(cases)), [_tick(key, found) for key, found in cases.items()])
    axes.set_ylim(0, top * 1.12)
    axes.set_ylabel("time / frozen nn.Linear")
    axes.spines[["top", "right"]].set_visible(False)


def _tick(key: tables.CaseKey, found: dict[str, Row]) -> str:
    T, n, m = key[1]
    count = max(row.rounds for row in found.values())
    return f"{T} x {n} -> {m}\n{count} round{'s' * (count != 1)}"


def _section(folder: Path, latest: Sequence[Row]) -> str:
    """One device's part of the README."""
    cases = tables.by_case(latest)
    source = f"results/{folder.name}/layer.jsonl"
    missing = tables.failures(latest)
    parts = [
        f"### {latest[0].device}",
        f"From [`{source}`]({source}): {tables.provenance(latest)}.",
        f"![Time relative to the frozen layer](results/{folder.name}/layer.png)",
        "Forward plus backward, median ratio to the frozen `nn.Linear` in the same rounds:",
        tables.ratios(cases),
        *(["Without a time:", missing] if missing else []),
        "Goals:",
        tables.goals(cases),
        "Saved for backward, MiB, parameters not counted:",
        tables.saved(cases),
    ]
    return "\n\n".join(parts)


def insert(readme: Path, section: str) -> bool:
    """Put `section` between the markers of a README; whether that changed the file."""
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        return False
    updated = f"{head}{BEGIN}\n\n{section}\n\n{END}{tail}"
    if updated == text:
        return False
    readme.write_text(updated, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
