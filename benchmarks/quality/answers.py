"""Question answering: SQuAD v1.1 and v2.0 (arXiv 1606.05250, 1806.03822).

    DIR/<task>/train-v1.1.json, DIR/<task>/dev-v1.1.json        squad
    DIR/<task>/train-v2.0.json, DIR/<task>/dev-v2.0.json        squad_v2

The official files, in DIR/<task> or in DIR itself, or the same questions from the Hugging Face hub.
An answer is a span of the context. A context that is too long is read in windows that overlap; a
window without the answer has it at the first token, `cls`, which in v2.0 also stands for "there is
no answer".
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.quality import hub
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.prepared import Feature, Prepared
from benchmarks.quality.tasks import Task

_VERSIONS = {"squad": "v1.1", "squad_v2": "v2.0"}
_WITHOUT_ANSWERS = "squad_v2"
_POSITIONS = ("start_positions", "end_positions")

_SLICE_OF = 5

# The usual sizes: of a question what is read, of an answer what is looked for.
_QUESTION_TOKENS = 64
_ANSWER_TOKENS = 30
# Of a window what is shared with its neighbour, and at most the question: a third each.
_SHARE = 3
_AT_ONCE = 256

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")

_Member = TypeVar("_Member")
_Array = npt.NDArray[Any]


class Answer(NamedTuple):
    """A span of the context: its text, and the number of its first character."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a paragraph of an article; without answers where the paragraph has none."""

    article: str
    context: str
    text: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Splits:
    """A task's questions."""

    train: Sequence[Question]
    dev: Sequence[Question]

    def digest(self) -> str:
        """What tells these questions from others."""
        content = hashlib.sha256()
        for split in (self.train, self.dev):
            for question in split:
                content.update(repr(question).encode())
            content.update(b"\n")
        return content.hexdigest()[:12]


# Reading


def read(task: Task, folder: Path | None) -> Splits:
    """Both splits: from the official files of a folder, without one from the Hugging Face hub.

    Raises:
        QualityError: the folder or a file is missing or is not SQuAD's, a split is empty, an
            answer is not where it is said to be, or a question of v1.1 has none; without a folder,
            the package `datasets` is missing or the hub cannot be reached.
    """
    if folder is None:
        load = hub.loader(task, _files(task))
        train, dev = (
            _from_hub(load(split), task, f"{task.name}, {split}")
            for split in ("train", task.dev_split)
        )
        return Splits(train, dev)
    if not folder.is_dir():
        raise QualityError(
            f"--data: {folder} is not a folder; expected one that holds {_files(task)}"
        )
    inside = folder / task.name
    place = inside if inside.is_dir() else folder
    return Splits(*(_read(_find(place, split, task), task) for split in ("train", "dev")))


def slice_of_train(splits: Splits) -> Splits:
    """A fifth of the training articles takes the place of the dev split, which is not looked at.

    Of fewer than five articles, it is a fifth of the paragraphs.

    Raises:
        QualityError: the training questions are all about one paragraph.
    """
    sources = [question.article for question in splits.train]
    if len(set(sources)) < _SLICE_OF:
        sources = [question.context for question in splits.train]
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    if len(numbers) < 2:
        raise QualityError(
            "--data: the training questions are all about one paragraph; expected at least two, "
            "one of them to choose learning rates on"
        )
    held = [numbers[source] % _SLICE_OF == 0 for source in sources]
    paired = list(zip(splits.train, held, strict=True))
    return Splits([q for q, out in paired if not out], [q for q, out in paired if out])


def _files(task: Task) -> str:
    version = _VERSIONS[task.name]
    return f"train-{version}.json and dev-{version}.json, SQuAD's official files"


def _find(folder: Path, split: str, task: Task) -> Path:
    path = folder / f"{split}-{_VERSIONS[task.name]}.json"
    if not path.is_file():
        held = ", ".join(sorted(child.name for child in folder.iterdir())[:10]) or "nothing"
        raise QualityError(
            f"--data: {folder} lacks {path.name}; it holds {held}; {task.name} is read from "
            f"{_files(task)}"
        )
    return path


def _read(path: Path, task: Task) -> list[Question]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QualityError(
            f"--data: {path} is not JSON ({error}); expected SQuAD's official file; download it "
            "again"
        ) from None
    return _not_empty([_checked(*found, task) for found in _in_file(content, str(path))], str(path))


def _in_file(content: Any, path: str) -> Iterator[tuple[Question, str]]:
    """The questions of a file, each with where it is."""
    for number, article in enumerate(_member(content, "data", list, path)):
        where = f"{path}: data[{number}]"
        title = _member(article, "title", str, where)
        for place, paragraph in enumerate(_member(article, "paragraphs", list, where)):
            inside = f"{where}.paragraphs[{place}]"
            context = _member(paragraph, "context", str, inside)
            for count, asked in enumerate(_member(paragraph, "qas", list, inside)):
                here = f"{inside}.qas[{count}]"
                answers = tuple(
                    Answer(_member(a, "text", str, here), _member(a, "answer_start", int, here))
                    for a in _member(asked, "answers", list, here)
                )
                text = _member(asked, "question", str, here)
                yield Question(title, context, text, answers), here


def _member(holder: Any, key: str, kind: type[_Member], where: str) -> _Member:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        came = "nothing" if value is None else f"{value!r:.60}"
        raise QualityError(
            f"--data: {where}: expected {key!r} to be of type {kind.__name__}, as in SQuAD's "
            f"official files, got {came}"
        )
    return value


def _from_hub(rows: Any, task: Task, split: str) -> list[Question]:
    questions = []
    for number, row in enumerate(rows):
        given = row["answers"]
        answers = map(Answer, map(str, given["text"]), map(int, given["answer_start"]))
        question = Question(row["title"], row["context"], row["question"], tuple(answers))
        questions.append(_checked(question, f"{split} row {number}", task))
    return _not_empty(questions, split)


def _not_empty(questions: list[Question], where: str) -> list[Question]:
    if not questions:
        raise QualityError(f"--data: {where} holds no questions; expected SQuAD's official file")
    return questions


def _checked(question: Question, where: str, task: Task) -> Question:
    """The question, whose answers are where they should be."""
    if not question.answers and task.name != _WITHOUT_ANSWERS:
        raise QualityError(
            f"--data: {where}: the question {question.text!r} has no answer; expected at least one "
            f"in {task.name}; for data with such questions: --task {_WITHOUT_ANSWERS}"
        )
    for text, start in question.answers:
        there = question.context[max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or not text.strip() or there != text:
            raise QualityError(
                f"--data: {where}: expected the answer {text!r} at answer_start {start} of the "
                f"context, got {there!r}; correct answer_start, which counts characters from 0, "
                "and keep blanks at the context's beginning"
            )
    return question


# Windows


@dataclass(frozen=True)
class _Window:
    """A part of a question's context.

    Attributes:
        question: the question's number.
        first: the number of the context's first token in the window.
        offsets: of each token of the context, where it begins and ends in the text, `[tokens, 2]`.
    """

    question: int
    first: int
    offsets: _Array

    def find(self, answer: Answer) -> tuple[int, int] | None:
        """The answer's first and last token, if all of it is in the window."""
        begin = answer.start + len(answer.text) - len(answer.text.lstrip())
        end = begin + len(answer.text.strip())
        begins, ends = self.offsets.T
        if not len(begins) or begins[0] > begin or ends[-1] < end:
            return None
        tokens = np.flatnonzero((begins < end) & (ends > begin)) + self.first
        return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None

    def best_span(self, starts: _Array, ends: _Array) -> tuple[float, int, int]:
        """Score, begin and end in the text of the best span that is not too long."""
        inside = slice(self.first, self.first + len(self.offsets))
        beyond = np.full(_ANSWER_TOKENS - 1, -np.inf)
        reach = np.lib.stride_tricks.sliding_window_view(
            np.concatenate([ends[inside], beyond]), _ANSWER_TOKENS
        )
        scores = starts[inside, None] + reach  # [first token, tokens after it]
        token, more = divmod(int(scores.argmax()), _ANSWER_TOKENS)
        begin, end = int(self.offsets[token, 0]), int(self.offsets[token + more, 1])
        return float(scores[token, more]), begin, end


def prepare(
    task: Task,
    splits: Splits,
    tokenizer: Any,
    max_tokens: int,
    digest: str | None = None,
    *,
    stride: int | None = None,
) -> Prepared:
    """Tokenise both splits; the scored windows in order of length, so that little is padding.

    `score` needs all windows of a question: to score less, take fewer questions before this, not
    fewer windows after it.

    Args:
        max_tokens: length of a window: the question, its part of the context, special tokens.
            Questions are cut at 64 tokens, or at a third of the window.
        stride: tokens of context that neighbouring windows share; a third of `max_tokens` unless
            given, the usual 128 of 384.

    Raises:
        QualityError: a tokenizer that does not say where its tokens are in the text, or that does
            not begin with `cls` and pad at the end; windows too short for what they share.
    """
    from transformers import DataCollatorWithPadding

    stride = max_tokens // _SHARE if stride is None else stride
    _check(tokenizer, max_tokens, stride)
    train = [feature for feature, _ in _windows(splits.train, tokenizer, max_tokens, stride)]
    scored = list(_windows(splits.dev, tokenizer, max_tokens, stride))
    scored.sort(key=lambda pair: len(pair[0]["input_ids"]))
    lengths = [len(feature["input_ids"]) for feature, _ in scored]
    windows = [window for _, window in scored]

    def score(outputs: Any, _: Any) -> Mapping[str, float]:
        starts, ends = _logits(outputs, lengths)
        return figures(task, splits.dev, _predictions(task, splits.dev, windows, starts, ends))

    return Prepared(
        train=train,
        evaluation=[feature for feature, _ in scored],
        collate=DataCollatorWithPadding(tokenizer),
        score=score,
        constant_score=figures(task, splits.dev, [""] * len(splits.dev)),
        outputs=2,
        digest=digest or splits.digest(),
        label_names=_POSITIONS,
        reduce=_reduce,
    )


def _check(tokenizer: Any, max_tokens: int, stride: int) -> None:
    kind = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise QualityError(
            f"--model: its tokenizer, {kind}, does not say where in a text its tokens are; "
            "expected a fast tokenizer; use a model that comes with a tokenizer.json"
        )
    if tokenizer.padding_side != "right":
        raise QualityError(
            f"--model: its tokenizer, {kind}, pads on the {tokenizer.padding_side}; expected one "
            "that pads on the right; use an encoder such as BERT or RoBERTa"
        )
    begins = tokenizer("a", "a")["input_ids"][:1]
    if tokenizer.cls_token_id is None or begins != [tokenizer.cls_token_id]:
        raise QualityError(
            f"--model: its tokenizer, {kind}, does not begin with a cls token, where questions "
            "without an answer point to; use an encoder such as BERT or RoBERTa"
        )
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = max_tokens - _question_tokens(max_tokens) - special
    if not 0 <= stride < room:
        raise QualityError(
            f"--max-tokens: {max_tokens} leaves windows {max(room, 0)} tokens of context beside a "
            f"question, of which neighbours would share {stride}; expected more than they share; "
            "use longer windows"
        )


def _question_tokens(max_tokens: int) -> int:
    return min(_QUESTION_TOKENS, max_tokens // _SHARE)


def _windows(
    questions: Sequence[Question], tokenizer: Any, max_tokens: int, stride: int
) -> Iterator[tuple[Feature, _Window]]:
    for begin in range(0, len(questions), _AT_ONCE):
        some = questions[begin : begin + _AT_ONCE]
        encoded = tokenizer(
            _cut([q.text.strip() for q in some], tokenizer, _question_tokens(max_tokens)),
            [q.context for q in some],
            truncation="only_second",
            max_length=max_tokens,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        offsets = encoded.pop("offset_mapping")
        numbers = encoded.pop("overflow_to_sample_mapping")
        for place, number in enumerate(numbers):
            sides = encoded.sequence_ids(place)
            first = sides.index(1) if 1 in sides else 0
            spans = np.asarray(offsets[place][first : first + sides.count(1)], dtype=np.int32)
            window = _Window(begin + number, first, spans.reshape(-1, 2))
            answers = some[number].answers
            # The cls token, the first one, where the answer is not here.
            start, end = (window.find(answers[0]) if answers else None) or (0, 0)
            feature: Feature = {key: column[place] for key, column in encoded.items()}
            yield {**feature, **dict(zip(_POSITIONS, (start, end), strict=True))}, window


def _cut(questions: list[str], tokenizer: Any, most: int) -> list[str]:
    """The questions' beginnings, of at most so many tokens."""
    encoded = tokenizer(
        questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return [
        text[: offsets[most - 1][1]] if len(offsets) > most else text
        for text, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


# Scoring


def _reduce(outputs: Any, _: Any) -> Any:
    """Start and end logits: what else a model gives can be large."""
    return outputs[:2]


def _logits(outputs: Any, lengths: list[int]) -> tuple[_Array, _Array]:
    """Start and end logits of every window, padded, `[windows, tokens]` each."""
    given = outputs if isinstance(outputs, tuple | list) else (outputs,)
    starts, ends = (np.asarray(output) for output in (given if len(given) > 1 else given * 2)[:2])
    shape, longest = starts.shape, max(lengths)
    if len(given) < 2 or len(shape) != 2 or ends.shape != shape or shape[1] < longest:
        came = ", ".join(str(list(np.shape(output))) for output in given)
        raise QualityError(
            "--model: expected start logits and end logits of every token, two arrays "
            f"[{len(lengths)}, {longest}], got {came}; use a model for question answering"
        )
    if len(starts) != len(lengths):
        raise QualityError(
            f"--scored-size: got the logits of {len(starts)} windows; expected {len(lengths)}, all "
            "of them: an answer is the best of all windows of its question; take fewer questions "
            "before they are cut into windows"
        )
    return starts.astype(np.float64), ends.astype(np.float64)


def _predictions(
    task: Task, questions: Sequence[Question], windows: list[_Window], starts: _Array, ends: _Array
) -> list[str]:
    """The best span of each question, or nothing where in v2.0 `cls` is better than any."""
    best = [(-np.inf, 0, 0)] * len(questions)
    none = [np.inf] * len(questions)
    for window, start, end in zip(windows, starts, ends, strict=True):
        # Padding is not looked at, nor is the question.
        read = np.r_[0, window.first : window.first + len(window.offsets)]
        if not np.isfinite(start[read] + end[read]).all():
            raise DivergedError(
                "--model: it gave start or end logits that are not finite; a lower --lr may help"
            )
        which = window.question
        none[which] = min(none[which], float(start[0] + end[0]))
        if len(window.offsets):
            best[which] = max(best[which], window.best_span(start, end), key=lambda span: span[0])
    return [
        "" if task.name == _WITHOUT_ANSWERS and nothing > score else question.context[begin:end]
        for question, (score, begin, end), nothing in zip(questions, best, none, strict=True)
    ]


def figures(
    task: Task, questions: Sequence[Question], predictions: Sequence[str]
) -> dict[str, float]:
    """The task's figures of one prediction a question: each the best over its answers, 0 to 1."""
    compare = {"f1": _f1, "exact": _exact}
    found = []
    for question, prediction in zip(questions, predictions, strict=True):
        came = normalised(prediction)
        answers = [normalised(answer.text) for answer in question.answers]
        if task.name == _WITHOUT_ANSWERS:
            answers = [answer for answer in answers if answer] or [""]
        if task.name == _WITHOUT_ANSWERS and not came:
            # Only in v2.0 do nothing and nothing agree in their words.
            found.append([float(answers == [""])] * len(task.metrics))
        else:
            found.append([max(compare[m](came, a) for a in answers) for m in task.metrics])
    return dict(zip(task.metrics, map(float, np.mean(found, axis=0)), strict=True))


def normalised(text: str) -> str:
    """What of an answer is compared: its words, without case, punctuation and articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _exact(prediction: str, answer: str) -> float:
    return float(prediction == answer)


def _f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it occurs."""
    came, expected = prediction.split(), answer.split()
    common = sum((Counter(came) & Counter(expected)).values())
    return 2 * common / (len(came) + len(expected)) if common else 0.0
