"""Checkpoints, a tokenizer and tasks small enough to fine-tune in a test, without a network."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

FILLERS = ("the", "film", "was", "and", "a", "very", "long", "one", "we", "saw", "it", "twice")
GOOD, BAD = "fine", "poor"
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
# With the usual 0.02, layers this narrow would hardly affect the output.
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES |= {"intermediate_size": 64, "max_position_embeddings": 64}
_STD = 0.2


def tokenizer() -> Any:
    """A WordPiece tokenizer like BERT's that knows the words above and lower-case letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = (*_SPECIAL.values(), *FILLERS, GOOD, BAD, *letters, *(f"##{c}" for c in letters), ".")
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    words = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **_SPECIAL,
    )


def bert_config(**changes: Any) -> Any:
    """Two layers, and no dropout."""
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings |= {"vocab_size": len(tokenizer()), "initializer_range": _STD, "pad_token_id": 0}
    return transformers.BertConfig(**{**_SIZES, **settings, **changes})


def llama_config(**changes: Any) -> Any:
    """Two layers."""
    settings = {"vocab_size": len(tokenizer()), "initializer_range": _STD, "pad_token_id": 0}
    settings |= {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
    return transformers.LlamaConfig(**{**_SIZES, **settings, **changes})


def write_model(folder: Path, kind: Any, config: Any) -> Path:
    """A folder for `--model`: a model with fixed random weights, and the tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(30)
        kind(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences of 3 to 9 words, one of which determines the label."""
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    found = []
    for _ in range(count):
        words = [FILLERS[draw(len(FILLERS))] for _ in range(2 + draw(7))]
        label = draw(2)
        words.insert(draw(len(words) + 1), GOOD if label else BAD)
        found.append((" ".join(words), label))
    return found


def write_tsv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """A tab-separated file, gzipped if its name ends in .gz; the first row names the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join("\t".join(map(str, row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_task(folder: Path, train: int = 96, dev: int = 24) -> Path:
    """A task that can be learned."""
    header = ("sentence1", "label")
    for split, count, seed in (("train", train, 31), ("dev", dev, 32)):
        write_tsv(folder / f"{split}.tsv", [header, *sentences(count, seed)])
    return folder
