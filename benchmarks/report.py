"""Report on stored rows: `python -m benchmarks.report [results/<device> ...]`.

For every device folder (those under benchmarks/results that hold a `rows.jsonl`) writes `report.md`
and its plots into the folder, and a short section into the README beside the results. Nothing is
measured here. `--summary FOLDER` prints a page on a folder instead and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import goals, plots, sections, summary, tables
from benchmarks.environment import RESULTS
from benchmarks.stored import ROWS, Stored, load

REPORT = "report.md"

BEGIN = "<!-- results: written by `python -m benchmarks.report`, do not edit -->"
END = "<!-- end of results -->"

_PLOTS: dict[str, Callable[[Stored, Path], bool]] = {
    "layer": plots.layer,
    "roofline": plots.roofs,
    "memory": plots.memory,
    "scaling": plots.scaling,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write reports, or print a summary; the exit status is 1 if there is nothing to report on."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help=f"folder with {ROWS} (all under benchmarks/results)",
    )
    parser.add_argument("--summary", type=Path, metavar="FOLDER", help="print a page and stop")
    options = parser.parse_args(arguments)
    if options.summary is not None and options.folders:
        parser.error("--summary: expected no other folders beside it")
    try:
        if options.summary is not None:
            print(summary.text(load(options.summary)))
        else:
            write([load(folder) for folder in options.folders or _all_folders(RESULTS)])
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _all_folders(results: Path) -> list[Path]:
    found = sorted(file.parent for file in results.glob(f"*/{ROWS}"))
    if not found:
        raise ValueError(f"{results}: no */{ROWS}; `python -m benchmarks.run` measures one")
    return found


def write(devices: Sequence[Stored]) -> None:
    """Reports and plots into the devices' folders, and their sections into READMEs."""
    for stored in devices:
        drawn = _draw(stored)
        file = stored.folder / REPORT
        file.write_text(sections.report(stored, drawn), encoding="utf-8")
        print(f"wrote {file}" + f" and {len(drawn)} plots" * bool(drawn))
    for results in dict.fromkeys(stored.folder.resolve().parent for stored in devices):
        readme = results.parent / "README.md"
        if readme.is_file():
            # Devices that are not reported on this time keep their place.
            reported = [file.parent for file in sorted(results.glob(f"*/{REPORT}"))]
            parts = [readme_section(load(f), readme) for f in reported if (f / ROWS).is_file()]
            if insert(readme, "\n\n".join(parts)):
                print(f"updated {readme}")


def _draw(stored: Stored) -> set[str]:
    """Draw what there are rows for; the names of the plots. Those without rows are removed."""
    drawn = set()
    for name, draw in _PLOTS.items():
        if draw(stored, stored.folder / name):
            drawn.add(name)
        else:
            for suffix in (".png", ".svg"):
                (stored.folder / f"{name}{suffix}").unlink(missing_ok=True)
    return drawn


def readme_section(stored: Stored, readme: Path) -> str:
    """One device's part of the README: the plot, the layer's table, and where the rest is."""
    place = os.path.relpath(stored.folder.resolve(), readme.parent.resolve()).replace(os.sep, "/")
    table = tables.ratios(goals.layer_cases(stored), only=tuple(plots.COLOURS))
    clock = f"{stored.clocks[0]} time"
    plot = (stored.folder / "layer.png").is_file()
    parts = [
        f"### {stored.device}",
        sections.source(stored.rows, f"{place}/{ROWS}"),
        f"![{sections.PLOTS['layer']}]({place}/layer.png)" if plot else "",
        f"Forward + backward, median ratio to the frozen `nn.Linear` by {clock}:" if table else "",
        table,
        f"Everything else, goals and failures included: [{place}/{REPORT}]({place}/{REPORT}).",
    ]
    return "\n\n".join(part for part in parts if part)


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
