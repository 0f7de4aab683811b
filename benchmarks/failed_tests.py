"""A plugin of pytest that writes failed tests to a file as they happen, so that none is lost.

    pytest -p benchmarks.failed_tests --failures FILE [-n WORKERS]

A line has the test's name, the phase if it is not the test itself, and its error. After an illegal
memory access nothing runs on the GPU any more in that process: a worker of pytest-xdist then exits,
which adds a line, and another one runs the other tests.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

_LONGEST = 400  # characters of an error


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", type=Path, metavar="FILE", help="append failed tests to a file")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker())
    elif config.getoption("--failures") is not None:
        config.pluginmanager.register(_FailedTests(config.getoption("--failures")))


class _FailedTests:
    """Where all reports arrive."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._append(report.nodeid, report.when, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._append(report.nodeid, "collect", report.longrepr)

    def _append(self, name: str, phase: str | None, error: Any) -> None:
        crash = getattr(error, "reprcrash", None)
        # Without a place of the error there is only text, whose last line says what it is.
        last = str(error).strip().rpartition("\n")[2].removeprefix("E   ")
        text = " ".join((last if crash is None else crash.message).split())
        phase = "" if phase == "call" else f" ({phase})"
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{name}{phase}: {text[:_LONGEST]}\n")


class _Worker:
    """In a process of pytest-xdist that runs tests."""

    failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    @pytest.hookimpl(trylast=True)  # when the test's reports are sent
    def pytest_runtest_logfinish(self) -> None:
        if self.failed and gpu_is_broken():
            os._exit(1)
        self.failed = False


def gpu_is_broken() -> bool:
    """Whether an error has ended all that this process can do on the GPU."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
