"""Options of the benchmark suite, and where pytest-benchmark's own JSON goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment

RESULTS = environment.ROOT / "benchmarks" / "results"
QUICK_RESULTS = environment.ROOT / ".benchmarks" / "quick"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dcft_kernels benchmarks")
    group.addoption(
        "--quick",
        action="store_true",
        help="tiny shapes for a moment: tries the suite out, says nothing about speed; "
        f"rows go to {QUICK_RESULTS.relative_to(environment.ROOT)}",
    )
    group.addoption(
        "--budget", type=float, metavar="SECONDS", help="time for the rounds of a case (60)"
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
    if not getattr(option, "benchmark_json", None):
        # The folder comes into being with the first row.
        option.benchmark_json = str(_device_folder(config) / "layer.pytest-benchmark.json")
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
        results = QUICK_RESULTS if config.getoption("--quick") else RESULTS
    return results / environment.describe(config.getoption("--device")).slug
