"""Compiling for a GPU that is not there, and what the binaries need."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.aot.binaries import matrix_products, products_in_flight, read_binary
from benchmarks.aot.cases import CASES, DTYPES, OF_ENTRIES
from dcft_kernels.triton.launch import Launch
from dcft_kernels.triton.tiles import Tile, as_architecture, entries

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Multiprocessor(NamedTuple):
    """What programs on a multiprocessor (AMD: compute unit) share."""

    registers: int
    shared_kib: int
    reserved_kib: int  # of every program's share, for the system: a program has the rest at most

    def holds(self, threads: int, registers: int, shared_bytes: int) -> int:
        """How many programs fit; registers of a thread are allocated by eights."""
        by_registers = self.registers // (-(-registers // 8) * 8 * threads)
        share = shared_bytes + self.reserved_kib * 1024
        return min(by_registers, self.shared_kib * 1024 // share) if share else by_registers


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(1 << 16, 164, 1),
    "sm_89": Multiprocessor(1 << 16, 100, 1),
    "sm_90": Multiprocessor(1 << 16, 228, 1),
    "sm_100": Multiprocessor(1 << 16, 228, 1),
    "gfx942": Multiprocessor(1 << 17, 64, 0),
}

# Kernels whose loops only load and multiply: while one product runs, the next can be issued. Those
# of `row_block` are not: they compute operands in registers, or results from a product's own.
_KEEP_PRODUCTS_IN_FLIGHT = ("gemm",)

# Kernels whose tiles may count on more programs than fit. `backward` halves rows and warps where
# tokens are few, and then they do fit; otherwise those that do not fit wait, at no cost that shows
# between tiles with 1, 2 and 3 programs in results/nvidia-h200/tune.jsonl.
_MAY_COUNT_ON_MORE = ("backward",)


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


class Compiled(NamedTuple):
    """A kernel that a launcher would have launched."""

    name: str
    kernel: Any
    programs: int  # that its tile counts on per multiprocessor; 0: any number


@contextlib.contextmanager
def compiling_for(architecture: str) -> Iterator[list[Compiled]]:
    """Compile for an architecture, with its tiles, what launchers would launch.

    Yields:
        What was compiled, filled in as launchers are called with CPU tensors.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected unset, got 1, which compiles nothing")
    compiled: list[Compiled] = []
    programs: dict[str, int] = {}  # by kernel, of the tile that its last launch was prepared with
    run, prepare = triton.JITFunction.run, Launch.__init__

    def prepare_seen(
        self: Any, kernel: Any, device: Any, arguments: Any, tile: Tile, **rest: Any
    ) -> None:
        programs[kernel.__name__] = tile.programs
        prepare(self, kernel, device, arguments, tile, **rest)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        name = self.__name__.removeprefix("_").removesuffix("_kernel")
        compiled.append(Compiled(name, kernel, programs[self.__name__]))

    driver: Any = triton.runtime.driver
    before = driver._active
    driver.set_active(_Driver(architecture))
    try:
        with (
            mock.patch.object(triton.JITFunction, "run", compile_only),
            mock.patch.object(Launch, "__init__", prepare_seen),
            as_architecture(architecture),
        ):
            yield compiled
    finally:
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
        and entries(architecture, case.launcher, DTYPES[dtype].itemsize)
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
    warps: int
    programs: int  # see `Compiled`
    products: int  # that a matrix unit can compute
    matrix_instructions: int
    in_flight: int | None  # see `Binary`; of kernels that are to keep products in flight
    triton: str

    def failures(self) -> list[str]:
        """What a binary must not need."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes with {self.registers} registers")
        multiprocessor = MULTIPROCESSORS[self.architecture]
        limit = (multiprocessor.shared_kib - multiprocessor.reserved_kib) * 1024
        if self.shared_bytes > limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, of {limit}")
        threads = self.warps * GPU_TARGETS[self.architecture].warp_size
        fitting = multiprocessor.holds(threads, self.registers, self.shared_bytes)
        claimed = self.case.startswith(OF_ENTRIES) and self.kernel not in _MAY_COUNT_ON_MORE
        if claimed and fitting < self.programs:
            found.append(f"fits {fitting} times, and its tile counts on {self.programs}")
        if self.products and not self.matrix_instructions:
            found.append(f"computes {self.products} products without matrix instructions")
        if self.kernel in _KEEP_PRODUCTS_IN_FLIGHT and not self.in_flight:
            found.append("waits for every product before the next")
        return [f"{' '.join(self[:4])}: {text}" for text in found]


def compile_job(job: Job) -> list[Record]:
    """Compile what one call of a launcher launches."""
    case = CASES[job.case]
    with compiling_for(job.architecture) as compiled:
        case.run(job.dtype)
    records = []
    for name, kernel, programs in {each.kernel.hash: each for each in compiled}.values():
        binary = read_binary(kernel, job.architecture)
        in_flight = None
        if name in _KEEP_PRODUCTS_IN_FLIGHT:
            in_flight = min(products_in_flight(kernel.asm["ttgir"]) or 0, binary.in_flight or 0)
        records.append(
            Record(
                job.architecture,
                name,
                job.dtype,
                case.name,
                binary.registers,
                binary.spills,
                kernel.metadata.shared + binary.static_shared_bytes,
                kernel.metadata.num_warps,
                programs,
                # Gluon kernels begin as TTGIR.
                matrix_products(str(kernel.asm.get("ttir") or kernel.asm["ttgir"])),
                binary.matrix_instructions,
                in_flight,
                triton.__version__,
            )
        )
    return records
