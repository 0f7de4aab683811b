"""Options of the pytest-benchmark suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import results_folder


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dcft_kernels benchmarks")
    group.addoption(
        "--tiny", action="store_true", help="tiny shapes: try the suite out, in .benchmarks/tiny"
    )
    group.addoption(
        "--case-budget", type=float, metavar="SECONDS", help="time for the rounds of a case (30)"
    )
    group.addoption("--results", type=Path, metavar="DIR", help="folder for the rows")
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to measure (a GPU if there is one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    option: Any = config.option
    if option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: expected a GPU that PyTorch finds, and there is none")
    if not getattr(option, "benchmark_json", None):
        folder = results_folder(option.results, option.device, tiny=option.tiny)
        option.benchmark_json = str(folder / "pytest-benchmark.json")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave the host's name out of files that are meant to be shared."""
    machine_info.pop("node", None)
