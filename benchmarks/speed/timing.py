"""Paired, interleaved timing.

Every round runs each provider once, so that drifting clocks and other processes hit all of them
alike; a provider's ratio to the baseline is the median of the ratios within the rounds. The order
rotates, and is reversed in every second round, so that no provider always runs first or always
after the same neighbour.

On a GPU a sample has three clocks:

| clock | starts when | ends when | measures |
| --- | --- | --- | --- |
| `wall` | the GPU is idle | it is idle again | what an eager caller waits for |
| `host` | the GPU is idle | all launches are queued | host overhead |
| `device` | all launches are queued | the last one ends | the GPU's work |

`device` is measured in a separate run: the step is queued behind a sleep that outlasts the
launches, so the GPU never waits for one, and behind a read of other memory that flushes the L2
cache. A step that waits for the GPU itself, or whose launches do not fit the GPU's queue, has no
`device` time. A fourth time, `graph`, is the `device` time of the step's CUDA graph (`Replay`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch


class Sample(NamedTuple):
    """The duration of one step in seconds, by clock; None where the device has no such clock."""

    wall: float
    device: float | None = None
    host: float | None = None


class Step(Protocol):
    """What is timed."""

    def prepare(self) -> None:
        """Set up the state that `run` starts from; not timed."""

    def run(self) -> None:
        """The step itself."""

    def release(self) -> None:
        """Free what the last run left behind."""


Stopwatch = Callable[[Step], Sample]
"""Prepares a step and runs it, perhaps several times, and returns how long it took."""


# Short steps are repeated for this long, preparation included. With a busy neighbour it is longer
# than the scheduler's time slices.
_SAMPLE_S, _BUSY_SAMPLE_S = 0.005, 0.05


def host_stopwatch(step: Step, sample_s: float = _SAMPLE_S) -> Sample:
    """For the CPU, which has only the wall clock; the mean of several runs of a short step."""
    runs, seconds = 0, 0.0
    end = time.perf_counter() + sample_s
    while runs == 0 or time.perf_counter() < end:
        step.prepare()
        start = time.perf_counter()
        step.run()
        seconds += time.perf_counter() - start
        runs += 1
    return Sample(seconds / runs)


# Larger than any GPU's last-level cache. It is read, not written: dirty lines would have to be
# written back while the step runs.
_FLUSH_BYTES = 256 << 20
# A clock cycle is half a nanosecond or more. The sleep is this much longer than the launches took,
# and then as much as the next one says if the GPU woke up too early.
_CYCLES_PER_SECOND = 2e9
_MARGINS = (1.5, 4.0)
_LONGEST_SLEEP_S = 0.5


class CudaStopwatch:
    """For a GPU: all clocks of this module's table."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.zeros(_FLUSH_BYTES // 4, device=device)

    def __call__(self, step: Step) -> Sample:
        step.prepare()
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        step.run()
        host = time.perf_counter() - start
        torch.cuda.synchronize(self._device)
        wall = time.perf_counter() - start
        for margin in _MARGINS:
            step.release()
            device = self._device_time(step, min(host * margin, _LONGEST_SLEEP_S))
            if device is not None:
                break
        return Sample(wall, device, host)

    def _device_time(self, step: Step, sleep_s: float) -> float | None:
        """Seconds of a run that is queued behind a sleep; None if the GPU woke up too early."""
        step.prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        sleep: Any = torch.cuda._sleep
        sleep(int(sleep_s * _CYCLES_PER_SECOND))
        self._flush.sum()
        begin.record()
        step.run()
        end.record()
        waited = begin.query()
        torch.cuda.synchronize(self._device)
        return None if waited else begin.elapsed_time(end) / 1e3


@functools.cache
def stopwatch_for(device: torch.device, neighbour: bool = False) -> Stopwatch:
    """The stopwatch for a device."""
    if device.type == "cuda":
        return CudaStopwatch(device)
    if neighbour:
        return functools.partial(host_stopwatch, sample_s=_BUSY_SAMPLE_S)
    return host_stopwatch


def warm_up(step: Step) -> None:
    """Run a step once, so that what its first call compiles is compiled."""
    step.prepare()
    step.run()
    step.release()


class Replay:
    """A step captured as a CUDA graph; its results stay where the capture put them.

    The step's inputs and parameters must have been created on `stream` and never used on another:
    their AccumulateGrad nodes run on the stream of their first use, and a capture cannot wait for
    another stream.

    A graph holds addresses, not tensors. What it writes, gradients included, is in memory that it
    owns, because `prepare` leaves no gradients that the step would add to. What it reads, the step
    holds: inputs, parameters, and what a layer keeps from an earlier step. So the step is kept
    here, and must not run again except as a replay.

    Raises:
        Exception: what the capture raises.
    """

    def __init__(self, step: Step, stream: torch.cuda.Stream) -> None:
        self._step = step
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, loads, and allocates workspaces of this stream
                warm_up(step)
            step.prepare()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        cause: Exception | None = None
        try:
            # A collection might destroy an earlier graph, which is not permitted in a capture.
            with _no_collections(), torch.cuda.graph(self._graph, stream=stream):
                try:
                    step.run()
                except Exception as error:  # the capture's own error says less
                    cause = error
                    raise
        except Exception as error:
            torch.cuda.set_stream(before)  # a failed capture does not restore it
            raise cause or error from error

    def prepare(self) -> None:
        """Nothing: inputs and results stay in place."""

    def run(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        """Nothing: the graph owns its memory."""


@dataclass(frozen=True)
class Plan:
    """How much time a case may take."""

    budget_s: float = 30.0  # another round starts if it fits
    first_round_s: float = 300.0  # the first round starts no provider after this
    min_rounds: int = 0  # these may take longer than the budget, up to longest_s
    longest_s: float = 90.0
    max_rounds: int = 50
    # With fewer rounds than this, the first round counts as well instead of being a warm-up: a step
    # then takes seconds, and a warm-up does not matter.
    enough_rounds: int = 5
    graph_s: float = 0.05  # GPU steps shorter than this are also timed as CUDA graphs
    graph_budget_s: float = 2.0
    footprint: bool = True  # whether peak memory is measured, in a separate run

    def brief(self) -> Plan:
        """For one of many cases."""
        return replace(
            self,
            budget_s=min(self.budget_s, 3.0),
            min_rounds=min(self.max_rounds, 7),
            max_rounds=min(self.max_rounds, 40),
            footprint=False,
        )


Round = Mapping[str, Sample]


def timed(step: Step, stopwatch: Stopwatch) -> Sample:
    """One sample of a step, with the garbage collector off."""
    with _no_collections():
        return stopwatch(step)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Run the block with the garbage collector off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def paired_rounds(
    steps: Mapping[str, Step],
    first_round: Round,
    plan: Plan,
    stopwatch: Stopwatch,
    failed: Callable[[str, Exception], None],
    now: Callable[[], float] = time.perf_counter,
) -> list[Round]:
    """Interleaved rounds of all steps, as many as the plan allows.

    Args:
        steps: what to run, by name.
        first_round: samples of a round that has already been run, by the same names.
        plan: limits.
        stopwatch: measures a step.
        failed: told of a step that raises, which then leaves the rounds.
        now: the clock for the budget.
    """
    names = list(steps)
    estimate = sum(sample.wall for sample in first_round.values())
    rounds: list[Round] = []
    begun = now()
    while names and len(rounds) < plan.max_rounds:
        limit = plan.longest_s if len(rounds) < plan.min_rounds else plan.budget_s
        if now() - begun + estimate > limit:
            break
        samples: dict[str, Sample] = {}
        start = now()
        for name in order(names, len(rounds)):
            try:
                samples[name] = timed(steps[name], stopwatch)
            except Exception as error:
                names.remove(name)
                failed(name, error)
            steps[name].release()
        rounds.append(samples)
        estimate = now() - start
    if len(rounds) < plan.enough_rounds:
        rounds.insert(0, first_round)
    return rounds


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: rotated by one every two rounds, reversed in every second round."""
    shift = number // 2 % max(1, len(names))
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if number % 2 else rotated


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile in milliseconds, as "p20" and so on."""
    return {f"p{p}": float(np.percentile(seconds, p)) * 1e3 for p in (20, 50, 80)}


def median_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return float(np.median(np.asarray(seconds) / np.asarray(baseline)))
