"""Which linear layers of a model a set of targets means (Table 6 of arXiv 2503.01419)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks.quality import errors, roles

# Table 6's O is the attention's output and the feed-forward's: only so do its counts come out.
_OUTPUTS = (roles.ATTENTION_OUTPUT, roles.FEED_FORWARD_OUTPUT)

TARGETS: Mapping[str, tuple[str, ...]] = {
    "QK": (roles.QUERY, roles.KEY),
    "QV": (roles.QUERY, roles.VALUE),
    "QKV": (roles.QUERY, roles.KEY, roles.VALUE),
    "QKVO": (roles.QUERY, roles.KEY, roles.VALUE, *_OUTPUTS),
    "ALL": (roles.QUERY, roles.KEY, roles.VALUE, *_OUTPUTS, roles.FEED_FORWARD_INPUT),
}
"""Sets of targets by name: the roles that they hold."""


def find_layers(model: Any, targets: str) -> list[str]:
    """The full names of the layers, in the model's order.

    Raises:
        QualityError: an unknown set, or a model in which not all of its roles are known by name.
    """
    if targets not in TARGETS:
        raise errors.unknown("--targets", targets, TARGETS)
    prefix = f"{model.base_model_prefix}."
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]
    missing = roles.missing(linear, TARGETS[targets])
    if missing:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise errors.QualityError(
            f"--targets: {targets} has no layer of {type(model).__name__} for "
            f"{', '.join(missing)}; its linear layers are named {', '.join(kinds) or 'nothing'}; "
            f"expected names ending in {roles.known_endings(*missing)}"
        )
    return roles.with_role(linear, *TARGETS[targets])
