"""The checked description of one adapter, as it travels from the public functions to a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
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

    def widened(self, dtype: torch.dtype) -> Adapter:
        """The same adapter with factors in `dtype`, or in float32 where that is wider."""
        wide = torch.promote_types(dtype, torch.float32)
        return self._replace(A=self.A.to(wide), B=self.B.to(wide), C=self.C.to(wide))
