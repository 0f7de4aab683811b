"""Paired, interleaved timing.

Every round runs each provider once, so that whatever else the machine is doing hits all of them
alike, and a provider's ratio to the baseline is the median of the ratios within the rounds. The
order rotates, and is reversed in every second round, so that nobody always runs first or always
after the same neighbour.

On a GPU a sample has three clocks; `device` is a run of its own:

| clock | starts | ends | says |
| --- | --- | --- | --- |
| `wall` | the GPU is idle | it is idle again | what an eager caller waits |
| `host` | the GPU is idle | all launches are queued | what the processor works |
| `device` | all launches are queued | the last one ends | what the GPU works |

For `device`, a step is queued behind a sleep that outlasts the processor, so that no launch is
waited for, and behind a read of other memory, so that it finds none of its input in a cache. That
holds as far as the GPU's queue does: a step of more than LAUNCHES_QUEUED has no `device` time. A
fourth time, of the step as a CUDA graph, is the `device` time of a replay (`Replay`).
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch


class Sample(NamedTuple):
    """The duration of one step in seconds, by clock; None where the device has no such clock."""

    wall: float
    device: float | None = None
    host: float | None = None  # until the processor has put the step into the device's queue


class Step(Protocol):
    """What is timed."""

    def prepare(self) -> None:
        """Bring about the state that `run` starts from; not timed."""

    def run(self) -> None:
        """The step itself."""

    def release(self) -> None:
        """Drop what the last run left behind, or it would crowd the next one's memory."""


Stopwatch = Callable[[Step], Sample]
"""Prepares a step and runs it, perhaps several times, and says how long it took."""


def host_stopwatch(step: Step) -> Sample:
    """For the CPU, where the device's time is the wall's, and for work that is the processor's."""
    step.prepare()
    start = time.perf_counter()
    step.run()
    return Sample(time.perf_counter() - start)


# More than the last-level cache of any GPU. It is read: what is written would have to be written
# back while the step runs.
_OTHER_BYTES = 256 << 20
# A clock cycle is half a nanosecond or more; the sleep is longer than the launches took by as much.
_CYCLES_A_SECOND = 2e9
_SLEEP_MARGIN = 1.5
_LONGEST_SLEEP_S = 0.5
LAUNCHES_QUEUED = 1000


class CudaStopwatch:
    """For a GPU: both clocks, see this module's text."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._other = torch.zeros(_OTHER_BYTES // 4, device=device)

    def __call__(self, step: Step) -> Sample:
        step.prepare()
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        step.run()
        queueing = time.perf_counter() - start
        torch.cuda.synchronize(self._device)
        wall = time.perf_counter() - start
        step.release()

        step.prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        sleep: Any = torch.cuda._sleep
        sleep(int(min(queueing * _SLEEP_MARGIN, _LONGEST_SLEEP_S) * _CYCLES_A_SECOND))
        self._other.sum()
        begin.record()
        step.run()
        end.record()
        torch.cuda.synchronize(self._device)
        return Sample(wall, begin.elapsed_time(end) / 1e3, queueing)


def warm_up(step: Step) -> None:
    """Run a step once, so that what its first call compiles is compiled."""
    step.prepare()
    step.run()
    step.release()


@functools.cache
def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch that suits a device."""
    return CudaStopwatch(device) if device.type == "cuda" else host_stopwatch


class Replay:
    """A step as a CUDA graph; its results stay where the first replay wrote them.

    Raises:
        Exception: whatever the capture raises.
    """

    def __init__(self, step: Step) -> None:
        stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(3):
                step.prepare()
                step.run()
                step.release()
            step.prepare()
        before.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                try:
                    step.run()
                except Exception as error:  # what ends the capture says less than what broke it
                    cause = error
                    raise
        except Exception as error:
            torch.cuda.set_stream(before)  # which a capture that fails does not come back to
            raise cause or error from error

    def prepare(self) -> None:
        """Inputs and results are where they were."""

    def run(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        """What a graph writes to is its own."""


@dataclass(frozen=True)
class Plan:
    """How much time a case may take."""

    budget_s: float = 30.0  # rounds go on while another one fits in
    first_round_s: float = 300.0  # the first round starts no provider after this
    max_rounds: int = 50
    # With fewer rounds than this after it, the first round counts too instead of being a warm-up:
    # where so few fit into the budget a step takes seconds, and warming up is no part of that.
    enough_rounds: int = 5
    graph_s: float = 0.005  # steps of a GPU that take less are timed as CUDA graphs as well
    graph_budget_s: float = 2.0  # for their rounds
    extras: bool = True  # whether peak memory and launches are measured, in runs of their own


Round = Mapping[str, Sample]


def timed(step: Step, stopwatch: Stopwatch) -> Sample:
    """One sample of a step, with the garbage collector kept out of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return stopwatch(step)
    finally:
        if enabled:
            gc.enable()


def paired_rounds(
    steps: Mapping[str, Step],
    first_round: Round,
    plan: Plan,
    stopwatch: Stopwatch,
    now: Callable[[], float] = time.perf_counter,
    failed: Callable[[str, Exception], None] | None = None,
) -> list[Round]:
    """Interleaved rounds of all steps, as many as the plan allows.

    Args:
        steps: what to run, by name.
        first_round: samples of a round that has been run already, with the same names.
        plan: limits.
        stopwatch: measures a step.
        now: the clock that the budget is held against.
        failed: told of a step that raises, out of memory for instance, which then leaves the
            rounds; without it the exception is raised.
    """
    names = list(steps)
    estimate = sum(sample.wall for sample in first_round.values())
    rounds: list[Round] = []
    begun = now()
    while names and len(rounds) < plan.max_rounds and now() - begun + estimate <= plan.budget_s:
        gc.collect()
        samples: dict[str, Sample] = {}
        start = now()
        for name in order(names, len(rounds)):
            try:
                samples[name] = timed(steps[name], stopwatch)
            except Exception as error:
                if failed is None:
                    raise
                names.remove(name)
                failed(name, error)
            steps[name].release()
        rounds.append(samples)
        estimate = now() - start
    if len(rounds) < plan.enough_rounds:
        rounds.insert(0, first_round)
    return rounds


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: rotated by one every two rounds, backwards in the second of the two."""
    shift = number // 2 % max(1, len(names))
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if number % 2 else rotated


class Percentiles(NamedTuple):
    p20: float
    p50: float
    p80: float


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """The 20th, 50th and 80th percentile in milliseconds."""
    return Percentiles(*(float(p) for p in np.percentile(np.asarray(seconds) * 1e3, (20, 50, 80))))


def median_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return float(np.median(np.asarray(seconds) / np.asarray(baseline)))
