"""Do these benchmarks catch what they should? `python -m benchmarks.selftest [--device cuda]`.

Plants providers with a known fault on the device that is to be measured: each wrong one must fail
the gate and have no times, and one that is slower by a known time must be measured as slower by
that time. Exit status 1, and what was missed, if not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import adapters, environment
from benchmarks.adapters import AdapterKind, Candidate
from benchmarks.cases import Case
from benchmarks.entries import BASELINE
from benchmarks.levels import layer
from benchmarks.measure import Outcome, measure
from benchmarks.timing import Plan

_CASE = Case("layer", 64, 128, 128, "fp32")
_DELAY_S = 0.02
_CYCLES = 20_000_000
_WAITING = "waiting"  # a provider whose processor is slow, and whose GPU is not
# Clocks of a shared machine and of a GPU that changes its own.
_TOLERANCE = 0.5

Spoil = Callable[[Tensor, Tensor, nn.Module], Tensor]


class Planted(nn.Module):
    """A right layer with something done to its output."""

    def __init__(self, layer: nn.Module, spoil: Spoil) -> None:
        super().__init__()
        self.layer, self.spoil = layer, spoil

    def forward(self, x: Tensor) -> Tensor:
        return self.spoil(self.layer(x), x, self.layer)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 1.001 * g


def _one_element(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    y = y.clone()
    y[3, 5] = 0.0
    return y


def _not_finite(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    y = y.clone()
    y[-1, -1] = torch.nan
    return y


def _scaled_gradient(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    scaled: Tensor = _ScaledGradient.apply(y)
    return scaled


# By what is wrong: how to spoil a right DCFT layer, and how the gate's reason begins.
WRONG: dict[str, tuple[Spoil, str]] = {
    "adapter missing": (
        lambda y, x, layer: nn.functional.linear(x, layer.weight),  # type: ignore[arg-type]
        "y: error ",
    ),
    "slightly off": (lambda y, x, layer: y * 1.0001, "y: error "),
    "blocks in another order": (lambda y, x, layer: y.roll(8, dims=1), "y: error "),
    "one element": (_one_element, "y: error "),
    "not finite": (_not_finite, "y: not finite"),
    "gradient off": (_scaled_gradient, "gradient of x: error "),
    "no gradient of x": (lambda y, x, layer: layer(x.detach()), "gradient of x: missing"),
}


def planted(name: str, spoil: Spoil, of: str = "dcft") -> AdapterKind:
    """A kind of adapter whose layers are spoilt."""
    (right,) = adapters.by_name(of)

    def build(base: nn.Linear, generator: torch.Generator) -> Candidate:
        made = right.layer(base, generator)
        inside = made.dense_weight

        def dense_weight(p: Any) -> Tensor:
            own = {key.removeprefix("layer."): value for key, value in p.items()}
            return own[made.weight] if inside is None else inside(own)

        return Candidate(
            Planted(made.layer, spoil), f"layer.{made.weight}", f"layer.{made.bias}", dense_weight
        )

    return AdapterKind(name, name, build)


def _delayed(device: torch.device) -> Spoil:
    def spoil(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        _wait(device)
        return y

    return spoil


def _wait(device: torch.device) -> None:
    """Take the known time: a GPU's own, in its stream, or the processor's."""
    if device.type == "cuda":
        sleep: Any = torch.cuda._sleep
        sleep(_CYCLES)
    else:
        time.sleep(_DELAY_S)


def delay_ms(device: torch.device) -> float:
    """How long `_wait` takes, by the clock that the rows' `milliseconds` are of."""
    if device.type != "cuda":
        return _DELAY_S * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _wait(device)
    begin.record()
    _wait(device)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def run(device: torch.device) -> dict[str, Outcome]:
    """Measure the frozen layer, a right one, and everything planted."""
    kinds = [
        *adapters.by_name(BASELINE, "dcft"),
        planted("slow", _delayed(device), BASELINE),
        *(planted(name, spoil) for name, (spoil, _) in WRONG.items()),
    ]
    if device.type == "cuda":
        kinds.append(planted(_WAITING, _delayed(torch.device("cpu")), BASELINE))
    outcomes = measure(
        _CASE,
        layer.entries_of(kinds),
        lambda: layer.LayerProblem(_CASE, device),
        environment.describe(device.type),
        Plan(budget_s=2.0, max_rounds=9, extras=False),
        device=device,
    )
    return {outcome.row.provider: outcome for outcome in outcomes}


def faults(outcomes: dict[str, Outcome], delay: float) -> list[str]:
    """What the benchmarks did not catch, or held against a provider that is right."""
    found = []
    for name in (BASELINE, "dcft", "slow"):
        row = outcomes[name].row
        if row.gate != "passed" or not row.milliseconds:
            found.append(f"{name} is right and has no time: {row.error}")
    for name, (_, reason) in WRONG.items():
        row = outcomes[name].row
        if row.gate != "failed" or not (row.error or "").startswith(reason):
            found.append(f"{name!r} was not caught: {row.error}")
        if row.wall_ms_p50 is not None:
            found.append(f"{name!r} is wrong and was timed")
    if _WAITING in outcomes:
        row = outcomes[_WAITING].row
        if row.device_ms_p50 is None or row.device_ms_p50 > _TOLERANCE * _DELAY_S * 1e3:
            found.append(f"waiting for the processor counts as the GPU's time: {row.device_ms_p50}")
    slow, frozen = outcomes["slow"].row.milliseconds, outcomes[BASELINE].row.milliseconds
    if slow and frozen and abs(slow - frozen - delay) > _TOLERANCE * delay:
        found.append(f"slower by {delay:.1f} ms was measured as {slow - frozen:.1f} ms")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selftest", description=__doc__)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU that PyTorch finds, got cuda and there is none")
    device = torch.device(options.device)
    delay = delay_ms(device)
    missed = faults(run(device), delay)
    for fault in missed:
        print(fault, file=sys.stderr)
    if not missed:
        print(f"{len(WRONG)} wrong providers were caught, and one slower by {delay:.1f} ms")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
