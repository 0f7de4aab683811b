"""A page of plain text on stored rows, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import goals, roofline, tables
from benchmarks.goals import Verdict
from benchmarks.stored import Group, Stored, provenance

LINES = 60
_WIDTH = 140

_HEADLINE = ("dcft", "lora_autograd", "lora_r8_16bit", "lora_r8", "lora_r1", "lokr", "published")
_SHORT = {
    "lora_autograd": "by hand",
    "lora_r8_16bit": "LoRA 8 16b",
    "lora_r8": "LoRA 8",
    "lora_r1": "LoRA 1",
}


def text(stored: Stored) -> str:
    """Ratios, goals, strategies, ceilings and failures, in at most LINES lines."""
    parts = [
        [f"{stored.device}: {len(stored.rows)} rows", provenance(stored.rows)],
        _ratios(stored),
        _goals(stored),
        _strategies(stored),
        _models(stored),
        _memory(stored),
        _ceilings(stored),
        _failures(stored),
    ]
    return "\n".join(_shortened(line) for part in parts for line in part)


def _by_clock(stored: Stored) -> list[tuple[Group, str]]:
    """The goals' cases by every clock, then the others by the usual one."""
    cases = goals.layer_cases(stored)
    meant = [c for c in cases if any(goal.applies(c) for goal in goals.frozen_goals(stored.gpu))]
    found = [(case, clock) for case in meant for clock in stored.clocks]
    return found + [(case, stored.clocks[0]) for case in cases if case not in meant]


def _ratios(stored: Stored) -> list[str]:
    cases = goals.layer_cases(stored)
    names = [name for name in _HEADLINE if any(case.of(name) for case in cases)]
    lines = []
    for case, clock in _by_clock(stored):
        if case.ratio("dcft", clock) is not None:
            values = "".join(f"{tables.number(case.ratio(n, clock)):>10}" for n in names)
            frozen = f"{tables.time(case.frozen_ms(clock)):>10}"
            lines.append(f"  {case.name:<26}{clock:<7}{frozen}{values}")
    if not lines:
        return []
    titles = "".join(f"{_SHORT.get(name, name):>10}" for name in names)
    head = "forward + backward / frozen"
    return [f"{head:<35}{'frozen ms':>10}{titles}", *_at_most(lines, 15)]


def _goals(stored: Stored) -> list[str]:
    # Whether DCFT beats LoRA by hand is judged over all sweeps, not only where other goals are.
    by_hand = goals.by_hand_verdicts(stored)
    of_layers = [v for v in goals.verdicts(stored) if v.goal.title != goals.by_hand().title]
    found = [*of_layers, *by_hand, *goals.merge_verdicts(stored)]
    if not found:
        return []
    missed = [v for v in found if v.met is False]
    unmeasured = [v for v in found if v.met is None]
    head = f"goals: {len(found) - len(missed) - len(unmeasured)} met, {len(missed)} missed"
    if unmeasured:
        head += f", {len(unmeasured)} not measured"
    return [head, *_at_most([_verdict(v) for v in [*missed, *unmeasured]], 12)]


def _verdict(verdict: Verdict) -> str:
    return f"  {verdict.goal.title}, {verdict.case.name}: {verdict.text}"


def _strategies(stored: Stored) -> list[str]:
    lines = [
        line for case, clock in _by_clock(stored) if (line := _strategy(case, clock)) is not None
    ]
    if not stored.gpu or not lines:
        return []
    return ["best strategy, beside auto", *_at_most(lines, 7)]


def _strategy(case: Group, clock: str) -> str | None:
    found = {s: r for s in tables.STRATEGIES if (r := case.ratio(s, clock)) is not None}
    auto = case.ratio("dcft", clock)
    if not found or auto is None:
        return None
    best = min(found, key=lambda name: found[name])
    return (
        f"  {case.name:<26}{clock:<7}{tables.strategy(best)} {found[best]:.2f}, "
        f"auto {auto:.2f}, {auto / found[best]:.2f} x that"
    )


def _models(stored: Stored) -> list[str]:
    lines = []
    for level in ("block", "step"):
        for case in stored.groups(level, sweeps=("main",)):
            names = [n for n in ("dcft", "dcft_grouped", *_HEADLINE[1:]) if case.ratio(n)]
            values = ", ".join(f"{n} {tables.number(case.ratio(n))}" for n in names)
            if values:
                lines.append(f"  {level} {case.name} {case.first.direction}: {values}")
    return ["models / frozen", *_at_most(lines, 6)] if lines else []


def _memory(stored: Stored) -> list[str]:
    """Peaks, where the goal is: no more than LoRA's."""
    cases = [*goals.layer_cases(stored)[:3], *stored.groups("step", sweeps=("main",))[:2]]
    lines = []
    for case in cases:
        peaks = {n: row.peak_bytes for n in _HEADLINE if (row := case.of(n)) and row.peak_bytes}
        if peaks:
            values = ", ".join(f"{n} {size / 2**20:,.0f}" for n, size in peaks.items())
            lines.append(f"  {case.name} {case.first.direction}: {values}")
    return ["peak of a step, MiB", *_at_most(lines, 4)] if lines else []


def _ceilings(stored: Stored) -> list[str]:
    found = [
        f"{c.dtype} {roofline.rate(c.gb_per_s)} GB/s, {roofline.rate(c.tflop_per_s)} TFLOP/s"
        for c in roofline.ceilings(stored).values()
    ]
    return [f"ceilings: {'; '.join(found)}"] if found else []


def _failures(stored: Stored) -> list[str]:
    lines = [f"  {who}: {error}" for who, error in tables.without_time(stored.rows)]
    return ["without a time", *_at_most(lines, 6)] if lines else []


def _shortened(line: str) -> str:
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"


def _at_most(lines: Sequence[str], count: int) -> list[str]:
    """The first of some lines, and how many there are beside them."""
    if len(lines) <= count:
        return list(lines)
    return [*lines[: count - 1], f"  and {len(lines) - count + 1} more"]
