"""Compiling for a GPU that is not there: launchers run on CPU tensors and launch nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from dcft_kernels.triton.tiles import as_architecture

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Compiled(NamedTuple):
    """A kernel that a launcher would have launched."""

    name: str  # "shrink_expand"
    kernel: Any  # triton.compiler.CompiledKernel


class _Driver:
    """What Triton asks a driver before it compiles."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._architecture]

    def get_current_device(self) -> str:
        return f"absent {self._architecture}"  # a key of Triton's caches

    def get_current_stream(self, device: object) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(architecture: str) -> Iterator[list[Compiled]]:
    """Compile for an architecture, with its tiles, what launchers would launch.

    Yields:
        The kernels, in order, filled in as launchers are called.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected unset, got 1, which compiles nothing")
    found: list[Compiled] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append(Compiled(self.__name__.removeprefix("_").removesuffix("_kernel"), kernel))

    driver: Any = triton.runtime.driver
    before = driver._active
    driver.set_active(_Driver(architecture))
    triton.JITFunction.run = compile_only
    try:
        with as_architecture(architecture):
            yield found
    finally:
        triton.JITFunction.run = run
        driver._active = before
