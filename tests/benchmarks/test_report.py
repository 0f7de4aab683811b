"""Reports and plots, from rows with known values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks import plots, report, rows
from benchmarks.environment import RESULTS
from benchmarks.rows import Row
from benchmarks.stored import StoredRows, load, provenance
from tests.benchmarks.test_levels import row

SIZES = {
    "dcft": {"d": 8, "k": 1, "stride": 8},
    "published": {"d": 8, "k": 1, "stride": 8},
    "lora_r8": {"k": 8},
}
RATIOS = {"frozen": 1.0, "dcft": 1.05, "lora_r8": 1.2, "published": 2.9}


def timed(provider: str, ratio: float, **values: object) -> Row:
    """A row from a CPU."""
    times = {"rounds": 9, "wall_ms_p50": 20 * ratio, "ratio_to_frozen_wall": ratio}
    return row(provider, **{**SIZES.get(provider, {}), **times, "gate": "passed", **values})


def on_gpu(provider: str, device: float, wall: float, **values: object) -> Row:
    """A row from a GPU."""
    times = {"rounds": 9, "dtype": "bf16", "gate": "passed"}
    for clock, ratio in (("device", device), ("wall", wall)):
        times |= {f"{clock}_ms_p50": 2 * ratio, f"ratio_to_frozen_{clock}": ratio}
    return row(provider, **{**SIZES.get(provider, {}), **times, **values})


def layer_rows() -> list[Row]:
    found = [
        timed(p, r, n=n, saved_bytes=int(r * 2**20)) for n in (16, 32) for p, r in RATIOS.items()
    ]
    return [*found, row("lora_r1", error="cannot run: no peft")]


def stored(found: Iterable[Row]) -> StoredRows:
    return StoredRows(Path("some-device"), tuple(rows.latest(found)))


def text_of(found: Iterable[Row]) -> str:
    return report.report(stored(found))


def test_ratios_and_memory_have_tables() -> None:
    text = text_of([*layer_rows(), timed("dcft", 1.3, k=4), timed("dcft", 1.4, d=4, stride=2)])
    layers, _, memory = text.partition("Saved for backward")
    assert "| provider | 8x16->16 fp32 | 8x32->16 fp32 |" in layers
    assert "| frozen, ms | 20.0 | 20.0 |" in layers
    assert "| rounds | 9 | 9 |" in layers
    assert "| DCFT | 1.05 | 1.05 |" in layers
    assert "| DCFT, k=4 | 1.30 | – |" in layers
    assert "| DCFT, d=4, stride=2 | 1.40 | – |" in layers
    assert "From [`rows.jsonl`](rows.jsonl): some device; torch 2.0; commit abc1234;" in layers
    assert "| DCFT as published | 2.90 | 2.90 |" in memory


def test_only_the_latest_run_of_a_case_counts() -> None:
    newer = [timed(p, r, time="2026-02-02") for p, r in (("frozen", 1.0), ("dcft", 1.5))]
    assert "| DCFT | 1.50 | 1.05 |" in text_of([*layer_rows(), *newer])
    assert provenance([*layer_rows(), *newer]).endswith("2026-01-01, 2026-02-02")


def test_clocks_have_separate_tables_on_a_gpu() -> None:
    text = text_of([on_gpu("frozen", 1, 1), on_gpu("dcft", 1.1, 1.4), on_gpu("lora_r8", 1.5, 2)])
    _, _, device = text.partition("Ratio to the frozen layer, device time:\n")
    device, _, wall = device.partition("Ratio to the frozen layer, wall time:\n")
    assert "| DCFT | 1.10 |" in device
    assert "| DCFT | 1.40 |" in wall


def test_sweeps_have_separate_tables() -> None:
    found = [timed(p, r, sweep="tokens", T=T) for T in (1, 16) for p, r in RATIOS.items()]
    found += [timed("frozen", 1.0, sweep="rank")]
    found += [timed("dcft", ratio, sweep="rank", k=k) for k, ratio in ((1, 1.1), (2, 1.2))]
    tokens, _, rank = text_of(found).partition("### Forward + backward, by rank")
    assert "| provider | 1x16->16 fp32 | 16x16->16 fp32 |" in tokens
    assert "| DCFT | 1.10 |\n| DCFT, k=2 | 1.20 |" in rank


def test_cpu_sweep_answers_the_goals() -> None:
    def case(T: int, ratios: dict[str, float], **values: object) -> list[Row]:
        shape = {"T": T, "n": 768, "m": 768, "sweep": "cpu", "threads": 2}
        return [timed(p, r, **{**shape, **values}) for p, r in ratios.items()]

    quicker = {"frozen": 1.0, "dcft": 1.1, "lora_r1": 1.2, "lora_r8": 1.3, "lora_by_hand": 1.08}
    slower = {"frozen": 1.0, "dcft": 1.3, "lora_r1": 1.4, "lora_r8": 1.25, "lora_by_hand": 1.0}
    found = [*case(128, slower), *case(512, quicker), *case(2048, quicker)]
    found += case(16, slower)  # too few tokens to count
    found += case(1, slower, direction="inference")
    busy = {"frozen": 1.0, "dcft": 2.2, "lora_r1": 3.6}
    found += case(512, busy, neighbour=True)
    text = text_of(found)
    assert "| 1 of 3; worst 1.04, 128x768, 2 threads | 0 of 1; worst 0.61, 512x768," in text
    assert "by hand | 1 of 3; worst 1.30, 128x768, 2 threads | – |" in text
    assert "frozen | worst 1.10, 512x768, 2 threads | worst 2.20, 512x768, 2 threads, busy" in text
    assert "frozen | worst 1.30, 1x768, 2 threads | – |" in text
    assert "neighbour: DCFT | – | 2.00 |" in text
    assert "neighbour: LoRA r=1 (peft) | – | 3.00 |" in text
    training = text.partition("#### fp32 training, 2 threads\n")[2]
    assert "| 512x768 | 20.0 | 1.10 | 1.20 | 1.30 | 1.08 | 9 |" in training
    assert "#### fp32 training, 2 threads, busy neighbour" in training


def test_levels_without_a_frozen_layer_have_times_and_rates() -> None:
    shape = {"level": "merge", "direction": "merge", "T": None}
    text = text_of([on_gpu("copy", 0.9, 1, **shape), on_gpu("dcft", 1.0, 1, gb_per_s=9.5, **shape)])
    milliseconds, _, rates = text.partition("GB/s, counted:")
    assert "| DCFT | 2.000 |" in milliseconds
    assert "| DCFT | 9.50 |" in rates


def test_failures_are_counted_once_per_reason() -> None:
    found = [*layer_rows(), row("lora_r1", n=32, error="cannot run: no peft")]
    found += [row("dora", gate="failed", error="y: off by 3")]
    found += [on_gpu("lokr", 2.2, 2.2, graph_error="cannot capture")]
    text = text_of(found).partition("## Without a time")[2]
    assert "- LoRA r=1 (peft) (layer, 2 cases): cannot run: no peft\n" in text
    assert "- DoRA r=8 (peft) (layer, 1 case): wrong result: y: off by 3\n" in text
    assert "CUDA graph\n\n- LoKr r=4 (peft) (layer, 1 case): cannot capture" in text


def test_plot_is_drawn_if_there_are_layers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / plots.PLOT_FILE
    plot.touch()  # a stale one
    for found, drawn in (([timed("frozen", 1.0)], False), (layer_rows(), True)):
        for one in found:
            rows.append(tmp_path / rows.ROWS_FILE, one)
        assert report.main([str(tmp_path)]) == 0
        text = (tmp_path / report.REPORT_FILE).read_text(encoding="utf-8")
        assert (plot.exists(), "![layer](layer.png)" in text) == (drawn, drawn)


@pytest.mark.parametrize("folder", sorted(f.parent for f in RESULTS.glob(f"*/{rows.ROWS_FILE}")))
def test_stored_report_is_that_of_the_stored_rows(folder: Path) -> None:
    text = report.report(load(folder), plotted=(folder / plots.PLOT_FILE).exists())
    assert text == (folder / report.REPORT_FILE).read_text(encoding="utf-8")


def test_folder_without_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "rows.jsonl: no such file" in capsys.readouterr().err
