"""The stages of gpu.sh on a CPU, under the interpreter; how smoke and tests tell faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.environment import ROOT
from benchmarks.speed import methods, smoke
from benchmarks.speed.methods import AdaptedLayer, LayerMethod

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    finished = subprocess.run(
        [SCRIPT, "--dry-run"],
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    files = {path.name for path in tmp_path.iterdir()}
    expected = {"smoke.jsonl", "rows.jsonl", "report.md", "tune.jsonl", "tiles.json"}
    assert files - {"layer.png"} == expected | {"profile.jsonl"}  # a plot needs Matplotlib
    timed: dict[str, set[str]] = {}
    for row in rows.read(tmp_path / "rows.jsonl"):
        if row.rounds:
            timed.setdefault(row.level, set()).add(row.provider)
    assert timed["kernel"] >= {"frozen", "copy", "shrink_expand", "backward", "expand"}
    strategies = {f"dcft_{name}" for name in methods.STRATEGIES}
    assert timed["layer"] >= {"frozen", "dcft", "lora_r8", "dcft_torch", "dcft_row_block"}
    assert timed["block"] >= {"frozen", "dcft", "lora_r8"}
    checked = (tmp_path / smoke.SMOKE_FILE).read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["provider"] for line in checked} == strategies


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    finished = subprocess.run(
        [SCRIPT, "smoke"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert "finds no GPU" in finished.stderr


def test_smoke_finds_wrong_and_unrepeatable_results(tmp_path: Path) -> None:
    (right,) = methods.by_name("dcft_torch")
    calls = iter(range(100))

    def broken(module: nn.Module, args: object, y: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory access")

    def refused(module: nn.Module, args: object, y: Tensor) -> Tensor:
        raise RuntimeError("strategy='new' cannot run: tiny; use strategy='auto' or 'torch'")

    hooks = {
        "right": lambda module, args, y: y,
        "wrong": lambda module, args, y: 1.01 * y,
        "unrepeatable": lambda module, args, y: y * (1 + 2e-7 * next(calls)),
        "broken": broken,
        "refused": refused,
    }

    def method(name: str) -> LayerMethod:
        def build(base: nn.Linear, generator: torch.Generator) -> AdaptedLayer:
            adapted = right.build(base, generator)
            adapted.layer.register_forward_hook(hooks[name])
            return adapted

        return LayerMethod(name, build)

    chosen = [method(name) for name in hooks]
    assert smoke.run(tmp_path, torch.device("cpu"), chosen, tiny=True) == 3  # not "refused"
    lines = (tmp_path / smoke.SMOKE_FILE).read_text(encoding="utf-8").splitlines()
    found = {row["provider"]: row for row in map(json.loads, lines)}
    assert found["right"]["wrong"] == []
    assert found["wrong"]["wrong"][0].startswith("y: error ")
    assert "y: repeats are not bitwise equal" in found["unrepeatable"]["wrong"]
    assert "an illegal memory access" in found["broken"]["traceback"]
    assert found["refused"]["refused"].startswith("strategy='new' cannot run: tiny")


FAILING_TESTS = """
import pytest
from benchmarks import failed_tests

@pytest.fixture
def broken():
    raise RuntimeError("an illegal\\nmemory access")

def test_wrong():
    failed_tests.gpu_is_broken = lambda: True
    assert 1 == 2

def test_with(broken): ...

def test_right(): ...
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_failed_tests_are_written_as_they_happen(workers: int, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(FAILING_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command += ["test_some.py", "-p", "benchmarks.failed_tests", "--failures", "failures.txt"]
    if workers:
        pytest.importorskip("xdist")
        command += ["-n", str(workers)]
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    outside["PYTHONPATH"] = str(ROOT)

    def failures() -> list[str]:
        subprocess.run(command, env=outside, cwd=tmp_path, capture_output=True)
        return (tmp_path / "failures.txt").read_text(encoding="utf-8").splitlines()

    # A worker whose GPU is broken exits, and the next one runs the rest.
    wrong = "test_some.py::test_wrong"
    crash = f"{wrong} (???): worker 'gw0' crashed while running '{wrong}'"
    expected = [
        f"{wrong}: assert 1 == 2",
        *[crash] * workers,
        "test_some.py::test_with (setup): RuntimeError: an illegal memory access",
    ]
    assert failures() == expected
    (tmp_path / "test_some.py").write_text("import absent\n")
    assert failures() == [
        *expected,
        "test_some.py (collect): ModuleNotFoundError: No module named 'absent'",
    ]
