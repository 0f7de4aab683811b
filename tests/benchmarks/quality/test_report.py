"""The report on stored results, and the stored results themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import report
from benchmarks.quality.runs import FOLDER, SLICE, Result, Run, by_key
from benchmarks.quality.studies import Found, Study, Variant

RATES = (2e-3, 5e-3, 1e-2)
DCFT = Variant("DCFT", "dcft", {"init": "balanced"}, rates=RATES)
LORA = Variant("LoRA r=1", "lora", {"r": 1}, rates=RATES[:1])
FULL = Variant("full", "full", rates=(1e-4,))
TRIAL: Any = {"scored": SLICE, "scored_size": 600}
SETTINGS = Run(task="", method="", steps=8, batch_size=4)
CHOICE: Any = {"chosen_by": "metric", "trial_seeds": 1, "differences": (("DCFT", "LoRA r=1"),)}
TASKS = ("cola", "shakespeare")
STUDY = Study("small", "How well?", (DCFT, LORA, FULL), TASKS, 3, SETTINGS, **CHOICE)


def result(variant: Variant, task: str, value: float | None, rate: float, **run: Any) -> Result:
    settings = dataclasses.replace(STUDY.run(task, variant), learning_rate=rate, **run)
    return Result(
        key=settings.key(),
        study="small",
        run=settings,
        metric="matthews" if task == "cola" else "perplexity",
        value=value,
        values={"matthews" if task == "cola" else "perplexity": value} if value else {},
        constant_value=0.25,
        trainable_parameters=1234,
        loss_curve=[(step, 1 / step) for step in range(1, 9)],
        seconds=10.0,
        data="d1g35t",
        device="some device",
        versions={"torch": "2.0"},
        commit="abc1234",
        time="2026-01-02T03:04:05+00:00",
        error=None if value is not None else "step 5 has the loss nan",
    )


def seeds(variant: Variant, task: str, rate: float, *values: float | None) -> list[Result]:
    return [result(variant, task, value, rate, seed=seed) for seed, value in enumerate(values)]


def trials(task: str, *values: float | None) -> list[Result]:
    pairs = zip(RATES, values, strict=False)
    return [result(DCFT, task, value, rate, **TRIAL) for rate, value in pairs]


RESULTS = [
    *trials("cola", 0.1, 0.3, 0.2),
    *trials("shakespeare", 9.0, 8.0, 7.0),
    *seeds(DCFT, "cola", RATES[0], 0.9),  # a rate that was not chosen
    *seeds(DCFT, "cola", RATES[1], 0.40, 0.44, 0.48),
    *seeds(DCFT, "shakespeare", RATES[2], 7.0, 7.0, 7.3),
    *seeds(LORA, "cola", RATES[0], 0.1, 0.50, 0.56),
    *seeds(LORA, "cola", RATES[0], 0.50),  # the last of equal runs counts
    *seeds(FULL, "cola", 1e-4, 0.1, None),
    *seeds(FULL, "shakespeare", 1e-4, 7.0, 7.2),
]


def lines(table: str) -> dict[str, list[str]]:
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {first: rest for first, *rest in cells}


def test_tables_of_a_study() -> None:
    found = Found.of(by_key(RESULTS), STUDY)
    table = lines(report.results_table(found))
    assert table["method"][1:3] == [
        "cola, matthews, %",
        "shakespeare, perplexity (lower is better)",
    ]
    assert table["DCFT"] == ["1,234", "44.0 ± 4.0", "**7.10 ± 0.17**", "0.005 / 0.01†", "10"]
    # 0.50, 0.50, 0.56: squares of 0.02, 0.02 and 0.04 are 0.0024, over 2 is 0.0346 squared
    assert table["LoRA r=1"] == ["1,234", "**52.0 ± 3.5**", "-", "0.002 / -", "10"]
    assert table["full"][1:3] == ["failed", "**7.10 ± 0.14 (2 seeds)**"]
    assert table["constant answer"][1:3] == ["25.0", "0.25"]
    difference = lines(report.difference_table(found))
    # -0.10, -0.06, -0.08: a deviation of 0.02, over the root of 3 is 0.0115
    assert difference["DCFT − LoRA r=1"] == ["-8.0 ± 1.2", "-"]
    named = dataclasses.replace(STUDY, differences=(("LoRA r=1", "full"),))
    difference = lines(report.difference_table(Found.of(by_key(RESULTS), named)))
    assert difference["LoRA r=1 − full"] == ["+40.0 (1 seed)", "-"]
    shown = lines(report.trials_table(found))["DCFT"]
    assert shown[0] == "0.002 → 10.0, **0.005 → 30.0**, 0.01 → 20.0"


def test_a_rate_is_chosen_only_when_all_were_tried() -> None:
    for values, expected in (((0.1, 0.2), "-"), ((None, None, None), "failed")):
        results = [*trials("cola", *values), *seeds(DCFT, "cola", RATES[1], 0.4)]
        table = lines(report.results_table(Found.of(by_key(results), STUDY)))
        assert table["DCFT"][1] == expected


def test_rates_are_chosen_by_the_mean_loss_of_the_trials_that_have_one() -> None:
    study = dataclasses.replace(STUDY, tasks=("cola",), chosen_by="loss", trial_seeds=2)
    replicate = dataclasses.replace(DCFT, label="again", rates_of=DCFT, settings={"replicate": 1})
    study = dataclasses.replace(study, variants=(DCFT, replicate), trial_steps=4)

    def losses(*values: tuple[float, float]) -> list[Result]:
        return [
            dataclasses.replace(r, values={**r.values, "nll": nll})
            for rate, pair in zip(RATES, values, strict=True)
            for seed, nll in enumerate(pair)
            for r in [result(DCFT, "cola", 0.5, rate, seed=seed, **TRIAL, steps=4)]
        ]

    found = losses((0.5, 0.6), (0.3, 0.9), (0.4, 0.5))
    cell = Found.of(by_key(found), study).cells["again", "cola"]
    assert cell.scores == {2e-3: 0.55, 5e-3: 0.6, 1e-2: 0.45}
    assert cell.learning_rate == 1e-2
    found[0] = dataclasses.replace(found[0], values={"matthews": 0.5})  # an older trial
    assert Found.of(by_key(found), study).cells["again", "cola"].learning_rate is None


def scored(variant: Variant, seed: int, groups: list[float], **changes: Any) -> Result:
    """A result whose matthews is the mean of its jackknife values."""
    one = result(variant, "cola", sum(groups) / len(groups), RATES[0], seed=seed)
    run = dataclasses.replace(one.run, **changes)
    return dataclasses.replace(one, run=run, jackknife={"matthews": groups})


def test_a_differences_error_is_that_of_seeds_and_examples() -> None:
    ours, theirs = (dataclasses.replace(v, rates=RATES[:1]) for v in (DCFT, LORA))
    replicate = dataclasses.replace(ours, label="again", rates_of=ours, settings={"replicate": 1})
    study = dataclasses.replace(STUDY, tasks=("cola",), variants=(ours, theirs, replicate))
    results = [scored(theirs, seed, [0.5, 0.5, 0.5]) for seed in (0, 1)]
    results += [scored(ours, 0, [0.5, 0.52, 0.54]), scored(ours, 1, [0.54, 0.56, 0.58])]
    found = Found.of(by_key(results), study)
    # Seeds: 0.02 and 0.06 have the variance 0.0008, halved. Examples: without each of three groups
    # 0.02, 0.04 and 0.06; the jackknife takes (3 - 1) / 3 of the sum of their squared deviations.
    examples = 2 / 3 * (0.02**2 + 0.02**2)
    shown = lines(report.difference_table(found))["DCFT − LoRA r=1"]
    assert shown == [f"+4.0 ± {100 * (0.0004 + examples) ** 0.5:.1f}"]
    one = Found.of(by_key([results[0], results[2]]), study)
    assert lines(report.difference_table(one))["DCFT − LoRA r=1"] == [
        f"+2.0 ± {100 * examples**0.5:.1f}"
    ]
    results += [
        scored(ours, 0, [0.55] * 3, replicate=1),
        scored(ours, 1, [0.6] * 3, replicate=1),
    ]
    noise = lines(report.noise_table(Found.of(by_key(results), study)))["again"]
    assert noise == [f"{100 * ((0.03**2 + 0.04**2) / 2) ** 0.5:.1f}"]


def test_the_best_evaluation_is_compared_with_the_last() -> None:
    curves = ([(4, 0.6), (8, 0.5)], [(4, 0.1), (8, 0.44)])
    results = seeds(FULL, "cola", 1e-4, 0.5, 0.44)
    results = [dataclasses.replace(r, value_curve=c) for r, c in zip(results, curves, strict=True)]
    results += seeds(FULL, "shakespeare", 1e-4, 7.0)
    results[2] = dataclasses.replace(results[2], value_curve=[(4, 6.5), (8, 7.0)])
    table = lines(report.best_table(Found.of(by_key(results), STUDY)))
    assert table["full"] == ["+5.0", "-0.50 (1 seed)"]


def test_losses_of_different_arithmetic_are_compared() -> None:
    fast = Variant("fast", "dcft", {"backend": "torch"}, rates=RATES[:1])
    slow = Variant("slow", "dcft", {"backend": "reference"}, rates=RATES[:1])
    study = dataclasses.replace(STUDY, variants=(fast, slow), tasks=("cola",))
    ours = seeds(fast, "cola", RATES[0], 0.5, 0.4)
    curve = [(step, loss + 0.25 * (step == 2)) for step, loss in ours[1].loss_curve]
    ours[1] = dataclasses.replace(ours[1], loss_curve=curve)
    found = Found.of(by_key([*ours, *seeds(slow, "cola", RATES[0], 0.5, 0.4)]), study)
    assert "by at most 2.5e-01 at" in report.parity(found)


def test_the_stored_report_is_what_the_stored_rows_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--results", str(FOLDER), "--out", str(tmp_path)]) == 0
    written = (tmp_path / report.REPORT).read_text(encoding="utf-8").splitlines()
    stored = (FOLDER / report.REPORT).read_text(encoding="utf-8").splitlines()
    assert [line for line in written if line[:1] == "|"] == [x for x in stored if x[:1] == "|"]
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "--results: expected results of a study" in capsys.readouterr().err
