"""What the Triton kernels need of a GPU, read from their binaries, compiled where there is no GPU.

    python -m benchmarks.aot            # compile what ships, write aot_resources.csv, print it
    python -m benchmarks.aot --only 'sm_90 backward'

Nothing is described twice: the launchers themselves run, on CPU tensors and with the tiles of the
architecture that is asked for, while `recording` stands in for the driver. Triton specialises the
launch as it would on a GPU and hands over what it is about to compile; nothing is launched.

Every variant is then compiled for its architecture, and its binary is read:

- Spills: local memory and the stack, in bytes or in instructions that reach them; on AMD, spilled
  vector registers or bytes of scratch. Scalar registers go to lanes of vector registers there, not
  to memory: the table counts these apart (`lane_spills`), and they are no failure.
- Shared memory: what Triton allocates and what is static, but not the KiB that every block has to
  leave to the system from sm_90 on, which the limits below do not count either.
- Matrix instructions, which a kernel needs if it multiplies 16-bit tokens (or tf32). Products of
  float32 run on ordinary instructions on NVIDIA GPUs.
- Products in flight. On sm_90 a product runs on while its loop goes on to load. Where a tile is an
  operand of such a product and goes to registers as well, Triton 3.7 gives it one buffer too few:
  the load after next writes over what the product still reads. No loop here may leave one running.
- Wide loads. Loads of tokens (`TOKENS`) are found in Triton's IR by the argument that their
  pointer comes from; the line of source that they stand on leads to their instructions. A variant
  whose windows are contiguous and whose tensors are aligned to 16 bytes must load at least 128 bits
  with every one of these instructions. Factors, `U`, bias and what is added in an epilogue, whose
  layout the matrix unit dictates, are exempt.

A row's fingerprint covers the source of the kernel and of all that it calls, but not comments and
docstrings, and everything the launch was specialised for. `tests/test_aot.py` compares the stored
fingerprints, so a kernel or a tile that changed without its row fails there.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from benchmarks.absent_gpu import TARGETS, AbsentDriver, driver_of
from dcft_kernels.adapter import Adapter
from dcft_kernels.cost_model import ranks_of_a_launch
from dcft_kernels.geometry import Geometry, Pair, Side
from dcft_kernels.triton.backward import backward
from dcft_kernels.triton.expand import expand, expand_backward
from dcft_kernels.triton.fused_backward import fused_backward
from dcft_kernels.triton.fused_linear import fused_linear
from dcft_kernels.triton.layout import layout_of
from dcft_kernels.triton.ranks import slices
from dcft_kernels.triton.shrink_expand import shrink_expand
from dcft_kernels.triton.tiles import KERNELS, find, lookup

RESULTS = Path(__file__).with_name("results") / "aot_resources.csv"

# Most bytes of shared memory (LDS) that a block can ask for.
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}

# Columns of tensor memory, which sm_100 has.
TENSOR_MEMORY_LIMIT = 512

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Kernel arguments that point to the large tensors, which must be loaded 128 bits at a time.
TOKENS = {
    "_shrink_expand_kernel": {"x_ptr"},
    "_backward_kernel": {"g_ptr", "x_ptr"},
    "_fused_linear_kernel": {"z_ptr", "w_ptr"},
    "_fused_backward_kernel": {"g_ptr", "w_ptr", "x_ptr"},
    "_expand_kernel": {"weight_ptr"},
    "_expand_backward_kernel": {"g_ptr"},
}


# Divisible by 16, as sizes of models are; no two alike.
TOKEN_COUNT, IN_FEATURES, OUT_FEATURES = 256, 1024, 2048


class Setting(NamedTuple):
    """What a case is launched with."""

    geometry: Geometry
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool = False
    tokens: int = TOKEN_COUNT

    @property
    def adapter(self) -> Adapter:
        geometry, dtype = self.geometry, self.adapter_dtype
        return Adapter(
            torch.empty(geometry.shape_A, dtype=dtype),
            torch.empty(geometry.shape_B, dtype=dtype),
            torch.empty(geometry.shape_C, dtype=dtype),
            1.5,
            geometry,
            0.1 if self.dropout else 0.0,
            torch.tensor(0) if self.dropout else None,
        )

    def tensor(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    @property
    def x(self) -> Tensor:
        return self.tensor(self.tokens, self.geometry.inputs.size)

    @property
    def y(self) -> Tensor:
        return self.tensor(self.tokens, self.geometry.outputs.size)

    @property
    def u(self) -> Tensor:
        return self.tensor(self.tokens, self.geometry.rank * self.geometry.inputs.width)

    @property
    def bias(self) -> Tensor:
        return self.tensor(self.geometry.outputs.size)

    @property
    def weight(self) -> Tensor:
        return self.tensor(self.geometry.outputs.size, self.geometry.inputs.size)


class Case(NamedTuple):
    """One way to launch a kernel, for every architecture and dtype."""

    kernel: str  # of tiles.KERNELS
    name: str
    geometry: Geometry
    launch: Callable[[Setting], object]
    dropout: bool = False
    tf32: bool = False
    dtypes: tuple[str, ...] = tuple(DTYPES)
    tokens: int = TOKEN_COUNT
    extreme: bool = False  # right, but beyond what the tiles are made for: spills are recorded

    @property
    def alignable(self) -> bool:
        """Whether a row of tokens is contiguous windows, so that 16 bytes are one piece of it."""
        return all(_is_contiguous(side) for side in (self.geometry.inputs, self.geometry.outputs))

    def runs_on(self, architecture: str, dtype: str) -> bool:
        """Whether there is such a variant; tf32 is a matter of NVIDIA GPUs.

        The fused kernels take no adapter that has to be sliced, and the backward one what there
        are tiles for. In float16, whose instructions are those of bfloat16 but for a letter, every
        tile is compiled once.
        """
        most = ranks_of_a_launch(self.geometry, DTYPES[dtype].itemsize)
        if dtype == "fp16" and self.name.removeprefix("gx-") not in (*_COLUMNS, "stochastic"):
            return False
        fits = self.kernel not in _FUSED or self.geometry.rank <= most
        columns = layout_of(self.geometry).columns
        if find(architecture, self.kernel, DTYPES[dtype].itemsize, columns) is None:
            return False
        return fits and dtype in self.dtypes and (not self.tf32 or architecture.startswith("sm_"))

    def adapter_dtypes(self, dtype: str) -> list[str]:
        """Adapters are float32; in the first case of a kernel also of the tokens' dtype."""
        first = self.name == FIRST and dtype != "fp32"
        return ["fp32", dtype] if first else ["fp32"]


def _is_contiguous(side: Side) -> bool:
    return side.width == side.stride and side.width & (side.width - 1) == 0


FIRST = "columns16"


def _geometry(width: int = 8, rank: int = 1, stride: Pair | None = None) -> Geometry:
    return Geometry.build(IN_FEATURES, OUT_FEATURES, rank, (width, width), stride or (width, width))


# One for each number of columns in the table: see layout.Layout.columns.
_COLUMNS = {
    FIRST: _geometry(),
    "columns32": _geometry(rank=4),
    "columns64": _geometry(rank=8),
    "columns128": _geometry(rank=16),
    "sliced": _geometry(width=12, rank=10),  # more columns than a launch holds
}
_OVERLAP = _geometry(stride=(2, 2))


def _forward(s: Setting) -> None:
    shrink_expand(s.x, s.adapter, u=s.u, bias=s.bias, y=s.y)


def _forward_update(s: Setting) -> None:
    shrink_expand(s.x, s.adapter, u=s.u, base=s.y, y=s.y)


def _forward_shrink(s: Setting) -> None:
    shrink_expand(s.x, s.adapter, u=s.u)


def _forward_expand(s: Setting) -> None:
    shrink_expand(None, s.adapter, u=s.u, bias=s.bias, y=s.y)


def _backward(needs: str, gx: bool) -> Callable[[Setting], object]:
    def launch(s: Setting) -> object:
        return backward(
            s.adapter,
            g=s.y,
            x=s.x if "A" in needs else None,
            u=s.u if "B" in needs or "C" in needs else None,
            gx=s.x if gx else None,
            needs_A="A" in needs,
            needs_B="B" in needs,
            needs_C="C" in needs,
        )

    return launch


def _backward_to_ub(s: Setting) -> object:
    return backward(s.adapter, g=s.y, u=s.u, ub=s.u, needs_B=True, needs_C=True)


def _backward_from_ub(s: Setting) -> object:
    return backward(s.adapter, x=s.x, ub=s.u, gx=s.x, needs_A=True)


def _fused(s: Setting) -> None:
    fused_linear(s.x, s.weight, s.adapter, s.y, bias=s.bias, u=s.u)


def _fused_gx(s: Setting) -> None:
    fused_linear(s.y, s.weight, s.adapter, s.x, grad_input=True)


def _fused_backward(needs: str) -> Callable[[Setting], object]:
    def launch(s: Setting) -> object:
        return fused_backward(
            s.y,
            s.x if "A" in needs else None,
            s.u if "B" in needs or "C" in needs else None,
            s.weight,
            s.adapter,
            s.x,
            needs_A="A" in needs,
            needs_B="B" in needs,
            needs_C="C" in needs,
        )

    return launch


def _expand(s: Setting) -> None:
    weight = s.weight
    expand(s.adapter, out=weight, weight=weight)


def _expand_delta(s: Setting) -> None:
    expand(s.adapter, out=s.weight)


def _expand_stochastic(s: Setting) -> None:
    weight = s.weight
    expand(s.adapter, out=weight, weight=weight, seed=torch.tensor(0))


def _expand_backward(needs: str) -> Callable[[Setting], object]:
    def launch(s: Setting) -> object:
        return expand_backward(s.weight, s.adapter, "A" in needs, "B" in needs, "C" in needs)

    return launch


_EXTREMES = {
    "width1-rank128": _geometry(1, rank=128),
    "width16-rank8": _geometry(16, rank=8),
    "width64": _geometry(64),
    "width64-overlap": _geometry(64, stride=(16, 16)),
}

# The launchers of a layer's passes, and how their cases' names begin.
_LAYERS = (
    ("shrink_expand", _forward, ""),
    ("backward", _backward("ABC", gx=True), ""),
    ("fused_linear", _fused, ""),
    ("fused_linear", _fused_gx, "gx-"),
    ("fused_backward", _fused_backward("ABC"), ""),
)
# Kernels that compute the base layer's product as well.
_FUSED = ("fused_linear", "fused_backward")


def _cases() -> Iterator[Case]:
    main = _COLUMNS[FIRST]
    for kernel, launch, prefix in _LAYERS:
        for name, geometry in _COLUMNS.items():
            yield Case(kernel, prefix + name, geometry, launch)
        yield Case(kernel, prefix + "dropout", main, launch, dropout=True)
        yield Case(kernel, prefix + "tf32", main, launch, tf32=True, dtypes=("fp32",))
    for kernel, launch in (("expand", _expand), ("expand_backward", _expand_backward("ABC"))):
        for name, geometry in _COLUMNS.items():
            yield Case(kernel, name, geometry, launch)
        yield Case(kernel, "overlap", _OVERLAP, launch)
    yield Case("expand", "delta", main, _expand_delta)
    yield Case("expand", "stochastic", main, _expand_stochastic, dtypes=("bf16", "fp16"))
    for needs in "ABC":
        yield Case("expand_backward", f"needs-{needs}", main, _expand_backward(needs))
    # Other kernel sizes that the paper tries, and those farthest from it.
    for kernel, launch, prefix in _LAYERS:
        for width in (2, 4, 6, 12, 16):
            geometry = _geometry(width)
            padded = kernel in _FUSED and not _is_contiguous(geometry.inputs)
            yield Case(kernel, f"{prefix}width{width}", geometry, launch, extreme=padded)
        for name, geometry in _EXTREMES.items():
            if kernel in _FUSED and name.endswith("overlap"):
                continue  # what is contracted must not overlap
            yield Case(kernel, prefix + name, geometry, launch, dtypes=("bf16",), extreme=True)
        widest = _COLUMNS["columns128"]
        name = prefix + "columns128-dropout"
        yield Case(kernel, name, widest, launch, dropout=True, dtypes=("bf16",), extreme=True)
    # Fewer rows a program where there are few tokens: half as many, and the fewest.
    for name, tokens in (("tokens64", 64), ("tokens16", 16)):
        yield Case("shrink_expand", name, main, _forward, tokens=tokens)
        yield Case("backward", name, main, _backward("ABC", gx=True), tokens=tokens)
    yield Case("shrink_expand", "overlap", _OVERLAP, _forward)
    yield Case("shrink_expand", "update", main, _forward_update)
    yield Case("shrink_expand", "shrink", main, _forward_shrink)
    yield Case("shrink_expand", "expand", main, _forward_expand)
    yield Case("backward", "overlap", _OVERLAP, _backward("ABC", gx=True))
    for needs, gx in (("ABC", False), ("BC", True), ("", True), ("A", False), ("B", False)):
        name = "needs-" + needs + ("-gx" if needs and gx else "gx" if gx else "")
        yield Case("backward", name, main, _backward(needs, gx))
    yield Case("backward", "needs-C", main, _backward("C", gx=False))
    yield Case("backward", "to-ub", main, _backward_to_ub)
    yield Case("backward", "from-ub", main, _backward_from_ub)
    for needs in ("BC", "A", "B", "C"):
        yield Case("fused_backward", f"needs-{needs}", main, _fused_backward(needs))
    # What is contracted must not overlap.
    yield Case("fused_linear", "overlap", _geometry(stride=(2, 8)), _fused)
    yield Case("fused_linear", "gx-overlap", _geometry(stride=(8, 2)), _fused_gx)


CASES = tuple(_cases())


class Launch(NamedTuple):
    """A kernel and all that Triton specialised it for."""

    kernel: str  # `_shrink_expand_kernel`
    function: Any  # triton.JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], object]
    options: dict[str, object]
    architecture: str

    @property
    def fingerprint(self) -> str:
        """Changes with the kernel, with what it calls, and with what it is specialised for."""
        parts = (
            *_source(self.function),
            json.dumps(self.signature),
            *(f"{where}: {value}" for where, value in sorted(self.constants.items())),
            *(f"{where}: {value}" for where, value in sorted(self.attributes.items())),
            json.dumps(self.options, sort_keys=True),
            self.architecture,
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def compile(self) -> Any:
        """The compiled kernel."""
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=TARGETS[self.architecture], options=self.options)


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Record what kernels would be compiled for an architecture; launch and compile nothing.

    Yields:
        The launches, in order, filled in as they happen.
    """
    launches: list[Launch] = []

    def hook(*, fn: Any, **event: Any) -> bool:
        found = event["compile"]
        options = json.loads(found["specialization_data"])["options"]
        launches.append(
            Launch(
                fn.jit_function.__name__,
                fn.jit_function,
                found["signature"],
                found["constants"],
                found["configs"][0],
                {name: v for name, v in options.items() if isinstance(v, bool | int | float | str)},
                architecture,
            )
        )
        return True  # taken care of: Triton neither compiles nor launches

    with driver_of(AbsentDriver(architecture), architecture):
        knob = triton.knobs.runtime.jit_cache_hook
        triton.knobs.runtime.jit_cache_hook = hook
        try:
            yield launches
        finally:
            triton.knobs.runtime.jit_cache_hook = knob


@functools.cache
def _source(function: Any) -> tuple[str, ...]:
    """A kernel's code and that of all it calls, without comments and docstrings."""
    sources: dict[str, str] = {}
    pending = [function]
    while pending:
        current = pending.pop()
        if current.__name__ in sources:
            continue
        tree = ast.parse(current.src)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        definition = tree.body[0]
        if isinstance(definition, ast.FunctionDef) and ast.get_docstring(definition) is not None:
            definition.body = definition.body[1:] or [ast.Pass()]
        values = {name: current.fn.__globals__.get(name) for name in sorted(names)}
        settings = [f"{n} = {v}" for n, v in values.items() if isinstance(v, tl.constexpr | int)]
        sources[current.__name__] = "\n".join([*settings, ast.unparse(tree)])
        # Triton's own library comes with its version, which rows name.
        pending += [
            value
            for value in values.values()
            if isinstance(value, triton.JITFunction) and not value.__module__.startswith("triton.")
        ]
    return tuple(sources[name] for name in sorted(sources))


class Key(NamedTuple):
    """A row of the table. Variants that differ in nothing are listed under their first key."""

    architecture: str
    kernel: str  # `shrink_expand`, or one that its launcher starts besides
    dtype: str
    adapter_dtype: str
    case: str


class Variant(NamedTuple):
    """One binary that ships."""

    key: Key
    launch: Launch
    tile: str  # as in tiles.json; "-" where the table has no say
    alignable: bool
    extreme: bool


def variants_of(case: Case, architecture: str, dtype: str, adapter_dtype: str) -> list[Variant]:
    """What one call of a launcher starts."""
    setting = Setting(
        case.geometry, DTYPES[dtype], DTYPES[adapter_dtype], case.dropout, case.tokens
    )
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    try:
        with recording(architecture) as launches:
            case.launch(setting)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    itemsize = setting.dtype.itemsize
    whole, part = case.geometry, slices(setting.adapter, setting.dtype)[0].adapter.geometry
    variants: list[Variant] = []
    for launch in launches:
        kernel = launch.kernel.removeprefix("_").removesuffix("_kernel")
        tile = "-"
        if kernel in KERNELS:
            geometry = whole if kernel.startswith("expand") else part
            columns = layout_of(geometry).columns
            tile = " ".join(map(str, lookup(architecture, kernel, itemsize, columns)))
        # A slice of ranks after the first adds to what is there, and so is a variant of its own.
        again = sum(variant.launch.kernel == launch.kernel for variant in variants)
        name = f"{case.name}-again{again}" if again else case.name
        key = Key(architecture, kernel, dtype, adapter_dtype, name)
        variants.append(Variant(key, launch, tile, case.alignable, case.extreme))
    return variants


class Job(NamedTuple):
    """How another process finds a variant again."""

    case: int  # position in CASES
    architecture: str
    dtype: str
    adapter_dtype: str
    launch: int  # position among those of the case

    @property
    def variant(self) -> Variant:
        return variants_of(CASES[self.case], *self[1:4])[self.launch]


def all_variants() -> dict[Key, tuple[Job, Variant]]:
    """Everything that ships, each binary once; takes seconds, as nothing is compiled."""
    found: dict[Key, tuple[Job, Variant]] = {}
    seen: set[str] = set()
    for architecture in TARGETS:
        for number, case in enumerate(CASES):
            for dtype in DTYPES:
                if not case.runs_on(architecture, dtype):
                    continue
                for adapter_dtype in case.adapter_dtypes(dtype):
                    variants = variants_of(case, architecture, dtype, adapter_dtype)
                    for position, variant in enumerate(variants):
                        fingerprint = variant.launch.fingerprint
                        if fingerprint not in seen:
                            seen.add(fingerprint)
                            job = Job(number, architecture, dtype, adapter_dtype, position)
                            found[variant.key] = (job, variant)
    return found


class Record(NamedTuple):
    """A row of the table: a variant and what was read from its binary."""

    architecture: str
    kernel: str
    dtype: str
    adapter_dtype: str
    case: str
    tile: str  # tokens, features, outputs, programs, warps, stages
    registers: int  # of a thread
    spills: int  # to memory: bytes or instructions, whichever are more
    lane_spills: int  # AMD: scalar registers kept in lanes of vector registers
    shared_bytes: int
    shared_limit: int
    tensor_memory: int
    products: int  # products of 16-bit or tf32 operands in the kernel
    matrix_instructions: int
    in_flight: int  # products that a loop leaves running while it loads on
    may_spill: int  # 1 where spills are recorded, not refused: `Case.extreme`
    alignable: int  # 1 where loads of tokens have to be wide
    wide_loads: int  # instructions that load 128 bits or more of tokens
    narrow_loads: int
    instructions: int
    triton: str
    fingerprint: str

    @property
    def key(self) -> Key:
        return Key(*self[:5])


class Binary(NamedTuple):
    """What a disassembly shows."""

    registers: int
    spills: int
    lane_spills: int
    static_shared_bytes: int
    matrix_instructions: int
    instructions: int
    loads: list[tuple[str, int, bool]]  # file name and line of a global load; whether it is wide


def measure(variant: Variant) -> Record:
    """Compile a variant and read its binary."""
    launch = variant.launch
    compiled = launch.compile()
    if "cubin" in compiled.asm:
        binary = _read_nvidia(compiled.asm["cubin"], launch.architecture)
    else:
        binary = read_amdgcn(compiled.asm["amdgcn"])
    ttir = str(compiled.asm["ttir"])
    pointers = [name for name, kind in launch.signature.items() if kind != "constexpr"]
    if any(kind.startswith("tensordesc") for kind in launch.signature.values()):
        # The copy engine loads the tokens: whole tiles, however wide a thread's loads would be.
        places: set[tuple[str, int]] = set()
        widths = [True] * compiled.asm["ptx"].count("cp.async.bulk.tensor")
    else:
        places = token_loads(ttir, pointers, TOKENS.get(launch.kernel, set()))
        widths = [wide for name, line, wide in binary.loads if (name, line) in places]
    for place in places - {(name, line) for name, line, _ in binary.loads}:
        raise RuntimeError(f"{variant.key}: no instruction found for the load in {place}")
    return Record(
        *variant.key,
        variant.tile,
        binary.registers,
        binary.spills,
        binary.lane_spills,
        compiled.metadata.shared + binary.static_shared_bytes,
        SHARED_LIMITS[launch.architecture],
        getattr(compiled.metadata, "tmem_size", None) or 0,
        matrix_products(ttir),
        binary.matrix_instructions,
        products_in_flight(str(compiled.asm["ttgir"])),
        int(variant.extreme),
        int(variant.alignable and bool(places or widths)),
        widths.count(True),
        widths.count(False),
        binary.instructions,
        triton.__version__,
        launch.fingerprint,
    )


_NARROW_OPERAND = re.compile(r" : tensor<[\dx]+x(bf16|f16)> \*")


def matrix_products(ttir: str) -> int:
    """How many products of a kernel a matrix unit can take: of 16-bit operands, or in tf32."""
    products = (line for line in ttir.splitlines() if " tt.dot " in line)
    return sum(
        "inputPrecision = tf32" in line or _NARROW_OPERAND.search(line) is not None
        for line in products
    )


_DEFINITION = re.compile(r"\s*(%[\w$.-]+)(?::\d+)? = \S+ [^%]*(%[\w$.-]+)")
_ITERATED = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+)")
_LOAD = re.compile(r" tt\.(?:load|descriptor_load) [^%]*(%[\w$.-]+).* loc\((#loc\d*)\)$")


_WAIT = re.compile(r"warp_group_dot_wait .*\{pendings = (\d+)")


def products_in_flight(ttgir: str) -> int:
    """The most asynchronous products that a wait inside of a loop leaves running.

    Args:
        ttgir: Triton's GPU IR as text.
    """
    most, depth = 0, 0
    loops: list[int] = []  # depths of the braces of the loops around a line
    for line in ttgir.splitlines():
        code = line.split(" loc(")[0]
        wait = _WAIT.search(code)
        if loops and wait is not None:
            most = max(most, int(wait.group(1)))
        depth += code.count("{") - code.count("}")
        while loops and depth < loops[-1]:
            loops.pop()
        if "scf.for" in code:
            loops.append(depth)
    return most


def token_loads(ttir: str, arguments: Sequence[str], tokens: set[str]) -> set[tuple[str, int]]:
    """File names and lines of the loads whose pointer comes from one of some arguments.

    Args:
        ttir: Triton's IR as text.
        arguments: names of the arguments that are no constants, in order.
        tokens: names of those that are looked for.
    """
    comes_from: dict[str, str] = {}
    loads: list[tuple[str, str]] = []
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))
    for line in ttir.splitlines():
        if "tt.func public" in line:
            # Locations inside the list of arguments would end it early.
            names = re.findall(r"(%[\w$.-]+): ", line)
            comes_from |= dict(zip(names, arguments, strict=True))
            continue
        if match := _LOAD.search(line):
            loads.append((match[1], match[2]))
        if "iter_args(" in line:
            for inner, outer in _ITERATED.findall(line.partition("iter_args(")[2]):
                comes_from[inner] = outer
        elif match := _DEFINITION.match(line):
            comes_from[match[1]] = match[2]

    def origin(value: str) -> str:
        seen = set()
        while value in comes_from and value not in seen:
            seen.add(value)
            value = comes_from[value]
        return value

    return {_place(locations, where) for pointer, where in loads if origin(pointer) in tokens}


def _place(locations: dict[str, str], reference: str) -> tuple[str, int]:
    """Where code stands: for code that was inlined, in the function that it was inlined from."""
    while reference in locations:
        text = locations[reference]
        if match := re.match(r'"([^"]+)":(\d+):\d+', text):
            return Path(match[1]).name, int(match[2])
        match = re.search(r"#loc\d*", text)
        if match is None:
            break
        reference = match[0]
    raise ValueError(f"ttir: no place in the source for {reference}")


def _tool(name: str) -> str:
    """Disassemblers come with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(cubin: bytes, architecture: str) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def output(*command: str) -> str:
            done = subprocess.run(
                [*command, str(path)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
            return done.stdout

        usage = output(_tool("cuobjdump"), "--dump-resource-usage")
        sass = output(_tool("nvdisasm"), "-g", "-c", "-ndf")
    return read_sass(sass, usage, reserved=1024 if int(architecture[3:]) >= 90 else 0)


_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
_SASS_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
_SASS_MATRIX = re.compile(r"(?:[A-Z]?HMMA|[A-Z]?GMMA|IMMA|DMMA|QMMA|OMMA|HGMMA|UTC\w*MMA)\b")
_SASS_LOAD = re.compile(r"(?:LDG|LDGSTS|UTMALDG|UBLKCP)\b")
_SASS_WIDE = re.compile(r"UTMALDG|UBLKCP|\.(?:128|256)\b")


def read_sass(sass: str, usage: str, reserved: int = 0) -> Binary:
    """Read NVIDIA's assembly.

    Args:
        sass: from `nvdisasm -g`.
        usage: from `cuobjdump --dump-resource-usage`.
        reserved: bytes of shared memory among the static ones that are the system's.
    """
    counts: Counter[str] = Counter()
    loads = []
    name, line = "", 0
    for text in sass.splitlines():
        if place := _SASS_LINE.match(text):
            name, line = Path(place[1]).name, int(place[2])
        elif match := _SASS.match(text):
            opcode = match[1]
            counts[opcode] += 1
            if _SASS_LOAD.match(opcode):
                loads.append((name, line, _SASS_WIDE.search(opcode) is not None))
    resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    if "REG" not in resources or not counts:
        raise ValueError("sass, usage: expected one kernel, got none")
    reached = sum(n for opcode, n in counts.items() if opcode.split(".")[0] in {"LDL", "STL"})
    return Binary(
        resources["REG"],
        max(resources["STACK"] + resources["LOCAL"], reached),
        0,
        max(resources["SHARED"] - reserved, 0),
        sum(n for opcode, n in counts.items() if _SASS_MATRIX.match(opcode)),
        counts.total(),
        loads,
    )


_GCN = re.compile(r"\t([a-z]\w+)(?:\s|$)")
_GCN_LOAD = re.compile(r"(?:global|buffer|flat)_load_")
_GCN_LINE = re.compile(r"\t\.loc\t(\d+) (\d+)")


def read_amdgcn(assembly: str) -> Binary:
    """Read AMD's assembly, as the compiler leaves it; LDS is in Triton's metadata."""
    files = {
        int(number): name for number, name in re.findall(r'\t\.file\t(\d+) .*"([^"\n]+)"', assembly)
    }
    counts: Counter[str] = Counter()
    loads = []
    name, line = "", 0
    for text in assembly.splitlines():
        if place := _GCN_LINE.match(text):
            name, line = files[int(place[1])], int(place[2])
        elif match := _GCN.match(text):
            opcode = match[1]
            counts[opcode] += 1
            if _GCN_LOAD.match(opcode):
                loads.append((name, line, "x4" in opcode))
    resources = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)\n", assembly)}
    if "vgpr_count" not in resources or not counts:
        raise ValueError("assembly: expected one kernel, got none")
    return Binary(
        resources["vgpr_count"],
        max(resources["vgpr_spill_count"], resources["private_segment_fixed_size"]),
        resources["sgpr_spill_count"],
        0,
        sum(n for opcode, n in counts.items() if opcode.startswith(("v_mfma", "v_smfmac"))),
        counts.total(),
        loads,
    )


def check_spills(record: Record) -> str | None:
    """No register goes to memory, but in extreme cases."""
    if record.spills and not record.may_spill:
        return f"spills: expected 0, got {record.spills} with {record.registers} registers"
    return None


def check_shared_memory(record: Record) -> str | None:
    """A block fits."""
    if record.shared_bytes > record.shared_limit:
        return (
            f"shared memory: expected {record.shared_limit} bytes or less, "
            f"got {record.shared_bytes}"
        )
    if record.tensor_memory > TENSOR_MEMORY_LIMIT:
        return (
            f"tensor memory: expected {TENSOR_MEMORY_LIMIT} columns or fewer, "
            f"got {record.tensor_memory}"
        )
    return None


def check_matrix_instructions(record: Record) -> str | None:
    """Products of 16-bit operands, or in tf32, run on the matrix unit."""
    if record.products and not record.matrix_instructions:
        return f"matrix instructions: expected some for {record.products} products, got none"
    return None


def check_wide_loads(record: Record) -> str | None:
    """Tokens that are aligned to 16 bytes are loaded 16 bytes at a time, all of them."""
    if record.alignable and (record.narrow_loads or not record.wide_loads):
        return (
            "loads of tokens: expected all 128 bits wide, "
            f"got {record.wide_loads} wide, {record.narrow_loads} narrow"
        )
    return None


def check_products_in_flight(record: Record) -> str | None:
    """No loop loads on while a product may still read what is loaded over."""
    if record.in_flight:
        return (
            f"products in flight: expected none when a loop goes on, got {record.in_flight}: look "
            "in Triton's GPU IR whether their operands' buffers are loaded over meanwhile"
        )
    return None


CHECKS = (
    check_spills,
    check_shared_memory,
    check_matrix_instructions,
    check_products_in_flight,
    check_wide_loads,
)


def failures(record: Record) -> list[str]:
    """What is wrong with a record, in words."""
    return [text for check in CHECKS if (text := check(record)) is not None]


def read(path: Path = RESULTS) -> dict[Key, Record]:
    """Stored records; none if there is no file."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        header = tuple(next(lines))
        if header != Record._fields:
            raise ValueError(f"{path}: expected the columns {Record._fields}, got {header}")
        kinds = get_type_hints(Record)
        convert = [int if kinds[name] is int else str for name in header]
        rows = ([kind(text) for kind, text in zip(convert, row, strict=True)] for row in lines)
        records = [Record._make(row) for row in rows]
    return {record.key: record for record in records}


def write(records: Iterable[Record], path: Path = RESULTS) -> None:
    """Store records, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(Record._fields)
        rows.writerows(records)
    temporary.replace(path)


def table(records: Iterable[Record]) -> str:
    """Text in columns; the versions and fingerprints are left to the file."""
    shown = [name for name in Record._fields if name not in {"triton", "fingerprint"}]
    rows = [shown, *([str(getattr(r, name)) for name in shown] for r in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def compile_all(
    only: str = "", jobs: int | None = None, path: Path = RESULTS, fresh: bool = False
) -> tuple[list[Record], list[str]]:
    """Compile what has no current row yet, and store as it goes.

    Args:
        only: a regular expression; variants whose `architecture kernel dtype adapter_dtype case`
            it does not match are left as they are.
        jobs: processes.
        path: the table.
        fresh: whether rows that are current are compiled again.

    Returns:
        The selected records, and what is wrong with them.
    """
    wanted = all_variants()
    stored = {key: record for key, record in read(path).items() if key in wanted}
    selected = [key for key in wanted if re.search(only, " ".join(key))]
    missing = [key for key in selected if fresh or not is_current(stored.get(key), wanted[key][1])]
    wrong = []

    def save() -> None:
        write((stored[key] for key in wanted if key in stored), path)

    # A fresh interpreter for each worker: forks of a process that runs threads can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count(), context) as pool:
        started = time.monotonic()
        futures = {pool.submit(_measure_job, wanted[key][0]): key for key in missing}
        try:
            done = concurrent.futures.as_completed(futures)
            for number, future in enumerate(done, start=1):
                key = futures[future]
                try:
                    stored[key] = future.result()
                    outcome = "; ".join(failures(stored[key])) or "ok"
                except Exception as error:  # one kernel that does not compile hides no other
                    stored.pop(key, None)
                    # Triton's errors quote the source first.
                    text = str(error).strip().splitlines() or [""]
                    outcome = f"{type(error).__name__}: {text[-1]}"
                    wrong.append(f"{' '.join(key)}: {outcome}")
                clock = f"{time.monotonic() - started:.0f} s"
                print(f"[{number}/{len(missing)}, {clock}] {' '.join(key)}: {outcome}", flush=True)
                if number % 20 == 0:
                    save()
        finally:
            for future in futures:
                future.cancel()
            save()
    records = [stored[key] for key in selected if key in stored]
    wrong += [f"{' '.join(r.key)}: {text}" for r in records for text in failures(r)]
    return records, wrong


def is_current(record: Record | None, variant: Variant) -> bool:
    """Whether a stored record is of this very variant, compiled by this Triton."""
    return (
        record is not None
        and record.triton == triton.__version__
        and record.fingerprint == variant.launch.fingerprint
        and record.tile == variant.tile
    )


def _measure_job(job: Job) -> Record:
    return measure(job.variant)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description="Compile the Triton kernels for GPUs that are not here; check what they need.",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="variants to compile, by key")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    parser.add_argument("--fresh", action="store_true", help="compile again what is up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="CSV")
    options = parser.parse_args(arguments)
    records, wrong = compile_all(options.only, options.jobs, options.results, options.fresh)
    print(table(records))
    print(f"\n{len(records)} variants, {len(wrong)} failures; {options.results}")
    for text in wrong:
        print(f"FAILED {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
