"""The benchmarks' reports: from rows with known values, nothing measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks import (
    goals,
    host_rows,
    paper,
    plots,
    report,
    roofline,
    rows,
    sections,
    stored,
    summary,
    tables,
)
from benchmarks.adapters import ADAPTERS
from benchmarks.entries import BASELINE
from benchmarks.rows import Row
from benchmarks.stored import Stored

DEFAULTS = {
    "provider": "dcft",
    "level": "layer",
    "model": None,
    "direction": "fwd+bwd",
    "dtype": "fp32",
    "T": 8,
    "n": 16,
    "m": 16,
    "d": None,
    "k": None,
    "stride": None,
    "device": "some device",
    "torch": "2.0",
    "triton": None,
    "peft": "0.1",
    "commit": "abc1234",
    "time": "2026-01-02T03:04:05+00:00",
}
SIZES = {
    "dcft": {"d": 8, "k": 1, "stride": 8},
    "published": {"d": 8, "k": 1, "stride": 8},
    "lora_r8": {"k": 8},
    "lora_autograd": {"k": 8},
    "lora_r1": {"k": 1},
    "lokr": {"d": 8, "k": 4},
}
RATIOS = {
    "frozen": 1.0,
    "dcft": 1.05,
    "lora_r8": 1.2,
    "published": 2.9,
    "lora_autograd": 1.1,
    "lokr": 7.5,
}


def row(provider: str = "dcft", **values: object) -> Row:
    return Row(**{**DEFAULTS, **SIZES.get(provider, {}), **values, "provider": provider})  # type: ignore[arg-type]


def timed(provider: str, ratio: float, *, ms: float = 20.0, **values: object) -> Row:
    """A row as a CPU gives it."""
    times = {"rounds": 9, "wall_ms_p50": ms * ratio, "ratio_to_frozen_wall": ratio}
    return row(provider, **{**times, "gate": "passed", **values})


def on_gpu(provider: str, device: float, wall: float, graph: float | None, **values: object) -> Row:
    """A row as a GPU gives it."""
    clocks = {"device": device, "wall": wall, "graph": graph}
    times: dict[str, object] = {"rounds": 9, "gate": "passed", "dtype": "bf16", "triton": "3.7"}
    for clock, ratio in clocks.items():
        if ratio is not None:
            times |= {f"{clock}_ms_p50": 2 * ratio, f"ratio_to_frozen_{clock}": ratio}
    return row(provider, **{**times, **values})


def layer_rows(ratios: dict[str, float] = RATIOS) -> list[Row]:
    found = [
        timed(p, r, n=n, saved_bytes=int(r * 2**20)) for n in (16, 32) for p, r in ratios.items()
    ]
    return [*found, row("lora_r1", error="cannot run: no peft")]


def gpu_rows() -> list[Row]:
    small, large = {"T": 4096, "n": 768, "m": 768}, {"T": 8192, "n": 4096, "m": 4096}
    found = []
    for shape, ratios in (
        (small, {"frozen": (1, 1, 1), "dcft": (1.4, 1.3, 1.15), "dcft_fused": (1.2, 1.3, 1.25)}),
        (large, {"frozen": (1, 1, None), "dcft": (1.1, 1.3, None), "lora_r8": (1.5, 1.6, None)}),
    ):
        for provider, (device, wall, graph) in ratios.items():
            found.append(on_gpu(provider, device, wall, graph, **shape))
    return [*found, on_gpu("lokr", 2.2, 2.2, None, **large)]


def folder_of(root: Path, found: Iterable[Row], name: str = "some-device") -> Path:
    folder = root / "results" / name
    for one in found:
        rows.append(folder / stored.ROWS, one)
    return folder


def held(found: Iterable[Row]) -> Stored:
    return Stored(Path("some-device"), tuple(rows.latest(found)))


def text_of(found: Iterable[Row]) -> str:
    return sections.report(held(found))


# ------------------------------------------------------------------------------------------ tables


def test_ratios_stand_beside_the_frozen_layers_milliseconds() -> None:
    text = text_of(layer_rows())
    assert "| provider | 8x16->16 fp32 | 8x32->16 fp32 |" in text
    assert "| frozen, ms | 20.0 | 20.0 |" in text
    assert "| DCFT | 1.05 | 1.05 |" in text
    assert "| LoKr r=4 (peft) | 7.50 | 7.50 |" in text
    assert "| rounds | 9 | 9 |" in text
    assert (
        "From [`rows.jsonl`](rows.jsonl): some device; torch 2.0; peft 0.1; commit abc1234;" in text
    )


def test_more_cases_than_providers_go_downwards() -> None:
    found = [timed(p, r, n=n) for n in (16, 32, 64) for p, r in (("frozen", 1.0), ("dcft", 1.05))]
    text = tables.ratios(held(found).groups("layer"))
    assert "| case | frozen, ms | rounds | DCFT |" in text
    assert "| 8x64->16 fp32 | 20.0 | 9 | 1.05 |" in text


def test_variants_of_a_provider_are_told_apart() -> None:
    found = [*layer_rows(), timed("dcft", 1.3, k=4), timed("dcft", 1.4, d=4, stride=2)]
    text = text_of(found)
    assert "| DCFT | 1.05 | 1.05 |" in text
    assert "| DCFT, k=4 | 1.30 | – |" in text
    assert "| DCFT, d=4, stride=2 | 1.40 | – |" in text


def test_only_the_latest_run_of_a_case_counts() -> None:
    newer = [timed(p, r, time="2026-02-02") for p, r in (("frozen", 1.0), ("dcft", 1.5))]
    text = tables.ratios(held([*layer_rows(), *newer]).groups("layer"))
    assert "| DCFT | 1.50 | 1.05 |" in text
    assert "2026-01-02, 2026-02-02" in stored.provenance([*layer_rows(), *newer])


def test_old_rows_lack_newer_fields(tmp_path: Path) -> None:
    newer = ("sweep", "graph_ms_p20", "graph_ms_p50", "graph_ms_p80", "ratio_to_frozen_graph")
    newer += ("moved_bytes", "flops", "gb_per_s", "tflop_per_s", "graph_error")
    file = tmp_path / "old" / stored.ROWS
    for one in layer_rows():
        rows.append_line(file, {k: v for k, v in one.as_dict().items() if k not in newer})
    assert sections.report(stored.load(file.parent)) == text_of(layer_rows())


def test_memory_is_in_mib() -> None:
    text = text_of([*layer_rows(), timed("full", 1.5, saved_bytes=0, peak_bytes=3 << 20)])
    assert "Saved for backward, MiB, parameters not counted:" in text
    assert "| DCFT | 1.05 | 1.05 |" in text.partition("## Memory")[2]
    assert "| full fine-tuning | 0 | – |" in text
    assert "| full fine-tuning | 3.00 |" in text or "| 8x16->16 fp32 | 3.00 |" in text


def test_failures_are_counted_once_a_reason() -> None:
    found = [*layer_rows(), row("lora_r1", n=32, error="cannot run: no peft")]
    found += [row("dora", gate="failed", error="y: off by 3")]
    # What was timed is no failure, whatever else went wrong.
    found += [timed("full", 1.5, error="no footprint: too big")]
    found += [on_gpu("lokr", 2.2, 2.2, None, graph_error="cannot capture")]
    text = text_of(found).partition("## Without a time")[2]
    assert "- LoRA r=1 (peft) (layer, 2 cases): cannot run: no peft\n" in text
    assert "- DoRA r=8 (peft) (layer, 1 case): wrong result: y: off by 3\n" in text
    assert "footprint" not in text
    assert (
        "Not captured as a CUDA graph:\n\n- LoKr r=4 (peft) (layer, 1 case): cannot capture" in text
    )


# ------------------------------------------------------------------------------------------- goals


def test_goals_on_a_cpu_are_met_or_marked() -> None:
    assert "| 8x16->16 fp32 | 1.05 | 0.88 | 2.76 | 1.05 |" in text_of(layer_rows())
    slow = layer_rows({**RATIOS, "dcft": 1.25, "lora_autograd": 1.25})
    expected = "| **1.25, missed** | **1.04, missed** | **2.32, missed** | **1.00, missed** |"
    assert expected.replace("1.00, missed", "1.0000, missed") in text_of(slow)


def test_goals_on_a_gpu_are_for_some_shapes_and_clocks() -> None:
    text = text_of(gpu_rows())
    titles = ["case", "DCFT / frozen, device, goal ≤ 1.10", "DCFT / frozen, wall, goal ≤ 1.25"]
    assert f"| {' | '.join(titles)} |" in text
    small = next(line for line in text.splitlines() if line.startswith("| 4096x768->768 bf16 | –"))
    assert small.startswith("| 4096x768->768 bf16 | – | **1.30, missed** | 1.15 | not measured |")
    large = "| 8192x4096->4096 bf16 | 1.10 | – | – | 1.36 | **2.00, missed** | not measured |"
    assert large in text


def test_the_goals_of_shapes_do_not_bind_float32() -> None:
    found = [on_gpu(p, r, r, r, dtype="fp32", T=4096, n=768, m=768) for p, r in RATIOS.items()]
    assert not any("frozen" in verdict.goal.what for verdict in goals.verdicts(held(found)))


def test_what_misses_by_a_hair_does_not_look_met() -> None:
    verdicts = goals.verdicts(held(layer_rows({"frozen": 1.0, "dcft": 1.1004})))
    assert verdicts[0].text == "1.1004, missed"


def test_lora_by_hand_is_met_at_every_shape_of_every_sweep() -> None:
    swept = [timed(p, r, sweep="tokens", T=1) for p, r in RATIOS.items()]
    text = text_of([*layer_rows(), *swept])
    assert "Faster than LoRA r=8 by hand at every shape measured, 3 of them." in text
    swept = [timed(p, r, sweep="tokens", T=1) for p, r in {**RATIOS, "dcft": 2.2}.items()]
    text = text_of([*layer_rows(), *swept])
    assert "at 2 of 3 cases of all sweeps" in text
    assert "**missed** at 1x16->16 fp32 (tokens) 0.50, missed." in text


def test_merging_is_held_against_a_copy() -> None:
    shape = {"level": "merge", "direction": "merge", "T": None}
    found = [on_gpu(p, r, r, None, **shape) for p, r in (("copy", 0.9), ("dcft", 1.0))]
    found += [on_gpu("dcft_in_place", 1.2, 1.2, None, **shape)]
    text = text_of(found)
    assert "| DCFT | 1.11 |" in text
    assert "| copy / merge, DCFT, goal ≥ 0.90: 16->16 bf16 | 0.90 |" in text
    assert "| copy / merge, DCFT, in place, goal ≥ 0.90: 16->16 bf16 | **0.75, missed** |" in text


# ------------------------------------------------------------------------------------------- a GPU


def test_clocks_have_tables_of_their_own_on_a_gpu() -> None:
    text = text_of(gpu_rows())
    device, wall, graph = (
        text.partition(f"\n{title}:\n\n")[2].partition("\n\n")[0]
        for title in ("Device time", "Wall time", "Device time of the step as a CUDA graph")
    )
    assert "| DCFT | 1.40 | 1.10 |" in device
    assert "| DCFT | 1.30 | 1.30 |" in wall
    assert "4096x768->768 bf16" in graph
    assert "8192x4096->4096" not in graph


def test_auto_is_held_against_the_best_strategy() -> None:
    text = text_of(gpu_rows()).partition("## Strategies")[2]
    assert "| case | auto | fused | best | auto / best |" in text
    assert "| 4096x768->768 bf16 | 1.40 | 1.20 | fused | 1.17 |" in text
    assert "## Strategies" not in text_of(layer_rows())


def ceiling_rows() -> list[Row]:
    shape = {"level": "ceiling", "d": None, "k": None, "stride": None}
    return [
        on_gpu("copy", 1, 1, None, direction="copy", gb_per_s=2000.0, **shape),
        on_gpu("product", 1, 1, None, direction="product", tflop_per_s=500.0, **shape),
    ]


def kernel_row() -> Row:
    counted = {"moved_bytes": 10**9, "flops": 10**11}
    return on_gpu("backward", 1, 1, None, level="kernel", device_ms_p50=1.0, **counted)


def test_a_kernel_is_held_against_the_lower_ceiling() -> None:
    best = roofline.ceilings(held(ceiling_rows()))["bf16"]
    assert best.attainable(100.0) == pytest.approx(200.0)
    assert best.attainable(1000.0) == pytest.approx(500.0)
    text = text_of([*ceiling_rows(), kernel_row()])
    assert "| bf16 | 2,000 | 500 |" in text
    assert "| backward, 8x16->16 bf16 | 1.000 | 1.00 | 1,000 | 100 | 100.0 | memory | 50 |" in text
    assert "## Kernels" in text


def test_a_kernel_without_ceilings_has_rates_but_no_share() -> None:
    text = text_of([kernel_row()])
    assert "| 1,000 | 100 | 100.0 | – | – |" in text


# --------------------------------------------------------------------------------- sweeps and paper


def swept(level: str, sweep: str, by_size: dict[int, float], size: str = "d") -> list[Row]:
    direction = "step" if level == "step" else "fwd+bwd"
    case = {"level": level, "sweep": sweep, "direction": direction}
    found = [timed("frozen", 1.0, **case)]
    for value, ratio in by_size.items():
        sizes = {"d": value, "stride": value} if size == "d" else {size: value}
        found.append(timed("dcft", ratio, **case, **sizes))
    return found


def test_sweeps_have_a_line_a_size() -> None:
    found = [*swept("layer", "rank", {1: 1.1, 2: 1.2}, "k")]
    found += [*swept("layer", "stride", {8: 1.1, 4: 1.4}, "stride")]
    found += [timed(p, r, sweep="tokens", T=T) for T in (1, 16) for p, r in RATIOS.items()]
    text = text_of(found)
    assert "| k | DCFT |\n| --- | ---: |\n| 1 | 1.10 |\n| 2 | 1.20 |" in text
    assert "| stride | DCFT |\n| --- | ---: |\n| 4 | 1.40 |\n| 8 | 1.10 |" in text
    assert "### Tokens, 16->16 fp32 fwd+bwd" in text
    # A curve's points are in its own section, and not among the adapters.
    assert "rank" not in text.partition("## Scaling")[0]


def test_the_papers_times_stand_beside_ours() -> None:
    ours = {2: 3.0, 4: 2.6, 6: 2.5, 8: 2.0, 12: 2.2}
    text = text_of(swept("step", "paper", ours)).partition("## The paper's times")[2]
    assert "here: a training step, 8x16->16 fp32" in text
    assert "| 2 | 1.91 | 1.80 | 1.34 | 1.51 | 1.28 | 1.54 | 1.48 | 1.50 |" in text
    assert "9 of 9 pairs that differ in the paper are in its order" in text
    assert "**The paper's order is borne out.**" in text
    assert "arxiv.org/abs/2503.01419" in text


def test_a_paper_that_is_not_borne_out_is_said_so() -> None:
    backwards = paper.Times("DCFT", {2: 1.0, 4: 1.1, 8: 1.3})
    told = paper.sentence(paper.TABLE_4, backwards)
    assert "fastest at d = 2, the slowest takes 30% more (the paper: 48%)" in told
    assert "0 of 3 pairs" in told
    assert told.endswith("**The paper's order is not borne out.**")
    flat = paper.sentence(paper.TABLE_5, paper.Times("DCFT", {1: 1.01, 8: 1.0}))
    assert "too little to tell apart. **The paper's order is not borne out.**" in flat


def test_the_papers_times_fall_back_on_the_layers_sweeps() -> None:
    found = swept("layer", "stride", {1: 2.4, 8: 1.2}, "stride")
    text = text_of(found).partition("## The paper's times")[2]
    assert "here: forward and backward of a layer, 8x16->16 fp32" in text
    assert "| 1 | 3.69 | 1.24 | 2.71 | 1.50 | 2.00 |" in text


def test_dcft_beside_lora_is_told_in_words() -> None:
    text = text_of(layer_rows()).partition("### DCFT beside LoRA (Figure 2)")[2]
    assert "| QNLI | 10.19 | 12.33 | 0.83 |" in text
    assert "- DCFT / LoRA r=8 (peft): 0.88. **Faster," in text
    assert "- DCFT as published / LoRA r=8 (peft): 2.42. **Not faster," in text


# ---------------------------------------------------------------------------------------- sections


def other(level: str, direction: str, provider: str = "dcft", **values: object) -> Row:
    return timed(provider, 1.0, level=level, direction=direction, T=None, n=None, m=None, **values)


SECTIONS = {
    "Layers": layer_rows(),
    "Strategies": gpu_rows(),
    "Roofline": ceiling_rows(),
    "Memory": layer_rows(),
    "Scaling": swept("layer", "rank", {1: 1.1, 2: 1.2}, "k"),
    "Blocks": [timed(p, r, level="block", model="bert") for p, r in RATIOS.items()],
    "Training steps": swept("step", "main", {8: 1.2}),
    "The paper's times": swept("step", "paper", {2: 1.5, 8: 1.2}),
    "Merging": [other("merge", "merge")],
    "Optimizer": [other("optimizer", "step", "dcft_fused", model="bert")],
    "Adapter files": [other("load", "save", model="bert", moved_bytes=2048)],
    "Kernels": [kernel_row()],
    "Without a time": [row("dcft", error="cannot run: no reason")],
}


def titles(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_is_there_with_its_rows_and_only_then(title: str) -> None:
    assert title in titles(text_of(SECTIONS[title]))
    untimed = [row("dora", error="cannot run: no reason")]
    assert titles(text_of(untimed)) == ["Without a time"]


def test_other_levels_alone_have_no_layers() -> None:
    text = text_of([*SECTIONS["Merging"], *SECTIONS["Optimizer"], *SECTIONS["Adapter files"]])
    assert titles(text) == ["Merging", "Optimizer", "Adapter files"]
    assert "KiB on disk:\n\n| provider | bert fp32 |\n| --- | ---: |\n| DCFT | 2.0 |" in text
    assert "| DCFT, fused | 20.0 |" in text


# ------------------------------------------------------------------------------------------- files


def everything() -> list[Row]:
    found = [*gpu_rows(), *ceiling_rows(), kernel_row()]
    sizes = {"dtype": "bf16", "saved_bytes": 1 << 20, "peak_bytes": 3 << 20}
    found = [
        one if one.level != "layer" else rows.Row(**{**one.as_dict(), **sizes}) for one in found
    ]
    found += swept("layer", "rank", {1: 1.1, 2: 7.2}, "k")
    return [*found, *(timed(p, r, sweep="tokens", T=T) for T in (1, 16) for p, r in RATIOS.items())]


def test_the_same_rows_give_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = folder_of(tmp_path, everything())
    assert report.main([str(folder)]) == 0
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    drawn = {f"{name}{end}" for name in sections.PLOTS for end in (".png", ".svg")}
    assert set(first) == {stored.ROWS, report.REPORT, *drawn}
    assert first["layer.png"].startswith(b"\x89PNG")
    for name in sections.PLOTS:
        assert f"({name}.png)" in first[report.REPORT].decode()
    assert report.main([str(folder)]) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


def test_a_plot_without_rows_is_neither_drawn_nor_left(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = folder_of(tmp_path, SECTIONS["Merging"])
    (folder / "layer.png").write_bytes(b"of another time")
    assert report.main([str(folder)]) == 0
    assert {file.name for file in folder.iterdir()} == {stored.ROWS, report.REPORT}


def test_the_readme_has_every_device_between_its_markers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    one, two = (folder_of(tmp_path, layer_rows(), name) for name in ("one", "two"))
    assert report.main([str(one), str(two)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n\n### some device\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    for name in ("one", "two"):
        assert f"![Time relative to the frozen layer](results/{name}/layer.png)" in text
        assert f"(results/{name}/report.md)" in text
    assert "| DCFT | 1.05 | 1.05 |" in text
    # Again, and with one of them alone: nothing changes.
    assert report.main([str(one)]) == 0
    assert readme.read_text() == text


def test_a_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\nno end\n")
    assert not report.insert(readme, "section")
    assert readme.read_text() == f"{report.BEGIN}\nno end\n"


def test_all_folders_with_rows_are_reported_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert report.main([]) == 1
    assert f"{tmp_path / 'results'}: no */rows.jsonl" in capsys.readouterr().err
    folder = folder_of(tmp_path, layer_rows())
    (tmp_path / "results" / "empty").mkdir()
    assert report.main([]) == 0
    assert (folder / report.REPORT).is_file()


def test_bad_input_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = folder_of(tmp_path, layer_rows())

    def error(folder: Path, *before: str) -> str:
        assert report.main([*before, str(folder)]) == 1
        return capsys.readouterr().err

    missing = tmp_path / "missing"
    assert f"error: {missing}: expected a folder with rows.jsonl" in error(missing)
    bare = tmp_path / "bare"
    bare.mkdir()
    assert f"error: {bare / 'rows.jsonl'}: no such file" in error(bare, str(good))
    (bare / stored.ROWS).write_text("")
    assert f"{bare / 'rows.jsonl'}: expected rows, and there are none" in error(bare)
    (bare / stored.ROWS).write_text(json.dumps(row().as_dict()) + "\n{broken\n")
    assert f"{bare / 'rows.jsonl'}, line 2: not a result row" in error(bare, "--summary")
    (bare / stored.ROWS).write_bytes(b"\xff\xfe\n")
    assert f"{bare / 'rows.jsonl'}: expected lines of JSON in UTF-8" in error(bare)
    assert [file.name for file in good.iterdir()] == [stored.ROWS]
    with pytest.raises(SystemExit) as stopped:
        report.main(["--summary", str(good), str(good)])
    assert stopped.value.code == 2


# ----------------------------------------------------------------------------------------- summary


def test_a_summary_is_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path, everything())
    assert report.main(["--summary", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "goals: " in text
    assert "  DCFT / frozen, wall, goal ≤ 1.25, 4096x768->768 bf16: 1.30, missed" in text
    assert "fused 1.20, auto 1.40, 1.17 x that" in text
    assert "ceilings: bf16 2,000 GB/s, 500 TFLOP/s" in text
    assert [file.name for file in folder.iterdir()] == [stored.ROWS]


def test_a_summary_of_very_many_rows_is_still_a_page() -> None:
    found = []
    for n in range(8, 8 * 60, 8):
        shape = {"T": 8192, "n": 4096 + n, "m": 4096}
        found += [on_gpu(p, r + n, r + n, r + n, **shape) for p, r in RATIOS.items()]
        found += [on_gpu(s, 1.0, 1.0, 1.0, **shape) for s in tables.STRATEGIES]
        found += [row("dora", error=f"{n}: a reason of its own" * 20)]
        block = {"level": "block", "model": f"model-{n}"}
        found += [on_gpu(p, r, r, r, **block) for p, r in RATIOS.items()]
    text = summary.text(held([*ceiling_rows(), *found]))
    assert len(text.splitlines()) <= summary.LINES
    assert "more" in text


def test_plots_show_providers_that_exist() -> None:
    names = {kind.name for kind in ADAPTERS} - {BASELINE}
    assert set(plots.COLOURS) <= names
    assert set(tables.STRATEGIES) <= names


def test_the_processor_s_share_is_told_where_it_was_measured(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, layer_rows())
    assert "The processor in a call" not in sections.report(stored.load(folder))
    one = {
        "provider": "dcft_fused", "direction": "forward", "x": "16x64", "microseconds": 98.7,
        "device": "some device", "torch": "2.0", "triton": "3.7", "peft": None, "commit": "abc",
        "time": "2026-01-01T00:00:00",
    }  # fmt: skip
    newer = {"time": "2026-02-02T00:00:00", "commit": "def"}
    for values in (
        one,
        {**one, **newer, "microseconds": 12.3},
        {**one, **newer, "provider": "somebody", "microseconds": 45.6},
    ):
        rows.append_line(folder / host_rows.FILE, values)
    text = sections.report(stored.load(folder))
    assert "| provider | forward, x 16x64 |" in text
    assert "| DCFT, fused | 12 |" in text
    assert "| somebody | 46 |" in text
    assert "99" not in text.split("The processor in a call")[1]
    assert "commit def; 2026-02-02." in text
