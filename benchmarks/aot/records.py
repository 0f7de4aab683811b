"""What one binary needs, and what it must not need."""

from __future__ import annotations

import re
from typing import NamedTuple

import triton

from benchmarks.aot.binaries import matrix_products, read_binary
from benchmarks.aot.cases import CASES
from benchmarks.aot.compiling import TARGETS, Compiled, compiling_for

# The most shared memory (LDS) of a block, in bytes.
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}


class Record(NamedTuple):
    """A row of the table: one binary."""

    architecture: str
    kernel: str
    dtype: str
    adapter_dtype: str
    case: str
    registers: int
    spills: int
    shared_bytes: int
    products: int  # that a matrix unit can compute
    matrix_instructions: int
    triton: str

    @property
    def name(self) -> str:
        return " ".join(self[:5])


class Job(NamedTuple):
    """A case for an architecture and dtypes."""

    case: int  # index in CASES
    architecture: str
    dtype: str
    adapter_dtype: str

    @property
    def name(self) -> str:
        case = CASES[self.case]
        return f"{self.architecture} {case.launcher} {self.dtype} {self.adapter_dtype} {case.name}"


def jobs(only: str = "") -> list[Job]:
    """All jobs whose name matches a regular expression."""
    found = [
        Job(number, architecture, dtype, adapter_dtype)
        for architecture in TARGETS
        for number, case in enumerate(CASES)
        for dtype in case.dtypes
        for adapter_dtype in case.adapter_dtypes
        if not (case.tf32 and architecture.startswith("gfx"))
    ]
    return [job for job in found if re.search(only, job.name)]


def compile_job(job: Job) -> list[Record]:
    """Compile what one call of a launcher launches."""
    case = CASES[job.case]
    with compiling_for(job.architecture) as compiled:
        case.run(job.dtype, job.adapter_dtype)
    unique = {each.kernel.hash: each for each in compiled}
    return [_record(job, each) for each in unique.values()]


def _record(job: Job, compiled: Compiled) -> Record:
    kernel = compiled.kernel
    binary = read_binary(kernel, job.architecture)
    return Record(
        job.architecture,
        compiled.name,
        job.dtype,
        job.adapter_dtype,
        CASES[job.case].name,
        binary.registers,
        binary.spills,
        kernel.metadata.shared + binary.static_shared_bytes,
        matrix_products(str(kernel.asm["ttir"])),
        binary.matrix_instructions,
        triton.__version__,
    )


def failures(record: Record) -> list[str]:
    """What is wrong with a binary."""
    found = []
    if record.spills:
        found.append(f"spills {record.spills} bytes with {record.registers} registers")
    limit = SHARED_LIMITS[record.architecture]
    if record.shared_bytes > limit:
        found.append(f"needs {record.shared_bytes} bytes of shared memory, of {limit}")
    if record.products and not record.matrix_instructions:
        found.append(f"computes {record.products} products without matrix instructions")
    return found
