"""Runs: stored results, training, exact resume, learning rates, the command line."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from benchmarks.quality import __main__, runs, training
from benchmarks.quality.errors import QualityError
from benchmarks.quality.methods import Adapted, Method
from benchmarks.quality.methods.table import METHODS
from benchmarks.quality.runs import SLICE, Result, Run
from benchmarks.quality.sentences import prepare, read
from benchmarks.quality.session import Session
from benchmarks.quality.tasks import TASKS, Prepared
from tests.benchmarks.quality import small_data

COLA = TASKS["cola"]
STEPS = 12  # checkpoints are written every 3


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    bert, llama = transformers.BertForSequenceClassification, transformers.LlamaForCausalLM
    config = small_data.bert_config(hidden_dropout_prob=0.1)
    small_data.write_model(folder / "bert", bert, config)
    small_data.write_model(folder / "llama", llama, small_data.llama_config())
    small_data.write_task(folder / "data" / "cola")
    text = " ".join(sentence for sentence, _ in small_data.sentences(200, 33))
    (folder / "data" / "text.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(training, "CHECKPOINTS", tmp_path / "checkpoints")
    rates = {"learning_rate": 1e-2, "head_learning_rate": 1e-2}
    options, model = {"r": 2}, str(folder / "bert")
    return Run("cola", "lora", options, model=model, steps=STEPS, batch_size=8, **rates)


@pytest.fixture(scope="session")
def prepared(folder: Path) -> Prepared:
    return prepare(COLA, read(COLA, folder / "data"), small_data.tokenizer(), 32)


class Killed(BaseException):
    """Like a process that ends: nothing handles it."""


def fine_tune(run: Run, prepared: Prepared, **changes: Any) -> Result:
    method = changes.pop("method", METHODS[run.method])
    on_step = changes.pop("on_step", lambda: None)
    return training.train(run, TASKS[run.task], method, prepared, "", on_step)


def kill_after(step: int) -> Callable[[], None]:
    left = iter(range(step - 1))

    def on_step() -> None:
        if next(left, None) is None:
            raise Killed

    return on_step


def test_keys_identify_settings(run: Run) -> None:
    # Stored results are found by it.
    assert Run("cola", "dcft", {"init": "balanced"}, max_tokens=128).key() == "e44acd29d6058bda"
    run = dataclasses.replace(run, train_size=5, scored_size=6, max_tokens=7)
    others = {str: "other", int: 99, float: 0.5, bool: True, dict: {"r": 3}}
    changes = {f.name: others[type(getattr(run, f.name))] for f in dataclasses.fields(Run)}
    keys = {dataclasses.replace(run, **{name: value}).key() for name, value in changes.items()}
    assert len(keys - {run.key()}) == len(changes)


def test_results_are_stored(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    run = dataclasses.replace(run, steps=1, options={"r": (2, 3)})
    unfinished = dataclasses.replace(run, options={})
    result = dataclasses.replace(fine_tune(unfinished, prepared), run=run, key=run.key())
    path = tmp_path / "new" / runs.RUNS_FILE
    runs.add(path, result)
    path.write_bytes(path.read_bytes() + b'{"key": "unfini')
    (found,) = runs.read(path)
    assert found.run.key() == found.key == run.key()
    assert dataclasses.replace(found, run=run) == result
    with ThreadPoolExecutor() as pool:  # each opens the file, as a process would
        list(pool.map(functools.partial(runs.add, path), [result] * 8))
    assert len(runs.read(path)) == 9
    old = result.as_line()
    for name in ("replicate", "stopping", "jackknife", "scored_step"):
        del old[name]
    assert Result.from_line(old).run == run
    for line in ("nothing", "[1]", "7", '{"key": "a", "color": 1}'):
        path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(QualityError, match=r"runs\.jsonl, line 1: not a result: "):
            Session(None, path, Console())


def test_stored_results_are_reused(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / runs.RUNS_FILE
    session = Session(folder / "data", path, Console(quiet=True))
    first = session.result(dataclasses.replace(run, steps=1), "")
    assert runs.read(path) == [first]
    monkeypatch.setattr(training, "train", lambda *_: first)
    for stored in (
        first,
        dataclasses.replace(first, value=None, error="diverged"),
        dataclasses.replace(first, data="other"),
        dataclasses.replace(first, values={"matthews": 0.0}),
    ):
        runs.add(path, stored)
        count = len(runs.read(path))
        assert session.result(first.run, "", "nll") == first
        assert len(runs.read(path)) == count + (stored is not first)


def test_a_slice_of_train_decides_when_to_stop(cli: Any) -> None:
    stopping = ("--stopping", "--evaluations", "2", "--steps", "4", "--weight-decay", "0.1")
    code, (found,) = cli("--task", "cola", "--lr", "1e-2", *stopping, "--replicate", "2")
    assert (code, found.scored_step in (2, 4), len(found.jackknife["auc"])) == (0, True, 24)
    assert (found.run.weight_decay, found.run.replicate, found.run.stopping) == (0.1, 2, True)


def test_batches_depend_on_the_seed_alone() -> None:
    lengths = [number % 40 for number in range(50)]
    order = training.batch_order(lengths, 8, 20, 1)
    for epoch in range(3):
        assert sorted(order[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert training.batch_order(lengths, 8, 30, 1)[:160] == order
    assert training.batch_order(lengths, 8, 20, 2) != order
    similar = training.batch_order([number % 40 for number in range(640)], 8, 80, 1)
    batches = [[number % 40 for number in similar[at : at + 8]] for at in range(0, 640, 8)]
    # Drawn at random they would differ by 30 and more.
    assert max(max(batch) - min(batch) for batch in batches) < 10


def test_a_run_trains_and_scores(run: Run, prepared: Prepared) -> None:
    models: list[Any] = []

    def adapt(*arguments: Any, **options: Any) -> Adapted:
        adapted = METHODS["lora"].adapt(*arguments, **options)
        models.append(adapted.model)
        return adapted

    run = dataclasses.replace(run, steps=101, evaluations=3)
    result = fine_tune(run, prepared, method=dataclasses.replace(METHODS["lora"], adapt=adapt))
    assert result.error is None
    assert result.value == result.values["matthews"]
    assert [step for step, _ in result.loss_curve] == [*range(2, 101, 2), 101]
    assert [step for step, _ in result.value_curve] == [33, 67, 101]
    # PEFT starts these factors at zero.
    moved = [p.any().item() for name, p in models[0].named_parameters() if "lora_B" in name]
    assert len(moved) == 2 * 6
    assert all(moved)
    # Rank 2: in each block four square layers and both of the feed-forward; pooler, classifier.
    assert result.trainable_parameters == 2 * 2 * (4 * (32 + 32) + 2 * (32 + 64))
    assert result.head_parameters == (32 * 32 + 32) + (32 * 2 + 2)
    assert not list(training.CHECKPOINTS.glob("*"))


@pytest.mark.parametrize("killed", [2, 3, 8, 12])
@pytest.mark.parametrize("stopping", [True, False])
def test_an_interrupted_run_ends_as_if_it_was_not(
    run: Run, prepared: Prepared, killed: int, stopping: bool
) -> None:
    run = dataclasses.replace(run, evaluations=3, stopping=stopping)
    losses = iter((0.2, 0.1))  # the second of three evaluations has the lowest
    seen: dict[float, float] = {}

    def score(outputs: list[Any]) -> dict[str, float]:
        return {"nll": seen.setdefault(float(np.sum(outputs)), next(losses, 0.3))}

    held_out = dataclasses.replace(prepared, score=score)
    prepared = dataclasses.replace(prepared, held_out=held_out if stopping else None)
    expected = fine_tune(run, prepared)
    assert expected.scored_step == (8 if stopping else 12)
    assert expected.value == dict(expected.value_curve)[expected.scored_step]
    assert len(expected.jackknife["nll"]) == len(prepared.evaluation)
    with pytest.raises(Killed):
        fine_tune(run, prepared, on_step=kill_after(killed))
    torch.rand(7)
    steps: list[int] = []
    found = fine_tune(run, prepared, on_step=lambda: steps.append(0))
    assert len(steps) == STEPS - killed // 3 * 3
    assert found.loss_curve == expected.loss_curve
    assert found.value_curve == expected.value_curve
    assert (found.values, found.jackknife) == (expected.values, expected.jackknife)
    assert found.loss_curve != fine_tune(dataclasses.replace(run, seed=1), prepared).loss_curve


def test_a_replicate_differs_in_dropout_only(run: Run, prepared: Prepared) -> None:
    models: list[Any] = []

    def adapt(*arguments: Any, **options: Any) -> Adapted:
        adapted = METHODS["lora"].adapt(*arguments, **options)
        models.append(copy.deepcopy(adapted.model).state_dict())
        return adapted

    method = dataclasses.replace(METHODS["lora"], adapt=adapt)
    found = [
        fine_tune(dataclasses.replace(run, replicate=n), prepared, method=method) for n in (0, 1)
    ]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    first, second = (result.loss_curve for result in found)
    assert first[0][1] != second[0][1]  # the first step's loss


@pytest.mark.parametrize("change", ["commit", "method with state"])
def test_runs_that_cannot_resume_start_over(
    run: Run, prepared: Prepared, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change != "commit":
        run = dataclasses.replace(run, method="adalora", options={})
    with pytest.raises(Killed):
        fine_tune(run, prepared, on_step=kill_after(8))
    if change == "commit":
        monkeypatch.setattr(training, "commit", lambda _: "other")
    steps: list[int] = []
    fine_tune(run, prepared, on_step=lambda: steps.append(0))
    assert len(steps) == STEPS


def test_rates_penalty_and_after_step(run: Run, prepared: Prepared) -> None:
    """Adam's first step is the learning rate; without warm-up the schedule begins at its top."""
    before: dict[str, torch.Tensor] = {}
    calls: list[Any] = []
    models = []

    def adapt(model: Any, layers: Any, steps: int) -> Adapted:
        adapted = METHODS["bitfit"].adapt(model, layers, steps)
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})
        models.append(model)
        bias = model.get_parameter("bert.encoder.layer.0.output.dense.bias")
        adapted.penalty = lambda: torch.tensor(100.0)
        adapted.after_step = lambda step: calls.append((step, bias.grad is not None))
        return adapted

    run = dataclasses.replace(
        run, method="bitfit", options={}, steps=1, warm_up=0.0, head_learning_rate=3e-3
    )
    result = fine_tune(run, prepared, method=Method(adapt))
    after = dict(models[0].named_parameters())
    moved = {name: (after[name] - p).abs().max().item() for name, p in before.items()}
    assert moved["bert.encoder.layer.0.output.dense.bias"] == pytest.approx(1e-2, rel=1e-2)
    assert moved["classifier.weight"] == pytest.approx(3e-3, rel=1e-2)
    assert moved["bert.encoder.layer.0.output.dense.weight"] == 0.0
    assert result.loss_curve[0][1] > 100
    assert calls == [(1, True)]


def test_a_diverged_run_has_an_error(run: Run, prepared: Prepared) -> None:
    result = fine_tune(dataclasses.replace(run, learning_rate=1e30), prepared)
    assert result.value is None
    message = (
        r"(step \d+ of 12 has the loss nan|not finite); a lower --lr may help \(it was 1e\+30\)"
    )
    with pytest.raises(QualityError, match=message):
        raise QualityError(result.error)


# The command line


@pytest.fixture
def cli(run: Run, folder: Path, tmp_path: Path) -> Callable[..., tuple[int, list[Result]]]:
    def main(*arguments: str, model: str = "bert") -> tuple[int, list[Result]]:
        data = ["--model", str(folder / model), "--data", str(folder / "data")]
        size = ["--batch-size", "8"] if "--study" not in arguments else []
        code = __main__.main([*data, *size, "--results", str(tmp_path), *arguments])
        return code, runs.read(tmp_path / runs.RUNS_FILE)

    return main


def test_learning_rates_are_chosen_on_a_slice_of_train(cli: Any, capsys: Any) -> None:
    arguments = ("--task", "CoLA", "--steps", "4", "--seeds", "2", "--method", "dcft,head")
    code, found = cli(*arguments, "--option", "dcft.rank=2")
    assert code == 0
    trials = [result for result in found if result.run.scored == SLICE]
    rates = METHODS["dcft"].learning_rates
    assert [(t.run.learning_rate, t.run.seed) for t in trials] == [
        (rate, seed) for rate in rates for seed in (0, 1)
    ]
    assert not any(trial.jackknife for trial in trials)
    nll = {
        rate: sum(t.values["nll"] for t in trials if t.run.learning_rate == rate) for rate in rates
    }
    best = min(nll, key=nll.__getitem__)
    final = [r.run for r in found if r.run.scored != SLICE and r.run.method == "dcft"]
    assert [(r.seed, r.learning_rate) for r in final] == [(0, best), (1, best)]
    assert final[0].options == {"rank": 2, "init": "balanced"}
    assert len(found) == 4 * 2 + 2 + 2
    assert cli(*arguments, "--option", "dcft.rank=2")[1] == found  # stored runs are not repeated
    shown = capsys.readouterr().out
    assert "| dcft | " in shown
    assert "| constant answer | 0 | 0.0 |" in shown


def test_language_models_and_folders(cli: Any, folder: Path) -> None:
    steps = ("--lr", "1e-2", "--steps", "8", "--max-tokens", "16")
    _, found = cli("--task", "shakespeare", "--method", "head,lora", *steps, model="llama")
    head, lora = found
    assert (head.trainable_parameters, head.head_parameters, head.loss_curve) == (0, 0, [])
    assert lora.value > 1.0
    assert lora.value != head.value
    code, found = cli("--task", str(folder / "data" / "cola"), *steps, "--precision", "bf16")
    assert (code, found[-1].metric, found[-1].error) == (0, "accuracy", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--task: expected a task, or --study"),
        (("--task", "colla"), "--task: expected one of .*did you mean cola"),
        (("--task", "cola", "--method", "lroa"), "--method: expected one of .*did you mean lora"),
        (("--task", "cola", "--targets", "X"), "--targets: expected one of QK"),
        (("--task", "cola", "--option", "r"), "--option: expected name=value, got 'r'"),
        (("--task", "cola", "--option", "rnk=1"), "--option of dcft: .*did you mean rank"),
        (("--task", "cola", "--option", "lora.r=1"), "is for 'lora', which is not in --method"),
        (("--task", "cola", "--option", "rank=0", "--lr", "1"), "--option: dcft: rank: expected"),
        (("--study", "rank", "--option", "a=1"), "--option: --study sets it"),
        (("--study", "rank", "--variants", "z*"), "--variants: 'z\\*' matches none of k=1"),
        (("--study", "rnk"), "--study: expected one of .*did you mean rank"),
    ],
)
def test_mistakes_are_reported(cli: Any, capsys: Any, arguments: Any, message: str) -> None:
    code, found = cli(*arguments)
    assert (code, found) == (2, [])
    with pytest.raises(QualityError, match=message):
        raise QualityError(" ".join(capsys.readouterr().out.split()))


def test_a_missing_model_is_reported(cli: Any, capsys: Any) -> None:
    assert cli("--task", "cola", model="gone")[0] == 2
    assert "--model: " in capsys.readouterr().out
