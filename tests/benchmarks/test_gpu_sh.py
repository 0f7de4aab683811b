"""The stages of gpu.sh on a CPU, under the interpreter; the smoke check's faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.environment import ROOT
from benchmarks.speed import smoke

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    finished = subprocess.run(
        [SCRIPT, "--dry-run", "smoke", "tune", "profile"],
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"smoke.jsonl", "rows.jsonl", "tune.jsonl", "tiles.json", "profile.jsonl"}
    kernels = {row.provider for row in rows.read(tmp_path / "rows.jsonl") if row.rounds}
    assert kernels >= {"frozen", "copy", "shrink_expand", "backward", "expand"}


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


def test_smoke_finds_wrong_and_unrepeatable_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = smoke.Layer.step
    calls = iter(range(100))

    def step(self: smoke.Layer, strategy: str) -> smoke.Results:
        results = right(self, "torch")
        if strategy == "wrong":
            results["gB"] = results["gB"] * 1.01
        if strategy == "unrepeatable":
            results["y"] = results["y"] * (1 + 2e-7 * next(calls))
        if strategy == "broken":
            raise RuntimeError("an illegal memory access")
        return results

    monkeypatch.setattr(smoke.Layer, "step", step)
    strategies = ["torch", "wrong", "unrepeatable", "broken"]
    assert smoke.run(tmp_path, smoke.TINY_SHAPES, strategies, torch.device("cpu")) == 3
    lines = (tmp_path / smoke.FILE).read_text(encoding="utf-8").splitlines()
    found = {row["strategy"]: row for row in map(json.loads, lines)}
    assert found["torch"]["wrong"] == []
    assert found["wrong"]["wrong"][0].startswith("gB: error ")
    assert found["unrepeatable"]["wrong"] == ["y: repeats are not bitwise equal"]
    assert "an illegal memory access" in found["broken"]["traceback"]
