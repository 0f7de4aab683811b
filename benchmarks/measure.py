"""The engine: check every provider of a case on its input, then time those that are right."""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import footprint
from benchmarks.cases import Case
from benchmarks.entries import BASELINE, AnyEntry, Subject, UnavailableError
from benchmarks.environment import Environment
from benchmarks.rows import Row
from benchmarks.timing import (
    Plan,
    Round,
    Sample,
    Stopwatch,
    captured,
    median_ratio,
    paired_rounds,
    percentiles,
    stopwatch_for,
    timed,
    warm_up,
)


@dataclass(frozen=True)
class Outcome:
    """A row and the samples behind it, none where the provider was not timed."""

    key: str  # the entry's
    row: Row
    samples: Sequence[Sample] = ()
    skipped: bool = False  # the provider could not run here, which is no fault of it


@dataclass
class _Contender:
    """A provider on its way from being built to being timed."""

    entry: AnyEntry
    row: Row
    subject: Subject | None = None
    first: Sample | None = None
    replay: Callable[[], None] | None = None
    skipped: bool = False
    samples: list[Sample] = field(default_factory=list)

    def fail(self, error: str, *, gate: str | None = None, skipped: bool = False) -> None:
        self.row = replace(self.row, error=error, gate=gate)
        self.subject, self.first, self.replay, self.skipped = None, None, None, skipped


def measure(
    case: Case,
    entries: Sequence[AnyEntry],
    problem: Callable[[], Any],
    environment: Environment,
    plan: Plan,
    *,
    device: torch.device | None = None,
    stopwatch: Stopwatch | None = None,
) -> list[Outcome]:
    """Check, then time, the providers on one case; one outcome each, in the same order.

    The first round runs every provider once, timed, and its results go through the gate: what is
    checked is what is timed. A provider that fails in any way has a row that says so and no times;
    so has every provider of a case whose input cannot be made.

    Args:
        case: what the rows are of.
        entries: the providers.
        problem: makes the input that all of them share.
        environment: what the rows say of the device and of versions.
        plan: limits.
        device: where to measure.
        stopwatch: in place of the device's own.
    """
    device = device or torch.device("cpu")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    contenders = [_Contender(e, _blank_row(case, e, environment, started)) for e in entries]
    try:
        stopwatch = stopwatch or stopwatch_for(device)
        made = problem()
    except Exception as error:
        skipped = isinstance(error, (UnavailableError, ImportError))
        for contender in contenders:
            contender.fail(_why(error), skipped=skipped)
        return [_outcome(c) for c in contenders]

    spent = 0.0
    for contender in contenders:
        if spent > plan.first_round_s:
            contender.fail(
                f"not run: the providers before it took {spent:.0f} s for one step each",
                skipped=True,
            )
            continue
        _first_step(contender, made, stopwatch, device, plan)
        spent += contender.first.wall if contender.first else 0.0

    ready = {c.entry.key: c for c in contenders if c.subject is not None}
    steps = {key: c.subject.step for key, c in ready.items() if c.subject is not None}
    first_round = {key: c.first for key, c in ready.items() if c.first is not None}
    graphs = {key: c.replay for key, c in ready.items() if c.replay is not None}
    try:
        rounds = paired_rounds(steps, first_round, plan, stopwatch, graphs) if steps else []
    except Exception as error:  # out of memory, say: nothing can be said of any of them
        rounds = []
        for contender in ready.values():
            contender.fail(f"while timing: {_why(error)}", gate="passed")
        ready = {}
    for samples in rounds:
        _collect(ready, samples)
    baseline = ready[BASELINE].samples if BASELINE in ready else []
    for contender in ready.values():
        contender.row = _with_times(contender, baseline)
    for contender in contenders:
        if contender.subject is not None:
            contender.subject.close()
    return [_outcome(c) for c in contenders]


def _outcome(contender: _Contender) -> Outcome:
    return Outcome(contender.entry.key, contender.row, contender.samples, contender.skipped)


def _first_step(
    contender: _Contender, problem: Any, stopwatch: Stopwatch, device: torch.device, plan: Plan
) -> None:
    """Build a provider, run its first step and put that through the gate, then what it takes."""
    subject: Subject | None = None
    try:
        subject = contender.entry.build(problem)
        saved = None
        if subject.forward is not None:
            saved = footprint.saved_bytes(subject.forward, subject.parameters)
        if subject.compiles or device.type == "cuda":
            warm_up(subject.step)
        contender.first = timed(subject.step, stopwatch)
        reason = subject.check()
        subject.step.release()
    except Exception as error:
        if subject is not None:
            subject.step.release()
        contender.fail(_why(error), skipped=isinstance(error, (UnavailableError, ImportError)))
        _free(device)
        return
    if reason is not None:
        contender.fail(reason, gate="failed")
        return
    contender.subject = subject
    contender.row = replace(
        contender.row,
        gate="passed",
        saved_bytes=saved,
        moved_bytes=subject.moved_bytes,
        flops=subject.flops,
    )
    # A step that passed can still fail here: its times count all the same.
    if plan.extras:
        try:
            contender.row = replace(
                contender.row,
                peak_bytes=footprint.peak_bytes(subject.step, device),
                launches=footprint.launches(subject.step, device),
            )
        except Exception as error:
            subject.step.release()
            contender.row = replace(contender.row, error=f"no footprint: {_why(error)}")
    first = contender.first
    if first.device is not None and first.device < plan.graph_s and subject.graphable:
        try:
            contender.replay = captured(subject.step)
        except Exception as error:
            subject.step.release()
            contender.row = replace(contender.row, graph_error=_why(error))
    _free(device)


def _free(device: torch.device) -> None:
    """Give memory back, so that one provider's peak is no reason for the next one to fail."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _collect(ready: dict[str, _Contender], samples: Round) -> None:
    for key, sample in samples.items():
        contender = ready[key]
        repeats = 1 if contender.subject is None else contender.subject.repeats
        once = (None if clock is None else clock / repeats for clock in sample)
        contender.samples.append(Sample(*once))  # type: ignore[arg-type]


def _with_times(contender: _Contender, baseline: Sequence[Sample]) -> Row:
    """The row with percentiles and ratios; ratios only where the baseline was timed as well."""
    samples = contender.samples
    values: dict[str, Any] = {"rounds": len(samples)}
    for clock in ("wall", "device", "graph"):
        of_clock = [getattr(s, clock) for s in samples]
        # The round that came first has no graphs yet.
        paired = [
            (own, getattr(frozen, clock))
            for own, frozen in zip(of_clock, baseline, strict=False)
            if own is not None and getattr(frozen, clock) is not None
        ]
        measured = [value for value in of_clock if value is not None]
        if measured:
            for name, value in percentiles(measured)._asdict().items():
                values[f"{clock}_ms_{name}"] = value
        if paired:
            values[f"ratio_to_frozen_{clock}"] = median_ratio(*zip(*paired, strict=True))
    row = replace(contender.row, **values)
    if row.milliseconds:
        seconds = row.milliseconds / 1e3
        if row.moved_bytes is not None:
            row = replace(row, gb_per_s=row.moved_bytes / seconds / 1e9)
        if row.flops is not None:
            row = replace(row, tflop_per_s=row.flops / seconds / 1e12)
    return row


def _blank_row(case: Case, entry: AnyEntry, environment: Environment, started: str) -> Row:
    return Row(
        provider=entry.name,
        level=case.level,
        model=case.model,
        direction=case.direction,
        dtype=case.dtype,
        T=case.T,
        n=case.n,
        m=case.m,
        d=entry.d,
        k=entry.k,
        stride=entry.stride,
        device=environment.device,
        torch=environment.torch,
        triton=environment.triton,
        peft=environment.peft,
        commit=environment.commit,
        time=started,
        sweep=case.sweep,
    )


def _why(error: Exception) -> str:
    """An exception in a line; what cannot run says so without the exception's name."""
    lines = str(error).strip().splitlines()
    if isinstance(error, (UnavailableError, ImportError)):
        return f"cannot run: {lines[0] if lines else type(error).__name__}"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
