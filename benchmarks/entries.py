"""What every level gives to the engine: providers, and what they build for one input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from benchmarks.timing import Step

BASELINE = "frozen"
"""The provider that ratios refer to, where a level has it."""

Problem = TypeVar("Problem")


class UnavailableError(Exception):
    """A provider cannot run here, through no fault of its own; the message says why."""


class DeviceLostError(Exception):
    """A provider broke the GPU's context: nothing more can be measured by this process.

    Attributes:
        key: the provider's.
    """

    def __init__(self, key: str, cause: Exception) -> None:
        super().__init__(f"{key} broke the device: {cause}")
        self.key = key


@dataclass(frozen=True)
class Subject:
    """A provider on one input, ready to be checked and timed."""

    step: Step
    check: Callable[[], str | None]  # after a run: why its results are wrong, or None
    forward: Callable[[], Tensor] | None = None  # whose saved tensors are counted
    parameters: tuple[Tensor, ...] = ()  # what of them exists in any case
    moved_bytes: int | None = None  # this and flops: of one repeat
    flops: int | None = None
    repeats: int = 1  # how often a run does what the row is of
    compiles: bool = False  # at its first call, which must not count
    on_host: bool = False  # a run is the processor's work, which a GPU's clock knows nothing of
    graphable: bool = True  # whether `run` may be captured: what `prepare` leaves is not freed
    close: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Entry(Generic[Problem]):
    """A provider as one level measures it."""

    name: str
    label: str
    build: Callable[[Problem], Subject]
    d: int | None = None
    k: int | None = None
    stride: int | None = None
    variant: str = ""  # what tells it from others of the same name: "d4"

    @property
    def key(self) -> str:
        """A name for it alone: `dcft`, `dcft-d4`."""
        return f"{self.name}-{self.variant}" if self.variant else self.name


AnyEntry = Entry[Any]
