"""Question answering: SQuAD v1.1 and v2.0 (arXiv 1606.05250, 1806.03822).

    DIR/<task>/train-v1.1.json, DIR/<task>/dev-v1.1.json        squad
    DIR/<task>/train-v2.0.json, DIR/<task>/dev-v2.0.json        squad_v2

An answer is a span of the context. A context that is too long is read in overlapping windows; in a
window without the answer the target is the `cls` token, which in v2.0 also means "no answer".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.metrics import Values, answers
from benchmarks.quality.tasks import Feature, Prepared, Splits, Task

_VERSIONS = {"squad": "v1.1", "squad_v2": "v2.0"}
_UNANSWERABLE = "squad_v2"

_SLICE_OF = 5
_QUESTION_TOKENS = 64  # longer questions are truncated
_ANSWER_TOKENS = 30  # longer answers are not considered
# Neighbouring windows share a third of their tokens, and a question takes at most a third.
_SHARE = 3
_CHUNK = 256  # questions that are tokenized together

_Logits = tuple[Values, Values]  # start and end, of every token


class Answer(NamedTuple):
    """A span of the context: its text, and the index of its first character."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a paragraph of an article; without answers if the paragraph has none."""

    article: str
    context: str
    text: str
    answers: tuple[Answer, ...]


def read(task: Task, folder: Path) -> Splits[Question]:
    """Both splits from the official files of a folder."""
    place = folder / task.name if (folder / task.name).is_dir() else folder
    version = _VERSIONS[task.name]
    train, dev = (_questions(task, place / f"{s}-{version}.json") for s in ("train", "dev"))
    digest = hashlib.sha256()
    for questions in (train, dev):
        for question in questions:
            digest.update(repr(question).encode())
        digest.update(b"\n")
    return Splits(train, dev, digest.hexdigest()[:12])


def _questions(task: Task, path: Path) -> list[Question]:
    try:
        questions = [
            Question(article["title"], paragraph["context"], asked["question"], answers)
            for article in json.loads(path.read_text(encoding="utf-8"))["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
            for answers in [tuple(Answer(a["text"], a["answer_start"]) for a in asked["answers"])]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QualityError(
            f"--data: expected SQuAD's official file at {path}; reading it failed with {error!r}"
        ) from None
    for question in questions:
        where = f"--data: {path}: the question {question.text!r}"
        if not question.answers and task.name != _UNANSWERABLE:
            raise QualityError(f"{where} has no answer; expected --task {_UNANSWERABLE}")
        for text, start in question.answers:
            there = question.context[max(start, 0) : max(start, 0) + len(text)]
            if start < 0 or not text.strip() or there != text:
                raise QualityError(
                    f"{where}: expected the answer {text!r} at answer_start {start}, got {there!r}"
                )
    return questions


def slice_of_train(splits: Splits[Question]) -> Splits[Question]:
    """Splits whose dev split is a fifth of the training articles; the real one is not used.

    Of fewer than five articles, it is a fifth of the paragraphs.
    """
    sources = [question.article for question in splits.train]
    if len(set(sources)) < _SLICE_OF:
        sources = [question.context for question in splits.train]
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    if len(numbers) < 2:
        raise QualityError("--lr: a search needs training questions on at least two paragraphs")
    return splits.hold_out([numbers[source] % _SLICE_OF == 0 for source in sources])


class _Window(NamedTuple):
    """A part of a question's context.

    Attributes:
        question: the question's index.
        first: the position of the context's first token in the window.
        offsets: where each token of the context begins and ends in the text, `[tokens, 2]`.
    """

    question: int
    first: int
    offsets: Values

    def find(self, answer: Answer) -> tuple[int, int] | None:
        """The answer's first and last token, if all of it is in the window."""
        begin = answer.start + len(answer.text) - len(answer.text.lstrip())
        end = begin + len(answer.text.strip())
        begins, ends = self.offsets.T
        if not len(begins) or begins[0] > begin or ends[-1] < end:
            return None
        tokens = np.flatnonzero((begins < end) & (ends > begin)) + self.first
        return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None

    def best_span(self, starts: Values, ends: Values) -> tuple[float, int, int]:
        """The score of the best span of at most `_ANSWER_TOKENS`, and its place in the text."""
        inside = slice(self.first, self.first + len(self.offsets))
        scores = starts[inside, None] + ends[inside]  # [first token, last token]
        allowed = np.triu(np.tri(len(scores), k=_ANSWER_TOKENS - 1, dtype=bool))
        scores = np.where(allowed, scores, -np.inf)
        first, last = divmod(int(scores.argmax()), len(scores))
        return float(scores[first, last]), int(self.offsets[first, 0]), int(self.offsets[last, 1])


def prepare(task: Task, splits: Splits[Question], tokenizer: Any, max_tokens: int) -> Prepared:
    """Tokenize both splits into windows; those that are scored are sorted by length."""
    from transformers import DataCollatorWithPadding

    fits = tokenizer.is_fast and tokenizer.padding_side == "right"
    if not fits or tokenizer("a", "a")["input_ids"][:1] != [tokenizer.cls_token_id]:
        raise QualityError(
            "--model: expected a fast tokenizer that begins with cls and pads on the right, as an "
            f"encoder such as BERT has, got {type(tokenizer).__name__}"
        )
    train = [feature for feature, _ in _windows(splits.train, tokenizer, max_tokens)]
    scored = list(_windows(splits.dev, tokenizer, max_tokens))
    scored.sort(key=lambda pair: len(pair[0]["input_ids"]))
    windows = [window for _, window in scored]
    expected = [[answer.text for answer in question.answers] for question in splits.dev]

    def figures(predictions: list[str]) -> dict[str, float]:
        return answers(predictions, expected, may_be_empty=task.name == _UNANSWERABLE)

    return Prepared(
        train=train,
        evaluation=[feature for feature, _ in scored],
        collate=DataCollatorWithPadding(tokenizer),
        reduce=_logits,
        score=lambda logits: figures(_predictions(task, splits.dev, windows, logits)),
        constant_score=figures([""] * len(splits.dev)),
        outputs=2,
        digest=splits.digest,
        by_example=False,  # a question may have several windows
    )


def _logits(output: Any, _: Sequence[Feature]) -> list[_Logits]:
    sides = (side.double().cpu().numpy() for side in (output.start_logits, output.end_logits))
    return list(zip(*sides, strict=True))


def _windows(
    questions: Sequence[Question], tokenizer: Any, max_tokens: int
) -> Iterator[tuple[Feature, _Window]]:
    most = min(_QUESTION_TOKENS, max_tokens // _SHARE)
    for begin in range(0, len(questions), _CHUNK):
        chunk = questions[begin : begin + _CHUNK]
        encoded = tokenizer(
            _truncated([q.text.strip() for q in chunk], tokenizer, most),
            [q.context for q in chunk],
            truncation="only_second",
            max_length=max_tokens,
            stride=max_tokens // _SHARE,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        offsets = encoded.pop("offset_mapping")
        for place, number in enumerate(encoded.pop("overflow_to_sample_mapping")):
            sides = encoded.sequence_ids(place)
            first = sides.index(1) if 1 in sides else 0
            spans = np.asarray(offsets[place][first : first + sides.count(1)], dtype=np.int32)
            window = _Window(begin + number, first, spans.reshape(-1, 2))
            answers = chunk[number].answers
            start, end = (window.find(answers[0]) if answers else None) or (0, 0)  # 0 is cls
            feature: Feature = {key: column[place] for key, column in encoded.items()}
            yield {**feature, "start_positions": start, "end_positions": end}, window


def _truncated(questions: list[str], tokenizer: Any, most: int) -> list[str]:
    """The questions, each cut after its first `most` tokens."""
    encoded = tokenizer(
        questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return [
        text[: offsets[most - 1][1]] if len(offsets) > most else text
        for text, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def _predictions(
    task: Task, questions: Sequence[Question], windows: list[_Window], logits: list[_Logits]
) -> list[str]:
    """The best span of each question; in v2.0 nothing, if `cls` scores higher in any window."""
    best = [(-np.inf, 0, 0)] * len(questions)
    none = [np.inf] * len(questions)
    for window, (start, end) in zip(windows, logits, strict=True):
        read = np.r_[0, window.first : window.first + len(window.offsets)]  # no padding
        if not np.isfinite(start[read] + end[read]).all():
            raise DivergedError("the start or end logits are not finite")
        number = window.question
        none[number] = min(none[number], float(start[0] + end[0]))
        if len(window.offsets):
            best[number] = max(best[number], window.best_span(start, end), key=lambda span: span[0])
    return [
        "" if task.name == _UNANSWERABLE and nothing > score else question.context[begin:end]
        for question, (score, begin, end), nothing in zip(questions, best, none, strict=True)
    ]
