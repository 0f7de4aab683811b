"""Which linear layers a set of targets names (Table 6 of arXiv 2503.01419), by their role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from benchmarks.quality.errors import QualityError, unknown

QUERY, KEY, VALUE = "query", "key", "value"
ATTENTION_OUTPUT = "attention output"
FEED_FORWARD_INPUT, FEED_FORWARD_OUTPUT = "feed-forward input", "feed-forward output"

# BERT, RoBERTa, MiniLM; DeBERTa; DistilBERT; MPNet; ALBERT; Llama and relatives; OPT; BART; Phi.
_ENDINGS: Mapping[str, tuple[str, ...]] = {
    QUERY: ("query", "query_proj", "q_lin", "attn.q", "q_proj"),
    KEY: ("key", "key_proj", "k_lin", "attn.k", "k_proj"),
    VALUE: ("value", "value_proj", "v_lin", "attn.v", "v_proj"),
    ATTENTION_OUTPUT: (
        "attention.output.dense",
        "out_lin",
        "attn.o",
        "attention.dense",
        "o_proj",
        "self_attn.out_proj",
        "encoder_attn.out_proj",
        "self_attn.dense",
    ),
    FEED_FORWARD_INPUT: ("intermediate.dense", "ffn.lin1", "ffn", "gate_proj", "up_proj", "fc1"),
    FEED_FORWARD_OUTPUT: ("output.dense", "ffn.lin2", "ffn_output", "down_proj", "fc2"),
}
_ROLES = {ending: role for role, endings in _ENDINGS.items() for ending in endings}

# Table 6's O is both outputs, the attention's and the feed-forward's: its counts say so.
_QKVO = (QUERY, KEY, VALUE, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT)
TARGETS: Mapping[str, tuple[str, ...]] = {
    "QK": (QUERY, KEY),
    "QV": (QUERY, VALUE),
    "QKV": (QUERY, KEY, VALUE),
    "QKVO": _QKVO,
    "ALL": (*_QKVO, FEED_FORWARD_INPUT),
}
"""Sets of targets by name: the roles in them."""


def with_role(names: Sequence[str], *roles: str) -> list[str]:
    """The names of layers that have one of the roles; every role has to occur.

    Raises:
        ValueError: a role that no name has.
    """
    for role in roles:
        if not any(role_of(name) == role for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"expected layers for {role}, with names ending in {', '.join(_ENDINGS[role])}, "
                f"got names ending in {', '.join(known) or 'nothing'}"
            )
    return [name for name in names if role_of(name) in roles]


def role_of(name: str) -> str | None:
    """The role of the layer of this name, if its ending is known."""
    # The longest ending counts: attention.output.dense is not a feed-forward output.
    endings = [ending for ending in _ROLES if f".{name}".endswith(f".{ending}")]
    return _ROLES[max(endings, key=len)] if endings else None


def find_layers(model: Any, targets: str) -> list[str]:
    """The full names of the layers, in the model's order.

    Raises:
        QualityError: an unknown set, or a model in which a role of the set is not found.
    """
    if targets not in TARGETS:
        raise unknown("--targets", targets, TARGETS)
    prefix = f"{model.base_model_prefix}."
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]
    try:
        return with_role(linear, *TARGETS[targets])
    except ValueError as error:
        raise QualityError(f"--targets: {targets} of {type(model).__name__}: {error}") from None
