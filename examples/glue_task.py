"""GLUE tasks read from TSV files: `DIR/<task>/train.tsv` and `DIR/<task>/dev.tsv`.

A header row names the columns `sentence1`, `label` and, for sentence pairs, `sentence2`; quotes
are text. The dev split is the held-out one. A file may be gzipped (`train.tsv.gz`).
"""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import NamedTuple

from text_task import ACCURACY, MATTHEWS, PEARSON, DemoError, Example, Metric, TextTask


class _Glue(NamedTuple):
    """What the files of one GLUE task hold."""

    description: str
    is_pair: bool
    label_names: tuple[str, ...]
    metric: Metric
    max_tokens: int


_TASKS = {
    "cola": _Glue(
        "is this sentence acceptable English", False, ("no", "yes"), MATTHEWS, max_tokens=48
    ),
    "rte": _Glue(
        "does the first text entail the second",
        True,
        ("entailment", "not_entailment"),
        ACCURACY,
        max_tokens=192,
    ),
    "stsb": _Glue("how alike are two sentences, 0 to 5", True, (), PEARSON, max_tokens=96),
    "sst2": _Glue(
        "is this review positive", False, ("negative", "positive"), ACCURACY, max_tokens=64
    ),
}
GLUE_TASKS = tuple(_TASKS)

# Regression labels are brought to 0..1, where a fresh head starts; correlations do not notice.
_HIGHEST_SCORE = 5.0


def glue_task(name: str, data: Path | None) -> TextTask:
    """Read one GLUE task from the folder `data`."""
    glue = _TASKS[name]
    if data is None:
        raise DemoError(
            f"--data: expected the folder that holds {name}/train.tsv and {name}/dev.tsv, got "
            f"nothing; pass --data DIR, or leave out --task {name} for a task that needs no files"
        )
    return TextTask(
        name=name,
        description=glue.description,
        train=_read(data, name, "train", glue),
        held_out=_read(data, name, "dev", glue),
        label_names=glue.label_names,
        metric=glue.metric,
        max_tokens=glue.max_tokens,
    )


def _read(data: Path, name: str, split: str, glue: _Glue) -> list[Example]:
    path = _find(data, name, split)
    columns = ("sentence1", "sentence2") if glue.is_pair else ("sentence1",)
    examples = []
    with _open_text(path) as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = rows.fieldnames or ()
        missing = [column for column in (*columns, "label") if column not in header]
        if missing:
            raise DemoError(
                f"--data: {path} lacks the column {', '.join(missing)}; its header is "
                f"{', '.join(header) or 'empty'}; expected {', '.join(columns)}, label, "
                "separated by tabs"
            )
        for row in rows:
            texts = tuple(row[column] for column in columns)
            if None in texts:
                raise DemoError(
                    f"--data: {path} line {rows.line_num} has fewer fields than the header"
                )
            examples.append(Example(texts, _label(row["label"], glue, path, rows.line_num)))
    if not examples:
        raise DemoError(f"--data: {path} holds no examples below its header")
    return examples


def _find(data: Path, name: str, split: str) -> Path:
    plain = data / name / f"{split}.tsv"
    for path in (plain, plain.with_name(plain.name + ".gz")):
        if path.is_file():
            return path
    if not data.is_dir():
        raise DemoError(
            f"--data: {data} is not a folder; expected one that holds {name}/{split}.tsv"
        )
    found = ", ".join(sorted(child.name for child in data.iterdir())[:12]) or "nothing"
    raise DemoError(f"--data: {plain} does not exist (nor {split}.tsv.gz); {data} holds {found}")


def _open_text(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _label(text: str | None, glue: _Glue, path: Path, line: int) -> float:
    expected = (
        f"one of {', '.join(str(index) for index in range(len(glue.label_names)))}"
        if glue.label_names
        else f"a number from 0 to {_HIGHEST_SCORE:g}"
    )
    try:
        label = float(text or "")
    except ValueError:
        label = float("nan")
    if glue.label_names:
        valid = label in range(len(glue.label_names))
    else:
        valid = 0.0 <= label <= _HIGHEST_SCORE
        label /= _HIGHEST_SCORE
    if not valid:
        raise DemoError(f"--data: {path} line {line} has the label {text!r}, expected {expected}")
    return label
