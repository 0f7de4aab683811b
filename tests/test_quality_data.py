"""The learning-quality harness's tasks: files, the hub, figures, layers, heads, language."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from benchmarks.quality import language, layers, metrics, sentences, tasks, text_files
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.pretrained import head_parameters
from benchmarks.quality.text_files import Example, Splits
from tests import quality_models

COLA, RTE, STSB = tasks.TASKS["cola"], tasks.TASKS["rte"], tasks.TASKS["stsb"]
HEADER = ("sentence1", "label")
ROWS = (HEADER, ("one", 0), ("two", 1))


def write(folder: Path, train: Sequence[Any] = ROWS, dev: Sequence[Any] = ROWS) -> Path:
    quality_models.write_tsv(folder / "train.tsv", train)
    quality_models.write_tsv(folder / "dev.tsv", dev)
    return folder


def one(*texts: str, label: float = 0) -> Example:
    return Example(texts, label)


# The table of tasks


def test_glue_is_scored_by_its_official_figures() -> None:
    expected = {
        "cola": ("matthews", "accuracy"),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson",),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
    glue = {name: task for name, task in tasks.TASKS.items() if (task.hub or "")[:1] == ("glue",)}
    assert {name: task.metrics for name, task in glue.items()} == expected
    assert {task.metric for task in glue.values()} <= set(metrics.METRICS)
    assert {name: len(task.labels) for name, task in glue.items() if len(task.labels) != 2} == {
        "mnli": 3,
        "stsb": 0,
    }
    # As the hub numbers them; WNLI's is the other way round.
    assert glue["rte"].labels[0] == glue["qnli"].labels[0] == "entailment"
    assert glue["wnli"].labels == ("not_entailment", "entailment")
    assert [name for name, task in glue.items() if task.kind == "regression"] == ["stsb"]


@pytest.mark.parametrize("name", ["sst2", "SST-2", "SST2", "squad-v2", "SQuAD_v2"])
def test_names_of_tasks_are_read_generously(name: str) -> None:
    assert tasks.by_name(name).name in ("sst2", "squad_v2")


def test_an_unknown_task_lists_the_tasks_and_the_near_ones() -> None:
    message = r"--task: expected one of cola, sst2, .*, got 'colla'; did you mean cola\?"
    with pytest.raises(QualityError, match=message):
        tasks.by_name("colla")


# Files


def test_sentences_are_read_as_they_are(tmp_path: Path) -> None:
    odd = '"Quotes" are text, "so is one that never ends'
    header = ("label", "extra", "sentence1")
    train = [header, (1, "x", odd), (0, "y", "  naïve ' "), (1, "", "")]
    quality_models.write_tsv(tmp_path / "cola" / "train.tsv.gz", train)
    quality_models.write_tsv(tmp_path / "cola" / "dev.tsv", [HEADER, ("last", 0), ()])
    found = text_files.read_folder(COLA, tmp_path)
    assert list(found.train) == [one(odd, label=1), one("  naïve ' "), one("", label=1)]
    assert list(found.dev) == [one("last")]


def test_pairs_and_scores_are_read(tmp_path: Path) -> None:
    rows = [("sentence1", "sentence2", "label"), ("a", "b", "5.000"), ("c", "d", "1.25")]
    folder = write(tmp_path / "stsb", rows, rows)
    expected = [one("a", "b", label=1.0), one("c", "d", label=0.25)]
    assert list(text_files.read_folder(STSB, tmp_path).dev) == expected
    # The task's own folder will do, too.
    assert list(text_files.read_folder(STSB, folder).train) == expected


def test_a_byte_order_mark_is_no_part_of_a_column_s_name(tmp_path: Path) -> None:
    write(tmp_path)
    content = (tmp_path / "dev.tsv").read_bytes()
    (tmp_path / "dev.tsv").write_bytes(b"\xef\xbb\xbf" + content)
    found = text_files.read_folder(COLA, tmp_path)
    assert found.dev == found.train


def test_another_task_s_folder_is_refused(tmp_path: Path) -> None:
    """Its sentences would pass for this task's: the columns and the labels are the same."""
    folder = write(tmp_path / "sst2")
    with pytest.raises(QualityError, match=r"sst2 is the folder of the task sst2; expected .*cola"):
        text_files.read_folder(COLA, folder)
    assert len(text_files.read_folder(tasks.TASKS["sst2"], folder).train) == 2


def test_a_missing_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    message = r"--data: .*gone is not a folder; expected one that holds cola/train\.tsv and cola/d"
    with pytest.raises(QualityError, match=message):
        text_files.read_folder(COLA, tmp_path / "gone")
    with pytest.raises(
        QualityError, match=r"lacks train\.tsv \(or train\.tsv\.gz\); it holds noth"
    ):
        text_files.read_folder(COLA, tmp_path)
    write(tmp_path / "cola").joinpath("dev.tsv").rename(tmp_path / "cola" / "test.tsv")
    message = r"cola lacks dev\.tsv .*; it holds test\.tsv, train\.tsv; the tasks are cola, sst2"
    with pytest.raises(QualityError, match=message):
        text_files.read_folder(COLA, tmp_path)


@pytest.mark.parametrize(
    ("task", "dev", "message"),
    [
        ("cola", [("text", "label"), ("a", 0)],
         r"lacks the column sentence1; its first line is text, label; expected sentence1, label"),
        ("rte", [HEADER, ("a", 0)], r"lacks the column sentence2; its first line is sentence1, la"),
        ("cola", [], r"lacks the column sentence1, label; its first line is empty"),
        ("cola", [HEADER, ("a", 0), ("b",)], r"line 3 has fewer fields than the first line"),
        ("cola", [HEADER, ("a", 0), ("b", 1, "c")], r"line 3 has more fields than the first line"),
        ("cola", [HEADER], r" holds no examples"),
        ("cola", [HEADER, ("a", 0), ("b", 2)],
         r"line 3 has the label '2'; expected one of 0 \(unacceptable\), 1 \(acceptable\)"),
        ("cola", [HEADER, ("a", "0.5")], r"line 2 has the label '0\.5'; expected one of 0"),
        ("cola", [HEADER, ("a", "acceptable")], r"line 2 has the label 'acceptable'; expected one"),
        ("stsb", [("sentence1", "sentence2", "label"), ("a", "b", 5), ("a", "b", 5.01)],
         r"line 3 has the label '5\.01'; expected a number from 0 to 5"),
        ("stsb", [("sentence1", "sentence2", "label"), ("a", "b", "nan")],
         r"line 2 has the label 'nan'; expected a number from 0 to 5"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_told_with_its_line(
    tmp_path: Path, task: str, dev: list[Any], message: str
) -> None:
    header = ("sentence1", "sentence2", "label")
    write(tmp_path, [header, ("a", "b", 0)], dev)
    with pytest.raises(QualityError, match=rf"--data: .*dev\.tsv.*{message}"):
        text_files.read_folder(tasks.TASKS[task], tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dev.tsv", b"sentence1\tlabel\ncaf\xe9\t1\n"),
        ("dev.tsv.gz", b"sentence1\tlabel\na\t1\n"),
        ("dev.tsv", b"sentence1\tlabel\n" + b"a" * 200_000 + b"\t1\n"),
    ],
    ids=["not UTF-8", "not gzipped", "endless"],
)
def test_what_is_no_text_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path).joinpath("dev.tsv").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        QualityError, match=rf"--data: .*{name} could not be read: .*; expected UTF"
    ):
        text_files.read_folder(COLA, tmp_path)


def test_a_digest_tells_examples_from_others(tmp_path: Path) -> None:
    examples = [one("a"), one("b", label=1), one("c")]
    splits = Splits(examples[:2], examples[2:])
    digests = [
        splits.digest(),
        Splits(examples[:1], examples[1:]).digest(),
        Splits(examples[1::-1], examples[2:]).digest(),
        Splits(examples[:2], [one("c", label=1)]).digest(),
        Splits(examples[:2], [one("C")]).digest(),
        Splits(examples[:2], [one("c", "")]).digest(),
    ]
    assert len(set(digests)) == len(digests)
    rows = [HEADER, ("a", 0), ("b", 1)]
    plain = text_files.read_folder(COLA, write(tmp_path / "plain", rows, rows))
    for split in ("train", "dev"):
        quality_models.write_tsv(tmp_path / "packed" / f"{split}.tsv.gz", rows)
    assert text_files.read_folder(COLA, tmp_path / "packed").digest() == plain.digest()


# A folder as a task


def test_a_folder_is_a_task_of_its_own(tmp_path: Path) -> None:
    train = [("sentence1", "sentence2", "label"), ("a", "b", 0), ("c", "d", 2), ("e", "f", 1)]
    dev = [("label", "sentence2", "sentence1"), (1, "b", "a")]
    folder = write(tmp_path / "mine", train, dev)
    task = text_files.own_task(folder)
    assert (task.name, task.kind, task.metrics) == ("mine", "classification", ("accuracy",))
    assert task.labels == ("0", "1", "2")
    splits = text_files.read_folder(task, folder)
    assert list(splits.train) == [one("a", "b"), one("c", "d", label=2), one("e", "f", label=1)]
    assert list(splits.dev) == [one("a", "b", label=1)]
    single = text_files.own_task(write(tmp_path / "single"))
    assert len(text_files.read_folder(single, tmp_path / "single").train[0].texts) == 1


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([HEADER, ("a", 0), ("b", "yes")],
         r"train\.tsv line 3 has the label 'yes'; expected the number of a class, 0, 1, \.\.\."),
        ([HEADER, ("a", 0), ("b", -1)], r"line 3 has the label '-1'; expected the number"),
        ([HEADER, ("a", 1), ("b", 20230101)], r"has no example with the label 0; expected classes"),
        ([HEADER, ("a", 0), ("b", 0)], r"has no example with the label 1; .* at least two"),
        ([("label",), (0,)], r"lacks the column sentence1; its first line is label"),
        ([("text", "label"), ("a", 0)], r"lacks the column sentence1; its first line is text, la"),
        ([], r"lacks the column sentence1, label; its first line is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_own_task_is_told(
    tmp_path: Path, train: list[Any], message: str
) -> None:
    with pytest.raises(QualityError, match=message):
        text_files.own_task(write(tmp_path, train, [HEADER, ("a", 0)]))


def test_a_class_of_dev_alone_is_told(tmp_path: Path) -> None:
    train = [HEADER, ("a", 0), ("b", 1), ("c", 0)]
    dev = [HEADER, ("a", 0), ("b", 2)]
    message = (
        r"dev\.tsv line 3 has the label 2, which no training example has; expected one of 0, 1"
    )
    with pytest.raises(QualityError, match=message):
        text_files.own_task(write(tmp_path, train, dev))


def test_an_own_task_without_files_lists_the_tasks(tmp_path: Path) -> None:
    with pytest.raises(
        QualityError, match=r"lacks train\.tsv .*it holds nothing; the tasks are co"
    ):
        text_files.own_task(tmp_path)


# The hub


def _datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[Any]:
    """A module `datasets` whose splits are all `rows`; the calls that it got."""
    calls = []

    def load_dataset(*arguments: Any, split: str) -> Any:
        calls.append((*arguments, split))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("name", "columns", "dev"),
    [
        ("cola", ("sentence",), "validation"),
        ("sst2", ("sentence",), "validation"),
        ("mrpc", ("sentence1", "sentence2"), "validation"),
        ("qqp", ("question1", "question2"), "validation"),
        ("stsb", ("sentence1", "sentence2"), "validation"),
        ("mnli", ("premise", "hypothesis"), "validation_matched"),
        ("qnli", ("question", "sentence"), "validation"),
        ("rte", ("sentence1", "sentence2"), "validation"),
        ("wnli", ("sentence1", "sentence2"), "validation"),
    ],
)
def test_the_hub_is_asked_for_the_task_s_columns_and_splits(
    monkeypatch: pytest.MonkeyPatch, name: str, columns: tuple[str, ...], dev: str
) -> None:
    texts = {column: f"a {column}" for column in columns}
    calls = _datasets(monkeypatch, [{**texts, "label": 1, "idx": 0}])
    found = text_files.read_hub(tasks.TASKS[name])
    assert calls == [("glue", name, "train"), ("glue", name, dev)]
    label = 0.2 if name == "stsb" else 1
    assert found.train == found.dev == [Example(tuple(texts.values()), label)]


def test_the_hub_s_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _datasets(monkeypatch, ConnectionError("no connection"))
    message = r"--data: cola could not be read from the hub: no connection; pass a folder"
    with pytest.raises(QualityError, match=message):
        text_files.read_hub(COLA)
    _datasets(monkeypatch, [{"sentence": "a", "label": -1}])
    with pytest.raises(QualityError, match=r"train row 0 has the label '-1'; expected one of 0"):
        text_files.read_hub(COLA)
    _datasets(monkeypatch, [])
    with pytest.raises(QualityError, match=r"cola, train holds no examples"):
        text_files.read_hub(COLA)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r"--data: expected the folder with cola/train\.tsv .* got nothing; .*pip install data"
    with pytest.raises(QualityError, match=message):
        text_files.read_hub(COLA)


def test_an_own_task_is_not_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=r"--data: mine is not on the hub; pass its folder"):
        text_files.read_hub(text_files.own_task(write(tmp_path / "mine")))


# The slice of train


class _Untouchable(Sequence[Any]):
    """Examples that nothing may look at."""

    def __getitem__(self, _: Any) -> Any:
        raise AssertionError("the dev split was looked at")

    def __len__(self) -> int:
        raise AssertionError("the dev split was counted")


@pytest.mark.parametrize("count", [2, 3, 5, 12, 149, 150, 1000, 1017])
def test_a_slice_of_train_takes_the_place_of_dev(count: int) -> None:
    train = [one(str(number)) for number in range(count)]
    found = sentences.slice_of_train(Splits(train, _Untouchable()))
    kept, held = ([int(e.texts[0]) for e in split] for split in (found.train, found.dev))
    assert set(kept).isdisjoint(held)
    assert sorted(kept + held) == list(range(count))
    assert len(kept) >= len(held) > 0
    assert kept == sorted(kept)
    assert held == sorted(held)
    if count >= 150:
        # Neighbours stay together.
        assert held[:30] == list(range(30))
    if count > 4:
        assert count / 5 - 1 < len(held) < count / 5 + 30


def test_a_slice_of_one_example_is_an_error() -> None:
    with pytest.raises(
        QualityError, match=r"--lr: .* at least 2 training examples, got 1; pass a n"
    ):
        sentences.slice_of_train(Splits([one("a")], _Untouchable()))


# Features and scores


def test_sentences_become_features() -> None:
    tokenizer = quality_models.tokenizer()
    splits = Splits(
        [one("the film was fine", label=1), one("it", label=1), one("poor")],
        [one("we saw it twice and it was long"), one("fine", label=1), one("a poor one")],
    )
    prepared = sentences.prepare(COLA, splits, tokenizer, 6)
    expected = tokenizer("the film was fine")["input_ids"]
    assert prepared.train[0]["input_ids"] == expected
    assert [feature["labels"] for feature in prepared.train] == [1, 1, 0]
    assert prepared.outputs == 2
    # Scored in order of length, cut at six tokens.
    assert [len(feature["input_ids"]) for feature in prepared.evaluation] == [3, 5, 6]
    assert [feature["labels"] for feature in prepared.evaluation] == [1, 0, 0]
    batch = prepared.collate(list(prepared.train))
    assert batch["input_ids"].shape == (3, 6)
    assert batch["attention_mask"].sum(1).tolist() == [6, 3, 3]
    assert batch["labels"].dtype == torch.int64
    # The commonest class of train, 1, is one of three in dev.
    assert prepared.constant_score == {"matthews": 0.0, "accuracy": pytest.approx(1 / 3)}
    assert prepared.digest == splits.digest()
    assert sentences.prepare(COLA, splits, tokenizer, 6, "before").digest == "before"


def test_scores_are_of_the_largest_output() -> None:
    splits = Splits([one("a")], [one("a"), one("a", label=1), one("a", label=1)])
    prepared = sentences.prepare(COLA, splits, quality_models.tokenizer(), 8)
    outputs = np.array([[2.0, 1.0], [-3.0, -2.0], [0.5, 0.0]])
    labels = np.array([0, 1, 1])
    expected = {"matthews": pytest.approx(0.5), "accuracy": pytest.approx(2 / 3)}
    assert prepared.score(outputs, labels) == expected
    # Some models give more than logits.
    assert prepared.score((outputs, np.zeros(3)), labels) == expected
    outputs[2, 0] = np.nan
    with pytest.raises(DivergedError, match=r"the model gave outputs that are not finite"):
        prepared.score(outputs, labels)


def test_pairs_and_regression_become_features() -> None:
    splits = Splits([one("a", "the film", label=0.5)] * 2, [one("a", "b"), one("a", "b", label=1)])
    prepared = sentences.prepare(STSB, splits, quality_models.tokenizer(), 16)
    assert prepared.outputs == 1
    assert prepared.train[0]["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    batch = prepared.collate(list(prepared.train))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.5, 0.5]
    assert prepared.constant_score == {"pearson": 0.0}
    found = prepared.score(np.array([[0.1], [0.9]]), np.array([0.0, 1.0]))
    assert found == {"pearson": pytest.approx(1.0)}


# Figures


def _values(*numbers: float) -> Any:
    return np.array(numbers)


def test_figures_are_what_their_definitions_say() -> None:
    predictions, labels = _values(1, 1, 1, 0, 0, 0, 0, 1), _values(1, 1, 0, 0, 0, 1, 0, 1)
    true_positive, true_negative, false_positive, false_negative = 3, 3, 1, 1
    assert metrics.accuracy(predictions, labels) == 0.75
    precision, recall = 3 / 4, 3 / 4
    expected = 2 * precision * recall / (precision + recall)
    assert metrics.f1(predictions, labels) == pytest.approx(expected)
    numerator = true_positive * true_negative - false_positive * false_negative
    assert metrics.matthews(predictions, labels) == pytest.approx(numerator / 16)
    assert metrics.matthews(1 - predictions, labels) == pytest.approx(-numerator / 16)


def test_matthews_and_f1_with_unequal_classes() -> None:
    # 2 true positives, 1 false positive, 3 false negatives, 4 true negatives
    predictions, labels = _values(1, 1, 1, *[0] * 7), _values(1, 1, 0, 1, 1, 1, 0, 0, 0, 0)
    expected = (2 * 4 - 1 * 3) / math.sqrt((2 + 1) * (2 + 3) * (4 + 1) * (4 + 3))
    assert metrics.matthews(predictions, labels) == pytest.approx(expected)
    assert metrics.f1(predictions, labels) == pytest.approx(2 * 2 / (3 + 5))


def test_pearson_by_hand() -> None:
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-1, 1, -1, 1): 2 / sqrt(5 * 4)
    assert metrics.pearson(_values(1, 2, 3, 4), _values(0, 2, 0, 2)) == pytest.approx(0.4472135955)
    scores = _values(0.1, 0.4, 0.35).astype(np.float32)
    assert metrics.pearson(scores, 5 * scores - 2) == pytest.approx(1.0)


def test_a_constant_side_has_no_correlation() -> None:
    constant, varied = _values(1, 1, 1), _values(0, 1, 1)
    for figure in (metrics.matthews, metrics.pearson):
        assert figure(constant, varied) == figure(varied, constant) == 0.0
        assert figure(constant, constant) == 0.0
    assert metrics.f1(_values(0, 0), _values(0, 0)) == 0.0
    assert metrics.f1(_values(0, 0), _values(1, 0)) == 0.0


def test_which_value_is_better() -> None:
    assert metrics.better("accuracy", 0.6, 0.5)
    assert not metrics.better("accuracy", 0.5, 0.5)
    assert metrics.better("perplexity", 5.0, 6.0)
    assert not metrics.better("perplexity", 6.0, 5.0)


# Layers and heads

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL |= {"intermediate_size": 32, "vocab_size": 20, "max_position_embeddings": 16}


def _build(kind: str, **changes: Any) -> Any:
    """A model of a class of transformers, without numbers."""
    cls = getattr(transformers, kind)
    with torch.device("meta"):
        return cls(cls.config_class(**{**_SMALL, **changes}))


_ENCODER = {
    "QK": ("attention.self.query", "attention.self.key"),
    "QV": ("attention.self.query", "attention.self.value"),
    "QKV": ("attention.self.query", "attention.self.key", "attention.self.value"),
}
_ENCODER["QKVO"] = (*_ENCODER["QKV"], "attention.output.dense", "output.dense")
_ENCODER["ALL"] = (*_ENCODER["QKV"], "attention.output.dense", "intermediate.dense", "output.dense")
_DEBERTA = {
    targets: [re.sub(r"(self\.\w+)", r"\1_proj", name) for name in names]
    for targets, names in _ENCODER.items()
}
_DECODER = {
    "QK": ("self_attn.q_proj", "self_attn.k_proj"),
    "QV": ("self_attn.q_proj", "self_attn.v_proj"),
    "QKV": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
_DECODER["QKVO"] = (*_DECODER["QKV"], "self_attn.o_proj", "mlp.down_proj")
_DECODER["ALL"] = (*_DECODER["QKVO"], "mlp.gate_proj", "mlp.up_proj")
_DISTILBERT = {
    "QK": ("attention.q_lin", "attention.k_lin"),
    "QV": ("attention.q_lin", "attention.v_lin"),
    "QKV": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
}
_DISTILBERT["QKVO"] = (*_DISTILBERT["QKV"], "attention.out_lin", "ffn.lin2")
_DISTILBERT["ALL"] = (*_DISTILBERT["QKVO"], "ffn.lin1")

_MPNET = {
    "QK": ("attention.attn.q", "attention.attn.k"),
    "QV": ("attention.attn.q", "attention.attn.v"),
    "QKV": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
}
_MPNET["QKVO"] = (*_MPNET["QKV"], "attention.attn.o", "output.dense")
_MPNET["ALL"] = (*_MPNET["QKVO"], "intermediate.dense")
_OPT = {name: endings[: len(name)] for name, endings in _DECODER.items()}
_OPT["QKVO"] = (*_OPT["QKV"], "self_attn.out_proj", "fc2")
_OPT["ALL"] = (*_OPT["QKVO"], "fc1")

_ARCHITECTURES = {
    "MPNetForSequenceClassification": ("mpnet.encoder.layer", _MPNET, {}),
    "OPTForCausalLM": (
        "model.decoder.layers",
        _OPT,
        {
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
        },
    ),
    "BertForSequenceClassification": ("bert.encoder.layer", _ENCODER, {}),
    "RobertaForSequenceClassification": ("roberta.encoder.layer", _ENCODER, {}),
    "DebertaV2ForSequenceClassification": (
        "deberta.encoder.layer",
        _DEBERTA,
        # Relative positions with projections of their own, which are not adapted.
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False},
    ),
    "LlamaForCausalLM": ("model.layers", _DECODER, {}),
    "LlamaForSequenceClassification": ("model.layers", _DECODER, {}),
    "DistilBertForSequenceClassification": (
        "distilbert.transformer.layer",
        _DISTILBERT,
        {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    ),
}


@pytest.mark.parametrize("targets", layers.TARGETS)
@pytest.mark.parametrize("kind", _ARCHITECTURES)
def test_targets_are_the_layers_of_every_block_and_no_head(kind: str, targets: str) -> None:
    blocks, endings, changes = _ARCHITECTURES[kind]
    model = _build(kind, **changes)
    found = layers.find_layers(model, targets)
    expected = {f"{blocks}.{block}.{name}" for block in range(2) for name in endings[targets]}
    assert set(found) == expected
    assert len(found) == len(expected)
    order = [name for name, _ in model.named_modules()]
    assert found == sorted(found, key=order.index)


# Table 6 of arXiv 2503.01419 prints 6k, 6k, 9k, 18.4k and 24k, k for 1024.
@pytest.mark.parametrize(
    ("targets", "exact"),
    [("QK", 6144), ("QV", 6144), ("QKV", 9216), ("QKVO", 18816), ("ALL", 25344)],
)
def test_targets_have_the_counts_of_table_6(targets: str, exact: int) -> None:
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    model = _build(
        "DebertaV2ForSequenceClassification",
        **sizes,
        intermediate_size=3072,
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
    )
    found = [model.get_submodule(name) for name in layers.find_layers(model, targets)]
    # Rank 1 and kernel size 8: both factors and the kernel.
    assert sum(m.in_features // 8 + m.out_features // 8 + 64 for m in found) == exact


def test_a_head_s_layer_is_no_target_whatever_its_name() -> None:
    model = _build("BertForSequenceClassification")
    model.classifier = nn.ModuleDict({"query": nn.Linear(16, 2)})
    found = layers.find_layers(model, "QK")
    assert len(found) == 4
    assert "classifier.query" not in found


def test_an_unknown_set_of_targets_lists_the_sets() -> None:
    model = _build("BertForSequenceClassification")
    message = r"--targets: expected one of QK, QV, QKV, QKVO, ALL, got 'QKVF'"
    with pytest.raises(QualityError, match=message):
        layers.find_layers(model, "QKVF")


def test_a_model_in_which_some_roles_are_unknown_is_refused() -> None:
    changes = {"hidden_size": 16, "num_heads": 2, "attention_types": [[["global"], 2]]}
    model = _build("GPTNeoForCausalLM", **changes, num_layers=2, intermediate_size=32)
    assert len(layers.find_layers(model, "QKV")) == 6
    message = r"--targets: ALL has no layer of GPTNeo.* for attention output, feed-forward output"
    with pytest.raises(QualityError, match=message):
        layers.find_layers(model, "ALL")


def test_a_model_without_such_layers_tells_which_it_has() -> None:
    # GPT-2's are no linear layers by class.
    model = _build("GPT2LMHeadModel", n_embd=16, n_layer=1, n_head=2)
    message = (
        r"--targets: QK has no layer of GPT2LMHeadModel for query, key; its linear layers are "
        r"named nothing; expected names ending in query, query_proj, q_lin, attn.q, q_proj, key"
    )
    with pytest.raises(QualityError, match=message):
        layers.find_layers(model, "QK")


@pytest.mark.parametrize(
    ("kind", "task", "expected"),
    [
        ("BertForSequenceClassification", "cola", {"bert.pooler.dense", "classifier"}),
        ("BertForQuestionAnswering", "squad", {"qa_outputs"}),
        ("RobertaForSequenceClassification", "cola", {"classifier.dense", "classifier.out_proj"}),
        ("DebertaV2ForSequenceClassification", "stsb", {"pooler.dense", "classifier"}),
        ("DistilBertForSequenceClassification", "rte", {"pre_classifier", "classifier"}),
        ("LlamaForSequenceClassification", "cola", {"score"}),
        ("LlamaForCausalLM", "shakespeare", set()),
        ("BertForMaskedLM", "shakespeare", set()),
    ],
)
def test_the_head_is_what_lies_outside_of_the_body(
    kind: str, task: str, expected: set[str]
) -> None:
    changes = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2} if "Distil" in kind else {}
    model = _build(kind, **changes)
    head = head_parameters(model, tasks.TASKS[task])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(parameter)] for parameter in head]
    assert len(found) == len(set(found))
    assert {name.rsplit(".", 1)[0] for name in found} == expected
    inside = {name.split(".")[0] for name in found}
    assert model.base_model_prefix not in inside or expected & {"bert.pooler.dense"}


# Language


def test_text_is_read_from_a_file_or_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "play.txt"
    file.write_text("to be\nor not", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not this", encoding="utf-8")
    assert language.read_text(file) == language.read_text(tmp_path) == "to be\nor not"


def test_what_is_no_single_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        QualityError, match=r"--data: expected a text file, or a folder .*got nothi"
    ):
        language.read_text(None)
    for wrong in (tmp_path, tmp_path / "gone.txt"):
        with pytest.raises(
            QualityError, match=r"--data: expected a text file, .* got .*"
        ) as caught:
            language.read_text(wrong)
        assert str(wrong) in str(caught.value)
    (tmp_path / "one.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(QualityError, match=r"--data: .*one\.txt is empty"):
        language.read_text(tmp_path)
    (tmp_path / "one.txt").write_bytes(b"caf\xe9")
    with pytest.raises(
        QualityError, match=r"--data: .*one\.txt could not be read: .*; expected UT"
    ):
        language.read_text(tmp_path)
    (tmp_path / "two.txt").write_text("two", encoding="utf-8")
    with pytest.raises(QualityError, match=r"one \.txt file, got"):
        language.read_text(tmp_path)


def _text(words: int) -> str:
    """So many tokens, and no two places alike for long."""
    generator = torch.Generator().manual_seed(5)
    places = torch.randint(len(quality_models.FILLERS), (words,), generator=generator).tolist()
    return " ".join(quality_models.FILLERS[place] for place in places)


def _blocks(features: Sequence[Any]) -> list[int]:
    return [token for feature in features for token in feature["input_ids"]]


def test_the_last_tenth_of_the_blocks_is_scored() -> None:
    tokenizer = quality_models.tokenizer()
    text = _text(8 * 45 + 5)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prepared = language.prepare(text, tokenizer, 8, slice_of_train=False)
    assert {len(f["input_ids"]) for f in (*prepared.train, *prepared.evaluation)} == {8}
    # 45 whole blocks, a tenth of them rounded up.
    assert _blocks(prepared.train) == ids[: 40 * 8]
    assert _blocks(prepared.evaluation) == ids[40 * 8 : 45 * 8]
    inner = language.prepare(text, tokenizer, 8, slice_of_train=True)
    assert _blocks(inner.train) == ids[: 35 * 8]
    assert _blocks(inner.evaluation) == ids[35 * 8 : 40 * 8]
    assert inner.digest == prepared.digest
    few = language.prepare(text, tokenizer, 8, 2, slice_of_train=False)
    assert few.evaluation == [prepared.evaluation[0], prepared.evaluation[2]]
    assert few.train == prepared.train
    assert language.prepare(text + " it", tokenizer, 8, slice_of_train=False).digest != inner.digest


def test_a_text_of_less_than_three_blocks_is_an_error() -> None:
    tokenizer = quality_models.tokenizer()
    shortest = language.prepare(_text(24), tokenizer, 8, slice_of_train=True)
    assert (len(shortest.train), len(shortest.evaluation)) == (1, 1)
    message = r"--data: the text has 23 tokens; expected at least 24, three blocks"
    with pytest.raises(QualityError, match=message):
        language.prepare(_text(23), tokenizer, 8, slice_of_train=False)


def test_perplexity_is_that_of_the_model_s_own_loss() -> None:
    tokenizer = quality_models.tokenizer()
    prepared = language.prepare(_text(200), tokenizer, 8, slice_of_train=False)
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(quality_models.llama_config()).eval()
    batch = prepared.collate(list(prepared.evaluation))
    assert batch["attention_mask"].all()
    with torch.no_grad():
        found = model(**batch)
        singly = [model(**prepared.collate([block])).loss.item() for block in prepared.evaluation]
    assert prepared.reduce is not None
    losses = prepared.reduce(found.logits, batch["labels"])
    np.testing.assert_allclose(losses, singly, rtol=1e-5)
    score = prepared.score(np.asarray(losses), None)
    assert score == {"perplexity": pytest.approx(math.exp(found.loss.item()), rel=1e-5)}
    # The answer that does not look at the context: how often each token is in train, plus one.
    counts = torch.bincount(torch.tensor(_blocks(prepared.train)), minlength=len(tokenizer)) + 1
    constant = (counts / counts.sum()).log().expand_as(found.logits)
    losses = prepared.reduce(constant, batch["labels"])
    found = prepared.score(np.asarray(losses), None)
    assert found == pytest.approx(prepared.constant_score, rel=1e-5)
    assert 1.0 < prepared.constant_score["perplexity"] < len(tokenizer)


@pytest.mark.parametrize("losses", [[1.0, float("nan")], [1000.0, 1000.0]])
def test_a_perplexity_that_is_no_number_is_an_error(losses: list[float]) -> None:
    prepared = language.prepare(_text(200), quality_models.tokenizer(), 8, slice_of_train=False)
    with pytest.raises(DivergedError, match=r"the perplexity is not finite"):
        prepared.score(np.array(losses, dtype=np.float32), None)


def test_batches_of_text_predict_themselves() -> None:
    prepared = language.prepare(_text(200), quality_models.tokenizer(), 8, slice_of_train=False)
    batch = prepared.collate(list(prepared.train[:3]))
    assert batch["input_ids"].tolist() == [f["input_ids"] for f in prepared.train[:3]]
    assert torch.equal(batch["input_ids"], batch["labels"])
