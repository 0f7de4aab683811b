"""The paper's training times (arXiv 2503.01419) beside ours, both relative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from benchmarks import labels, tables
from benchmarks.rows import Row
from benchmarks.stored import Group, Stored

SOURCE = "[arXiv 2503.01419](https://arxiv.org/abs/2503.01419)"


@dataclass(frozen=True)
class Printed:
    """A table of the paper: hours of training by kernel size or stride, a column a task."""

    title: str
    size: str  # what varies: a field of the rows
    sweep: str  # of the layer level, that varies it too
    tasks: tuple[str, ...]
    hours: dict[int, tuple[float, ...]]
    claim: str

    def together(self, value: int) -> float:
        """All tasks: their average where it is printed, else their sum."""
        return self.hours[value][-1] if self.tasks[-1] == "Avg" else sum(self.hours[value])


TABLE_4 = Printed(
    "By kernel size (Table 4)",
    "d",
    "kernel_size",
    ("SST-2", "CoLA", "QNLI", "RTE", "MRPC", "STS-B", "Avg"),
    {
        2: (9.57, 0.97, 13.67, 1.63, 1.25, 0.97, 4.68),
        4: (7.32, 0.68, 12.27, 1.47, 1.27, 0.79, 3.97),
        6: (6.97, 0.64, 12.16, 1.45, 1.24, 0.77, 3.87),
        8: (5.01, 0.54, 10.19, 1.08, 0.98, 0.63, 3.16),
        12: (5.43, 0.62, 11.45, 1.28, 1.05, 0.72, 3.43),
    },
    "Its claim: kernel size 8 trains fastest.",
)
TABLE_5 = Printed(
    "By stride at kernel size 8 (Table 5)",
    "stride",
    "stride",
    ("CoLA", "MRPC", "STS-B", "RTE"),
    {
        1: (1.99, 1.22, 1.71, 1.62),
        2: (0.89, 0.99, 0.89, 1.14),
        4: (1.03, 0.99, 0.86, 1.11),
        8: (0.54, 0.98, 0.63, 1.08),
    },
    "Its claim: stride 8 trains fastest, and the smaller the stride, the longer it takes.",
)
FIGURE_2 = {  # hours of DCFT and of LoRA
    "CoLA": (0.54, 0.22),
    "RTE": (1.08, 0.53),
    "MRPC": (0.98, 1.05),
    "QNLI": (10.19, 12.33),
}

_REFERENCE = 8  # the kernel size, and the stride, that times are relative to
_SAME = 0.05  # times that differ by less than this share are not told apart
_OURS = ("dcft", "published")
_LORA = ("lora_r8", "lora_r1")

_NOTE = (
    f"Beside times that {SOURCE} prints for DeBERTaV3-base: hours of whole training runs, on "
    "another device, so only their proportions compare. A step of ours leaves out what an adapter "
    "does not change: data, evaluation, the number of steps."
)
_CLAIM_OF_FIGURE_2 = (
    "Its claim: DCFT is slower than LoRA on small tasks (CoLA, RTE) and faster on large ones "
    "(QNLI). A step costs the same whatever the task, so that a step alone cannot be both:"
)


@dataclass(frozen=True)
class Times:
    """One provider's times here, by kernel size or stride, relative to 8."""

    label: str
    relative: dict[int, float]


def section(stored: Stored) -> tuple[list[str], list[Row]]:
    """Tables and what they say, and the rows behind them; nothing without such rows."""
    parts: list[str] = []
    used: list[Row] = []
    for printed in (TABLE_4, TABLE_5):
        measured = _measured(stored, printed)
        if measured is not None:
            group, found = measured
            used += group.rows
            parts += [f"### {printed.title}", *_compared(printed, group, found)]
    groups = _beside_lora(stored)
    if groups:
        used += [row for group in groups for row in group.rows]
        parts += ["### DCFT beside LoRA (Figure 2)", *_lora_tables(groups)]
    return ([_NOTE, *parts] if parts else []), used


def sentence(printed: Printed, times: Times) -> str:
    """Whether measured times bear out the order of the printed ones, where those differ enough."""
    ours = times.relative
    theirs = {value: printed.together(value) for value in ours}
    spread, their_spread = (max(t.values()) / min(t.values()) - 1 for t in (ours, theirs))
    fastest = min(ours, key=lambda value: ours[value])
    found = (
        f"{times.label}: fastest at {printed.size} = {fastest}, the slowest takes "
        f"{100 * spread:.0f}% more (the paper: {100 * their_spread:.0f}%)"
    )
    if spread < _SAME:
        return f"{found}, too little to tell apart. **The paper's order is not borne out.**"
    pairs = [
        (a, b)
        for a, b in combinations(ours, 2)
        if max(theirs[a], theirs[b]) / min(theirs[a], theirs[b]) - 1 >= _SAME
    ]
    agreeing = sum((ours[a] > ours[b]) == (theirs[a] > theirs[b]) for a, b in pairs)
    verdict = "is borne out" if agreeing == len(pairs) else "is not borne out"
    return (
        f"{found}; {agreeing} of {len(pairs)} pairs that differ in the paper are in its order. "
        f"**The paper's order {verdict}.**"
    )


def _measured(stored: Stored, printed: Printed) -> tuple[Group, list[Times]] | None:
    """Times of a training step where there are any, else of a layer."""
    candidates = [
        *stored.groups("step", sweeps=["paper"], direction="step"),
        *stored.groups("layer", sweeps=[printed.sweep], direction="fwd+bwd"),
    ]
    for group in candidates:
        found = [times for p in _OURS if (times := _times(group, p, printed)) is not None]
        if found:
            return group, found
    return None


def _times(group: Group, provider: str, printed: Printed) -> Times | None:
    """One provider's times by the size that the paper varies, all else as it has it."""
    rows = {
        getattr(row, printed.size): row
        for row in group.rows
        if row.provider == provider
        and row.k == 1
        and row.ratio is not None
        and (row.stride == row.d if printed.size == "d" else row.d == _REFERENCE)
    }
    # Ratios to the frozen model within rounds, which the machine's moods do not reach.
    base = rows[_REFERENCE].ratio if _REFERENCE in rows else None
    relative = {v: (rows[v].ratio or 0.0) / base for v in printed.hours if base and v in rows}
    if len(relative) < 2:
        return None
    return Times(labels.provider_label(rows[_REFERENCE]), relative)


def _compared(printed: Printed, group: Group, found: Sequence[Times]) -> list[str]:
    base = printed.hours[_REFERENCE]
    lines = [
        [
            str(value),
            *(f"{one / at_8:.2f}" for one, at_8 in zip(hours, base, strict=True)),
            *(tables.number(times.relative.get(value)) for times in found),
        ]
        for value, hours in printed.hours.items()
    ]
    titles = [printed.size, *printed.tasks, *(f"{times.label}, here" for times in found)]
    here = f"{_what(group)}, {group.rounds} rounds"
    return [
        f"Time relative to {printed.size} = {_REFERENCE}; here: {here}. {printed.claim}",
        tables.table(titles, lines),
        "\n".join(f"- {sentence(printed, times)}" for times in found),
    ]


def _what(group: Group) -> str:
    what = {"step": "a training step", "layer": "forward and backward of a layer"}
    return f"{what[group.first.level]}, {group.name}"


def _beside_lora(stored: Stored) -> list[Group]:
    """Cases that have DCFT and LoRA: training steps if there are any, else layers."""
    for level, sweep in (("step", "paper"), ("step", "main"), ("layer", "main")):
        direction = "step" if level == "step" else "fwd+bwd"
        groups = stored.groups(level, sweeps=[sweep], direction=direction)
        found = [g for g in groups if any(_over(g, o, lora) for o in _OURS for lora in _LORA)]
        if found:
            return found
    return []


def _over(group: Group, ours: str, lora: str) -> float | None:
    above, below = group.ratio(ours), group.ratio(lora)
    return None if above is None or not below else above / below


def _lora_tables(groups: Sequence[Group]) -> list[str]:
    printed = [
        [task, f"{dcft:.2f}", f"{lora:.2f}", f"{dcft / lora:.2f}"]
        for task, (dcft, lora) in FIGURE_2.items()
    ]
    pairs = [
        (ours, lora)
        for ours in _OURS
        for lora in _LORA
        if any(_over(group, ours, lora) for group in groups)
    ]
    names = [f"{_name(groups, ours)} / {_name(groups, lora)}" for ours, lora in pairs]
    here = [[_what(g), *(tables.number(_over(g, *pair)) for pair in pairs)] for g in groups]
    told = [
        f"- {name}: {_told([v for g in groups if (v := _over(g, *pair)) is not None])}"
        for name, pair in zip(names, pairs, strict=True)
    ]
    return [
        tables.table(["the paper's task", "DCFT, h", "LoRA, h", "DCFT / LoRA"], printed),
        _CLAIM_OF_FIGURE_2,
        tables.table(["here", *names], here),
        "\n".join(told),
    ]


def _name(groups: Sequence[Group], provider: str) -> str:
    row = next((row for group in groups if (row := group.of(provider)) is not None), None)
    return provider if row is None else labels.provider_label(row)


def _told(found: Sequence[float]) -> str:
    """In words, whether quotients of times are on one side of 1."""
    low, high = f"{min(found):.2f}", f"{max(found):.2f}"
    span = low if low == high else f"{low} to {high}"
    if max(found) < 1:
        return f"{span}. **Faster, as the paper has it for MRPC and QNLI.**"
    if min(found) >= 1:
        return f"{span}. **Not faster, as the paper has it for CoLA and RTE.**"
    return f"{span}. **Faster in some cases, by their size and not by a task's.**"
