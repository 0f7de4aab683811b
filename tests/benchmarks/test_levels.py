"""What is measured: levels, the command line, the pytest-benchmark suite, stored rows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import environment, rows
from benchmarks.environment import Environment
from benchmarks.rows import Row
from benchmarks.speed import methods
from benchmarks.speed.cases import Case, Scope, parse_shape
from benchmarks.speed.levels import LEVELS, layer, merge, model
from benchmarks.speed.methods import AdaptedLayer, LayerMethod
from benchmarks.speed.provider import BASELINE

CPU = torch.device("cpu")


def row(provider: str = "dcft", **values: object) -> Row:
    base = dict.fromkeys(("model", "d", "k", "stride", "triton", "peft"))
    base |= {"level": "layer", "direction": "fwd+bwd", "dtype": "fp32", "T": 8, "n": 16, "m": 16}
    base |= {"device": "some device", "torch": "2.0", "commit": "abc1234", "time": "2026-01-01"}
    return Row(provider=provider, **(base | values))  # type: ignore[arg-type]


# Levels.


@pytest.mark.parametrize("scope", [Scope("cpu"), Scope("cuda"), Scope("cpu", tiny=True)])
def test_cases_and_providers_are_distinct(scope: Scope) -> None:
    cases = [case for level in LEVELS.values() for case in level.cases(scope)]
    assert len(cases) == len(set(cases))
    for case in cases:
        assert case.level in LEVELS
        keys = [provider.key for provider in LEVELS[case.level].providers(case)]
        assert len(keys) == len(set(keys)), case
    if scope.gpu:  # a run that is cut off has the goals' shapes
        assert [case.sizes for case in cases[:2]] == [(8192, 4096, 4096), (4096, 768, 768)]


@pytest.mark.parametrize(("cores", "native_bf16"), [(1, True), (2, False), (8, None)])
def test_cpu_sweep_fits_the_machine_and_leaves_out_what_is_slow(
    cores: int, native_bf16: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "native_bf16", lambda: native_bf16)
    monkeypatch.setattr(environment, "available_cores", lambda: cores)
    cases = [case for case in layer.cases(Scope("cpu")) if case.sweep == layer.CPU_SWEEP]
    assert {case.threads for case in cases} == set(range(1, 1 + min(cores, 2)))
    assert {case.neighbour for case in cases} == {False, cores > 1}
    for case in cases:
        names = {provider.name for provider in layer.providers(case)}
        assert {BASELINE, "dcft", "lora_r1", "lora_r8", "lora_by_hand"} <= names
        assert ("lokr" in names) == ("published" in names) == (math.prod(case.sizes) < 2**31)
    large = {case.dtype for case in cases if math.prod(case.sizes) >= 2**31}
    assert large == ({"fp32"} if native_bf16 is False else {"fp32", "bf16"})


@pytest.mark.slow
def test_cpu_sweep_has_rows_of_every_setting(tmp_path: Path) -> None:
    arguments = ["--only", "layer-cpu-.*-(dcft|lora_r1)$", "--tiny", "--device", "cpu"]
    arguments += ["--case-budget", "0"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    stored = rows.read(tmp_path / rows.ROWS_FILE)
    assert {(r.gate, r.error) for r in stored} == {("passed", None)}
    threads = {(t, False) for t in (1, 2)[: environment.available_cores()]}
    threads |= {(2, True)} if len(threads) == 2 else set()
    assert {(r.threads, r.neighbour) for r in stored} == threads
    assert {r.direction for r in stored} == {"fwd+bwd", "inference"}
    assert {r.processor for r in stored} == {environment.processor()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "providers"),
    [
        ("block", "dcft lora_by_hand published"),
        ("step", "dcft lora_r1 full dora"),
        ("merge", "copy dcft dcft_in_place lora_r8 lokr"),
        ("kernel", "frozen_forward base_added base_added_backward copy"),
    ],
)
def test_levels_pass_their_gates(tmp_path: Path, level: str, providers: str) -> None:
    only = f"^{level}-.*-({providers.replace(' ', '|')})$"
    arguments = ["--only", only, "--tiny", "--device", "cpu", "--case-budget", "0"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    stored = rows.read(tmp_path / rows.ROWS_FILE)
    assert {r.gate for r in stored} == {"passed"}
    assert {r.provider for r in stored} - {BASELINE} == set(providers.split())


def test_model_with_a_wrong_layer_fails_its_gate() -> None:
    (right,) = methods.by_name("dcft")

    def build(base: torch.nn.Linear, generator: torch.Generator) -> AdaptedLayer:
        adapted = right.build(base, generator)
        adapted.layer.register_forward_hook(lambda module, args, y: 1.0001 * y)
        return adapted

    problem = model.ModelProblem(Case("block", 16, 64, 64, "fp32", model="tiny-roberta"), CPU)
    workload = model.workload_of(problem, LayerMethod("wrong", build))
    workload.step.prepare()
    workload.step.run()
    assert workload.check().startswith("y: error")


def test_unmerge_without_a_merge_fails_its_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("merge", None, 64, 96, "fp32", "unmerge")
    (provider,) = (p for p in merge.providers(case) if p.key == "dcft_in_place")
    monkeypatch.setattr(merge, "add_delta_weight_", lambda weight, *factors, scaling: weight)
    workload = provider.build(merge.MergeProblem(case, CPU))
    workload.step.prepare()
    workload.step.run()
    assert workload.check().startswith("weight before it was unmerged: error")


def test_shapes_are_written_in_two_ways() -> None:
    assert parse_shape("4096x768->3072") == parse_shape("4096x768x3072") == (4096, 768, 3072)
    for text in ("4096", "0x768x768", "1x2x3x4", ""):
        with pytest.raises(ValueError, match="shape: expected tokens, features in and out"):
            parse_shape(text)


# The command line.


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--only", "nobody"], "nothing to measure: no measurement has such a name"),
        (["--shapes", "12"], "shape: expected tokens, features in and out"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        pytest.param(
            ["--device", "cuda"],
            "--device: expected a GPU that PyTorch finds",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert error in capsys.readouterr().err


def test_run_keeps_what_it_has_when_its_budget_is_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--only", "^layer.*-dcft$", "--shapes", "8x16x16", "8x32x32", "--dtype", "fp32"]
    arguments += ["--device", "cpu", "--case-budget", "0", "--budget", "0"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    stored = rows.read(tmp_path / rows.ROWS_FILE)
    assert {(r.provider, r.n) for r in stored} == {(BASELINE, 16), ("dcft", 16)}
    assert "not measured: layer 8x32->32" in capsys.readouterr().out


@pytest.mark.slow
def test_suite_fills_table_rows_and_json_from_the_same_samples(tmp_path: Path) -> None:
    arguments = ["-m", "pytest", "--benchmark-only", "--tiny", "--device", "cpu"]
    arguments += ["--results", str(tmp_path), "-p", "no:cacheprovider", "-p", "no:xdist"]
    test = "bench_provider[layer-main-32x64->64-fp32-fwd+bwd-dcft]"
    arguments.append(f"benchmarks/speed/bench_suite.py::{test}")
    # A worker of pytest-xdist would disable pytest-benchmark through its environment.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    finished = subprocess.run(
        [sys.executable, *arguments],
        env=outside,
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    stored = {r.provider: r for r in rows.read(tmp_path / rows.ROWS_FILE)}
    assert set(stored) == {BASELINE, "dcft"}  # the baseline is always measured
    written = json.loads((tmp_path / "pytest-benchmark.json").read_text())
    assert "node" not in written["machine_info"]
    (entry,) = written["benchmarks"]
    assert entry["group"] == "layer 32x64->64 fp32 fwd+bwd (main)"
    assert entry["stats"]["rounds"] == stored["dcft"].rounds
    assert entry["stats"]["median"] * 1e3 == pytest.approx(stored["dcft"].wall_ms_p50)


# Rows.


def test_rows_survive_the_file_and_a_killed_run(tmp_path: Path) -> None:
    file = tmp_path / "new" / rows.ROWS_FILE
    written = [row(), row("lora_r8", wall_ms_p50=1.25, gate="passed")]
    rows.append(file, written[0])
    with file.open("a") as handle:
        handle.write('{"provider": "dc')
    assert rows.read(file) == written[:1]
    rows.append(file, written[1])
    assert rows.read(file) == written


@pytest.mark.parametrize("line", ["{", "[]", '{"provider": "dcft"}', '{"speed": 1}'])
def test_line_that_is_not_a_row_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / rows.ROWS_FILE
    rows.append(file, row())
    with file.open("a") as handle:
        handle.write(line + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not a result row"):
        rows.read(file)


def test_latest_takes_whole_runs_of_a_case() -> None:
    old = [row(name, time="2026-01-01") for name in ("frozen", "dcft", "lora_r8")]
    new = [row(name, time="2026-01-02") for name in ("frozen", "dcft")]
    other = [row(T=99), row(sweep="rank"), row(threads=2), row(threads=2, neighbour=True)]
    assert rows.latest([*old, *other, *new]) == [*new, *other]


# Environment.


def test_commit_tells_whether_measured_code_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    assert environment.commit(tmp_path) == "unknown"
    code = tmp_path / "benchmarks" / "code.py"
    code.parent.mkdir()
    code.write_text("1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    clean = environment.commit(tmp_path)
    assert clean.isalnum()
    result = tmp_path / "benchmarks" / "results" / "a" / "rows.jsonl"
    result.parent.mkdir(parents=True)
    result.write_text("2\n")
    assert environment.commit(tmp_path) == clean
    code.write_text("2\n")
    assert environment.commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.parametrize(
    ("cpuinfo", "processor"),
    [
        (
            {"model name": "AMD EPYC", "cpu family": "25", "model": "17"},
            "AMD EPYC, family 25, model 17",
        ),
        ({"model name": "Intel(R) Xeon(R) CPU @ 2.20GHz"}, "Intel Xeon"),
    ],
)
def test_processor_has_family_and_model(
    cpuinfo: dict[str, str], processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_cpuinfo", lambda: cpuinfo)
    assert environment.processor() == processor
    assert environment.device_name(CPU).startswith(processor.partition(",")[0])


def test_slug_is_a_folder_name() -> None:
    described = Environment("Some CPU (2 cores, AVX2)", "2.0", None, None, "abc")
    assert described.slug == "some-cpu-2-cores-avx2"
