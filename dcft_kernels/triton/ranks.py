"""Adapters wider than one launch holds, computed a slice of their ranks at a time.

Everything about an adapter is a sum over its ranks, or its slices side by side: `y`, `gx` and `gC`
are sums, `U`, `gA` and `gB` lie side by side. A launch holds the columns that its registers do
(`cost_model.ranks_of_a_launch`); every further slice is one more pass over the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dcft_kernels.adapter import Adapter
from dcft_kernels.cost_model import ranks_of_a_launch
from dcft_kernels.geometry import Geometry


class Slice(NamedTuple):
    """Some of an adapter's ranks, as an adapter of its own."""

    adapter: Adapter
    columns: slice  # of `U [T, k*d_in]` and `Ub`


def fit_one_launch(geometry: Geometry, itemsize: int) -> bool:
    """Whether one launch takes all ranks of an adapter."""
    return ranks_of_a_launch(geometry, itemsize) == geometry.rank


def slices(adapter: Adapter, dtype: torch.dtype) -> list[Slice]:
    """The adapter in as few slices as it takes for each to fit, of about equal rank."""
    rank = adapter.geometry.rank
    size = ranks_of_a_launch(adapter.geometry, dtype.itemsize)
    return [_slice(adapter, start, min(start + size, rank)) for start in range(0, rank, size)]


def _slice(adapter: Adapter, start: int, stop: int) -> Slice:
    """The ranks `start .. stop - 1`."""
    width = adapter.geometry.inputs.width
    return Slice(
        adapter._replace(
            A=adapter.A[start:stop],
            B=adapter.B[:, start:stop],
            geometry=adapter.geometry._replace(rank=stop - start),
        ),
        slice(start * width, stop * width),
    )
