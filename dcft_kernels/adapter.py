"""The checked description of one adapter, as it travels from the public functions to a backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dcft_kernels.geometry import Geometry


class Adapter(NamedTuple):
    """Factors and settings of one DCFT adapter; every field has been validated."""

    A: Tensor  # [k, I]
    B: Tensor  # [J, k]
    C: Tensor  # [d_out, d_in]
    scaling: float
    geometry: Geometry
    dropout_p: float = 0.0
    seed: Tensor | None = None  # int64 scalar; None: no dropout in this call
