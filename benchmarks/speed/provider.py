"""The interface between levels and the timing engine: providers and their workloads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.speed.timing import Step

BASELINE = "frozen"
"""The provider that ratios refer to, at levels that have it."""


class UnavailableError(Exception):
    """A provider cannot run on this machine; the message says why."""


def why_unavailable(error: Exception) -> str | None:
    """Why a provider does not run here, by the error that it raised; None if it failed."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, (UnavailableError, ImportError)):
        return f"cannot run: {line}"
    # What DCFTLinear says of a strategy that does not take a case.
    return line if re.match(r"strategy=\S+ cannot run: ", line) else None


@dataclass(frozen=True)
class Workload:
    """A provider built for one input, ready to be checked and timed."""

    step: Step
    check: Callable[[], str | None]  # after a run: why its results are wrong, or None
    forward: Callable[[], Tensor] | None = None  # whose saved tensors are counted
    parameters: tuple[Tensor, ...] = ()  # not counted among them
    moved_bytes: int | None = None  # counted: each tensor read or written once
    flops: int | None = None  # counted: a multiply-add is two
    compiles: bool = False  # at its first call, which must not be timed
    graphable: bool = True  # whether `run` can be captured as a CUDA graph


@dataclass(frozen=True)
class Provider:
    """One way to compute what a level measures."""

    name: str
    build: Callable[[Any], Workload]  # from the level's problem
    d: int | None = None
    k: int | None = None
    stride: int | None = None
    variant: str = ""  # distinguishes providers of one name: "d4"

    @property
    def key(self) -> str:
        """A unique name: `dcft`, `dcft-d4`."""
        return f"{self.name}-{self.variant}" if self.variant else self.name
