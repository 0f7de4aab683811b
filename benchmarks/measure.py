"""The engine: check every provider of a case on its input, then time those that are right."""

from __future__ import annotations

import contextlib
import datetime
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import footprint
from benchmarks.cases import Case
from benchmarks.entries import BASELINE, AnyEntry, DeviceLostError, Subject, UnavailableError
from benchmarks.environment import Environment
from benchmarks.rows import Row
from benchmarks.timing import (
    LAUNCHES_QUEUED,
    Plan,
    Replay,
    Round,
    Sample,
    Step,
    Stopwatch,
    host_stopwatch,
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
    skipped: bool = False
    samples: list[Sample] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.entry.key

    def fail(self, error: str, *, gate: str | None = None, skipped: bool = False) -> None:
        self.row = replace(self.row, error=error, gate=gate)
        self.skipped, self.first, self.samples = skipped, None, []
        self.drop()

    def drop(self) -> None:
        """Let go of what was built."""
        if self.subject is not None:
            # What cannot be cleared up, on a device that is lost for instance, is no news.
            with contextlib.suppress(Exception):
                self.subject.step.release()
                self.subject.close()
        self.subject = None

    def outcome(self) -> Outcome:
        return Outcome(self.key, self.row, tuple(self.samples), self.skipped)


def measure(
    case: Case,
    entries: Sequence[AnyEntry],
    problem: Callable[[], Any],
    environment: Environment,
    plan: Plan,
    *,
    device: torch.device | None = None,
    stopwatch: Stopwatch | None = None,
    record: Callable[[Row], None] = lambda row: None,
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
        record: takes every row as soon as it is complete.

    Raises:
        DeviceLostError: a provider broke the GPU's context; all rows are recorded, those that had
            no times yet with the reason.
    """
    device = device or torch.device("cpu")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    contenders = [_Contender(e, _blank_row(case, e, environment, started)) for e in entries]
    recorded: set[str] = set()

    def complete(contender: _Contender) -> None:
        if contender.key not in recorded:
            recorded.add(contender.key)
            record(contender.row)

    torch.compiler.reset()  # or its limit of recompilations would be reached by shapes before
    try:
        _measure(contenders, problem, plan, stopwatch, device, complete)
    except DeviceLostError as error:
        for contender in contenders:
            if not contender.samples and contender.row.error is None:
                contender.fail(f"not run: {_one_line(error)}", skipped=True)
            complete(contender)
        raise
    finally:
        for contender in contenders:
            contender.drop()
    return [contender.outcome() for contender in contenders]


def _measure(
    contenders: Sequence[_Contender],
    problem: Callable[[], Any],
    plan: Plan,
    stopwatch: Stopwatch | None,
    device: torch.device,
    complete: Callable[[_Contender], None],
) -> None:
    """All rounds of a case; the contenders hold the results."""
    try:
        stopwatch = stopwatch or stopwatch_for(device)
        made = problem()
    except Exception as error:
        for contender in contenders:
            contender.fail(_why(error), skipped=_no_fault(error))
            complete(contender)
        return
    spent = 0.0
    for contender in contenders:
        if spent > plan.first_round_s:
            contender.fail(
                f"not run: the providers before it took {spent:.0f} s for a first step each",
                skipped=True,
            )
        else:
            begun = time.perf_counter()
            _first_step(contender, made, stopwatch, device, plan)
            timed_s = contender.first.wall if contender.first else 0.0
            spent += max(timed_s, time.perf_counter() - begun)
        if contender.subject is None:
            complete(contender)

    ready = {c.key: c for c in contenders if c.subject is not None}
    first_round = {key: c.first for key, c in ready.items() if c.first is not None}

    def failed(key: str, error: Exception) -> None:
        ready[key].fail(f"while timing: {_why(error)}", gate="passed")
        _raise_if_lost(key, error, device)

    steps = {key: c.subject.step for key, c in ready.items() if c.subject is not None}
    if any(c.subject is not None and c.subject.on_host for c in contenders):
        stopwatch = host_stopwatch
    for samples in paired_rounds(steps, first_round, plan, stopwatch, failed=failed):
        _collect(ready, samples)
    _set_times(ready)
    # Last, and on top of rows that are complete: a capture that fails can leave PyTorch's memory
    # in a state in which others fail.
    _measure_graphs(ready, plan, stopwatch, device)
    for contender in ready.values():
        complete(contender)


def _first_step(
    contender: _Contender, problem: Any, stopwatch: Stopwatch, device: torch.device, plan: Plan
) -> None:
    """Build a provider, run its first step and put that through the gate, then what it takes."""
    try:
        subject = contender.subject = contender.entry.build(problem)
        saved = None
        if subject.forward is not None:
            saved = footprint.saved_bytes(subject.forward, subject.parameters)
        if subject.compiles or device.type == "cuda":
            warm_up(subject.step)
        contender.first = timed(subject.step, host_stopwatch if subject.on_host else stopwatch)
        reason = subject.check()
        subject.step.release()
    except Exception as error:
        contender.fail(_why(error), skipped=_no_fault(error))
        _raise_if_lost(contender.key, error, device)
        _free(device)
        return
    if reason is not None:
        contender.fail(reason, gate="failed")
        return
    contender.row = replace(
        contender.row,
        gate="passed",
        saved_bytes=saved,
        moved_bytes=subject.moved_bytes,
        flops=subject.flops,
    )
    if plan.extras:
        _measure_footprint(contender, subject, device)
    _free(device)


def _measure_footprint(contender: _Contender, subject: Subject, device: torch.device) -> None:
    """Launches and peak memory; where nobody may count them, times count all the same."""
    try:
        peak = footprint.peak_bytes(subject.step, device)
        contender.row = replace(contender.row, peak_bytes=peak)
        launches = footprint.launches(subject.step, device)
        if launches is not None:
            contender.row = replace(contender.row, launches=launches // subject.repeats)
    except Exception as error:
        contender.row = replace(contender.row, footprint_error=_why(error))
        _raise_if_lost(contender.key, error, device)
        subject.step.release()


def _measure_graphs(
    ready: dict[str, _Contender], plan: Plan, stopwatch: Stopwatch, device: torch.device
) -> None:
    """Check and time short steps once more, as CUDA graphs, in rounds of their own."""
    replays: dict[str, Step] = {}
    for key, contender in ready.items():
        subject, row = contender.subject, contender.row
        short = row.device_ms_p50 is not None and row.device_ms_p50 < plan.graph_s * 1e3
        if subject is None or not short or not subject.graphable:
            continue
        try:
            replay = Replay(subject.step)
            replay.run()
            reason = subject.check()
            subject.step.release()
        except Exception as error:
            contender.row = replace(row, graph_error=_why(error))
            _raise_if_lost(key, error, device)
            continue
        if reason is None:
            replays[key] = replay
        else:
            contender.row = replace(row, graph_error=f"wrong: {reason}")

    def failed(key: str, error: Exception) -> None:
        ready[key].row = replace(ready[key].row, graph_error=_why(error))
        _raise_if_lost(key, error, device)

    limits = replace(plan, budget_s=min(plan.budget_s, plan.graph_budget_s))
    found: dict[str, list[float]] = {key: [] for key in replays}
    for samples in paired_rounds(replays, {}, limits, stopwatch, failed=failed):
        for key, sample in samples.items():
            repeats = ready[key].subject.repeats  # type: ignore[union-attr]
            found[key].append((sample.device or sample.wall) / repeats)
    for key, seconds in found.items():
        row = ready[key].row
        if seconds and row.graph_error is None:
            ready[key].row = replace(row, **_times("graph", seconds, found.get(BASELINE, [])))


def _raise_if_lost(key: str, error: Exception, device: torch.device) -> None:
    """Raise DeviceLostError if the GPU's context is broken."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as broken:
        raise DeviceLostError(key, broken) from error


def _free(device: torch.device) -> None:
    """Give memory back, so that one provider's peak is no reason for the next one to fail."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _collect(ready: dict[str, _Contender], samples: Round) -> None:
    for key, sample in samples.items():
        contender = ready[key]
        if contender.row.error is None:
            contender.samples.append(_once(contender, sample))


def _once(contender: _Contender, sample: Sample) -> Sample:
    """A sample of what the row is of, of which a run does several."""
    repeats = 1 if contender.subject is None else contender.subject.repeats
    return Sample(*(None if clock is None else clock / repeats for clock in sample))  # type: ignore[arg-type]


def _set_times(ready: dict[str, _Contender]) -> None:
    """Percentiles, ratios and rates in the rows of those that were timed."""
    baseline = ready[BASELINE].samples if BASELINE in ready else []
    for contender in ready.values():
        if contender.samples:
            contender.row = _with_times(contender, baseline)


def _with_times(contender: _Contender, baseline: Sequence[Sample]) -> Row:
    samples, row = contender.samples, contender.row
    values: dict[str, Any] = {"rounds": len(samples)}
    values |= _times("wall", [s.wall for s in samples], [s.wall for s in baseline])
    on_host = [s.host for s in samples if s.host is not None]
    if on_host:
        values |= _times("host", on_host, [s.host for s in baseline if s.host is not None])
    many = row.launches is not None and row.launches > LAUNCHES_QUEUED
    on_device = [s.device for s in samples if s.device is not None]
    if on_device and not many:
        theirs = [s.device for s in baseline if s.device is not None]
        values |= _times("device", on_device, theirs)
    row = replace(row, **values)
    if row.milliseconds:
        seconds = row.milliseconds / 1e3
        if row.moved_bytes is not None:
            row = replace(row, gb_per_s=row.moved_bytes / seconds / 1e9)
        if row.flops is not None:
            row = replace(row, tflop_per_s=row.flops / seconds / 1e12)
    return row


def _times(clock: str, seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """A clock's columns; the ratio only where the baseline was timed in the same rounds."""
    found = {f"{clock}_ms_{p}": v for p, v in percentiles(seconds)._asdict().items()}
    if len(baseline) == len(seconds):
        found[f"ratio_to_frozen_{clock}"] = median_ratio(seconds, baseline)
    return found


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


def _no_fault(error: Exception) -> bool:
    """Whether a provider cannot run here, as against one that is broken."""
    return isinstance(error, (UnavailableError, ImportError))


def _why(error: Exception) -> str:
    """An exception in a line; what cannot run says so without the exception's name."""
    if _no_fault(error):
        return f"cannot run: {_one_line(error)}"
    text = str(error).strip()
    return f"{type(error).__name__}: {_one_line(error)}" if text else type(error).__name__


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
