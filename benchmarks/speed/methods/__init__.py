"""The ways to adapt a linear layer that are compared; `table.LAYER_METHODS` lists them all."""

from benchmarks.speed.methods.adapted_layer import AdaptedLayer
from benchmarks.speed.methods.table import (
    LAYER_METHODS,
    STRATEGIES,
    LayerMethod,
    by_name,
    dcft,
    published_dcft,
)

__all__ = [
    "LAYER_METHODS",
    "STRATEGIES",
    "AdaptedLayer",
    "LayerMethod",
    "by_name",
    "dcft",
    "published_dcft",
]
