"""The device, versions and commit that a measurement was made with."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# What can change a measurement.
_MEASURED_CODE = (
    "dcft_kernels",
    "benchmarks",
    "pyproject.toml",
    "constraints.txt",
    ":(exclude)benchmarks/results",
    ":(exclude)benchmarks/README.md",
)


@dataclass(frozen=True)
class Environment:
    """The columns of a row that are the same for a whole run."""

    device: str
    torch: str
    triton: str | None
    peft: str | None
    commit: str
    processor: str | None = None  # of a CPU, with family and model
    native_bf16: bool | None = None  # of a CPU: whether it has instructions for products in bf16

    @property
    def slug(self) -> str:
        """The device as a folder name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


@functools.cache
def describe(device_type: str) -> Environment:
    """The environment of a device of this type; looked up once per process."""
    return Environment(
        device=device_name(torch.device(device_type)),
        torch=torch.__version__,
        triton=package_version("triton"),
        peft=package_version("peft"),
        commit=commit(ROOT),
        processor=processor() if device_type == "cpu" else None,
        native_bf16=native_bf16() if device_type == "cpu" else None,
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its cores and the instruction set PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = available_cores()
    threads = torch.get_num_threads()
    parts = [f"{cores} core{'s' * (cores != 1)}"]
    if threads != cores:
        parts.append(f"{threads} thread{'s' * (threads != 1)}")
    parts.append(torch.backends.cpu.get_cpu_capability())
    return f"{_name(_cpuinfo())} ({', '.join(parts)})"


def commit(folder: Path) -> str:
    """The short commit, with "-dirty" if measured code differs from it, or "unknown"."""
    head = _git(folder, "rev-parse", "--short", "HEAD")
    if not head:
        return "unknown"
    changes = _git(folder, "status", "--porcelain", "--", *_MEASURED_CODE)
    return head if changes == "" else f"{head}-dirty"


def available_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def processor() -> str:
    """Name, family and model: a virtual machine may show no more of the name than "AMD EPYC"."""
    found = _cpuinfo()
    numbers = [
        f"{k.removeprefix('cpu ')} {found[k]}" for k in ("cpu family", "model") if k in found
    ]
    return ", ".join([_name(found), *numbers])


def native_bf16() -> bool | None:
    """Whether there are instructions for products in bf16; None if PyTorch does not say."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        # On x86 oneDNN's answer includes products that it emulates in float32.
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        has: Any = torch.cpu
        return not x86 or has._is_avx512_bf16_supported() or has._is_amx_tile_supported()
    except (AttributeError, RuntimeError):
        return None


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; none where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    return dict(re.findall(r"^(.*?)\s*:[ \t]*(.*)$", text.split("\n\n")[0], flags=re.MULTILINE))


def _name(cpuinfo: Mapping[str, str]) -> str:
    name = cpuinfo.get("model name") or platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)|\bCPU\b|@.*$", "", name).strip()


def package_version(package: str) -> str | None:
    """An installed package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
