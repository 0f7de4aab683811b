"""Language modelling: one text file, cut into blocks, the last tenth of which is scored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.tasks import Feature, Prepared, spread

_SCORED_SHARE = 0.1


def read_text(data: Path) -> str:
    """The text of a file, or of the only .txt file of a folder."""
    files = sorted(data.glob("*.txt")) if data.is_dir() else [data]
    if len(files) != 1 or not files[0].is_file():
        raise QualityError(f"--data: expected a text file, or a folder with one .txt, got {data}")
    try:
        return files[0].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QualityError(f"--data: {files[0]} is not UTF-8 text: {error}") from error


def prepare(
    text: str, tokenizer: Any, block: int, size: int | None = None, *, slice_of_train: bool
) -> Prepared:
    """Cut the text into blocks of tokens; the last tenth, or `size` blocks of it, is scored.

    With `slice_of_train` the last tenth is not used, and the tenth before it is scored.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    features: list[Feature] = [
        {"input_ids": ids[start : start + block]} for start in range(0, len(ids) - block + 1, block)
    ]
    if len(features) < 3:
        raise QualityError(
            f"--data: the text has {len(ids)} tokens; expected at least {3 * block}, three blocks"
        )
    scored = math.ceil(len(features) * _SCORED_SHARE)
    if slice_of_train:
        features = features[:-scored]
    train, evaluation = features[:-scored], spread(features[-scored:], size)
    constant = {"perplexity": _unigram_perplexity(train, evaluation, len(tokenizer))}
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Prepared(train, evaluation, _collate, _block_losses, _score, constant, 0, digest)


def _unigram_perplexity(
    train: Sequence[Feature], evaluation: Sequence[Feature], vocabulary: int
) -> float:
    """Perplexity of the token frequencies in `train`, with add-one smoothing."""
    counts = np.ones(vocabulary)
    for feature in train:
        np.add.at(counts, feature["input_ids"], 1)
    surprise = np.log(counts.sum()) - np.log(counts)
    # The first token of a block is not predicted.
    tokens = [token for feature in evaluation for token in feature["input_ids"][1:]]
    return float(np.exp(surprise[tokens].mean()))


def _collate(features: list[Feature]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([feature["input_ids"] for feature in features])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _block_losses(output: Any, blocks: Sequence[Feature]) -> list[float]:
    """Each block's mean loss over the tokens it predicts."""
    logits = output.logits.float()
    ids = torch.tensor([block["input_ids"] for block in blocks], device=logits.device)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return list(losses.mean(1).cpu().numpy())


def _score(losses: list[float], kept: Any = slice(None)) -> Mapping[str, float]:
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.mean(np.asarray(losses, dtype=np.float64)[kept])))
    if not math.isfinite(perplexity):
        raise DivergedError("the perplexity is not finite")
    return {"perplexity": perplexity}
