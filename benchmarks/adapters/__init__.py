"""The ways to adapt a linear layer that are compared; `table` lists them all."""

from benchmarks.adapters.candidate import Candidate
from benchmarks.adapters.table import ADAPTERS, AdapterKind, by_name, variants

__all__ = ["ADAPTERS", "AdapterKind", "Candidate", "by_name", "variants"]
