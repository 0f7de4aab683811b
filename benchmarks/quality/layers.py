"""Which linear layers of a model a set of targets means (Table 6 of arXiv 2503.01419)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks.quality import errors

# Endings of names, for encoders (BERT, RoBERTa, DeBERTa) and for decoders (Llama and its kin).
_ROLES: Mapping[str, tuple[str, ...]] = {
    "Q": ("query", "query_proj", "q_proj", "q_lin"),
    "K": ("key", "key_proj", "k_proj", "k_lin"),
    "V": ("value", "value_proj", "v_proj", "v_lin"),
    # Table 6's O is the attention's output and the feed-forward's: only so do its counts come out.
    "O": ("output.dense", "o_proj", "out_lin", "down_proj", "ffn.lin2"),
    "F": ("intermediate.dense", "gate_proj", "up_proj", "ffn.lin1"),
}

TARGETS: Mapping[str, str] = {
    "QK": "QK",
    "QV": "QV",
    "QKV": "QKV",
    "QKVO": "QKVO",
    "ALL": "QKVOF",
}
"""Sets of targets by name: the roles that they hold."""


def find_layers(model: Any, targets: str) -> list[str]:
    """The full names of the layers, in the model's order.

    Raises:
        QualityError: an unknown set, or a model in which it means nothing.
    """
    if targets not in TARGETS:
        raise errors.unknown("--targets", targets, TARGETS)
    endings = [ending for role in TARGETS[targets] for ending in _ROLES[role]]
    prefix = f"{model.base_model_prefix}."
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]
    found = [name for name in linear if any(name.endswith(f".{ending}") for ending in endings)]
    if not found:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise errors.QualityError(
            f"--targets: {targets} matches no layer of {type(model).__name__}; its linear layers "
            f"are named {', '.join(kinds) or 'nothing'}; expected names ending in "
            f"{', '.join(endings)}"
        )
    return found
