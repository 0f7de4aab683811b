"""The layer level: forward plus backward of one linear layer, every provider on the same input."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.cases import Case, Problem
from benchmarks.environment import Environment
from benchmarks.providers import BASELINE, Candidate, Provider
from benchmarks.rows import Row
from benchmarks.saved_tensors import saved_bytes
from benchmarks.timing import (
    Plan,
    Round,
    Sample,
    Stopwatch,
    median_ratio,
    paired_rounds,
    percentiles,
    stopwatch_for,
    timed,
)


@dataclass(frozen=True)
class Outcome:
    """A row and the samples behind it, none where the provider was not timed."""

    row: Row
    samples: Sequence[Sample] = ()
    skipped: bool = False  # the provider could not run here, which is no fault of it


class TrainingStep:
    """Forward and backward of a candidate's layer, with the gradients set to None before."""

    def __init__(self, problem: Problem, candidate: Candidate) -> None:
        self.problem = problem
        self.layer = candidate.layer
        self.trained = candidate.trained()
        self.y: Tensor | None = None

    def reset(self) -> None:
        self.y = None
        for tensor in (self.problem.x, *self.trained.values()):
            tensor.grad = None

    def run(self) -> None:
        self.y = self.layer(self.problem.x)
        self.y.backward(self.problem.g)

    def result(self) -> gate.StepResult:
        assert self.y is not None
        gradients = {name: p.grad for name, p in self.trained.items()}
        return gate.StepResult(self.y.detach(), self.problem.x.grad, gradients)


@dataclass
class _Contender:
    """A provider on its way from being built to being timed."""

    provider: Provider
    row: Row
    step: TrainingStep | None = None
    first: Sample | None = None
    skipped: bool = False
    samples: list[Sample] = field(default_factory=list)

    def fail(self, error: str, *, gate_state: str | None = None, skipped: bool = False) -> None:
        self.row = replace(self.row, error=error, gate=gate_state)
        self.step, self.first, self.skipped = None, None, skipped


def measure(
    case: Case,
    providers: Sequence[Provider],
    environment: Environment,
    plan: Plan,
    *,
    device: torch.device | None = None,
    stopwatch: Stopwatch | None = None,
) -> list[Outcome]:
    """Check, then time, the providers on one case; one outcome each, in the same order.

    The first round runs every provider once, timed, and its results go through the gate: what is
    checked is what is timed. A provider that fails in any way has a row that says so and no times.
    """
    device = device or torch.device("cpu")
    stopwatch = stopwatch or stopwatch_for(device)
    problem = Problem(case, device)
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    contenders = [
        _Contender(provider, _blank_row(case, provider, environment, started))
        for provider in providers
    ]
    spent = 0.0
    for contender in contenders:
        if spent > plan.first_round_s:
            contender.fail(
                f"not run: the providers before it took {spent:.0f} s for one step each",
                skipped=True,
            )
            continue
        _first_step(contender, problem, stopwatch)
        spent += contender.first.wall if contender.first else 0.0

    ready = {c.provider.name: c for c in contenders if c.step is not None}
    steps = {name: c.step for name, c in ready.items() if c.step is not None}
    first_round = {name: c.first for name, c in ready.items() if c.first is not None}
    for samples in paired_rounds(steps, first_round, plan, stopwatch) if steps else []:
        _collect(ready, samples)
    baseline = ready[BASELINE].samples if BASELINE in ready else []
    for contender in ready.values():
        contender.row = _with_times(contender.row, contender.samples, baseline)
    return [Outcome(c.row, c.samples, c.skipped) for c in contenders]


def _first_step(contender: _Contender, problem: Problem, stopwatch: Stopwatch) -> None:
    """Build a provider, count what it saves, run its first step and put that through the gate."""
    try:
        candidate = contender.provider.build(problem)
    except ImportError as error:
        contender.fail(f"cannot run: {error}", skipped=True)
        return
    except Exception as error:
        contender.fail(_one_line(error))
        return
    step = TrainingStep(problem, candidate)
    on_gpu = problem.device.type == "cuda"
    try:
        saved = saved_bytes(lambda: candidate.layer(problem.x), candidate.layer.parameters())
        if on_gpu:
            before = torch.cuda.memory_allocated(problem.device)
            torch.cuda.reset_peak_memory_stats(problem.device)
        contender.first = timed(step, stopwatch)
        peak = torch.cuda.max_memory_allocated(problem.device) - before if on_gpu else None
        reason = gate.check(problem, candidate, step.result())
    except Exception as error:
        contender.fail(_one_line(error))
        return
    finally:
        step.reset()
    if reason is not None:
        contender.fail(reason, gate_state="failed")
        return
    contender.step = step
    contender.row = replace(contender.row, gate="passed", saved_bytes=saved, peak_bytes=peak)


def _collect(ready: dict[str, _Contender], samples: Round) -> None:
    for name, sample in samples.items():
        ready[name].samples.append(sample)


def _with_times(row: Row, samples: Sequence[Sample], baseline: Sequence[Sample]) -> Row:
    """The row with percentiles and ratios; ratios only where the baseline was timed as well."""
    wall = [s.wall for s in samples]
    p20, p50, p80 = percentiles(wall)
    row = replace(row, rounds=len(samples), wall_ms_p20=p20, wall_ms_p50=p50, wall_ms_p80=p80)
    if baseline:
        row = replace(row, ratio_to_frozen_wall=median_ratio(wall, [s.wall for s in baseline]))
    on_device = [s.device for s in samples if s.device is not None]
    if on_device:
        p20, p50, p80 = percentiles(on_device)
        row = replace(row, device_ms_p20=p20, device_ms_p50=p50, device_ms_p80=p80)
        frozen = [s.device for s in baseline if s.device is not None]
        if frozen:
            row = replace(row, ratio_to_frozen_device=median_ratio(on_device, frozen))
    return row


def _blank_row(case: Case, provider: Provider, environment: Environment, started: str) -> Row:
    return Row(
        provider=provider.name,
        level="layer",
        model=None,
        direction="fwd+bwd",
        dtype=case.dtype,
        T=case.T,
        n=case.n,
        m=case.m,
        d=provider.d,
        k=provider.k,
        stride=provider.stride,
        device=environment.device,
        torch=environment.torch,
        triton=environment.triton,
        peft=environment.peft,
        commit=environment.commit,
        time=started,
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
