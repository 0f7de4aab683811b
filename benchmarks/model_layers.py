"""The linear layers of a whole model, without its weights."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.adapters.packages import required
from benchmarks.models import MODELS


def skeleton(name: str) -> nn.Module:
    """A model of all its layers on the meta device.

    Raises:
        ValueError: an unknown model.
        UnavailableError: transformers is missing.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    required("transformers")
    spec = MODELS[name]
    return spec.build(spec.layers, torch.float32, torch.device("meta"))


def linear_shapes(name: str) -> list[tuple[int, int]]:
    """`(in, out)` of every layer that an adapter would be put beside."""
    return [
        (module.in_features, module.out_features)
        for module_name, module in skeleton(name).named_modules()
        if type(module) is nn.Linear and "pooler" not in module_name
    ]
