"""The demo's own task: which standard-library module does this piece of a docstring come from?

The text comes with every Python installation, so nothing is downloaded. Source files are parsed,
never imported. The names of the modules are masked everywhere, and whole docstrings, not pieces
of them, are held out.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from text_task import ACCURACY, DemoError, Example, TextTask

# Label and the source file or package that holds its docstrings, best populated first.
_SOURCES = {
    "tkinter": "tkinter",
    "asyncio": "asyncio",
    "email": "email",
    "importlib": "importlib",
    "logging": "logging",
    "xml": "xml",
    "decimal": "_pydecimal.py",
    "turtle": "turtle.py",
    "unittest": "unittest",
    "multiprocessing": "multiprocessing",
    "http": "http",
    "typing": "typing.py",
    "inspect": "inspect.py",
    "urllib": "urllib",
    "tarfile": "tarfile.py",
    "ipaddress": "ipaddress.py",
    "statistics": "statistics.py",
    "threading": "threading.py",
}
_CLASSES = 12
_MIN_PIECES = 100
_MAX_TRAIN = 150
_MAX_HELD_OUT = 55
_PIECE_WORDS = range(6, 41)
_MAX_TOKENS = 32
_HELD_OUT_SHARE = 0.22

_NAMES = re.compile(rf"\b_*({'|'.join(_SOURCES)})(?=\b|_)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_CODE = re.compile(r"^\s*(>>>|\.\.\.|[-=+|*#]{3,})|^ {4,}", re.MULTILINE)


def docstring_task() -> TextTask:
    """Harvest the task from this interpreter's own standard library; the same one every time."""
    root = Path(sysconfig.get_path("stdlib"))
    harvest = {label: list(_pieces(root / source)) for label, source in _SOURCES.items()}
    unique = _drop_repeats(harvest)
    classes = [label for label, pieces in unique.items() if len(pieces) >= _MIN_PIECES][:_CLASSES]
    if len(classes) < 2:
        raise DemoError(
            f"--task docstrings: expected Python source files with docstrings under {root}, found "
            f"enough for {len(classes)} of {len(_SOURCES)} modules; use an interpreter whose "
            "standard library is installed as .py files, or pass --task and --data"
        )
    train: list[Example] = []
    held_out: list[Example] = []
    for index, label in enumerate(classes):
        examples = [(Example((piece.text,), index), piece.is_held_out) for piece in unique[label]]
        train += [example for example, held in examples if not held][:_MAX_TRAIN]
        held_out += [example for example, held in examples if held][:_MAX_HELD_OUT]
    return TextTask(
        name="docstrings",
        description="which standard-library module does this docstring come from",
        train=train,
        held_out=held_out,
        label_names=tuple(classes),
        metric=ACCURACY,
        max_tokens=_MAX_TOKENS,
    )


class _Piece(NamedTuple):
    """A run of sentences, and the hash of the docstring it was cut from."""

    digest: bytes
    text: str

    @property
    def is_held_out(self) -> bool:
        return self.digest[0] < _HELD_OUT_SHARE * 256

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(re.findall(r"[a-z]+", self.text.lower()))


def _pieces(source: Path) -> Iterator[_Piece]:
    """Prose from the docstrings of one module or package, the modules' names masked."""
    files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
    for file in files:
        if not file.is_file() or {"test", "tests", "idle_test"} & set(file.parts):
            continue
        for docstring in _docstrings(file):
            digest = hashlib.sha256(" ".join(docstring.split()).encode()).digest()
            for text in _prose(docstring):
                yield _Piece(digest, _NAMES.sub("module", text))


def _docstrings(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _prose(docstring: str) -> Iterator[str]:
    """Runs of whole sentences of a readable length; code, tables and indented blocks left out."""
    shortest, longest = _PIECE_WORDS.start, _PIECE_WORDS.stop
    for paragraph in _PARAGRAPH_END.split(docstring):
        if _CODE.search(paragraph):
            continue
        piece: list[str] = []
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            words = sentence.split()
            if piece and len(piece) + len(words) >= longest:
                yield " ".join(piece)
                piece = []
            piece += words[: longest - 1]
        if len(piece) >= shortest:
            yield " ".join(piece)


def _drop_repeats(harvest: dict[str, list[_Piece]]) -> dict[str, list[_Piece]]:
    """Of pieces with the same words keep one, or none when two modules have it.

    What is left is in the order of the docstrings' hashes: an even draw from all their files.
    """
    owners: dict[tuple[str, ...], set[str]] = {}
    for label, pieces in harvest.items():
        for piece in pieces:
            owners.setdefault(piece.words, set()).add(label)
    unique: dict[str, list[_Piece]] = {}
    for label, pieces in harvest.items():
        first: dict[tuple[str, ...], _Piece] = {}
        for piece in sorted(pieces):
            if len(owners[piece.words]) == 1:
                first.setdefault(piece.words, piece)
        unique[label] = list(first.values())
    return unique
