"""Options of the benchmark suite, and where pytest-benchmark's own JSON goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment
from benchmarks.cases import SIZES
from benchmarks.environment import RESULTS
from benchmarks.run import TINY_RESULTS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dcft_kernels benchmarks")
    group.addoption(
        "--size",
        choices=SIZES,
        default="main",
        help="tiny: tries the suite out, says nothing about speed, rows go to "
        f"{TINY_RESULTS.relative_to(environment.ROOT)}; main: minutes; full: every sweep (main)",
    )
    group.addoption(
        "--case-budget", type=float, metavar="SECONDS", help="time for the rounds of a case (30)"
    )
    group.addoption(
        "--results",
        type=Path,
        metavar="DIR",
        help="folder for the rows, one subfolder a device (benchmarks/results)",
    )
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to measure (a GPU where there is one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    option: Any = config.option
    if option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: expected a GPU that PyTorch finds, and there is none")
    if not getattr(option, "benchmark_json", None):
        # The folder comes into being with the first row.
        option.benchmark_json = str(_device_folder(config) / "pytest-benchmark.json")
    if not getattr(option, "benchmark_project_name", None):
        option.benchmark_project_name = "dcft_kernels"


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave the machine's name out of files that are meant to be shared."""
    machine_info.pop("node", None)


@pytest.fixture(scope="session")
def device_folder(request: pytest.FixtureRequest) -> Path:
    """Where this run's results go."""
    return _device_folder(request.config)


def _device_folder(config: pytest.Config) -> Path:
    results: Path | None = config.getoption("--results")
    if results is None:
        results = TINY_RESULTS if config.getoption("--size") == "tiny" else RESULTS
    return results / environment.describe(config.getoption("--device")).slug
