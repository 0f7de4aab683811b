"""The tuner: what it writes, what it tries, what it lets pass; and all of it, tiny, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import environment, kernel_work, tune
from benchmarks.gate import check_beside
from dcft_kernels import gpu_rates
from dcft_kernels.triton import tiles
from dcft_kernels.triton.tiles import Tile

JOB = tune.Job("backward", torch.bfloat16, 64, (64,))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A copy of the shipped tiles."""
    path = tmp_path / "tiles.json"
    path.write_bytes(tiles.TABLE.read_bytes())
    return path


# Files.


def test_the_shipped_tables_are_as_the_writer_writes_them() -> None:
    for path, format_ in ((tiles.TABLE, tune.format_table), (gpu_rates.TABLE, tune.format_rates)):
        text = path.read_text(encoding="utf-8")
        assert format_(json.loads(text)) == text, path.name


def test_one_tile_changes_one_line(table: Path) -> None:
    tune.store_tile(table, JOB, "sm_90", Tile(16, 16, 0, 1, 2, 1))
    before = tiles.TABLE.read_text(encoding="utf-8").splitlines()
    after = table.read_text(encoding="utf-8").splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == 1
    assert '"64": [16, 16, 0, 1, 2, 1]' in changed[0][1]
    assert tune.read_table(table)["sm_90"]["backward"]["2"]["64"] == [16, 16, 0, 1, 2, 1]
    unchanged = Tile(*tune.read_table(tiles.TABLE)["sm_90"]["backward"]["2"]["64"])
    tune.store_tile(table, JOB, "sm_90", unchanged)
    assert table.read_bytes() == tiles.TABLE.read_bytes()


def test_a_write_that_fails_leaves_the_file(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        tune.store_tile(table, JOB, "sm_90", Tile(16, 16, 0, 1, 2, 1))
    assert table.read_bytes() == tiles.TABLE.read_bytes()
    assert list(table.parent.iterdir()) == [table]


def test_a_file_keeps_its_mode(table: Path) -> None:
    table.chmod(0o640)
    tune.replace_file(table, "{}\n")
    assert table.stat().st_mode & 0o777 == 0o640
    assert table.read_text(encoding="utf-8") == "{}\n"


def test_measured_rates_are_found_by_the_full_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu_rates.json"
    path.write_bytes(gpu_rates.TABLE.read_bytes())
    entry = json.loads(path.read_text(encoding="utf-8"))["H100"] | {"source": "measured here"}
    tune.store_rates(path, "NVIDIA H100 80GB HBM3", entry)
    monkeypatch.setattr(gpu_rates, "TABLE", path)
    monkeypatch.setattr(gpu_rates, "table", gpu_rates.table.__wrapped__)
    look = gpu_rates.lookup.__wrapped__
    assert look("NVIDIA H100 80GB HBM3", "sm_90").source == "measured here"
    assert look("NVIDIA H100 NVL", "sm_90").source != "measured here"


# What is tried.


def test_valuable_entries_come_first() -> None:
    table = tune.read_table(tiles.TABLE)
    found = tune.jobs(table, "sm_90", list(tune.KERNELS), list(tune.DTYPES.values()))
    assert len(found) == len(set(found)) == 3 * (4 + 3) + 2 + 2 + 4
    assert [str(job) for job in found[:3]] == [
        "backward bfloat16 16",
        "shrink_expand bfloat16 16",
        "fused_linear bfloat16 16",
    ]
    assert found[0].classes == (16,)
    expand = next(job for job in found if job.kernel == "expand")
    assert expand.classes == (16, 32, 64, 128, 256)


@pytest.mark.parametrize("columns", sorted(kernel_work.ADAPTERS))
def test_adapters_fill_their_class(columns: int) -> None:
    from dcft_kernels.triton.layout import layout_of

    problem = kernel_work.Problem((4, 48, 96), columns, torch.float32, torch.device("cpu"), 0)
    assert layout_of(problem.geometry).columns == columns


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_neighbours_are_near_and_distinct(kernel: str) -> None:
    assert kernel in tune.KERNELS
    start = list(tiles.entries("sm_90", kernel, 2).values())[-1]
    found = tune.neighbours(kernel, start)
    assert len(found) == len(set(found)) >= 5
    assert start not in found
    for tile in found:
        changed = [f for f in Tile._fields if getattr(tile, f) != getattr(start, f)]
        assert 1 <= len(changed) <= 2
        assert set(changed) <= set(tune._FIELDS[kernel])
        for field in changed:
            low, high = tune._BOUNDS[field]
            assert low <= getattr(tile, field) <= high


def test_what_shared_memory_cannot_hold_is_not_tried() -> None:
    tile = Tile(64, 128, 0, 0, 4, 3)
    needed = (3 * 64 * 128 + 128 * 16) * 2
    assert tune.fits("shrink_expand", tile, 2, 16, needed)
    assert not tune.fits("shrink_expand", tile, 2, 16, needed - 1)
    assert tune.fits("shrink_expand", tile, 2, 16, None)


# What may win.


def test_a_tile_wins_by_more_than_noise() -> None:
    assert tune.wins([0.90, 0.91, 0.92, 0.93, 1.50])
    assert not tune.wins([0.90, 0.91, 0.92, 0.99, 1.50])
    assert not tune.wins([0.985] * 15)


def test_ratios_are_within_rounds_and_over_shapes() -> None:
    a, b = Tile(16, 16, 0, 0, 4, 1), Tile(32, 16, 0, 0, 4, 1)
    times = [{a: [1.0, 2.0, 9.0], b: [2.0, 4.0, 9.0]}, {a: [1.0, 1.0], b: [0.5, 0.5]}]
    assert tune.ratios(times, b, a) == pytest.approx([1.0, 1.0])


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events around all launches, behind a pause that covers their enqueuing."""
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queue.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 6.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("pause"))
    launches = [lambda: queue.append("launch")] * 3
    result = tune.seconds_a_launch(launches, torch.device("cuda"))
    assert queue == ["pause", "event", "launch", "launch", "launch", "event"]
    assert result() == pytest.approx(2e-3)


def test_the_gate_stops_what_is_wrong() -> None:
    truth = {"y": torch.linspace(-1, 1, 64, dtype=torch.float64)}
    peer = {"y": truth["y"].bfloat16()}

    def gate(y: torch.Tensor) -> str | None:
        return check_beside({"y": y}, peer, truth, torch.bfloat16)

    assert gate(truth["y"].bfloat16()) is None
    unwritten, off = truth["y"].clone(), truth["y"].clone()
    unwritten[3], off[3] = float("nan"), 0.5
    assert "y: not finite" in str(gate(unwritten))
    assert "y: error 1.4" in str(gate(off))
    assert "y: error 0.0" in str(gate(truth["y"] * 1.02))


def test_the_gate_sees_what_a_later_tile_leaves_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first tile's right results must not pass for those of a second one that writes nothing."""
    y = torch.empty(4, 4)
    writes = iter([True, False])

    def launch(copy: int) -> dict[str, torch.Tensor]:
        if next(writes):
            y.fill_(2.0)
        return {"y": y, "allocated": torch.empty(3).nan_to_num(nan=1.0)}

    def expected(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        ones = torch.ones(3, dtype=dtype)
        return {"y": torch.full((4, 4), 2.0, dtype=dtype), "allocated": ones}

    monkeypatch.setitem(
        tune.KERNELS, "expand", lambda p: kernel_work.Work(1, (y,), launch, expected)
    )
    problem = kernel_work.Problem((4, 16, 16), 16, torch.float32, torch.device("cpu"), 0)
    checked = tune.Checked("expand", problem)
    tile = Tile(32, 0, 32, 0, 4, 1)
    assert checked.why_wrong(tile) is None
    assert "y: not finite" in str(checked.why_wrong(tile))
    with pytest.raises(StopIteration):
        next(writes)
    assert "StopIteration" in str(checked.why_wrong(tile))


def test_a_tile_stands_in_for_the_tables() -> None:
    tile, other = Tile(16, 16, 0, 1, 2, 1), Tile(32, 16, 0, 1, 2, 1)
    before = tiles.lookup("sm_90", "backward", 2, 16)
    with tiles.override("backward", tile):
        assert tiles.lookup("sm_90", "backward", 2, 16) == tile
        assert tiles.lookup("sm_90", "shrink_expand", 2, 16) != tile
        with tiles.override("backward", other):
            assert tiles.lookup("sm_90", "backward", 2, 256) == other
        assert tiles.lookup("sm_90", "backward", 2, 16) == tile
    assert tiles.lookup("sm_90", "backward", 2, 16) == before
    message = r"kernel: expected one of shrink_expand, .*, got 'x'"
    with pytest.raises(ValueError, match=message), tiles.override("x", tile):
        pass


# The program.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == 2
    assert "no GPU: PyTorch finds none to measure; --dry-run" in capsys.readouterr().err


def test_a_dry_run_starts_again_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], str]] = []

    def call(command: list[str], env: dict[str, str]) -> int:
        started.append((command[1:], env["TRITON_INTERPRET"]))
        return 7

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(subprocess, "call", call)
    assert tune.main(["--dry-run", "--budget", "5"]) == 7
    assert started == [(["-m", "benchmarks.tune", "--dry-run", "--budget", "5"], "1")]


def test_a_dry_run_keeps_off_the_shipped_tables(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for option, path in (("--table", tiles.TABLE), ("--rates", gpu_rates.TABLE)):
        with pytest.raises(SystemExit):
            tune.main(["--dry-run", "--out", str(tmp_path), option, str(path)])
        assert f"{option}: a dry run must not write the shipped" in capsys.readouterr().err


def test_a_dry_run(tmp_path: Path, table: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.tune", "--dry-run"]
    command += ["--kernels", "expand", "--dtypes", "fp32"]
    command += ["--out", str(tmp_path / "rows"), "--table", str(table)]
    shipped = tiles.TABLE.read_bytes(), gpu_rates.TABLE.read_bytes()
    variables = os.environ | {"TRITON_INTERPRET": "1"}  # or it would set it and start again
    result = subprocess.run(
        command, cwd=environment.ROOT, env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tiles.TABLE.read_bytes(), gpu_rates.TABLE.read_bytes()) == shipped
    lines = (tmp_path / "rows" / "tune.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["kernel"] for row in rows] == ["rates", "expand", "expand"]
    for row in rows[1:]:
        assert row["gate"] == "passed"
        assert 0 < row["device_ms_p20"] <= row["device_ms_p50"] <= row["device_ms_p80"]
        assert row["triton"] is not None
    after, before = tune.read_table(table), tune.read_table(tiles.TABLE)
    assert {k: v for k, v in after.items() if k != "interpreter"} == {
        k: v for k, v in before.items() if k != "interpreter"
    }
    first, last = (t["interpreter"]["expand"]["4"]["256"] for t in (before, after))
    outcome = "stays" if first == last else f"-> {last}"
    assert f"expand float32 256: {first} {outcome}" in result.stdout
    rates = json.loads((tmp_path / "rows" / "gpu_rates.json").read_text(encoding="utf-8"))
    assert rates["dry run"]["source"].startswith("measured ")
    assert gpu_rates.from_entry("dry run", rates["dry run"]).bandwidth > 0


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu(tmp_path: Path) -> None:
    """A few seconds of the real thing, into copies of the tables."""
    command = [sys.executable, "-m", "benchmarks.tune", "--kernels", "expand", "--dtypes", "bf16"]
    copies = []
    for option, shipped in (("--table", tiles.TABLE), ("--rates", gpu_rates.TABLE)):
        copy = tmp_path / shipped.name
        copy.write_bytes(shipped.read_bytes())
        copies += [option, str(copy)]
    command += ["--budget", "30", "--out", str(tmp_path), *copies]
    result = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rates = json.loads((tmp_path / "gpu_rates.json").read_text(encoding="utf-8"))
    measured = gpu_rates.from_entry("here", rates[torch.cuda.get_device_name()])
    assert measured.bandwidth > 1e10
    assert measured.matrix_16 > measured.matrix_fp32
