"""The engine: check every provider of a case on its input, then time those that are right."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.environment import Environment
from benchmarks.rows import Row
from benchmarks.speed import conditions, memory
from benchmarks.speed.cases import Case
from benchmarks.speed.provider import BASELINE, Provider, Workload, why_unavailable
from benchmarks.speed.timing import (
    Plan,
    Replay,
    Sample,
    Step,
    Stopwatch,
    median_ratio,
    paired_rounds,
    percentiles,
    stopwatch_for,
    timed,
    warm_up,
)


@dataclass
class Outcome:
    """A provider's row, and the samples behind it: none if it was not timed."""

    provider: Provider
    row: Row
    samples: list[Sample] = field(default_factory=list)
    skipped: bool = False  # it cannot run on this machine, or there was no time for it
    workload: Workload | None = None
    first: Sample | None = None

    @property
    def key(self) -> str:
        return self.provider.key

    def fail(self, error: str, *, gate: str | None = None, skipped: bool = False) -> None:
        """Record why there are no times."""
        self.row = replace(self.row, error=error, gate=gate)
        self.skipped, self.first, self.samples = skipped, None, []
        self.close()

    def close(self) -> None:
        """Free what was built."""
        if self.workload is not None:
            self.workload.step.release()
        self.workload = None


def measure(
    case: Case,
    providers: Sequence[Provider],
    problem: Callable[[], Any],
    environment: Environment,
    plan: Plan,
    *,
    device: torch.device,
    stopwatch: Stopwatch | None = None,
    record: Callable[[Row], None] = lambda row: None,
) -> list[Outcome]:
    """Check, then time, the providers on one case; one outcome each, in the same order.

    The first round runs every provider once, timed, and checks its results: what is checked is what
    is timed. A provider that fails in any way gets a row with the reason and no times.

    A row is recorded as soon as it has the clocks of eager steps, and again with those of graphs.
    Launches are counted later (`count_launches`).

    Args:
        case: the case that the rows belong to.
        providers: the providers to compare.
        problem: makes the input that all of them share.
        environment: device and versions, for the rows.
        plan: limits.
        device: where to measure.
        stopwatch: replaces the device's own.
        record: receives every row as soon as it is known, and again when more is.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    shared = vars(case) | vars(environment) | {"time": started}
    outcomes = [Outcome(p, Row(p.name, d=p.d, k=p.k, stride=p.stride, **shared)) for p in providers]
    recorded: dict[str, Row] = {}

    def known(outcome: Outcome) -> None:
        if recorded.get(outcome.key) != outcome.row:
            recorded[outcome.key] = outcome.row
            record(outcome.row)

    torch.compiler.reset()  # or shapes measured before would count towards its recompile limit
    try:
        _measure(outcomes, case, problem, plan, stopwatch, device, known)
    finally:
        for outcome in outcomes:
            outcome.close()
    return outcomes


def _measure(
    outcomes: Sequence[Outcome],
    case: Case,
    problem: Callable[[], Any],
    plan: Plan,
    stopwatch: Stopwatch | None,
    device: torch.device,
    known: Callable[[Outcome], None],
) -> None:
    try:
        stopwatch = stopwatch or stopwatch_for(device, case.neighbour)
        made = problem()
    except Exception as error:
        for outcome in outcomes:
            outcome.fail(_reason(error), skipped=why_unavailable(error) is not None)
            known(outcome)
        return
    begun = time.perf_counter()
    for outcome in outcomes:
        spent = time.perf_counter() - begun
        if spent > plan.first_round_s:
            outcome.fail(f"not run: the first steps before it took {spent:.0f} s", skipped=True)
        else:
            _first_step(outcome, case, made, stopwatch, device, plan)
        if outcome.workload is None:
            known(outcome)

    ready = {o.key: o for o in outcomes if o.workload is not None}
    first_round = {key: o.first for key, o in ready.items() if o.first is not None}
    steps = {key: o.workload.step for key, o in ready.items() if o.workload is not None}

    def failed(key: str, error: Exception) -> None:
        ready[key].fail(f"while timing: {_reason(error)}", gate="passed")

    with contextlib.ExitStack() as stack:
        stack.enter_context(conditions.under(case))
        if case.neighbour and steps:
            stack.enter_context(conditions.busy_neighbour())
        rounds = paired_rounds(steps, first_round, plan, stopwatch, failed)
    for samples in rounds:
        for key, sample in samples.items():
            if ready[key].row.error is None:
                ready[key].samples.append(sample)
    baseline = ready[BASELINE].samples if BASELINE in ready else []
    for outcome in ready.values():
        if outcome.samples:
            outcome.row = _with_times(outcome.row, outcome.samples, baseline)
        known(outcome)
    # Last: a capture that fails can leave PyTorch's memory in a state in which others fail.
    with conditions.under(case):
        _time_graphs(ready, problem, plan, stopwatch, device)
    for outcome in ready.values():
        known(outcome)


def _first_step(
    outcome: Outcome,
    case: Case,
    problem: Any,
    stopwatch: Stopwatch,
    device: torch.device,
    plan: Plan,
) -> None:
    """Build a provider, time and check its first step, and measure its memory."""
    saved = reason = None
    try:
        workload = outcome.workload = outcome.provider.build(problem)
        if workload.forward is not None:
            saved = memory.saved_bytes(workload.forward, workload.parameters)
        if workload.compiles or device.type == "cuda":
            warm_up(workload.step)
        with conditions.under(case):
            outcome.first = timed(workload.step, stopwatch)
        reason = workload.check()
        workload.step.release()
    except Exception as error:
        outcome.fail(_reason(error), skipped=why_unavailable(error) is not None)
        _free(device)
        return
    if reason is not None:
        outcome.fail(reason, gate="failed")
        return
    outcome.row = replace(
        outcome.row,
        gate="passed",
        saved_bytes=saved,
        moved_bytes=workload.moved_bytes,
        flops=workload.flops,
    )
    if plan.footprint:
        _measure_footprint(
            outcome, lambda: {"peak_bytes": memory.peak_bytes(workload.step, device)}
        )
        workload.step.release()
        _free(device)  # a collection takes longer than a brief case does


def _measure_footprint(outcome: Outcome, measured: Callable[[], dict[str, Any]]) -> None:
    """Add columns to a row; a profiler that is not permitted costs no times."""
    try:
        outcome.row = replace(outcome.row, **measured())
    except Exception as error:
        outcome.row = replace(outcome.row, footprint_error=_reason(error))


def count_launches(
    outcomes: Sequence[Outcome],
    problem: Callable[[], Any],
    device: torch.device,
    record: Callable[[Row], None],
) -> None:
    """Record the rows of timed providers again, with their launches.

    This comes after all clocks of all cases, because the profiler that counts stays loaded.
    """
    timed_on_gpu = [o for o in outcomes if o.samples and device.type == "cuda"]
    once = functools.cache(problem)

    def launches(provider: Provider) -> dict[str, Any]:
        step = provider.build(once()).step
        warm_up(step)
        return {"launches": memory.launches(step, device)}

    for outcome in timed_on_gpu:
        _measure_footprint(outcome, functools.partial(launches, outcome.provider))
        record(outcome.row)


def _time_graphs(
    ready: Mapping[str, Outcome],
    problem: Callable[[], Any],
    plan: Plan,
    stopwatch: Stopwatch,
    device: torch.device,
) -> None:
    """Check and time short steps again as CUDA graphs, in separate rounds."""
    short = [
        outcome
        for outcome in ready.values()
        if outcome.workload is not None
        and outcome.workload.graphable
        and outcome.row.device_ms_p50 is not None
        and outcome.row.device_ms_p50 < plan.graph_s * 1e3
    ]
    if not short:
        return
    stream = torch.cuda.Stream(device)
    once = functools.cache(problem)  # inputs for the captures alone, see `Replay`
    replays: dict[str, Step] = {}
    for outcome in short:
        try:
            with torch.cuda.stream(stream):
                workload = outcome.provider.build(once())
            replay = Replay(workload.step, stream)
            replay.run()
            torch.cuda.synchronize(device)
            reason = workload.check()
        except Exception as error:
            outcome.row = replace(outcome.row, graph_error=_reason(error))
            continue
        if reason is None:
            replays[outcome.key] = replay
        else:
            outcome.row = replace(outcome.row, graph_error=f"wrong: {reason}")

    def failed(key: str, error: Exception) -> None:
        ready[key].row = replace(ready[key].row, graph_error=_reason(error))

    limits = replace(plan, budget_s=min(plan.budget_s, plan.graph_budget_s))
    found: dict[str, list[float | None]] = {key: [] for key in replays}
    for samples in paired_rounds(replays, {}, limits, stopwatch, failed):
        for key, sample in samples.items():
            found[key].append(sample.device)
    for key, seconds in found.items():
        row = ready[key].row
        if row.graph_error is None:
            ready[key].row = replace(row, **_times("graph", seconds, found.get(BASELINE, [])))


def _with_times(row: Row, samples: Sequence[Sample], baseline: Sequence[Sample]) -> Row:
    """Percentiles, ratios and rates."""
    row = replace(row, rounds=len(samples))
    for clock in ("wall", "host", "device"):
        seconds, theirs = ([getattr(s, clock) for s in each] for each in (samples, baseline))
        row = replace(row, **_times(clock, seconds, theirs))
    milliseconds = row.milliseconds()
    if milliseconds and row.moved_bytes is not None:
        row = replace(row, gb_per_s=row.moved_bytes / milliseconds / 1e6)
    if milliseconds and row.flops is not None:
        row = replace(row, tflop_per_s=row.flops / milliseconds / 1e9)
    return row


def _times(
    clock: str, seconds: Sequence[float | None], baseline: Sequence[float | None]
) -> dict[str, Any]:
    """A clock's columns; the ratio only where the baseline ran in the same rounds."""
    known = [s for s in seconds if s is not None]
    if not known:
        return {}
    found = {f"{clock}_ms_{p}": v for p, v in percentiles(known).items()}
    if len(baseline) == len(seconds):
        both = zip(seconds, baseline, strict=True)
        pairs = [(s, b) for s, b in both if s is not None and b is not None]
        if pairs:
            found[f"ratio_to_frozen_{clock}"] = median_ratio(*zip(*pairs, strict=True))
    return found


def _free(device: torch.device) -> None:
    """Return memory, so that one provider's peak does not make the next one fail."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a broken context shows where it is used
            torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return why_unavailable(error) or ": ".join([type(error).__name__, *lines[:1]])
