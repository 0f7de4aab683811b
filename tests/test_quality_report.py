"""The report on learning quality: from results with known values, nothing trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import report, report_plots, report_tables
from benchmarks.quality.errors import QualityError
from benchmarks.quality.found import Found, Stored, match
from benchmarks.quality.results import FILE, Store
from benchmarks.quality.runs import SLICE, Result, Run
from benchmarks.quality.studies import STUDIES, Study, Variant

SETTINGS = Run(task="", method="", steps=8, batch_size=4, evaluations=2)
RATES = (2e-3, 5e-3, 1e-2)
DCFT = Variant("DCFT", "dcft", {"init": "balanced"}, rates=RATES[:1])
LORA = Variant("LoRA r=1", "lora", {"r": 1}, rates=RATES[:1])
FULL = Variant("full", "full", rates=(1e-4,))
HEAD = Variant("head", "head", rates=(1e-3,))
STUDY = Study("small", "How well?", (DCFT, LORA, FULL, HEAD), ("cola", "sst2"), 3, SETTINGS)
# The same with a choice of rates.
SEARCHED = dataclasses.replace(DCFT, rates=RATES)
SEARCHED_LORA = dataclasses.replace(LORA, rates=RATES)
SEARCH = dataclasses.replace(STUDY, variants=(SEARCHED, SEARCHED_LORA, FULL, HEAD))
METRICS = {"cola": "matthews", "sst2": "accuracy", "shakespeare": "perplexity"}
DIVERGED = (
    "loss: step 5 of 8 has the loss nan; the first layer whose output is not finite is a.b; "
    "the last good checkpoint is /home/someone/checkpoint-4; a lower --lr may help (it was 0.01)"
)


def run(variant: Variant, task: str = "cola", study: Study = STUDY, **settings: Any) -> Run:
    values = {"learning_rate": (variant.rates or RATES)[0], **settings}
    return dataclasses.replace(
        study.settings,
        task=task,
        method=variant.method,
        options=dict(variant.options),
        targets=variant.targets,
        **values,
    )


def result(of: Run, value: float | None, **fields: Any) -> Result:
    metric, ended = METRICS[of.task], value is not None
    known: dict[str, Any] = {
        "key": of.key(),
        "study": "small",
        "run": of,
        "metric": metric,
        "value": value,
        "values": {} if value is None else {metric: value},
        "constant_value": 0.25,
        "trainable_parameters": 1234 if ended else 0,
        "head_parameters": 10,
        "loss_curve": [(step, 1 / step + 0.01 * of.seed) for step in range(1, 9)] if ended else [],
        "value_curve": [(4, 0.1), (8, value)] if ended else [],
        "seconds": 10.0 + of.seed if ended else 0.0,
        "data": "d1g35t",
        "device": "some device",
        "versions": {"torch": "2.0", "transformers": "5.1"},
        "commit": "abc1234",
        "time": "2026-01-02T03:04:05+00:00",
        "error": None if ended else DIVERGED,
    }
    return Result(**{**known, **fields})


def seeds(variant: Variant, *values: float | None, task: str = "cola", **more: Any) -> list[Result]:
    return [
        result(run(variant, task, seed=seed, **more), value) for seed, value in enumerate(values)
    ]


def trial(variant: Variant, rate: float, value: float | None, task: str = "cola") -> Result:
    settings = {"scored": SLICE, "scored_size": 600, "evaluations": 1}
    return result(run(variant, task, learning_rate=rate, **settings), value)


def found(results: Iterable[Result], study: Study = STUDY) -> Found:
    return Found.of(Stored(results), study)


def lines(table: str) -> dict[str, list[str]]:
    """A table's cells by the first of its line."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {first: rest for first, *rest in cells}


def shown(results: Iterable[Result], study: Study = STUDY) -> dict[str, list[str]]:
    return lines(report_tables.results_table(found(results, study))[0])


def stored(folder: Path, results: Iterable[Result]) -> Path:
    store = Store(folder)
    for one in results:
        store.add(one)
    return folder


USUAL = [
    *seeds(DCFT, 0.40, 0.44, 0.48),
    *seeds(LORA, 0.50, 0.50, 0.56),
    *seeds(FULL, 0.30, 0.31, 0.32),
    *seeds(DCFT, 0.90, 0.80, 0.70, task="sst2"),
]


# The table of a study


def test_table_has_means_deviations_and_what_belongs_to_them() -> None:
    table = shown(USUAL)
    assert table["method"] == [
        "parameters",
        "cola, matthews, %",
        "sst2, accuracy, %",
        "learning rate (cola / sst2)",
        "seconds a run",
    ]
    assert table["DCFT"] == ["1,234", "44.0 ± 4.0", "**80.0 ± 10.0**", "0.002", "11"]
    # 0.50, 0.50, 0.56: squares of 0.02, 0.02 and 0.04 are 0.0024, over 2 is 0.0346 squared
    assert table["LoRA r=1"] == ["1,234", "**52.0 ± 3.5**", "-", "0.002 / -", "11"]
    assert table["full"] == ["1,234", "31.0 ± 1.0", "-", "0.0001 / -", "11"]
    assert table["head"] == ["-", "-", "-", "-", "-"]
    assert table["constant answer"] == ["0", "25.0", "25.0", "-", "-"]


def test_lines_are_in_the_order_of_the_study() -> None:
    labels = list(shown(reversed(USUAL)))
    assert labels[2:] == ["DCFT", "LoRA r=1", "full", "head", "constant answer"]


def test_what_looks_the_same_is_best_together() -> None:
    table = shown([*seeds(DCFT, 0.5001), *seeds(LORA, 0.5002), *seeds(FULL, 0.49)])
    assert [table[name][1] for name in ("DCFT", "LoRA r=1", "full")] == [
        "**50.0**",
        "**50.0**",
        "49.0",
    ]


def test_perplexity_is_plain_and_the_smallest_is_best() -> None:
    study = dataclasses.replace(STUDY, tasks=("shakespeare",))
    results = [
        *seeds(DCFT, 30.5, 31.5, task="shakespeare"),
        *seeds(LORA, 33.0, 33.0, task="shakespeare"),
    ]
    table = shown(results, study)
    assert table["method"][1] == "shakespeare, perplexity (lower is better)"
    assert table["DCFT"][1] == "**31.00 ± 0.71**"
    assert table["LoRA r=1"][1] == "33.00 ± 0.00"
    difference = lines(report_tables.difference_table(found(results, study)))
    assert difference["DCFT − LoRA r=1"] == ["-2.00 ± 0.50"]


def test_fewer_seeds_than_others_have_are_told() -> None:
    table = shown([*seeds(DCFT, 0.4, 0.5, 0.6), *seeds(LORA, 0.4, 0.5), *seeds(FULL, 0.3)])
    assert table["LoRA r=1"][1] == "45.0 ± 7.1 (2 seeds)"
    assert table["full"][1] == "30.0 (1 seed)"


def test_failed_runs_are_named_with_their_reason() -> None:
    trials = [trial(LORA, rate, None) for rate in RATES]
    results = [*seeds(DCFT, 0.9, None, None), *seeds(FULL, 0.1), *trials]
    study = dataclasses.replace(STUDY, variants=(DCFT, SEARCHED_LORA, FULL, HEAD))
    table, notes = report_tables.results_table(found(results, study))
    assert lines(table)["DCFT"][1] == "failed (1)"
    assert lines(table)["LoRA r=1"][1] == "failed (2)"
    assert lines(table)["full"][1] == "**10.0 (1 seed)**"
    reason = (
        "loss: step 5 of 8 has the loss nan; the first layer whose output is not finite is a.b; "
        "a lower --lr may help (it was 0.01)"
    )
    assert notes == [
        f"DCFT on cola, seeds 1, 2: {reason}",
        f"LoRA r=1 on cola, at every learning rate tried: {reason}",
    ]


def test_trials_alone_are_not_a_result() -> None:
    assert shown([trial(DCFT, rate, 0.3) for rate in RATES], SEARCH)["DCFT"] == [
        "-",
        "-",
        "-",
        "-",
        "-",
    ]


# Which results


def test_the_best_rate_on_the_slice_counts_and_no_other() -> None:
    trials = [trial(DCFT, rate, value) for rate, value in zip(RATES, (0.1, 0.3, 0.3), strict=True)]
    at_rates = [seeds(DCFT, *[rate] * 3, learning_rate=rate) for rate in RATES]
    cell = match(
        Stored([*trials, *at_rates[0], *at_rates[1], *at_rates[2]]), STUDY, "cola", SEARCHED
    )
    assert cell.learning_rate == RATES[1]  # of equals the first
    assert list(cell.results) == at_rates[1]
    assert list(cell.trials) == trials


def test_lower_perplexity_on_the_slice_is_better() -> None:
    study = dataclasses.replace(STUDY, tasks=("shakespeare",))
    trials = [trial(DCFT, rate, 40 - 1000 * rate, "shakespeare") for rate in RATES]
    assert match(Stored(trials), study, "shakespeare", SEARCHED).learning_rate == RATES[2]


def test_trials_that_are_no_candidates_or_failed_do_not_count() -> None:
    trials = [trial(DCFT, rate, value) for rate, value in zip(RATES, (None, 0.1, 0.0), strict=True)]
    cell = match(Stored([trial(DCFT, 0.5, 0.9), *trials]), STUDY, "cola", SEARCHED)
    assert cell.learning_rate == RATES[1]
    assert list(cell.trials) == trials


@pytest.mark.parametrize("tried", [(), RATES[:2]])
def test_before_every_rate_was_tried_none_is_chosen(tried: tuple[float, ...]) -> None:
    results = [*[trial(DCFT, rate, 0.3) for rate in tried], *seeds(DCFT, 0.5, 0.6)]
    cell = match(Stored(results), STUDY, "cola", SEARCHED)
    assert (cell.learning_rate, cell.results, cell.failures) == (None, (), 0)
    assert shown(results, SEARCH)["DCFT"][1] == "-"


@pytest.mark.parametrize(
    ("values", "text"),
    [((0.3, 0.2, 0.1), "0.002†"), ((0.1, 0.3, 0.2), "0.005"), ((0.1, 0.2, 0.3), "0.01†")],
)
def test_a_rate_at_the_edge_of_those_tried_is_marked(values: tuple[float, ...], text: str) -> None:
    trials = [trial(DCFT, rate, value) for rate, value in zip(RATES, values, strict=True)]
    best = max(zip(values, RATES, strict=True))[1]
    table = shown([*trials, *seeds(DCFT, 0.5, learning_rate=best)], SEARCH)
    assert table["DCFT"][-2] == f"{text} / -"
    # A single rate has no edge.
    assert shown(USUAL)["DCFT"][-2] == "0.002"


def test_of_equal_settings_the_last_result_counts() -> None:
    again = seeds(FULL, 0.7)
    assert list(match(Stored([*seeds(FULL, None), *again]), STUDY, "cola", FULL).results) == again


# DCFT beside LoRA


def test_difference_is_paired_by_seed() -> None:
    table = lines(report_tables.difference_table(found(USUAL)))
    # -0.10, -0.06, -0.08: deviation 0.02, over the root of 3 is 0.0115
    assert table["DCFT − LoRA r=1"] == ["-8.0 ± 1.2", "-"]
    assert len(table) == 3


def test_difference_is_over_the_seeds_that_both_have() -> None:
    results = [*seeds(DCFT, 0.4, 0.5, 0.6), *seeds(LORA, 0.3, None, 0.3)]
    table = lines(report_tables.difference_table(found(results)))
    assert table["DCFT − LoRA r=1"][0] == "+20.0 ± 10.0 (2 seeds)"


def test_difference_is_to_lora_on_the_same_layers() -> None:
    here, there = (dataclasses.replace(DCFT, label=f"DCFT {t}", targets=t) for t in ("ALL", "QV"))
    lora = dataclasses.replace(LORA, label="LoRA QV", targets="QV")
    study = dataclasses.replace(STUDY, variants=(LORA, lora, here, there))
    results = [r for v in study.variants for r in seeds(v, 0.5)]
    table = lines(report_tables.difference_table(found(results, study)))
    assert list(table)[2:] == ["DCFT ALL − LoRA r=1", "DCFT QV − LoRA QV"]


def test_a_study_may_name_its_differences() -> None:
    study = dataclasses.replace(STUDY, differences=(("full", "DCFT"),))
    table = lines(report_tables.difference_table(found(USUAL, study)))
    # -0.10, -0.13, -0.16: deviation 0.03, over the root of 3 is 0.0173
    assert list(table.items())[2:] == [("full − DCFT", ["-13.0 ± 1.7", "-"])]


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_differences_are_of_lines_that_there_are(study: Study) -> None:
    labels = {variant.label for variant in study.variants}
    assert labels >= {label for pair in study.differences for label in pair}


def test_no_difference_without_lora_of_rank_1() -> None:
    wide = dataclasses.replace(LORA, options={"r": 8})
    study = dataclasses.replace(STUDY, variants=(DCFT, wide))
    results = [*seeds(DCFT, 0.5), *seeds(wide, 0.5)]
    assert report_tables.difference_table(found(results, study)) == ""


# Learning rates


def test_trials_are_listed_and_the_chosen_one_is_bold() -> None:
    values = (0.1, 0.3, None)
    trials = [trial(DCFT, rate, value) for rate, value in zip(RATES, values, strict=True)]
    table = lines(report_tables.trials_table(found([*trials, *USUAL], SEARCH)))
    assert table["DCFT"] == ["0.002 → 10.0, **0.005 → 30.0**, 0.01 → failed", "-"]
    assert len(table) == 3
    assert report_tables.trials_table(found(USUAL)) == ""


# The same run by different arithmetic


AUTO = Variant("auto", "dcft", {"backend": "auto"}, rates=(1e-3,))
REFERENCE = Variant("reference", "dcft", {"backend": "reference"}, rates=(1e-3,))
PAIRED = Study("pair", "Same?", (AUTO, REFERENCE), ("cola",), 2, SETTINGS, paired=True)


def pair(*curves: tuple[Variant, int, float, list[tuple[int, float]]]) -> list[Result]:
    return [
        dataclasses.replace(result(run(variant, seed=seed), value), loss_curve=curve)
        for variant, seed, value, curve in curves
    ]


APART = pair(
    (AUTO, 0, 0.50, [(1, 2.0), (2, 1.0), (3, 0.50)]),
    (AUTO, 1, 0.40, [(1, 2.0), (2, 1.0), (3, 0.51)]),
    (REFERENCE, 0, 0.50, [(1, 2.03), (2, 1.0), (3, 0.50)]),
    (REFERENCE, 1, 0.32, [(1, 2.0), (2, 1.0), (3, 0.50)]),
)


def test_paired_differences_are_the_largest_of_all_seeds() -> None:
    table = lines(report_tables.paired_table(found(APART, PAIRED)))
    # losses: 0.03 beside 2.03 and 0.01 beside 0.50; metric: 0.08 beside 0.32
    assert table["auto − reference, cola"] == ["2", "3.0e-02", "2.0e-02", "8.0e-02", "2.5e-01"]
    assert len(table) == 3


def test_equal_pairs_differ_by_0() -> None:
    curve = [(1, 2.0), (2, 0.0)]
    results = pair((AUTO, 0, 0.0, curve), (REFERENCE, 0, 0.0, curve), (AUTO, 1, 0.5, curve))
    table = lines(report_tables.paired_table(found(results, PAIRED)))
    assert table["auto − reference, cola"] == ["1", "0", "0", "0", "-"]


def test_paired_curves_are_drawn(tmp_path: Path) -> None:
    report.write(stored(tmp_path, APART), tmp_path, [PAIRED])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| auto − reference, cola | 2 |" in text
    assert "(pair_paired.png)" in text
    assert "(pair_curves.png)" in text
    svg = (tmp_path / "pair_paired.svg").read_text(encoding="utf-8")
    assert "<!-- reference -->" in svg
    assert "<!-- auto -->" in svg


def test_pairs_that_are_equal_are_drawn_too(tmp_path: Path) -> None:
    curve = [(1, 2.0), (2, 1.0)]
    results = pair((AUTO, 0, 0.5, curve), (REFERENCE, 0, 0.5, curve))
    assert report_plots.paired(found(results, PAIRED), tmp_path / "equal")
    svg = (tmp_path / "equal.svg").read_text(encoding="utf-8")
    assert "<!-- equal at every point -->" in svg


# Curves


def test_at_most_eight_lines_are_drawn_dcft_and_the_best_among_them() -> None:
    others = [Variant(f"peer {n}", "sora", {"r": n}, rates=(1e-3,)) for n in range(1, 12)]
    study = dataclasses.replace(STUDY, variants=(*others, LORA, DCFT, HEAD), tasks=("cola",))
    results = [r for n, v in enumerate(others) for r in seeds(v, 0.1 * (n % 6))]
    results += [*seeds(LORA, 0.01), *seeds(DCFT, 0.0)]
    labels = [variant.label for variant in report_plots.main_lines(found(results, study))]
    # the values of the eleven: 0, .1, .2, .3, .4, .5, 0, .1, .2, .3, .4
    best = ["peer 3", "peer 4", "peer 5", "peer 6", "peer 10", "peer 11"]
    assert labels == [*best, "LoRA r=1", "DCFT"]


def test_smoothing_keeps_a_straight_line() -> None:
    straight = [(step, 2.0 * step) for step in range(1, 12)]
    smoothed = report_plots.smooth(straight)
    assert [step for step, _ in smoothed] == list(range(1, 12))
    assert [value for _, value in smoothed] == pytest.approx([value for _, value in straight])
    bump = [(step, 5.0 * (step == 4)) for step in range(1, 8)]
    values = [value for _, value in report_plots.smooth(bump)]
    assert values == pytest.approx([0, 0, 1, 1, 1, 0, 0])


# The whole report


def test_same_results_same_bytes(tmp_path: Path) -> None:
    trials = [trial(DCFT, rate, rate) for rate in RATES[:1]]
    folder = stored(tmp_path / "rows", [*USUAL, *trials])
    written = []
    for out in (tmp_path / "one", tmp_path / "two"):
        report.write(folder, out, [STUDY])
        written.append({file.name: file.read_bytes() for file in sorted(out.iterdir())})
    assert written[0] == written[1]
    assert list(written[0]) == ["report.md", "small_curves.png", "small_curves.svg"]
    assert b"<dc:date>" not in written[0]["small_curves.svg"]


def test_report_tells_where_its_numbers_are_from(tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(run(DCFT), steps=99)
    searched = dataclasses.replace(SEARCHED, label="DCFT QV", targets="QV")
    study = dataclasses.replace(STUDY, variants=(*STUDY.variants, searched))
    results = [*USUAL, result(elsewhere, 0.5), trial(searched, RATES[0], 0.2)]
    out = tmp_path / "out"
    report.write(stored(tmp_path / "rows", results), out, [study, PAIRED])
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Learning quality\n")
    assert (
        "From [`../rows/runs.jsonl`](../rows/runs.jsonl), 13 runs: some device; torch 2.0; "
        "transformers 5.1; commit abc1234; model all-MiniLM-L6-v2; 2026-01-02. "
        "1 more are of no study's settings and left out."
    ) in text
    assert "Data by digest: cola d1g35t, sst2 d1g35t." in text
    assert "`python -m benchmarks.quality --study NAME --data DIR`" in text
    assert "## How well?\n\nStudy `small`: 3 seeds (0, 1, 2), 8 steps of 4 examples" in text
    assert "## Learning rates" in text
    assert "## Same?" not in text


def test_the_studies_own_results_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = STUDIES["methods"]
    head = next(variant for variant in study.variants if variant.method == "head")
    results = seeds(head, 0.12, 0.14, study=study)
    assert report.main(["--results", str(stored(tmp_path, results))]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.md'} and 1 plot\n"
    assert "**13.0 ± 1.4**" in (tmp_path / "report.md").read_text("utf-8")


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_lines_of_a_study_have_labels_of_their_own(study: Study) -> None:
    labels = [variant.label for variant in study.variants]
    assert len(set(labels)) == len(labels)


def test_plots_without_results_are_removed(tmp_path: Path) -> None:
    old = tmp_path / "pair_paired.png"
    old.write_bytes(b"old")
    (tmp_path / "mine.png").write_bytes(b"kept")
    report.write(stored(tmp_path, seeds(FULL, None)), tmp_path, [STUDY, PAIRED])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.png", "report.md", FILE]
    assert "1. full on cola, seed 0: loss: step 5" in (tmp_path / "report.md").read_text("utf-8")


def test_missing_and_empty_files_name_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--results", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'none' / FILE} is not there" in error
    assert f"`python -m benchmarks.quality --study NAME --data DIR --results {tmp_path}" in error
    (tmp_path / FILE).write_text("", encoding="utf-8")
    with pytest.raises(QualityError, match=r"holds no results; `python -m benchmarks\.quality"):
        report.write(tmp_path, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_results_of_no_study_are_an_error(tmp_path: Path) -> None:
    stored(tmp_path, USUAL)
    with pytest.raises(QualityError, match="holds 12 results, none with the settings of a study"):
        report.write(tmp_path, tmp_path, [PAIRED])


def test_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"key": 1}\n', encoding="utf-8")
    with pytest.raises(QualityError, match="line 1: not a result"):
        report.write(tmp_path, tmp_path, [STUDY])
