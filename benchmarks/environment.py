"""The device, versions and commit that a measurement was made with."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

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
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its cores and the instruction set PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = _cores()
    threads = torch.get_num_threads()
    parts = [f"{cores} core{'s' * (cores != 1)}"]
    if threads != cores:
        parts.append(f"{threads} thread{'s' * (threads != 1)}")
    parts.append(torch.backends.cpu.get_cpu_capability())
    return f"{_processor()} ({', '.join(parts)})"


def commit(folder: Path) -> str:
    """The short commit, with "-dirty" if measured code differs from it, or "unknown"."""
    head = _git(folder, "rev-parse", "--short", "HEAD")
    if not head:
        return "unknown"
    changes = _git(folder, "status", "--porcelain", "--", *_MEASURED_CODE)
    return head if changes == "" else f"{head}-dirty"


def _cores() -> int:
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


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)|\bCPU\b|@.*$", "", name).strip()


def package_version(package: str) -> str | None:
    """An installed package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
