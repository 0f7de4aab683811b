"""Comparing two runs: planted changes are found, a machine's moods are not, bad files are named."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare
from benchmarks.compare import (
    FASTER,
    SLOWER,
    THE_BASELINE,
    TOO_FEW_ROUNDS,
    WITHIN_NOISE,
    Benchmark,
    Comparison,
    Samples,
    Settings,
)

ROUNDS = 30
ROW = {
    "device": "some device",
    "torch": "2.0",
    "triton": None,
    "peft": "0.1",
    "commit": "abc1234",
    "dtype": "fp32",
    "time": "2026-01-02T03:04:05+00:00",
}
EXPECTED = (
    "expected what `pytest benchmarks --benchmark-only --benchmark-json FILE` writes "
    "(rows.jsonl holds no samples)"
)


def entry(name: str, seconds: Any, **extra: Any) -> dict[str, Any]:
    """A benchmark as pytest-benchmark writes it; arrays become lists."""
    extra = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in extra.items()}
    return {
        "name": name,
        "fullname": f"benchmarks/bench.py::{name}",
        "group": "some case",
        "extra_info": {**ROW, **extra},
        "stats": {"data": np.asarray(seconds).tolist()},
    }


def write(path: Path, *entries: dict[str, Any]) -> Path:
    content = {"benchmarks": entries, "commit_info": {"id": "fedcba9876543210"}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def noisy(
    generator: np.random.Generator, seconds: float, rounds: int = ROUNDS, noise: float = 0.01
) -> np.ndarray:
    return seconds * np.exp(noise * generator.standard_normal(rounds))


def paired(
    seed: int,
    factor: float = 1.0,
    machine: float | np.ndarray = 1.0,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """A provider that takes `factor` times 2 ms where the frozen layer takes 1 ms.

    `machine` slows both, and so does a mood of each round that is far larger than the noise.
    """
    generator = np.random.default_rng(seed)
    mood = machine * np.exp(0.3 * generator.standard_normal(rounds))
    own = noisy(generator, 2e-3 * factor, rounds) * mood
    return entry("bench[x]", own, baseline_seconds=noisy(generator, 1e-3, rounds) * mood)


def compared(
    tmp_path: Path, a: dict[str, Any], b: dict[str, Any], settings: Settings | None = None
) -> Comparison:
    runs = [compare.load(write(tmp_path / f"{n}.json", e)) for n, e in (("A", a), ("B", b))]
    return compare.compare_runs(*runs, settings)[0]


# Verdicts.


def test_a_planted_change_is_found(tmp_path: Path) -> None:
    slower = compared(tmp_path, paired(1), paired(2, 1.05))
    assert slower.verdict == SLOWER
    assert slower.interval is not None
    assert slower.interval[0] < 1.05 < slower.interval[1]
    assert slower.interval[0] < slower.ratio < slower.interval[1]
    faster = compared(tmp_path, paired(2, 1.05), paired(1))
    assert faster.verdict == FASTER
    assert faster.ratio == pytest.approx(1 / slower.ratio, rel=1e-12)


def test_the_same_distribution_is_within_noise(tmp_path: Path) -> None:
    verdicts = [compared(tmp_path, paired(2 * n), paired(2 * n + 1)).verdict for n in range(100)]
    assert verdicts.count(WITHIN_NOISE) >= 90


def test_without_noise_the_interval_is_as_wide_as_it_says(tmp_path: Path) -> None:
    settings = Settings(draws=1000, noise=0.0)
    verdicts = [
        compared(tmp_path, paired(2 * n), paired(2 * n + 1), settings).verdict for n in range(200)
    ]
    # 5% of 200 and three standard deviations.
    assert 0 < 200 - verdicts.count(WITHIN_NOISE) <= 19


def test_a_slower_machine_is_no_slower_provider(tmp_path: Path) -> None:
    result = compared(tmp_path, paired(1), paired(2, machine=2.0))
    assert result.verdict == WITHIN_NOISE
    assert result.paired
    assert result.milliseconds[1] > 1.5 * result.milliseconds[0]
    assert compared(tmp_path, paired(1), paired(2, 1.05, machine=2.0)).verdict == SLOWER


def test_drift_within_a_run_is_no_change(tmp_path: Path) -> None:
    drift = np.linspace(1.0, 3.0, ROUNDS)
    assert compared(tmp_path, paired(1), paired(2, machine=drift)).verdict == WITHIN_NOISE
    assert compared(tmp_path, paired(1), paired(2, 1.05, machine=drift)).verdict == SLOWER


def test_without_a_baseline_the_machine_is_in_the_ratio(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    before = entry("bench[x]", noisy(generator, 1e-3))
    result = compared(tmp_path, before, entry("bench[x]", noisy(generator, 2e-3)))
    assert (result.verdict, result.paired) == (SLOWER, False)
    assert result.ratio == pytest.approx(2.0, rel=0.02)
    # One file's baseline is of no use without the other's.
    assert not compared(tmp_path, before, paired(1)).paired


@pytest.mark.parametrize("rounds", [(4, ROUNDS), (ROUNDS, 4), (1, 1)])
def test_too_few_rounds(tmp_path: Path, rounds: tuple[int, int]) -> None:
    result = compared(tmp_path, paired(1, rounds=rounds[0]), paired(2, 9.0, rounds=rounds[1]))
    assert (result.verdict, result.interval, result.rounds) == (TOO_FEW_ROUNDS, None, rounds)
    assert result.ratio > 5.0


def test_five_rounds_are_enough(tmp_path: Path) -> None:
    assert compared(tmp_path, paired(1, rounds=5), paired(2, 1.5, rounds=5)).verdict == SLOWER


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (None, TOO_FEW_ROUNDS),
        ((0.9, 1.1), WITHIN_NOISE),
        ((1.002, 1.009), WITHIN_NOISE),
        ((1.002, 1.02), SLOWER),
        ((1.02, 1.03), SLOWER),
        ((0.992, 0.998), WITHIN_NOISE),
        ((0.98, 0.998), FASTER),
        ((0.97, 0.98), FASTER),
        ((1.0, 1.02), WITHIN_NOISE),
    ],
)
def test_a_change_is_clear_and_beyond_the_noise(
    interval: tuple[float, float] | None, expected: str
) -> None:
    assert compare.verdict(interval, 0.01) == expected


def test_the_frozen_layer_is_shown_and_not_judged(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    frozen = []
    for seconds in (1e-3, 2e-3):
        times = noisy(generator, seconds)
        clock = np.concatenate([[700.0], 700.0 + np.cumsum(times)])  # as pytest-benchmark rounds
        frozen.append(entry("bench[frozen]", np.diff(clock), baseline_seconds=times))
    result = compared(tmp_path, *frozen)
    assert (result.verdict, result.paired) == (THE_BASELINE, False)
    assert result.ratio == pytest.approx(2.0, rel=0.02)


# Clocks and rounds.


def test_device_clocks_are_preferred_where_both_files_have_them(tmp_path: Path) -> None:
    def with_device(seed: int, factor: float) -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        device = [None, *noisy(generator, 1e-4 * factor, ROUNDS - 1)]
        baseline = [None, *noisy(generator, 1e-4, ROUNDS - 1)]
        made = paired(seed)
        made["extra_info"] |= {"device_seconds": device, "baseline_device_seconds": baseline}
        return made

    result = compared(tmp_path, with_device(1, 1.0), with_device(2, 1.2))
    assert (result.verdict, result.clock, result.paired) == (SLOWER, "device", True)
    assert result.rounds == (ROUNDS - 1, ROUNDS - 1)
    assert result.milliseconds[0] == pytest.approx(0.1, rel=0.02)
    for wall_only in (paired(2), with_device(2, 1.2)):
        wall_only["extra_info"]["device_seconds"] = [None] * ROUNDS
        result = compared(tmp_path, with_device(1, 1.0), wall_only)
        assert (result.verdict, result.clock, result.paired) == (WITHIN_NOISE, "wall", True)


def test_a_pair_on_the_wall_beats_a_single_on_the_device(tmp_path: Path) -> None:
    made = [paired(1), paired(2)]
    for e in made:
        e["extra_info"]["device_seconds"] = [1e-4] * ROUNDS
    assert compared(tmp_path, *made).clock == "wall"
    for e in made:
        del e["extra_info"]["baseline_seconds"]
    result = compared(tmp_path, *made)
    assert (result.clock, result.paired) == ("device", False)


def test_a_round_keeps_its_provider_and_its_baseline_together() -> None:
    nan = math.nan
    samples = Samples(np.array([nan, 2.0, 4.0, 6.0]), np.array([9.0, 1.0, nan, 3.0]))
    both = samples.rounds(paired=True)
    assert both.own.tolist() == [2.0, 6.0]
    np.testing.assert_allclose(np.exp(both.logarithms()), [2.0, 2.0])
    alone = samples.rounds(paired=False)
    assert alone.own.tolist() == [2.0, 4.0, 6.0]
    np.testing.assert_allclose(np.exp(alone.logarithms()), [2.0, 4.0, 6.0])


# Repeatability.


def test_the_seed_decides(tmp_path: Path) -> None:
    def interval(seed: int) -> tuple[float, float] | None:
        return compared(tmp_path, paired(1), paired(2), Settings(seed=seed, draws=500)).interval

    assert interval(3) == interval(3)
    assert interval(3) != interval(4)


def test_other_benchmarks_in_the_file_change_nothing(tmp_path: Path) -> None:
    alone = compared(tmp_path, paired(1), paired(2))
    other = entry("bench[other]", [1e-3] * 7)
    a = compare.load(write(tmp_path / "A.json", other, paired(1)))
    b = compare.load(write(tmp_path / "B.json", paired(2), other))
    assert [c.name for c in compare.compare_runs(a, b)] == ["bench[other]", "bench[x]"]
    assert compare.compare_runs(a, b)[1] == alone


def test_draws_in_parts_are_the_distribution_of_draws_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.arange(7.0)
    monkeypatch.setattr(compare, "_DRAWN_AT_ONCE", 7 * 300)
    medians = compare._medians(values, 1000, np.random.default_rng(0))
    assert medians.shape == (1000,)
    assert set(medians) <= set(values)
    assert np.median(medians) == 3.0
    assert len(set(medians[:300])) > 3


# The command.


def run(
    capsys: pytest.CaptureFixture[str], a: Path, b: Path, *options: str
) -> tuple[int, str, str]:
    status = compare.main([str(a), str(b), *options])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = entry("bench[few]", [0.5] * 3)
    a = write(tmp_path / "A.json", paired(1), few, entry("bench[gone]", [1e-3] * 5))
    b = write(tmp_path / "B.json", paired(2, 1.05), few, entry("bench[new]", [1e-3] * 5))
    status, out, err = run(capsys, a, b, "--confidence", "0.9")
    assert (status, err) == (0, "")
    origin = "some device; torch 2.0; peft 0.1; commit abc1234; 2026-01-02"
    lines = out.splitlines()
    assert lines[:3] == [f"A: {a}: {origin}", f"B: {b}: {origin}", ""]
    head, first, second = lines[3:6]
    assert re.split(r"  +", head) == [
        *("benchmark", "A ms", "B ms", "ratio", "90% interval", "measure", "verdict")
    ]
    pattern = r"bench\[x\] +M +M +R +R to R +paired, wall +slower"
    pattern = pattern.replace("M", r"[12]\.\d{3}").replace("R", r"1\.0\d\d")
    assert re.fullmatch(pattern, first)
    assert re.split(r"  +", second) == [
        *("bench[few]", "500.000", "500.000", "1.000", "-", "unpaired, wall"),
        "too few rounds (3 and 3)",
    ]
    assert len({line.index(text) for line, text in ((head, "verdict"), (first, "slower"))}) == 1
    assert lines[6:] == [
        "",
        "only in A: bench[gone]",
        "only in B: bench[new]",
        "paired: each time over the frozen layer's in the same round; ratio is B over A of that",
        (
            "unpaired: not over a frozen layer's time, so how fast the machine was at the time is "
            "in the ratio"
        ),
        "1 slower, 1 too few rounds",
    ]


def test_what_differs_beside_the_code_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [1e-3] * 5
    a = write(tmp_path / "A.json", entry("one", data), entry("two", data))
    b = write(
        tmp_path / "B.json",
        entry("one", data, device="another", torch="2.1"),
        entry("two", data, device="another", dtype="bf16"),
        entry("three", data, dtype="fp16"),
    )
    _, out, _ = run(capsys, a, b)
    assert [line for line in out.splitlines() if line.startswith("warning")] == [
        "warning: not the same device: A some device, B another",
        "warning: not the same torch: A 2.0, B 2.1",
        "warning: not the same dtype: A fp32, B bf16",
    ]
    _, out, _ = run(capsys, a, a)
    assert "warning" not in out


def test_a_file_of_another_suite_is_read_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = {"fullname": "test.py::test", "stats": {"data": [1.0] * 5}}
    a, b = write(tmp_path / "A.json", bare), tmp_path / "B.json"
    b.write_text(json.dumps({"benchmarks": [bare]}), encoding="utf-8")
    status, out, _ = run(capsys, a, b)
    assert status == 0
    assert f"A: {a}: unknown device; commit fedcba9\n" in out
    assert f"B: {b}: unknown device; commit unknown\n" in out
    assert "test.py::test" in out


def test_exit_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "A.json", paired(1)), write(tmp_path / "B.json", paired(2, 1.05))
    assert run(capsys, a, b)[0] == 0
    assert run(capsys, a, b, "--fail-if-slower")[0] == 1
    assert run(capsys, b, a, "--fail-if-slower")[0] == 0
    assert run(capsys, a, b, "--fail-if-slower", "--noise", "0.5")[0] == 0
    assert run(capsys, a, tmp_path / "none.json", "--fail-if-slower")[0] == 2


def test_the_seed_and_the_draws_are_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "A.json", paired(1)), write(tmp_path / "B.json", paired(2))
    options = ("--seed", "7", "--draws", "100")
    assert run(capsys, a, b, *options) == run(capsys, a, b, *options)
    intervals = {run(capsys, a, b, "--seed", str(n), "--draws", "100")[1] for n in range(8)}
    assert len(intervals) > 1


def test_the_help_explains_verdicts_and_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        compare.main(["-h"])
    out = capsys.readouterr().out
    for text in (*compare.VERDICTS, "--benchmark-json", "exit status", "--fail-if-slower"):
        assert text in out


# Errors: one line that names the file and says what to do.


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a bad file, the same in either place."""
    other = write(path.parent / "good.json", paired(1))
    status, out, error = run(capsys, other, path)
    assert (status, out) == (2, "")
    assert run(capsys, path, other) == (2, "", error)
    assert error.count("\n") == 1
    return error.removesuffix("\n")


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.json"
    assert refused(path, capsys) == f"error: {path}: no such file; {EXPECTED}"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert refused(folder, capsys) == (
        f"error: {folder}: cannot be read: Is a directory; {EXPECTED}"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"T": 1}\n{"T": 2}\n', "not JSON: Extra data: line 2 column 1 (char 9)"),
        (b"\xff", "not JSON: 'utf-8' codec can't decode byte 0xff in position 0: *"),
        (b"[]", "not pytest-benchmark's: no list `benchmarks`"),
        (b'{"T": 1}', "not pytest-benchmark's: no list `benchmarks`"),
        (b'{"benchmarks": {}}', "not pytest-benchmark's: no list `benchmarks`"),
        (b'{"benchmarks": [1]}', "not pytest-benchmark's: an entry without `fullname` or `stats`"),
        (
            b'{"benchmarks": [{"fullname": "x"}]}',
            "not pytest-benchmark's: an entry without `fullname` or `stats`",
        ),
    ],
)
def test_another_kind_of_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    pattern = re.escape(f"error: {path}: {reason}; {EXPECTED}").replace(r"\*", ".*")
    assert re.fullmatch(pattern, refused(path, capsys))


def test_a_run_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "bad.json")
    assert refused(path, capsys) == (
        f"error: {path}: no benchmarks in it; measure with a `-k` that selects some"
    )


@pytest.mark.parametrize("stats", [{"median": 1.0}, {"data": []}])
def test_samples_that_were_not_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stats: dict[str, Any]
) -> None:
    path = write(tmp_path / "bad.json", {**paired(1), "stats": stats})
    assert refused(path, capsys) == (
        f"error: {path}: no samples of benchmarks/bench.py::bench[x]; --benchmark-json stores "
        "them, --benchmark-save and --benchmark-autosave only together with --benchmark-save-data"
    )


def test_a_benchmark_that_is_in_a_file_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "bad.json", paired(1), paired(2))
    assert refused(path, capsys) == (
        f"error: {path}: benchmarks/bench.py::bench[x] is in it twice; measure it once a file"
    )


@pytest.mark.parametrize(
    ("data", "extra", "reason"),
    [
        (1.0, {}, "stats.data: expected a list of seconds, got 1.0"),
        ([1.0, None], {}, "stats.data: expected a time for every round, got null"),
        ([1.0, 0.0], {}, "stats.data: expected seconds above 0, got 0.0"),
        ([1.0, "2"], {}, "stats.data: expected seconds above 0, got '2'"),
        ([1.0, math.inf], {}, "stats.data: expected seconds above 0, got inf"),
        ([1.0, math.nan], {}, "stats.data: expected seconds above 0, got nan"),
        (
            [1.0, 2.0],
            {"baseline_seconds": [1.0]},
            (
                "extra_info.baseline_seconds: expected 2 values, one for each in stats.data, got "
                "1; measure again"
            ),
        ),
        (
            [1.0, 2.0],
            {"device_seconds": [1.0, -1.0]},
            "extra_info.device_seconds: expected seconds above 0, got -1.0",
        ),
        (
            [1.0],
            {"device_seconds": [1.0], "baseline_device_seconds": "1.0"},
            "extra_info.baseline_device_seconds: expected a list of seconds, got '1.0'",
        ),
    ],
)
def test_samples_that_are_no_times(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: Any,
    extra: dict[str, Any],
    reason: str,
) -> None:
    bad = entry("bench[x]", [], **extra)
    bad["stats"]["data"] = data
    path = write(tmp_path / "bad.json", bad)
    assert refused(path, capsys) == f"error: {path}: benchmarks/bench.py::bench[x]: {reason}"


def test_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "A.json", entry("one", [1.0]))
    b = write(tmp_path / "B.json", entry("two", [1.0]))
    status, out, error = run(capsys, a, b)
    assert (status, out) == (2, "")
    assert error == (
        f"error: {a} and {b} have no benchmark in common (A has benchmarks/bench.py::one, B has "
        "benchmarks/bench.py::two); measure both with the same `-k`\n"
    )


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--confidence", "95", "expected a number between 0 and 1, got 95"),
        ("--confidence", "most", "expected a number between 0 and 1, got most"),
        ("--draws", "99", "expected a whole number, at least 100, got 99"),
        ("--draws", "1e4", "expected a whole number, at least 100, got 1e4"),
        ("--seed", "1.5", "expected a whole number, at least 0, got 1.5"),
        ("--noise", "nan", "expected 0 or a positive number, got nan"),
        ("--noise", "none", "expected 0 or a positive number, got none"),
    ],
)
def test_options_out_of_range(
    capsys: pytest.CaptureFixture[str], option: str, value: str, expected: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare.main(["A.json", "B.json", option, value])
    assert f"argument {option}: {expected}" in capsys.readouterr().err


def test_a_benchmark_is_told_by_the_path_of_its_test() -> None:
    times = {"wall": Samples(np.ones(5), None)}
    a, b = (Benchmark(f"{folder}/b.py::x", "x", times, {}) for folder in ("one", "two"))
    runs = [compare.Run(Path(x.key), {x.key: x}, None) for x in (a, b)]
    with pytest.raises(ValueError, match="no benchmark in common"):
        compare.compare_runs(*runs)
