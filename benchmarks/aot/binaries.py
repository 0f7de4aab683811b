"""Reading what a compiled kernel needs from its binary and from Triton's IR."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton


class Binary(NamedTuple):
    """What a disassembly shows."""

    registers: int  # per thread; on AMD vector registers
    spills: int  # bytes of local memory and stack, or instructions that access them if more
    static_shared_bytes: int
    matrix_instructions: int
    # The fewest products that a wait in the loop of products leaves running; None if no such loop
    # has asynchronous products.
    in_flight: int | None = None


def read_binary(kernel: Any, architecture: str) -> Binary:
    """Disassemble a compiled kernel."""
    if "cubin" in kernel.asm:
        return _read_nvidia(kernel.asm["cubin"], architecture)
    return read_amdgcn(kernel.asm["amdgcn"])


def _read_nvidia(cubin: bytes, architecture: str) -> Binary:
    # The disassemblers that Triton ships.
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def output(tool: str, *options: str) -> str:
            command = [str(tools / tool), *options, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = output("cuobjdump", "--dump-resource-usage")
        sass = output("nvdisasm", "-c", "-ndf")
    # From sm_90 on, the system reserves one KiB of every block's shared memory.
    return read_sass(sass, usage, reserved=1024 if int(architecture[3:]) >= 90 else 0)


_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
_SASS_MATRIX = re.compile(r"(?:[A-Z]?HMMA|[A-Z]?GMMA|IMMA|DMMA|QMMA|OMMA|HGMMA|UTC\w*MMA)\b")


def read_sass(sass: str, usage: str, reserved: int = 0) -> Binary:
    """Read NVIDIA's assembly.

    Args:
        sass: from `nvdisasm`.
        usage: from `cuobjdump --dump-resource-usage`.
        reserved: bytes of static shared memory that belong to the system.
    """
    counts = Counter(match[1] for text in sass.splitlines() if (match := _SASS.match(text)))
    resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    if "REG" not in resources or not counts:
        raise ValueError("sass, usage: expected one kernel, got none")
    local = sum(n for opcode, n in counts.items() if opcode.split(".")[0] in {"LDL", "STL"})
    return Binary(
        resources["REG"],
        max(resources["STACK"] + resources["LOCAL"], local),
        max(resources["SHARED"] - reserved, 0),
        sum(n for opcode, n in counts.items() if _SASS_MATRIX.match(opcode)),
        _fewest_pending(_sass_loops(sass), " HGMMA", _SASS_WAIT),
    )


_SASS_LABEL = re.compile(r"(\.L\w+):")
_SASS_BRANCH = re.compile(r"@!?U?P\d+ BRA `\((\.L\w+)\)")
_SASS_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb\d, 0x([0-9a-f]+)")


def _sass_loops(sass: str) -> Iterator[list[str]]:
    """The lines between a branch and a label before it.

    An unconditional branch ends no loop: code that waits for a barrier is moved to the end, from
    where it returns so.
    """
    lines = sass.splitlines()
    labels: dict[str, int] = {}
    for number, line in enumerate(lines):
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = number
        elif (branch := _SASS_BRANCH.search(line)) and branch[1] in labels:
            yield lines[labels[branch[1]] : number]


def _fewest_pending(loops: Iterable[list[str]], product: str, wait: re.Pattern[str]) -> int | None:
    """The fewest products that a wait in the innermost loop of products leaves pending."""
    with_products = [loop for loop in loops if any(product in line for line in loop)]
    if not with_products:
        return None
    innermost = min(with_products, key=len)
    return min((int(found[1], 16) for line in innermost if (found := wait.search(line))), default=0)


_GCN = re.compile(r"\t([a-z]\w+)(?:\s|$)")


def read_amdgcn(assembly: str) -> Binary:
    """Read AMD's assembly; its shared memory is in Triton's metadata."""
    counts = Counter(match[1] for text in assembly.splitlines() if (match := _GCN.match(text)))
    resources = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)\n", assembly)}
    if "vgpr_count" not in resources or not counts:
        raise ValueError("assembly: expected one kernel, got none")
    return Binary(
        resources["vgpr_count"],
        max(resources["vgpr_spill_count"], resources["private_segment_fixed_size"]),
        0,
        sum(n for opcode, n in counts.items() if opcode.startswith(("v_mfma", "v_smfmac"))),
    )


_16_BIT_OPERAND = re.compile(r" : (?:tensor|!ttg\.memdesc)<[\dx]+x(bf16|f16)\W.* \* ")
_PRODUCT = re.compile(r" (?:tt\.dot|ttng\.warp_group_dot) ")
_IR_WAIT = re.compile(r" ttng\.warp_group_dot_wait .*pendings = (\d+)")


def matrix_products(ir: str) -> int:
    """Products in Triton's IR that a matrix unit can compute: of 16-bit operands, or in tf32."""
    return sum(
        "inputPrecision = tf32" in line or _16_BIT_OPERAND.search(line) is not None
        for line in ir.splitlines()
        if _PRODUCT.search(line)
    )


def products_in_flight(ttgir: str) -> int | None:
    """As `Binary.in_flight`, of the TTGIR that the binary was compiled from."""
    return _fewest_pending(_ir_loops(ttgir), " ttng.warp_group_dot ", _IR_WAIT)


def _ir_loops(ir: str) -> Iterator[list[str]]:
    """The bodies of loops, by their indentation."""
    lines = ir.splitlines()
    for number, line in enumerate(lines):
        if " scf.for " in line:
            inside = " " * (len(line) - len(line.lstrip()) + 1)
            after = range(number + 1, len(lines))
            end = next((i for i in after if not lines[i].startswith(inside)), len(lines))
            yield lines[number + 1 : end]
