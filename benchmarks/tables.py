"""Markdown tables from stored rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks import goals, labels
from benchmarks.entries import BASELINE
from benchmarks.rows import Row
from benchmarks.stored import Group, Stored, milliseconds, ratio

NONE = "–"

STRATEGIES = ("dcft_row_block", "dcft_fused", "dcft_scratch", "dcft_torch")

Cell = Callable[[Group, Row], str]
Sum = tuple[str, Callable[[Group], str]]  # a title, and what it tells of a whole case


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    head = [_line(titles), _line(["---", *("---:" for _ in titles[1:])])]
    return "\n".join([*head, *(_line(cells) for cells in lines)])


def matrix(groups: Sequence[Group], cell: Cell, sums: Sequence[Sum] = ()) -> str:
    """A cell for every provider in every case, whichever are more of them downwards.

    Providers and cases without any value are left out; empty if that leaves nothing.
    """
    variants = {row.variant: row for group in groups for row in group.rows}
    cells = {
        variant: [
            next((cell(group, r) for r in group.rows if r.variant == variant), NONE)
            for group in groups
        ]
        for variant in variants
    }
    shown = [
        row
        for row in sorted(variants.values(), key=labels.order)
        if any(text != NONE for text in cells[row.variant])
    ]
    kept = [
        index
        for index, _ in enumerate(groups)
        if any(cells[row.variant][index] != NONE for row in shown)
    ]
    names = [groups[index].name for index in kept]
    columns = [[tell(groups[index]) for index in kept] for _, tell in sums]
    columns += [[cells[row.variant][index] for index in kept] for row in shown]
    titles = [title for title, _ in sums] + [labels.label(row) for row in shown]
    if not kept:
        return ""
    if len(kept) > len(shown):
        lines = [[name, *across] for name, *across in zip(names, *columns, strict=True)]
        return table(["case", *titles], lines)
    lines = [[title, *column] for title, column in zip(titles, columns, strict=True)]
    return table(["provider", *names], lines)


def ratios(groups: Sequence[Group], clock: str | None = None, only: Sequence[str] = ()) -> str:
    """Median ratio to the frozen layer by a clock, or the usual one.

    Of all providers, or of some at their usual sizes `only`.
    """

    def cell(group: Group, row: Row) -> str:
        if row.provider == BASELINE:
            return NONE
        if only and (row.provider not in only or labels.unusual_sizes(row)):
            return NONE
        return number(ratio(row, clock))

    return matrix(
        groups,
        cell,
        sums=[
            ("frozen, ms", lambda group: time(group.frozen_ms(clock))),
            ("rounds", lambda group: str(group.rounds)),
        ],
    )


def times(groups: Sequence[Group]) -> str:
    """Median milliseconds."""
    return matrix(groups, lambda group, row: time(milliseconds(row)))


def times_over(groups: Sequence[Group], provider: str) -> str:
    """Times as multiples of one provider's."""

    def cell(group: Group, row: Row) -> str:
        own, base = milliseconds(row), milliseconds(group.of(provider))
        return NONE if own is None or not base else number(own / base)

    return matrix(groups, cell)


def bytes_of(groups: Sequence[Group], field: str) -> str:
    """MiB by a field of the rows."""
    return matrix(groups, lambda group, row: mib(getattr(row, field)))


def launches(groups: Sequence[Group]) -> str:
    """Kernels that a step puts into the GPU's queue."""

    def cell(group: Group, row: Row) -> str:
        return NONE if row.launches is None else str(row.launches)

    return matrix(groups, cell)


def file_sizes(groups: Sequence[Group]) -> str:
    """KiB of an adapter's files."""

    def cell(group: Group, row: Row) -> str:
        return NONE if row.moved_bytes is None else f"{row.moved_bytes / 2**10:,.1f}"

    return matrix(groups, cell)


def goal_table(stored: Stored) -> str:
    """The goals for the layer by case, a miss marked; a dash is a goal for other cases."""
    found = goals.verdicts(stored)
    if not found:
        return ""
    kinds = [
        g for g in goals.layer_goals(stored.gpu) if any(v.goal.title == g.title for v in found)
    ]
    cells = {(v.case.name, v.goal.title): v for v in found}
    lines = [
        [case, *(_judged(cells.get((case, goal.title))) for goal in kinds)]
        for case in dict.fromkeys(v.case.name for v in found)
    ]
    return table(["case", *(goal.title for goal in kinds)], lines)


def merge_goals(stored: Stored) -> str:
    """How near to a copy's bandwidth merging comes."""
    lines = [[f"{v.goal.title}: {v.case.name}", _judged(v)] for v in goals.merge_verdicts(stored)]
    return table(["goal", "measured"], lines) if lines else ""


def by_hand_sentence(stored: Stored) -> str:
    """Whether DCFT is faster than LoRA by hand at every shape that was measured."""
    found = goals.by_hand_verdicts(stored)
    if not found:
        return ""
    missed = [v for v in found if not v.met]
    if not missed:
        return f"Faster than LoRA r=8 by hand at every shape measured, {len(found)} of them."
    named = "; ".join(f"{v.case.name} ({v.case.first.sweep}) {v.text}" for v in missed)
    return (
        f"Faster than LoRA r=8 by hand at {len(found) - len(missed)} of {len(found)} cases of all "
        f"sweeps, goal every one: **missed** at {named}."
    )


def strategy_table(groups: Sequence[Group], clock: str | None = None) -> str:
    """What `auto` takes beside the quickest strategy named explicitly."""
    known = [s for s in STRATEGIES if any(g.ratio(s, clock) is not None for g in groups)]
    lines = []
    for group in groups:
        found = {s: value for s in known if (value := group.ratio(s, clock)) is not None}
        auto = group.ratio("dcft", clock)
        if not found or auto is None:
            continue
        best = min(found, key=lambda s: found[s])
        lines.append(
            [
                group.name,
                number(auto),
                *(number(found.get(s)) for s in known),
                strategy(best),
                number(auto / found[best]),
            ]
        )
    titles = ["case", "auto", *(strategy(s) for s in known), "best", "auto / best"]
    return table(titles, lines) if lines else ""


def strategy(provider: str) -> str:
    """The name of the strategy that a provider pins."""
    return provider.removeprefix("dcft_")


def curve(group: Group, size: str, clock: str | None = None) -> str:
    """Ratio to the frozen layer by one of DCFT's sizes: rank, kernel size or stride."""
    points: dict[int, dict[str, str]] = {}
    names: dict[str, str] = {}
    for row in group.rows:
        value = getattr(row, size)
        if row.provider == BASELINE or value is None or ratio(row, clock) is None:
            continue
        names.setdefault(row.provider, labels.provider_label(row))
        points.setdefault(value, {})[row.provider] = number(ratio(row, clock))
    if not points:
        return ""
    lines = [
        [str(value), *(points[value].get(name, NONE) for name in names)] for value in sorted(points)
    ]
    return table([size, *names.values()], lines)


def without_time(found: Sequence[Row]) -> list[tuple[str, str]]:
    """Providers that have none, each with the number of cases, and why."""
    failed = [row for row in found if row.error is not None and milliseconds(row) is None]
    wrong = {True: "wrong result: ", False: ""}
    return _counted(failed, lambda row: f"{wrong[row.gate == 'failed']}{row.error}")


def without_graph(found: Sequence[Row]) -> list[tuple[str, str]]:
    """Likewise steps that are short but could not be captured as a CUDA graph."""
    return _counted([row for row in found if row.graph_error], lambda row: str(row.graph_error))


def reasons(found: Sequence[tuple[str, str]]) -> str:
    """A list of who and why."""
    return "\n".join(f"- {who}: {_inline(error)}" for who, error in found)


def _counted(found: Sequence[Row], reason: Callable[[Row], str]) -> list[tuple[str, str]]:
    counts: dict[tuple[str, str, str], int] = {}
    for row in sorted(found, key=lambda row: (row.level, labels.order(row))):
        key = (row.level, labels.label(row), reason(row))
        counts[key] = counts.get(key, 0) + 1
    return [
        (f"{name} ({level}, {count} case{'s' * (count != 1)})", error)
        for (level, name, error), count in counts.items()
    ]


def number(value: float | None) -> str:
    """A ratio; large ones without decimals, which would be noise."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def time(value: float | None) -> str:
    """Milliseconds."""
    if value is None:
        return NONE
    if value >= 10:
        return f"{value:,.1f}"
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def mib(size: int | None) -> str:
    """MiB of bytes."""
    if size is None:
        return NONE
    return "0" if size == 0 else f"{size / 2**20:,.2f}"


def _judged(verdict: goals.Verdict | None) -> str:
    if verdict is None:
        return NONE
    return f"**{verdict.text}**" if verdict.met is False else verdict.text


def _inline(error: str) -> str:
    """An error's text as Markdown that shows it as it is."""
    return " ".join(error.split()).replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
