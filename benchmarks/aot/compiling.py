"""Compiling for a GPU that is not there, and what the binaries need."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.aot.binaries import matrix_products, read_binary
from benchmarks.aot.cases import CASES
from dcft_kernels.triton.tiles import as_architecture

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The most shared memory (LDS) of a block, in KiB.
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}


class _Driver:
    """What Triton asks a driver before it compiles."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPU_TARGETS[self._architecture]

    def get_current_device(self) -> str:
        return f"absent {self._architecture}"  # a key of Triton's caches

    def get_current_stream(self, device: object) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(architecture: str) -> Iterator[list[tuple[str, Any]]]:
    """Compile for an architecture, with its tiles, what launchers would launch.

    Yields:
        Names and compiled kernels, filled in as launchers are called with CPU tensors.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected unset, got 1, which compiles nothing")
    compiled: list[tuple[str, Any]] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__.removeprefix("_").removesuffix("_kernel"), kernel))

    driver: Any = triton.runtime.driver
    before = driver._active
    driver.set_active(_Driver(architecture))
    triton.JITFunction.run = compile_only
    try:
        with as_architecture(architecture):
            yield compiled
    finally:
        triton.JITFunction.run = run
        driver._active = before


class Job(NamedTuple):
    """A case for an architecture and a dtype."""

    case: int  # index in CASES
    architecture: str
    dtype: str

    @property
    def name(self) -> str:
        case = CASES[self.case]
        return f"{self.architecture} {case.launcher} {self.dtype} {case.name}"


def jobs(only: str = "") -> list[Job]:
    """All jobs whose name matches a regular expression."""
    found = [
        Job(number, architecture, dtype)
        for architecture in GPU_TARGETS
        for number, case in enumerate(CASES)
        for dtype in case.dtypes
        if not (case.tf32 and architecture.startswith("gfx"))
    ]
    return [job for job in found if re.search(only, job.name)]


class Record(NamedTuple):
    """A row of the table: one binary."""

    architecture: str
    kernel: str
    dtype: str
    case: str
    registers: int
    spills: int
    shared_bytes: int
    products: int  # that a matrix unit can compute
    matrix_instructions: int
    triton: str

    def failures(self) -> list[str]:
        """What a binary must not need."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes with {self.registers} registers")
        limit = SHARED_KIB[self.architecture] * 1024
        if self.shared_bytes > limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, of {limit}")
        if self.products and not self.matrix_instructions:
            found.append(f"computes {self.products} products without matrix instructions")
        return [f"{' '.join(self[:4])}: {text}" for text in found]


def compile_job(job: Job) -> list[Record]:
    """Compile what one call of a launcher launches."""
    case = CASES[job.case]
    with compiling_for(job.architecture) as compiled:
        case.run(job.dtype)
    records = []
    for name, kernel in {kernel.hash: (name, kernel) for name, kernel in compiled}.values():
        binary = read_binary(kernel, job.architecture)
        records.append(
            Record(
                job.architecture,
                name,
                job.dtype,
                case.name,
                binary.registers,
                binary.spills,
                kernel.metadata.shared + binary.static_shared_bytes,
                matrix_products(str(kernel.asm["ttir"])),
                binary.matrix_instructions,
                triton.__version__,
            )
        )
    return records
