"""Question answering: where answers are in windows, which span wins, and the official figures."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from benchmarks.quality import answers, tasks
from benchmarks.quality.answers import Answer, Question, Splits
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.prepared import Prepared, spread

SQUAD, SQUAD_V2 = tasks.TASKS["squad"], tasks.TASKS["squad_v2"]
CONTEXT = (
    "  The café in Nîmes opened on 3 May 1862, twelve years after the old theatre had burnt down. "
    "Its owner, Marie-Anne d'Aubigné, served coffee from Réunion. The theatre was never rebuilt."
)
NUMBERS = " ".join(f"w{number}" for number in range(60))
INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
}


def asked(text: str, *found: str, context: str = CONTEXT, article: str = "Cafés") -> Question:
    return Question(article, context, text, tuple(Answer(t, context.index(t)) for t in found))


QUESTIONS = [
    asked("When did it open?", "3 May 1862"),
    asked("  Where is the café?", "Nîmes", "in Nîmes"),
    asked("Who owned it?", "Marie-Anne d'Aubigné"),
    asked("Whose initials?", "d'A"),
    asked("What burnt down?", "old theatre", "theatre"),
    asked("What begins it?", "The"),
    asked("What ends it?", "rebuilt."),
    asked("What was there?", " never "),
]
WITHOUT = asked("Who built the theatre?")


# Tokenizers


def _wrapped(tokenizer: Tokenizer, **keywords: Any) -> Any:
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=INPUTS, **{**SPECIAL, **keywords}
    )


def _numbered(*names: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys((*SPECIAL.values(), *names)))}


def words(**keywords: Any) -> Any:
    """A token a word or mark."""
    texts = [CONTEXT, NUMBERS, *(q.text for q in QUESTIONS), WITHOUT.text]
    vocabulary = _numbered(*re.findall(r"\w+|[^\w\s]+", " ".join(texts)))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer, **keywords)


def pieces() -> Any:
    """As BERT's: letters, lower case and without accents, so that texts change their length."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-'.,?"
    vocabulary = _numbered(*letters, *(f"##{letter}" for letter in letters), "the", "##eat")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _wrapped(tokenizer)


def bytes_(trim: bool = False) -> Any:
    """As RoBERTa's: a blank belongs to the word behind it, and a letter can be two tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = _numbered(*alphabet, "Ġt", "he")
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


TOKENIZERS = {"words": words, "pieces": pieces, "bytes": bytes_}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


# Files


def write(folder: Path, task: Any, train: list[Question], dev: list[Question]) -> Path:
    """Files like the official ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, questions in (("train", train), ("dev", dev)):
        data = [
            {
                "title": title,
                "paragraphs": [
                    {
                        "context": context,
                        "qas": [
                            {
                                "id": f"{number}",
                                "question": q.text,
                                "is_impossible": not q.answers,
                                "answers": [
                                    {"text": a.text, "answer_start": a.start} for a in q.answers
                                ],
                            }
                            for number, q in enumerate(inside)
                        ],
                    }
                    for context, inside in itertools.groupby(about, lambda q: q.context)
                ],
            }
            for title, about in itertools.groupby(questions, lambda q: q.article)
        ]
        version = {"squad": "v1.1", "squad_v2": "v2.0"}[task.name]
        path = folder / f"{split}-{version}.json"
        content = json.dumps({"version": version, "data": data}, ensure_ascii=False)
        path.write_text(content, encoding="utf-8")
    return folder


def test_files_are_read_from_the_folder_or_from_the_task_s_own(tmp_path: Path) -> None:
    write(tmp_path, SQUAD, QUESTIONS, QUESTIONS[:2])
    write(tmp_path / "squad_v2", SQUAD_V2, [*QUESTIONS, WITHOUT], [WITHOUT])
    assert answers.read(SQUAD, tmp_path) == Splits(QUESTIONS, QUESTIONS[:2])
    second = answers.read(SQUAD_V2, tmp_path)
    assert second == Splits([*QUESTIONS, WITHOUT], [WITHOUT])
    assert second.digest() == answers.read(SQUAD_V2, tmp_path / "squad_v2").digest()
    assert second.digest() != answers.read(SQUAD, tmp_path).digest()
    assert Splits([WITHOUT], []).digest() != Splits([], [WITHOUT]).digest()


def test_the_hub_s_rows_are_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*arguments: Any, split: str) -> list[dict[str, Any]]:
        calls.append((*arguments, split))
        questions = {"train": [QUESTIONS[0], WITHOUT], "validation": [QUESTIONS[1]]}[split]
        return [
            {
                "title": q.article,
                "context": q.context,
                "question": q.text,
                "answers": {
                    "text": [a.text for a in q.answers],
                    "answer_start": [a.start for a in q.answers],
                },
            }
            for q in questions
        ]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert answers.read(SQUAD_V2, None) == Splits([QUESTIONS[0], WITHOUT], [QUESTIONS[1]])
    assert calls == [("squad_v2", None, "train"), ("squad_v2", None, "validation")]
    with pytest.raises(QualityError, match=r"--data: squad, train row 1: the question 'Who built"):
        answers.read(SQUAD, None)


def test_the_hub_s_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QualityError, match=r"--data: .*train-v1\.1\.json.*pip install datasets"):
        answers.read(SQUAD, None)

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no connection")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(QualityError, match=r"from the hub: no connection; pass a folder"):
        answers.read(SQUAD, None)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=r"--data: .*gone is not a folder; .*dev-v1\.1\.json"):
        answers.read(SQUAD, tmp_path / "gone")
    with pytest.raises(QualityError, match=r"lacks train-v2\.0\.json; it holds nothing; squad_v2"):
        answers.read(SQUAD_V2, tmp_path)
    write(tmp_path, SQUAD, QUESTIONS, QUESTIONS)
    with pytest.raises(
        QualityError, match=r"lacks train-v2\.0\.json; it holds dev-v1\.1\.json, train-v1\.1\.json"
    ):
        answers.read(SQUAD_V2, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"dev-v1\.1\.json is not JSON .*; expected SQuAD's official file"),
        ("[]", r"dev-v1\.1\.json: expected 'data' to be of type list, .* got nothing"),
        ('{"data": []}', r"dev-v1\.1\.json holds no questions"),
        (
            '{"data": [{"title": "A", "paragraphs": 1}]}',
            r"data\[0\]: expected 'paragraphs' to be of type list, .* got 1",
        ),
        (
            (
                '{"data": [{"title": "A", "paragraphs": [{"context": "B", "qas": [{"answers": '
                '[{"text": "B", "answer_start": "0"}]}]}]}]}'
            ),
            r"paragraphs\[0\]\.qas\[0\]: expected 'answer_start' to be of type int, .* got '0'",
        ),
    ],
)
def test_what_is_no_squad_file_is_told_where(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path, SQUAD, QUESTIONS, QUESTIONS)
    (tmp_path / "dev-v1.1.json").write_text(content, encoding="utf-8")
    with pytest.raises(QualityError, match=f"--data: .*{message}"):
        answers.read(SQUAD, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "there"),
    [(Answer("Nîmes", 13), "' Nîme'"), (Answer("Nîmes", -1), "'  The'"), (Answer("", 3), "''")],
)
def test_an_answer_must_be_where_it_is_said_to_be(
    tmp_path: Path, wrong: Answer, there: str
) -> None:
    bad = QUESTIONS[1]._replace(answers=(QUESTIONS[1].answers[0], wrong))
    write(tmp_path, SQUAD, QUESTIONS, [*QUESTIONS, bad])
    message = (
        rf"data\[0\]\.paragraphs\[0\]\.qas\[{len(QUESTIONS)}\]: expected the answer {wrong.text!r} "
        rf"at answer_start {wrong.start} of the context, got {there}; correct answer_start"
    )
    with pytest.raises(QualityError, match=message):
        answers.read(SQUAD, tmp_path)


def test_a_question_without_an_answer_belongs_to_the_second_version(tmp_path: Path) -> None:
    write(tmp_path, SQUAD, [*QUESTIONS, WITHOUT], QUESTIONS)
    with pytest.raises(QualityError, match=r"has no answer; .* in squad; .*--task squad_v2"):
        answers.read(SQUAD, tmp_path)


# The slice for learning rates


def test_a_slice_of_train_keeps_articles_together() -> None:
    train = [
        asked(f"{article} {number}?", "The", article=str(article))
        for article in range(11)
        for number in range(3)
    ]
    found = answers.slice_of_train(Splits(train, QUESTIONS))
    held = {question.article for question in found.dev}
    assert held == {"0", "5", "10"}
    assert held.isdisjoint(question.article for question in found.train)
    assert sorted([*found.train, *found.dev]) == sorted(train)


def test_a_slice_of_few_articles_keeps_paragraphs_together() -> None:
    train = [asked(f"{n}?", context=f"context {c}") for c in range(5) for n in range(2)]
    found = answers.slice_of_train(Splits(train, QUESTIONS))
    assert list(found.dev) == train[:2]
    assert list(found.train) == train[2:]
    with pytest.raises(QualityError, match=r"--data: .* one paragraph; expected at least two"):
        answers.slice_of_train(Splits(train[:2], QUESTIONS))


# Windows


def texts_of(tokenizer: Any, question: Question, max_tokens: int, **keywords: Any) -> list[Any]:
    """A question's training features."""
    splits = Splits([question], QUESTIONS)
    return list(answers.prepare(SQUAD_V2, splits, tokenizer, max_tokens, **keywords).train)


def decoded(tokenizer: Any, feature: Any) -> str:
    ids = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
    return tokenizer.decode(ids)


def plain(text: str) -> str:
    """Without what the tokenizers lose: case, accents, blanks, joints between pieces."""
    text = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]).normalize_str(text)
    return re.sub(r"[\s#]", "", text).lower()


@pytest.mark.parametrize("max_tokens", [512, 48, 30])
@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_positions_decode_to_the_answer(tokenizer: Any, number: int, max_tokens: int) -> None:
    question = QUESTIONS[number]
    expected = plain(question.answers[0].text)
    features = texts_of(tokenizer, question, max_tokens)
    found = 0
    for feature in features:
        assert len(feature["input_ids"]) <= max_tokens
        start, end = feature["start_positions"], feature["end_positions"]
        if (start, end) == (0, 0):
            assert feature["input_ids"][0] == tokenizer.cls_token_id
        else:
            found += 1
            came = plain(decoded(tokenizer, feature))
            # A word's token is all of it, though the answer is not.
            assert came == expected or (expected == "d'a" and came == "d'aubigne")
    assert found or max_tokens == 30
    if max_tokens == 512:
        assert found == len(features) == 1


@pytest.mark.parametrize("max_tokens", [48, 30])
def test_windows_cover_the_context_and_overlap(tokenizer: Any, max_tokens: int) -> None:
    stride = 5
    features = texts_of(tokenizer, QUESTIONS[0], max_tokens, stride=stride)
    ends = [feature["input_ids"].index(tokenizer.sep_token_id) + 1 for feature in features]
    contexts = [f["input_ids"][end:-1] for f, end in zip(features, ends, strict=True)]
    whole = list(contexts[0])
    for before, context in itertools.pairwise(contexts):
        assert before[-stride:] == context[:stride]
        whole += context[stride:]
    assert len(features) > 1
    assert whole == tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]


def test_an_answer_is_found_in_the_windows_that_hold_all_of_it() -> None:
    # [CLS] x [SEP], eight tokens of the context, [SEP]; neighbours share four.
    context = " ".join(f"w{number}" for number in range(16))
    question = asked("x", "w6 w7 w8", context=context)
    features = texts_of(words(), question, 12, stride=4)
    positions = [(feature["start_positions"], feature["end_positions"]) for feature in features]
    assert positions == [(0, 0), (5, 7), (0, 0)]


def test_a_question_without_an_answer_points_to_cls(tokenizer: Any) -> None:
    features = texts_of(tokenizer, WITHOUT, 40)
    assert len(features) > 1
    assert {(f["start_positions"], f["end_positions"]) for f in features} == {(0, 0)}


def test_offsets_with_and_without_a_blank_find_the_same_tokens() -> None:
    for question in QUESTIONS:
        with_blank, without = (texts_of(bytes_(trim), question, 512)[0] for trim in (False, True))
        assert with_blank == without


def test_long_questions_are_cut() -> None:
    many = asked("open " * 200, "The")
    tokenizer = words()
    for max_tokens, kept in ((384, 64), (48, 16)):
        feature = texts_of(tokenizer, many, max_tokens)[0]
        assert feature["input_ids"].count(tokenizer.convert_tokens_to_ids("open")) == kept


def test_features_hold_what_a_model_takes_and_no_more() -> None:
    prepared = answers.prepare(SQUAD, Splits(QUESTIONS, QUESTIONS), words(), 48)
    names = {*INPUTS, "start_positions", "end_positions"}
    assert {name for f in (*prepared.train, *prepared.evaluation) for name in f} == names
    assert prepared.label_names == ("start_positions", "end_positions")
    assert prepared.outputs == 2
    batch = prepared.collate(list(prepared.train))
    assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(names, torch.int64)
    assert prepared.digest == Splits(QUESTIONS, QUESTIONS).digest()


def test_scored_windows_are_in_order_of_length() -> None:
    questions = [asked("short?", "b", context="a b"), *QUESTIONS, asked("x", "c", context="c")]
    prepared = answers.prepare(SQUAD, Splits(questions, questions), words(), 30, "abc")
    lengths = [len(feature["input_ids"]) for feature in prepared.evaluation]
    assert lengths == sorted(lengths)
    assert [len(feature["input_ids"]) for feature in prepared.train] != lengths
    assert prepared.digest == "abc"


class _Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_Slow, "--model: its tokenizer, _Slow, does not say where .* expected a fast tokenizer"),
        (lambda: words(padding_side="left"), "--model: .* pads on the left; expected .* right"),
        (lambda: words(cls_token=None), "--model: .* does not begin with a cls token"),
        (lambda: words(cls_token="[SEP]"), "--model: .* does not begin with a cls token"),
    ],
)
def test_tokenizers_that_cannot_be_used(make: Any, message: str) -> None:
    with pytest.raises(QualityError, match=message):
        answers.prepare(SQUAD, Splits(QUESTIONS, QUESTIONS), make(), 48)


def test_windows_must_be_longer_than_what_they_share() -> None:
    splits = Splits(QUESTIONS, QUESTIONS)
    with pytest.raises(
        QualityError, match=r"--max-tokens: 48 leaves windows 29 tokens .* share 29"
    ):
        answers.prepare(SQUAD, splits, words(), 48, stride=29)
    answers.prepare(SQUAD, splits, words(), 48, stride=28)
    with pytest.raises(QualityError, match=r"--max-tokens: 2 leaves windows 0 tokens"):
        answers.prepare(SQUAD, splits, words(), 2)


# Spans


def numbered(first: int, last: int) -> str:
    return " ".join(f"w{number}" for number in range(first, last + 1))


class Planted:
    """Logits, flat but for what is planted, of questions about `NUMBERS` in words."""

    def __init__(self, task: Any, questions: list[Question], max_tokens: int = 100) -> None:
        self.prepared: Prepared = answers.prepare(
            task, Splits(questions, questions), words(), max_tokens, stride=4
        )
        longest = max(len(feature["input_ids"]) for feature in self.prepared.evaluation)
        self.starts = np.zeros((len(self.prepared.evaluation), longest), np.float32)
        self.ends = np.zeros_like(self.starts)

    def score(self) -> dict[str, float]:
        return dict(self.prepared.score((self.starts, self.ends), None))


# [CLS] x [SEP], then the context.
CONTEXT_BEGINS = 3


def test_the_best_span_is_found() -> None:
    planted = Planted(SQUAD, [asked("x", numbered(7, 9), context=NUMBERS)])
    planted.starts[0, CONTEXT_BEGINS + 7] = 5
    planted.ends[0, CONTEXT_BEGINS + 9] = 5
    # A better end, before every good start.
    planted.ends[0, CONTEXT_BEGINS + 2] = 6
    assert planted.score() == {"f1": 1.0, "exact": 1.0}
    # Half of the words of either are the other's.
    planted.ends[0, CONTEXT_BEGINS + 8] = 9
    planted.starts[0, CONTEXT_BEGINS + 6] = 9
    assert planted.score() == {"f1": pytest.approx(2 * 2 / (3 + 3)), "exact": 0.0}


def test_a_span_is_at_most_thirty_tokens() -> None:
    planted = Planted(SQUAD, [asked("x", numbered(10, 39), context=NUMBERS)])
    planted.starts[0, CONTEXT_BEGINS + 10] = 5
    planted.ends[0, CONTEXT_BEGINS + 39] = 4
    planted.ends[0, CONTEXT_BEGINS + 40] = 9
    assert planted.score()["exact"] == 1.0


def test_a_span_is_inside_the_context() -> None:
    planted = Planted(SQUAD, [asked("x", numbered(58, 59), context=NUMBERS)])
    planted.starts[0, CONTEXT_BEGINS + 58] = 1
    planted.ends[0, CONTEXT_BEGINS + 59] = 1
    # cls, the question, the separators at both ends, and a start that the context ends behind.
    for place in (0, 1, 2, CONTEXT_BEGINS + 60):
        planted.starts[0, place] = planted.ends[0, place] = 50
    assert planted.score()["exact"] == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_no_span_is_better_than_the_one_that_is_found(seed: int) -> None:
    tokenizer, random = words(), np.random.default_rng(seed)
    logits = random.normal(size=(2, 2, 46)).astype(np.float32)
    found = []
    for feature, starts, ends in zip(
        Planted(SQUAD, [asked("x", "w0", context=NUMBERS)], 46).prepared.evaluation,
        *logits,
        strict=True,
    ):
        last = len(feature["input_ids"]) - 1
        for start in range(CONTEXT_BEGINS, last):
            for end in range(start, min(start + 30, last)):
                text = tokenizer.decode(feature["input_ids"][start : end + 1])
                found.append((float(starts[start]) + float(ends[end]), text))
    planted = Planted(SQUAD, [asked("x", max(found)[1], context=NUMBERS)], 46)
    windows = len(planted.starts)
    assert windows == 2
    planted.starts, planted.ends = logits[:, :windows]
    assert planted.score()["exact"] == 1.0


@pytest.mark.parametrize("padding", [-100.0, 1e9, np.nan, -np.inf])
def test_padding_is_never_chosen(padding: float) -> None:
    short = asked("x", "w1", context="w0 w1")
    planted = Planted(SQUAD, [asked("x", "w5", context=NUMBERS), short])
    for logits in (planted.starts, planted.ends):
        # Worse than the padding that the Trainer puts beside them.
        logits -= 1000
        logits[0, 6:] = padding
        logits[0, CONTEXT_BEGINS + 1] += 1
        logits[1, CONTEXT_BEGINS + 5] += 1
    assert planted.score()["exact"] == 1.0


def test_the_best_of_all_windows_wins() -> None:
    question = asked("x", "w50", context=NUMBERS)
    planted = Planted(SQUAD, [asked("y", "w0", context="w0 w1"), question], max_tokens=24)
    assert len(planted.starts) == 1 + 4
    places = [
        (window, feature["start_positions"])
        for window, feature in enumerate(planted.prepared.evaluation)
        if feature["start_positions"]
    ]
    for window, place in places:
        planted.starts[window, place] = planted.ends[window, place] = 3
    for window in range(1, 5):
        planted.starts[window, 6] += 1
    assert planted.score()["exact"] == 1.0
    planted.starts[1, 6] = planted.ends[1, 6] = 4
    assert planted.score()["exact"] == 0.5


def test_none_is_the_answer_where_cls_beats_every_span() -> None:
    questions = [asked("x", "w50", context=NUMBERS), asked("y", context=NUMBERS)]
    planted = Planted(SQUAD_V2, questions, max_tokens=24)
    windows = len(planted.starts) // 2
    features = planted.prepared.evaluation
    which = [feature["start_positions"] for feature in features]
    answered = next(number for number, place in enumerate(which) if place)
    # cls is best in all windows of both, and that of a window is not better than another's span.
    planted.starts[:, 0] = 2
    assert planted.score() == {"f1": 0.5, "exact": 0.5}
    assert planted.prepared.constant_score == {"f1": 0.5, "exact": 0.5}
    planted.starts[answered, which[answered]] = planted.ends[answered, which[answered]] = 1
    assert windows > 1
    # As good as cls is good enough.
    assert planted.score() == {"f1": 1.0, "exact": 1.0}
    # What counts is the window whose cls is worst.
    planted.ends[answered, which[answered]] = 0
    assert planted.score()["exact"] == 0.5
    planted.starts[answered, 0] = 0
    assert planted.score()["exact"] == 1.0


def test_an_empty_context_has_no_answer() -> None:
    planted = Planted(SQUAD_V2, [asked("x", context="")])
    planted.starts[0, 0] = -50
    assert planted.score() == {"f1": 1.0, "exact": 1.0}


def test_outputs_that_cannot_be_scored() -> None:
    planted = Planted(SQUAD, [asked("x", "w50", context=NUMBERS)], max_tokens=24)
    starts, ends = planted.starts, planted.ends
    score = planted.prepared.score
    assert score([starts, ends, "more"], None) == score((starts, ends), (1, 2))
    shape = r"--model: expected start logits and end logits .* \[4, 24\], got "
    with pytest.raises(QualityError, match=shape + r"\[4, 24\]; use"):
        score(starts, None)
    with pytest.raises(QualityError, match=shape + r"\[4, 24\], \[4, 23\]; use"):
        score((starts, ends[:, :-1]), None)
    with pytest.raises(QualityError, match=shape + r"\[4, 5\], \[4, 5\]; use"):
        score((starts[:, :5], ends[:, :5]), None)
    kept = spread(range(4), 2)
    with pytest.raises(QualityError, match=r"--scored-size: got the logits of 2 windows; .* 4"):
        score((starts[kept], ends[kept]), None)
    for place in (0, 5):
        broken = ends.copy()
        broken[1, place] = np.nan
        with pytest.raises(DivergedError, match=r"--model: .* not finite; a lower --lr may help"):
            score((starts, broken), None)


# Figures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel  Tower.", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("theatre another a", "theatre another"),
        ("U.S.", "us"),
        ("Marie-Anne d'Aubigné", "marieanne daubigné"),
        ("\tA\n", ""),
        ("the-end", "theend"),
        ("«a» – b", "« » – b"),
        ("$1,000", "1000"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert answers.normalised(text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "f1", "exact"),
    [
        ("the old theatre", ["Old Theatre!"], 1.0, 1.0),
        ("old", ["old theatre", "theatre"], 2 / 3, 0.0),
        ("theatre", ["old theatre", "theatre"], 1.0, 1.0),
        ("no no yes", ["no yes yes"], 2 / 3, 0.0),
        ("nothing", ["all of it"], 0.0, 0.0),
        ("", ["old theatre"], 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("task", [SQUAD, SQUAD_V2], ids=lambda task: task.name)
def test_figures(task: Any, prediction: str, gold: list[str], f1: float, exact: float) -> None:
    question = Question("", "", "", tuple(Answer(text, 0) for text in gold))
    assert answers.figures(task, [question], [prediction]) == pytest.approx(
        {"f1": f1, "exact": exact}
    )


def test_nothing_is_right_only_where_there_is_nothing() -> None:
    none, article = (Question("", "", "", a) for a in ((), (Answer("The", 0),)))
    some = Question("", "", "", (Answer("The", 0), Answer("theatre", 0)))

    def v2(question: Question, prediction: str) -> tuple[float, ...]:
        return tuple(answers.figures(SQUAD_V2, [question], [prediction]).values())

    assert v2(none, "") == v2(none, "the") == v2(article, "") == (1.0, 1.0)
    assert v2(none, "theatre") == v2(some, "") == (0.0, 0.0)
    # Version 1.1 counts common words, of which two nothings have none.
    assert answers.figures(SQUAD, [article], [""]) == {"f1": 0.0, "exact": 1.0}


def test_the_best_constant_answer() -> None:
    def constant(task: Any, *questions: Question) -> Any:
        return answers.prepare(task, Splits(QUESTIONS, questions), words(), 48).constant_score

    assert constant(SQUAD_V2, WITHOUT, *QUESTIONS[:3]) == {"f1": 0.25, "exact": 0.25}
    assert constant(SQUAD, *QUESTIONS[:3]) == {"f1": 0.0, "exact": 0.0}
    assert constant(SQUAD, QUESTIONS[0], QUESTIONS[5]) == {"f1": 0.0, "exact": 0.5}


# With a model


@pytest.mark.parametrize("task", [SQUAD, SQUAD_V2], ids=lambda task: task.name)
def test_a_model_learns_the_answers_through_the_trainer(task: Any, tmp_path: Path) -> None:
    questions = [*QUESTIONS[:3], asked("short?", "b", context="a b")]
    if task is SQUAD_V2:
        questions.append(WITHOUT)
    write(tmp_path, task, questions, questions)
    tokenizer = words()
    prepared = answers.prepare(task, answers.read(task, tmp_path), tokenizer, 30)
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        output_hidden_states=True,
    )
    trainer = transformers.Trainer(
        model=transformers.BertForQuestionAnswering(config),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=100,
            learning_rate=5e-3,
            per_device_train_batch_size=16,
            # Batches of differing length, which the Trainer pads with -100.
            per_device_eval_batch_size=1,
            label_names=list(prepared.label_names),
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=prepared.train,
        eval_dataset=prepared.evaluation,
        data_collator=prepared.collate,
        compute_metrics=lambda found: dict(prepared.score(found.predictions, found.label_ids)),
        preprocess_logits_for_metrics=prepared.reduce,
    )
    before = trainer.evaluate()
    assert np.isfinite(before["eval_loss"])
    assert 0.0 <= before["eval_exact"] <= before["eval_f1"] <= 1.0
    found = trainer.predict(prepared.evaluation)
    assert len(found.predictions) == 2
    assert (found.predictions[0] == -100).any()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_exact"] == after["eval_f1"] == 1.0
