"""Paired, interleaved timing.

Every round runs each provider once, so that whatever else the machine is doing hits all of them
alike, and a provider's ratio to the baseline is the median of the ratios within the rounds. The
order rotates, and is reversed in every second round, so that nobody always runs first or always
after the same neighbour.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch


class Sample(NamedTuple):
    """The duration of one step in seconds; device time only where the device has its own clock."""

    wall: float
    device: float | None = None


class Stopwatch(Protocol):
    """Runs a step and says how long it took."""

    def __call__(self, step: Callable[[], None]) -> Sample: ...


class Step(Protocol):
    """A training step of a layer."""

    def reset(self) -> None:
        """Drop what the last run left behind; not timed."""

    def run(self) -> None:
        """The step itself."""


def host_stopwatch(step: Callable[[], None]) -> Sample:
    """For the CPU, where the device's time is the wall's."""
    start = time.perf_counter()
    step()
    return Sample(time.perf_counter() - start)


def cuda_stopwatch(step: Callable[[], None]) -> Sample:
    """Wall time until the GPU has finished, and the time between two events in its stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return Sample(time.perf_counter() - start, begin.elapsed_time(end) / 1e3)


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch that suits a device."""
    return cuda_stopwatch if device.type == "cuda" else host_stopwatch


@dataclass(frozen=True)
class Plan:
    """How much time a case may take."""

    budget_s: float = 60.0  # rounds go on while another one fits in
    first_round_s: float = 300.0  # the first round starts no provider after this
    max_rounds: int = 50
    # With fewer rounds than this after it, the first round counts too instead of being a warm-up:
    # where so few fit into the budget a step takes seconds, and warming up is no part of that.
    enough_rounds: int = 5


Round = Mapping[str, Sample]


def timed(step: Step, stopwatch: Stopwatch) -> Sample:
    """One run of a step from its starting state, with the garbage collector kept out of it."""
    step.reset()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return stopwatch(step.run)
    finally:
        if enabled:
            gc.enable()


def paired_rounds(
    steps: Mapping[str, Step],
    first_round: Round,
    plan: Plan,
    stopwatch: Stopwatch,
    now: Callable[[], float] = time.perf_counter,
) -> list[Round]:
    """Interleaved rounds of all steps, as many as the plan allows.

    Args:
        steps: what to run, by name.
        first_round: samples of a round that has been run already, with the same names.
        plan: limits.
        stopwatch: measures a step.
        now: the clock that the budget is held against.
    """
    names = list(steps)
    estimate = sum(sample.wall for sample in first_round.values())
    rounds: list[Round] = []
    start = now()
    while len(rounds) < plan.max_rounds and now() - start + estimate <= plan.budget_s:
        gc.collect()
        samples: dict[str, Sample] = {}
        for name in order(names, len(rounds)):
            samples[name] = timed(steps[name], stopwatch)
            steps[name].reset()  # or its output and gradients would crowd the next one's memory
        rounds.append(samples)
        estimate = sum(sample.wall for sample in samples.values())
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
