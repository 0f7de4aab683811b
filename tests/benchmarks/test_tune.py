"""The tuner: rows, candidates, and which tile may win."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.speed.cases import Case
from benchmarks.speed.levels.kernel import KernelCall, KernelProblem
from benchmarks.speed.provider import Provider
from dcft_kernels.triton import tiles
from dcft_kernels.triton.tiles import Tile

TILE = Tile(16, 16, 0, 1, 2, 1)
OTHER = Tile(32, 16, 0, 1, 4, 1)


def test_one_tile_changes_one_line(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    shipped = tiles.TABLE.read_text(encoding="utf-8")
    table.write_text(shipped, encoding="utf-8")
    job = tune.Job("backward", "bf16", 64, (64,))
    tune.store_tile(table, job, "sm_90", TILE)
    changed = [
        line
        for line, before in zip(
            table.read_text(encoding="utf-8").splitlines(), shipped.splitlines(), strict=True
        )
        if line != before
    ]
    assert len(changed) == 1
    assert '"64": [16, 16, 0, 1, 2, 1]' in changed[0]


def test_valuable_entries_come_first() -> None:
    table = tune.read_table(tiles.TABLE)
    found = tune.jobs(table, "sm_90")
    assert len(found) == len(set(found))
    assert [str(job) for job in found[:2]] == ["backward bf16 16", "shrink_expand bf16 16"]
    expand = next(job for job in found if job.kernel == "expand")
    assert expand.classes == (16, 32, 64, 128, 256)


@pytest.mark.parametrize(("kernel", "side"), [("shrink", 1), ("shrink_backward", 2)])
def test_passes_are_timed_on_rows_that_their_entry_is_for(kernel: str, side: int) -> None:
    least, usual = 0, tune.Settings().shapes
    for job in tune.jobs(tune.read_table(tiles.TABLE), "sm_90", f"^{kernel} "):
        shapes = job.shapes(usual)
        assert shapes
        assert all(least < shape[side] <= job.columns for shape in shapes)
        least = job.columns


def test_tiles_that_few_tokens_make_equal_are_timed_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = []

    def measure(case: Case, providers: list[Provider], *_: object, **__: object) -> list[object]:
        timed.append([provider.name for provider in providers])
        sample = SimpleNamespace(device=None, wall=1.0)
        return [SimpleNamespace(samples=[sample]) for provider in providers]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune.tiles, "multiprocessors", lambda device: 132)
    tuner = tune.Tuner(torch.device("cpu"), tune.Settings(), tiles.TABLE, tmp_path / "rows")
    job = tune.Job("backward", "bf16", 16, (16,))
    chosen = [Tile(64, 128, 0, 2, 8, 3), Tile(32, 128, 0, 2, 8, 3), Tile(32, 128, 0, 2, 8, 2)]
    assert list(tuner.times(job, (4096, 768, 768), 16, chosen)) == chosen
    assert list(tuner.times(job, (8192, 768, 768), 16, chosen)) == chosen
    names = ["64-128-0-2-8-3", "32-128-0-2-8-3", "32-128-0-2-8-2"]
    assert timed == [[names[0], names[2]], names]


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_neighbours_are_near_and_within_bounds(kernel: str) -> None:
    start = list(tiles.entries("sm_90", kernel, 2).values())[-1]
    found = tune.neighbours(kernel, start)
    assert len(found) == len(set(found)) >= 2
    assert start not in found
    for tile in found:
        changed = [f for f in Tile._fields if getattr(tile, f) != getattr(start, f)]
        assert 1 <= len(changed) <= 2
        for field in changed:
            low, high = (tune._BOUNDS | tune._BOUNDS_OF.get(kernel, {}))[field]
            assert low <= getattr(tile, field) <= high


def test_tile_wins_by_more_than_noise() -> None:
    assert tune.wins([0.90, 0.91, 0.92, 0.93, 1.50])
    assert not tune.wins([0.90, 0.91, 0.92, 0.99, 1.50])
    assert not tune.wins([0.985] * 15)
    times = [
        {TILE: [1.0, 2.0, 9.0], OTHER: [2.0, 4.0, 9.0]},
        {TILE: [1.0, 1.0], OTHER: [0.5, 0.5]},
    ]
    assert tune.ratios(times, OTHER, TILE) == pytest.approx([1.0, 1.0])


def test_check_sees_what_a_later_tile_leaves_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first tile's right results must not pass for those of a second one that writes nothing."""
    problem = KernelProblem(Case("kernel", 4, 16, 16, "fp32"), torch.device("cpu"))
    out = torch.empty_like(problem.x)
    writes = iter([True, False])

    def launch() -> dict[str, torch.Tensor]:
        return {"x": out.copy_(problem.x) if next(writes) else out}

    monkeypatch.setitem(tune.KERNELS, "expand", lambda problem: KernelCall(launch, (out,), "x"))
    assert tune.workload(problem, "expand", TILE).check() is None
    with pytest.raises(ValueError, match="x: not finite"):
        tune.workload(problem, "expand", TILE)


def test_climb_takes_the_fastest_right_tile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "tiles.json"
    table.write_bytes(tiles.TABLE.read_bytes())
    job = tune.Job("backward", "fp32", 64, (16, 32, 64))
    start = Tile(*tune.read_table(table)["interpreter"]["backward"]["4"]["64"])
    wrong, too_wide, fast, slow = (start._replace(features=f) for f in (16, 64, 128, 256))
    seconds = {start: 1.0, wrong: 0.1, too_wide: 0.2, fast: 0.5, slow: 2.0}
    monkeypatch.setattr(tune, "neighbours", lambda *_: [wrong, too_wide, fast, slow])

    def times(self, job: tune.Job, shape: object, columns: int, chosen: list[Tile]) -> tune.Times:
        fails = {wrong} | ({too_wide} if columns == 64 else set())
        return {tile: [seconds[tile]] * 5 for tile in chosen if tile not in fails}

    monkeypatch.setattr(tune.Tuner, "times", times)
    tuner = tune.Tuner(torch.device("cpu"), tune.Settings(), table, tmp_path / tune.TUNE_FILE)
    assert tuner.climb(job) == (start, fast, 0.5)
    seconds[start] = 0.4
    assert tuner.climb(job) == (start, start, 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no GPU: PyTorch finds none; --dry-run" in capsys.readouterr().err
