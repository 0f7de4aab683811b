"""The sections of a device's report, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks import goals, host_rows, paper, plots, roofline, tables
from benchmarks.rows import Row
from benchmarks.stored import COMPARED, ROWS, Stored, provenance

PLOTS = {
    "layer": "Time relative to the frozen layer",
    "roofline": "Achieved rates under the measured ceilings",
    "memory": "Memory of a layer",
    "scaling": "Time relative to the frozen layer, by size",
}

_LEVELS = {"layer": "Layers", "block": "Blocks", "step": "Training steps"}
_CLOCKS = {
    "device": "Device time",
    "wall": "Wall time",
    "graph": "Device time of the step as a CUDA graph",
    "host": "Processor's time to put the step into the GPU's queue",
}
_PASSES = {
    "fwd+bwd": "forward + backward",
    "fwd": "forward",
    "bwd": "backward",
    "step": "forward, backward and AdamW",
}
_SWEEPS = {
    "main": "all adapters",
    "asked": "shapes asked for",
    "widths": "layers of real models",
    "dtypes": "other dtypes",
}
# Drawn as curves, in sections of their own.
_CURVES = ("rank", "kernel_size", "stride", "tokens")


_PREFACE = (
    "Written by `python -m benchmarks.report`; do not edit. Ratios are medians, over the rounds of "
    "a case, of the time beside the frozen `nn.Linear`'s in the same round. "
    f"{tables.NONE} is a provider without a time, or a goal for other cases."
)
_CEILING = (
    "Bytes and operations are counted, each tensor once. The ceiling is the copy's bandwidth at as "
    "many operations a byte, or the product's rate where that is less. What caches still hold can "
    "exceed it."
)


_SHARE = (
    "Least microseconds of a call over all rounds, by the clock of the process. Launches go all the"
    " way but for the driver's last step; PyTorch's own products are computed, of tiny tensors."
)


@dataclass(frozen=True)
class _Section:
    """A part of a report; left out without a body."""

    title: str
    rows: Sequence[Row]  # where its numbers are from
    body: Sequence[str]  # paragraphs; empty ones are left out


def report(stored: Stored, drawn: Collection[str] = ()) -> str:
    """A device's whole report, with the plots that are there, as Markdown."""
    plot = {name: f"![{title}]({name}.png)" for name, title in PLOTS.items() if name in drawn}
    sections = [
        _layers(stored, plot.get("layer", "")),
        _strategies(stored),
        _roofline(stored, plot.get("roofline", "")),
        _memory(stored, plot.get("memory", "")),
        _scaling(stored, plot.get("scaling", "")),
        *_models(stored),
        _paper(stored),
        *_rest(stored),
        _failures(stored),
    ]
    parts = [f"# {stored.device}", _PREFACE]
    for section in sections:
        body = [paragraph for paragraph in section.body if paragraph]
        if body:
            parts += [f"## {section.title}", source(section.rows), *body]
    share = host_rows.latest(stored.folder)
    if share:
        parts += ["## The processor in a call", host_rows.source(share), _SHARE]
        parts.append(host_rows.table(share))
    return "\n\n".join(parts) + "\n"


def source(rows: Sequence[Row], file: str = ROWS) -> str:
    """Where numbers are from."""
    return f"From [`{file}`]({file}): {provenance(rows)}."


def _of(stored: Stored, *levels: str, sweeps: Sequence[str] | None = None) -> list[Row]:
    return [
        row
        for row in stored.rows
        if row.level in levels and (sweeps is None or row.sweep in sweeps)
    ]


def _by_clock(stored: Stored, show: Callable[[str], str]) -> list[str]:
    """A table for each clock, under its name where there are several."""
    found = [(clock, text) for clock in stored.clocks if (text := show(clock))]
    if not stored.gpu:
        return [text for _, text in found]
    return [part for clock, text in found for part in (f"{_CLOCKS[clock]}:", text)]


def _layers(stored: Stored, plot: str) -> _Section:
    sweeps = [s for s in dict.fromkeys(r.sweep for r in _of(stored, "layer")) if s not in _CURVES]
    body = []
    for direction in stored.directions("layer"):
        for sweep in sweeps:
            groups = stored.groups("layer", sweeps=[sweep], direction=direction)
            shown = _by_clock(stored, partial(tables.ratios, groups))
            if shown:
                title = f"{_PASSES.get(direction, direction)}, {_SWEEPS.get(sweep, sweep)}"
                body += [f"### {title[0].upper()}{title[1:]}", *shown]
    launches = tables.launches(goals.layer_cases(stored))
    if launches:
        body += ["### Kernels launched, forward + backward", launches]
    table, sentence = tables.goal_table(stored), tables.by_hand_sentence(stored)
    judged = ["### Goals, forward + backward"] if table or sentence else []
    return _Section(
        "Layers",
        _of(stored, "layer"),
        [plot, *judged, table, sentence, *body],
    )


def _strategies(stored: Stored) -> _Section:
    groups = goals.layer_cases(stored) if stored.gpu else []
    body = _by_clock(stored, partial(tables.strategy_table, groups))
    if body:
        body.insert(
            0,
            "Ratios to the frozen layer, forward + backward, and what `auto` takes "
            "beside the quickest strategy named explicitly.",
        )
    return _Section("Strategies", _of(stored, "layer", sweeps=COMPARED), body)


def _roofline(stored: Stored, plot: str) -> _Section:
    best, found = roofline.ceilings(stored), roofline.points(stored)
    has_kernels = any(point.row.level == "kernel" for point in found)
    body = [plot]
    if best:
        body += ["What the same device reaches:", roofline.ceiling_table(best)]
    if found and (best or has_kernels):
        body += [
            _CEILING,
            roofline.point_table(found, best),
        ]
    levels = ("ceiling", "kernel", "layer") if found else ("ceiling", "kernel")
    return _Section("Roofline", _of(stored, *levels), body)


def _memory(stored: Stored, plot: str) -> _Section:
    body = [plot]
    kinds = {
        "saved_bytes": "Saved for backward, MiB, parameters not counted",
        "peak_bytes": "Peak of a step above what was held before it, MiB",
    }
    levels = {"layer": "fwd+bwd", "block": "fwd+bwd", "step": "step"}
    used = []
    for level, direction in levels.items():
        groups = stored.groups(level, sweeps=COMPARED, direction=direction)
        shown = [(title, tables.bytes_of(groups, field)) for field, title in kinds.items()]
        shown = [(title, table) for title, table in shown if table]
        if shown:
            used += [row for group in groups for row in group.rows]
            body.append(f"### {_LEVELS[level]}")
            body += [part for title, table in shown for part in (f"{title}:", table)]
    return _Section("Memory", used, body)


def _scaling(stored: Stored, plot: str) -> _Section:
    body = []
    sizes = {
        "rank": ("Rank", "k"),
        "kernel_size": ("Kernel size", "d"),
        "stride": ("Stride", "stride"),
    }
    for sweep, (title, size) in sizes.items():
        for group in stored.groups("layer", sweeps=[sweep]):
            shown = _by_clock(stored, partial(tables.curve, group, size))
            if shown:
                what = f"{title}, {group.name} {group.first.direction}"
                frozen = f"frozen {tables.time(group.frozen_ms())} ms, {group.rounds} rounds"
                body += [f"### {what}", f"{frozen[0].upper()}{frozen[1:]}.", *shown]
    for name, groups in plots.by_width(stored).items():
        shown = _by_clock(stored, partial(tables.ratios, groups))
        if shown:
            body += [f"### Tokens, {name} fwd+bwd", *shown]
    return _Section("Scaling", _of(stored, "layer", sweeps=_CURVES), [plot, *body] if body else [])


def _models(stored: Stored) -> list[_Section]:
    sections = []
    for level in ("block", "step"):
        body = []
        for direction in stored.directions(level):
            groups = stored.groups(level, sweeps=COMPARED, direction=direction)
            shown = _by_clock(stored, partial(tables.ratios, groups))
            if shown:
                title = _PASSES.get(direction, direction)
                body += [f"### {title[0].upper()}{title[1:]}", *shown]
        sections.append(_Section(_LEVELS[level], _of(stored, level, sweeps=COMPARED), body))
    return sections


def _paper(stored: Stored) -> _Section:
    body, used = paper.section(stored)
    return _Section("The paper's times", used, body)


def _rest(stored: Stored) -> list[_Section]:
    """What has no frozen layer beside it."""
    merging = []
    for direction in stored.directions("merge"):
        groups = stored.groups("merge", direction=direction)
        table = tables.times(groups)
        if table:
            merging += [f"### {direction.capitalize()}", "Milliseconds:", table]
            over = tables.times_over(groups, "copy")
            merging += ["As multiples of a copy of the weight:", over] if over else []
    merge_goals = tables.merge_goals(stored)
    merging += ["### Goals", merge_goals] if merge_goals else []
    optimizer = tables.times(stored.groups("optimizer"))
    files = []
    for direction in reversed(stored.directions("load")):  # saved before they are loaded
        table = tables.times(stored.groups("load", direction=direction))
        if table:
            files += [f"### {direction.capitalize()}", "Milliseconds:", table]
    sizes = tables.file_sizes(stored.groups("load", direction="save"))
    files += ["### Size", "KiB on disk:", sizes] if files and sizes else []
    kernels = tables.times(stored.groups("kernel"))
    over = tables.ratios(stored.groups("kernel"))
    return [
        _Section("Merging", _of(stored, "merge"), merging),
        _Section(
            "Optimizer",
            _of(stored, "optimizer"),
            ["Milliseconds of a step of AdamW over the adapters of a model:", optimizer]
            if optimizer
            else [],
        ),
        _Section("Adapter files", _of(stored, "load"), files),
        _Section(
            "Kernels",
            _of(stored, "kernel"),
            [
                "Milliseconds of a launch:" if kernels else "",
                kernels,
                "Beside the base layer's products:" if over else "",
                over,
            ],
        ),
    ]


def _failures(stored: Stored) -> _Section:
    failed, uncaptured = tables.without_time(stored.rows), tables.without_graph(stored.rows)
    body = [tables.reasons(failed)]
    if uncaptured:
        body += ["Not captured as a CUDA graph:", tables.reasons(uncaptured)]
    used = [row for row in stored.rows if row.error is not None or row.graph_error is not None]
    return _Section("Without a time", used, body)
