"""The stages of gpu.sh on a CPU, under the interpreter; the smoke check's faults."""

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


def test_smoke_finds_wrong_and_unrepeatable_results(tmp_path: Path) -> None:
    (right,) = methods.by_name("dcft_torch")
    calls = iter(range(100))

    def broken(module: nn.Module, args: object, y: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory access")

    hooks = {
        "right": lambda module, args, y: y,
        "wrong": lambda module, args, y: 1.01 * y,
        "unrepeatable": lambda module, args, y: y * (1 + 2e-7 * next(calls)),
        "broken": broken,
    }

    def method(name: str) -> LayerMethod:
        def build(base: nn.Linear, generator: torch.Generator) -> AdaptedLayer:
            adapted = right.build(base, generator)
            adapted.layer.register_forward_hook(hooks[name])
            return adapted

        return LayerMethod(name, build)

    chosen = [method(name) for name in hooks]
    assert smoke.run(tmp_path, torch.device("cpu"), chosen, tiny=True) == 3
    lines = (tmp_path / smoke.SMOKE_FILE).read_text(encoding="utf-8").splitlines()
    found = {row["provider"]: row for row in map(json.loads, lines)}
    assert found["right"]["wrong"] == []
    assert found["wrong"]["wrong"][0].startswith("y: error ")
    assert "y: repeats are not bitwise equal" in found["unrepeatable"]["wrong"]
    assert "an illegal memory access" in found["broken"]["traceback"]
