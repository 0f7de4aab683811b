"""The ways to adapt a linear layer that are compared; `table.METHODS` lists them all."""

from benchmarks.speed.methods.adapted_layer import AdaptedLayer
from benchmarks.speed.methods.table import METHODS, Method, by_name, dcft, published_dcft

__all__ = ["METHODS", "AdaptedLayer", "Method", "by_name", "dcft", "published_dcft"]
