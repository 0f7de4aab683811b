"""Read tab-separated files."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path


def read_tsv(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows of a tab-separated file, gzipped if its name ends in `.gz`, in the file's order.

    Raises:
        ValueError: a column is missing, a row has another number of fields than the header, or the
            file is not UTF-8 text.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = list(reader.fieldnames or ())
        missing = [column for column in columns if column not in header]
        if missing:
            raise ValueError(
                f"{path}: expected the column {', '.join(missing)}, got {', '.join(header)}"
            )
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: expected {len(header)} fields")
            rows.append(tuple(row[column] for column in columns))
    return rows
