"""A GPU that is not there, as far as Triton can tell: it compiles for it and launches nothing.

`dropping` lets the whole way of a launch be run, timed and looked at on any machine, but for the
last step of it, which is the driver's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from dcft_kernels import dispatch
from dcft_kernels import triton as dcft_triton
from dcft_kernels.triton.launching import forget
from dcft_kernels.triton.tiles import as_architecture

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# What any of these has, for a check that is not the point here.
_SHARED_BYTES = 1 << 20


class AbsentDriver:
    """As much of a driver as Triton asks before it compiles."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        """The target to compile for."""
        return TARGETS[self._architecture]

    def get_current_device(self) -> str:
        """The key of Triton's caches: no real device's."""
        return f"absent {self._architecture}"

    def get_current_stream(self, device: object) -> int:
        """The default stream."""
        return 0


class Dropped(NamedTuple):
    """A launch that would have been."""

    kernel: int  # which of the compiled ones
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]  # as the launcher got them: tensors, or pointers


# Triton keeps what it compiled, and with it the launcher of its first driver.
_handles = itertools.count(1)
_recorders: list[Callable[[Dropped], object]] = []


class _DroppingDriver(AbsentDriver):
    """A driver whose launches are handed on to whoever records them, and forgotten."""

    def __init__(self, architecture: str) -> None:
        super().__init__(architecture)
        self.utils = self

    def get_current_device(self) -> str:
        """Another key than that of drivers that compile nothing, and want to be asked to."""
        return f"dropping {self._architecture}"

    def load_binary(self, name: str, binary: object, shared: int, device: object) -> Any:
        """A handle of its own for each kernel, and registers, spills and threads that fit."""
        handle = next(_handles)
        return handle, handle, 32, 0, 1024

    def get_device_properties(self, device: object) -> dict[str, int]:
        """What Triton checks a kernel against."""
        return {"max_shared_mem": _SHARED_BYTES}

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """What stands in for the compiled launcher; it calls hooks, as that does."""

        def launch(
            x: int, y: int, z: int, stream: int, function: int, packed: object,
            metadata: object, enter_hook: Any, exit_hook: Any, *arguments: Any,
        ) -> None:  # fmt: skip
            if enter_hook is not None:
                enter_hook(metadata)
            for record in _recorders:
                record(Dropped(function, (x, y, z), arguments))
            if exit_hook is not None:
                exit_hook(metadata)

        return launch


@contextlib.contextmanager
def driver_of(driver: AbsentDriver, architecture: str) -> Iterator[None]:
    """Have Triton use a driver, and kernels the tiles of an architecture.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected unset, got 1, under which nothing compiles")
    config: Any = triton.runtime.driver
    before = config._active
    forget()
    config.set_active(driver)
    try:
        with as_architecture(architecture):
            yield
    finally:
        config._active = before
        forget()


@contextlib.contextmanager
def standing_in(driver: AbsentDriver, architecture: str) -> Iterator[None]:
    """Take CPU tensors for such a GPU's: kernels are compiled, and launched on the driver."""

    def none(device: torch.device) -> None:
        return None

    before = dcft_triton.why_unavailable
    dispatch.forget()
    dcft_triton.why_unavailable = none
    try:
        with driver_of(driver, architecture):
            yield
    finally:
        dcft_triton.why_unavailable = before
        dispatch.forget()


@contextlib.contextmanager
def dropping(
    architecture: str, record: Callable[[Dropped], object] | None = None
) -> Iterator[None]:
    """`standing_in` with launches that are dropped: what kernels write to holds what it held.

    Args:
        architecture: one of `TARGETS`.
        record: told of every launch.
    """
    recorders = [] if record is None else [record]
    _recorders.extend(recorders)
    try:
        with standing_in(_DroppingDriver(architecture), architecture):
            yield
    finally:
        for each in recorders:
            _recorders.remove(each)
