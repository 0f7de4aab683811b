"""`benchmarks/gpu_run.sh`: a dry run on the CPU, and what a real one would call."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import environment, rows, run, tune
from benchmarks.cases import Scope

SCRIPT = environment.ROOT / "benchmarks" / "gpu_run.sh"
RESULTS = {
    "environment.txt",
    "gpu_rates.json",
    "log.txt",
    "ncu.csv",
    "rows.jsonl",
    "summary.txt",
    "tiles.json",
    "tune.jsonl",
}
MINUTES = 9


def called(*arguments: str, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # A worker of pytest-xdist tells a pytest inside it that it is one.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=outside | {"OUT": str(out)} | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_dry_run_fills_every_file(tmp_path: Path) -> None:
    finished = called("--dry-run", out=tmp_path, PYTHON=sys.executable)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert {path.name for path in tmp_path.iterdir()} == RESULTS
    assert all(path.stat().st_size for path in tmp_path.iterdir())
    log = (tmp_path / "log.txt").read_text()
    assert "left out" not in log
    assert "not complete" not in log
    stored = rows.read(tmp_path / "rows.jsonl")
    assert {r.level for r in stored} >= {"ceiling", "layer", "kernel", "block", "merge"}
    kernels = {r.provider for r in stored if r.level == "kernel"}
    assert kernels >= {"shrink_expand", "backward", "fused_linear", "expand", "expand_backward"}
    strategies = {r.provider: r for r in stored if r.level == "layer" and r.sweep == "main"}
    for name in ("dcft_row_block", "dcft_fused"):  # interpreted
        assert strategies[name].gate == "passed"
    assert (tmp_path / "summary.txt").read_text().splitlines()


def stub(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def calls(tmp_path: Path) -> list[list[str]]:
    """The commands of a real run, on a machine whose Python and tools only write them down."""
    written = tmp_path / "calls.txt"
    tools = tmp_path / "tools"
    tools.mkdir()
    python = stub(
        tools,
        "python3",
        f"""printf '%s\\n' "$*" >> {shlex.quote(str(written))}
case "$*" in *xdist*) echo '-n 6' ;; *slug*) echo some-gpu ;; *) echo '# said' ;; esac""",
    )
    for tool in ("ncu", "compute-sanitizer"):
        command = 'while [ "$1" != "$PYTHON" ]; do shift; done; "$@"'
        stub(tools, tool, f"echo {tool} $* >> {shlex.quote(str(written))}; {command}")
    stub(tools, "nvidia-smi", "echo a GPU")
    out = tmp_path / "out"
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    finished = called(out=out, PYTHON=str(python), PATH=path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "left out" not in finished.stdout
    assert "a GPU" in (out / "environment.txt").read_text()
    assert len(list(out.iterdir())) <= len(RESULTS)
    return [shlex.split(line) for line in written.read_text().splitlines()]


def modules(calls: list[list[str]]) -> list[str]:
    """In order, but for what only compiles kernels beside the first of them."""
    beside = ["-m", "benchmarks.launch_once"]
    return [call[1] for call in calls if call[0] == "-m" and call != beside]


def test_kernels_are_compiled_beside_the_ceilings(calls: list[list[str]]) -> None:
    beside = calls.index(["-m", "benchmarks.launch_once"])
    headline = next(i for i, call in enumerate(calls) if "dcft_fused" in call)
    assert beside < headline


def test_a_real_run_calls_the_most_valuable_first(calls: list[list[str]]) -> None:
    order = modules(calls)
    assert order[:4] == [
        "benchmarks.environment",
        "benchmarks.run",
        "benchmarks.run",
        "benchmarks.report",
    ]
    assert order[-1] == "benchmarks.report"
    assert order.index("benchmarks.selftest") < order.index("pytest")
    assert order.index("pytest") < order.index("benchmarks.tune")
    assert order.index("tests.kernels.sanitizer_program") < order.index("benchmarks.tune")
    sanitizers = [call for call in calls if call[0] == "compute-sanitizer"]
    assert [call[2] for call in sanitizers] == ["memcheck", "racecheck"]
    # Once more before them, to be compiled while the tests run.
    assert order.count("tests.kernels.sanitizer_program") == 3


def test_every_measurement_of_a_real_run_exists(calls: list[list[str]]) -> None:
    """Levels, sweeps and providers are spelt as the suite has them, and select something."""
    seen = set()
    for call in calls:
        if call[:2] != ["-m", "benchmarks.run"]:
            continue
        options = run.parser().parse_args(["cpu" if part == "cuda" else part for part in call[2:]])
        options.levels = options.levels or []
        chosen = run.selected(options, Scope("cuda", options.size))
        assert chosen, call
        seen |= {case.level for case, _ in chosen}
        names = {entry.name for _, entries in chosen for entry in entries}
        assert set(options.providers) <= names, call
    assert seen == set(run.LEVELS)


def test_the_tuner_of_a_real_run_writes_beside_the_results(calls: list[list[str]]) -> None:
    (call,) = (call for call in calls if call[:2] == ["-m", "benchmarks.tune"])
    options = tune._parser().parse_args(call[2:])
    assert options.table.parent == options.rates.parent == options.out
    assert json.loads(options.table.read_text())


def test_parts_end_in_time(tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    budget = int(text.split("BUDGET=${BUDGET:-")[1].split("}")[0])
    kept = int(text.split("KEPT_FOR_SUMMARY=")[1].split()[0])
    assert budget < MINUTES * 60
    tools = tmp_path / "tools"
    tools.mkdir()
    finished = called(out=tmp_path / "out", PYTHON=str(stub(tools, "python3", "exit 0")))
    limits = [int(n) for n in re.findall(r"\(at most (\d+) s\)", finished.stdout)]
    assert len(limits) >= 14
    # All but the last, which takes what is left.
    assert sum(limits[:-1]) <= budget - kept


def test_what_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    python = stub(tools, "python3", 'case "$*" in *selftest*|*tune*) exit 3 ;; esac')
    finished = called(out=tmp_path / "out", PYTHON=str(python))
    assert finished.returncode == 0
    assert "not complete: self-test (status 3); tuner (status 3);" in finished.stdout
    assert finished.stdout.count("== everything: status 0") == 1


def test_a_spent_budget_leaves_parts_out_and_keeps_the_summary(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    python = stub(tools, "python3", "echo said")
    finished = called(out=tmp_path / "out", PYTHON=str(python), BUDGET="18")
    assert "== headline: left out, the budget of 18 s is spent" in finished.stdout
    assert (tmp_path / "out" / "summary.txt").read_text() == "said\n"


def test_no_gpu_and_strange_arguments_are_refused(tmp_path: Path) -> None:
    finished = called("--quick", out=tmp_path)
    assert (finished.returncode, finished.stderr) == (
        2,
        "gpu_run.sh: expected --dry-run or nothing, got '--quick'\n",
    )
    finished = called(out=tmp_path, PYTHON="false")
    assert finished.returncode == 2
    assert "finds no GPU, or no torch or triton" in finished.stderr
