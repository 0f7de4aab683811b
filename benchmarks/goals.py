"""The project's goals for a layer, forward and backward, held against stored rows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.stored import COMPARED, Group, Stored, milliseconds

_SIGNS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "<=": ("≤", operator.le),
    ">=": ("≥", operator.ge),
    ">": (">", operator.gt),
}


@dataclass(frozen=True)
class Goal:
    """A bound for a number that rows of one case give, in the cases that it is meant for."""

    what: str
    sign: str  # a key of _SIGNS
    limit: float
    value: Callable[[Group], float | None]
    applies: Callable[[Group], bool] = lambda group: True
    clock: str | None = None  # of a goal for the ratio to the frozen layer

    @property
    def title(self) -> str:
        """Such as `DCFT / frozen, goal ≤ 1.10`."""
        return f"{self.what}, goal {_SIGNS[self.sign][0]} {self.limit:.2f}"

    def met(self, value: float) -> bool:
        """Whether a value is as good as it should be."""
        return _SIGNS[self.sign][1](value, self.limit)


@dataclass(frozen=True)
class Verdict:
    """A goal in a case that it is meant for; no value where it was not measured."""

    goal: Goal
    case: Group
    value: float | None

    @property
    def met(self) -> bool | None:
        """None where there is nothing to judge."""
        return None if self.value is None else self.goal.met(self.value)

    @property
    def text(self) -> str:
        """The value, and that it missed the goal where it did."""
        if self.value is None:
            return "not measured"
        shown = f"{self.value:.2f}"
        if self.met:
            return shown
        # What misses by less than is shown would read as if it had met the goal.
        return (
            f"{self.value:.4f}, missed" if float(shown) == self.goal.limit else f"{shown}, missed"
        )


def frozen_goals(gpu: bool) -> list[Goal]:
    """What a step may cost beside the frozen layer's."""
    if not gpu:
        return [Goal("DCFT / frozen", "<=", 1.10, _to_frozen("wall"), clock="wall")]
    return [
        Goal("DCFT / frozen, device", "<=", 1.10, _to_frozen("device"), _large, "device"),
        Goal("DCFT / frozen, wall", "<=", 1.25, _to_frozen("wall"), _small, "wall"),
        Goal("DCFT / frozen, CUDA graph", "<=", 1.15, _to_frozen("graph"), _small, "graph"),
    ]


def layer_goals(gpu: bool) -> list[Goal]:
    """All goals of the layer."""
    if gpu:
        peers = [
            Goal("LoRA r=8 (peft) / DCFT", ">=", 1.3, _speedup("lora_r8")),
            Goal("LoKr / DCFT", ">=", 3.0, _speedup("lokr")),
            Goal("published / DCFT", ">=", 2.0, _speedup("published")),
        ]
    else:
        peers = [
            Goal("DCFT / LoRA r=8 (peft)", "<=", 1.0, _share("lora_r8")),
            Goal("published / DCFT", ">=", 2.5, _speedup("published")),
        ]
    return [*frozen_goals(gpu), *peers, by_hand()]


def by_hand() -> Goal:
    """The goal that holds for every shape that is measured."""
    return Goal("LoRA r=8 by hand / DCFT", ">", 1.0, _speedup("lora_autograd"))


def layer_cases(stored: Stored) -> list[Group]:
    """The cases that goals are held against."""
    return stored.groups("layer", sweeps=COMPARED, direction="fwd+bwd")


def verdicts(stored: Stored) -> list[Verdict]:
    """Every goal in every case that it is meant for."""
    return [
        Verdict(goal, case, goal.value(case))
        for goal in layer_goals(stored.gpu)
        for case in layer_cases(stored)
        if goal.applies(case) and case.of("dcft") is not None
    ]


def by_hand_verdicts(stored: Stored) -> list[Verdict]:
    """DCFT against LoRA by hand at every shape of every sweep that has both."""
    goal = by_hand()
    cases = stored.groups("layer", direction="fwd+bwd")
    found = [Verdict(goal, case, goal.value(case)) for case in cases]
    return [verdict for verdict in found if verdict.value is not None]


def merge_verdicts(stored: Stored) -> list[Verdict]:
    """On a GPU, how near merging comes to the bandwidth of a copy of the weight."""
    if not stored.gpu:
        return []
    found = []
    for provider, what in (("dcft", "DCFT"), ("dcft_in_place", "DCFT, in place")):
        goal = Goal(f"copy / merge, {what}", ">=", 0.9, _copy_share(provider))
        for case in stored.groups("merge", direction="merge"):
            if case.of(provider) is not None:
                found.append(Verdict(goal, case, goal.value(case)))
    return found


def _large(group: Group) -> bool:
    T, n, m = (size or 0 for size in group.first.shape)
    return group.first.dtype != "fp32" and T >= 8192 and min(n, m) >= 4096


def _small(group: Group) -> bool:
    return group.first.dtype != "fp32" and group.first.shape == (4096, 768, 768)


def _to_frozen(clock: str) -> Callable[[Group], float | None]:
    return lambda group: group.ratio("dcft", clock)


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _speedup(peer: str) -> Callable[[Group], float | None]:
    return lambda group: _quotient(group.ratio(peer), group.ratio("dcft"))


def _share(peer: str) -> Callable[[Group], float | None]:
    return lambda group: _quotient(group.ratio("dcft"), group.ratio(peer))


def _copy_share(provider: str) -> Callable[[Group], float | None]:
    return lambda group: _quotient(milliseconds(group.of("copy")), milliseconds(group.of(provider)))
