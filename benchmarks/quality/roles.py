"""What a linear layer does in a transformer, known by the ending of its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

QUERY, KEY, VALUE = "query", "key", "value"
ATTENTION_OUTPUT = "attention output"
FEED_FORWARD_INPUT, FEED_FORWARD_OUTPUT = "feed-forward input", "feed-forward output"

# BERT, RoBERTa and MiniLM; DeBERTa; DistilBERT; MPNet; ALBERT; Llama and its kin; OPT; BART; Phi.
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
    FEED_FORWARD_INPUT: (
        "intermediate.dense",
        "ffn.lin1",
        "ffn",
        "gate_proj",
        "up_proj",
        "fc1",
    ),
    FEED_FORWARD_OUTPUT: ("output.dense", "ffn.lin2", "ffn_output", "down_proj", "fc2"),
}
_ROLES = {ending: role for role, endings in _ENDINGS.items() for ending in endings}


def with_role(names: Sequence[str], *roles: str) -> list[str]:
    """Those names whose ending says that the layer has one of the roles."""
    return [name for name in names if _role(name) in roles]


def missing(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Those of the roles that no name has."""
    return [role for role in wanted if not with_role(names, role)]


def known_endings(*roles: str) -> str:
    """The endings that stand for these roles, for an error message."""
    return ", ".join(ending for role in roles for ending in _ENDINGS[role])


def _role(name: str) -> str | None:
    # The longest ending counts: an attention's output.dense is no feed-forward output.
    endings = [ending for ending in _ROLES if f".{name}".endswith(f".{ending}")]
    return _ROLES[max(endings, key=len)] if endings else None
