"""Adapters wider than one launch holds, computed a slice of their ranks at a time.

Everything about an adapter is a sum over its ranks, or its slices side by side: `y`, `gx` and `gC`
are sums, `U`, `gA` and `gB` lie side by side. A launch holds the columns that its registers do
(`cost_model.ranks_of_a_launch`); every further slice is one more pass over the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dcft_kernels.adapter import Adapter
from dcft_kernels.cost_model import ranks_of_a_launch


class Slice(NamedTuple):
    """Some of an adapter's ranks, as an adapter of its own."""

    adapter: Adapter
    columns: slice  # of `U [T, k*d_in]` and `Ub`


def slices(adapter: Adapter, dtype: torch.dtype) -> Iterator[Slice]:
    """The adapter in as few slices as it takes for each to fit, of about equal rank."""
    geometry = adapter.geometry
    size = ranks_of_a_launch(geometry, dtype.itemsize)
    if size == geometry.rank:
        yield Slice(adapter, slice(None))
        return
    for start in range(0, geometry.rank, size):
        ranks = slice(start, min(start + size, geometry.rank))
        yield Slice(
            adapter._replace(
                A=adapter.A[ranks],
                B=adapter.B[:, ranks],
                geometry=geometry._replace(rank=ranks.stop - start),
            ),
            slice(start * geometry.inputs.width, ranks.stop * geometry.inputs.width),
        )
