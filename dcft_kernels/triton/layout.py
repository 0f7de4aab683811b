"""How ranks and windows are padded to what a matrix unit takes: the numbers kernels compile for."""

from __future__ import annotations

import functools
from typing import NamedTuple

from dcft_kernels.geometry import Geometry

# Fewest columns that the matrix units take along each dimension of a product.
_FEWEST_COLUMNS = 16


class Layout(NamedTuple):
    """Padded sizes of an adapter, all powers of two; see `dcft_kernels.triton.windows`."""

    KP: int  # ranks
    WP_IN: int  # features of an input window
    WP_OUT: int  # features of an output window
    GROUP: int  # ranks that are mixed by C in one product

    @property
    def columns(self) -> int:
        """What a token is shrunk to, on the wider side."""
        return self.KP * max(self.WP_IN, self.WP_OUT)

    def reversed(self) -> Layout:
        """The layout with the sides exchanged, for the way back."""
        return Layout(self.KP, self.WP_OUT, self.WP_IN, self.GROUP)


@functools.cache
def layout_of(geometry: Geometry) -> Layout:
    """Pad so that both sides have 16 columns or more: ranks first, then the narrower window."""
    rank = _power_of_two(geometry.rank)
    width_in = _power_of_two(geometry.inputs.width)
    width_out = _power_of_two(geometry.outputs.width)
    rank = max(rank, _FEWEST_COLUMNS // max(width_in, width_out))
    width_in = max(width_in, _FEWEST_COLUMNS // rank)
    width_out = max(width_out, _FEWEST_COLUMNS // rank)
    return Layout(rank, width_in, width_out, max(1, _FEWEST_COLUMNS // min(width_in, width_out)))


def windows_per_tile(features: int, padded_width: int) -> int:
    """Windows in a tile of about `features` columns: at least one, and 16 columns or more."""
    return max(1, max(features, _FEWEST_COLUMNS) // padded_width)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
