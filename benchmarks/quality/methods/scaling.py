"""Methods that rescale the subspaces of a frozen weight: SSL, SSB, SAM-PARSER.

arXiv 2407.05417 writes `x W` with `W` `[n, m]`, so that `D1 W D2` (equation 7) scales the input's
side with `D1` and the output's side with `D2`. In `nn.Linear`'s layout, `[m, n]`, that is
`W -> diag(d2) W diag(d1)`; a scaled weight is never formed: `((x * d1) W^T) * d2`. The bias is no
part of `W` and stays as it is. (IA)3 scales the right, the output's side, see `peft_methods`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.methods.adapted import Adapted
from benchmarks.quality.methods.linear_layers import AdaptedLinear, replace_each


class SSLLinear(AdaptedLinear):
    """SSL: `y = (x * d1) W^T + b`, the left singular vectors' side (equation 7 with `D2 = I`)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.d1 = self.zeros(base.in_features)
        nn.init.ones_(self.d1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_output((x * self.d1).to(x.dtype))


class SSBLinear(AdaptedLinear):
    """SSB: `y = ((x * d1) W^T) * d2 + b`, both sides (equation 7)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.d1 = self.zeros(base.in_features)
        self.d2 = self.zeros(base.out_features)
        for scale in (self.d1, self.d2):
            nn.init.ones_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_both_sides(self.base.weight, self.base.bias, x, self.d1, self.d2)


class SAMPARSERLinear(AdaptedLinear):
    """SAM-PARSER: `W = U diag(sigma) V` with `sigma` trained (equation 4).

    The layer computes the base's output plus `x (U diag(sigma - sigma0) V)^T`: an SVD gives `W`
    back only to rounding, and like this the start is the base model exactly. It costs two products
    of the base's size, since its increment has full rank.
    """

    U: Tensor
    V: Tensor
    sigma0: Tensor

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        weight = base.weight.detach()
        # In float64: the factors' errors then are those of rounding them, and 16 bits work too.
        factors = torch.linalg.svd(weight.double(), full_matrices=False)
        U, sigma0, V = (factor.to(weight.dtype).contiguous() for factor in factors)
        self.register_buffer("U", U)  # [m, k], k = min(m, n)
        self.register_buffer("V", V)  # [k, n]
        self.register_buffer("sigma0", sigma0)
        self.sigma = nn.Parameter(sigma0.clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_output(x)
        shifted = F.linear(x, self.V) * (self.sigma - self.sigma0)
        return y + F.linear(shifted.to(x.dtype), self.U).to(y.dtype)


def scaled_both_sides(W: Tensor, b: Tensor | None, x: Tensor, d1: Tensor, d2: Tensor) -> Tensor:
    """`((x * d1) W^T) * d2 + b`."""
    y = F.linear((x * d1).to(x.dtype), W, b)
    scaled = y * d2
    if b is not None:
        # Not a product without the bias and then the bias: it would be rounded in another order
        # than the base's, and scales of one would not give the base's output exactly.
        scaled = scaled + b * (1.0 - d2)
    return scaled.to(y.dtype)


def ssl(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """SSL, section 3.2 and equation 7 of arXiv 2407.05417, on every layer of `layers`."""
    replace_each(model, layers, SSLLinear)
    return Adapted(model)


def ssb(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """SSB, section 3.2 and equation 7 of arXiv 2407.05417, on every layer of `layers`."""
    replace_each(model, layers, SSBLinear)
    return Adapted(model)


def sam_parser(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """SAM-PARSER (Peng et al. 2024), section 3.1 and equation 4 of arXiv 2407.05417.

    The paper's method is for the two square layers of SAM's neck; here it is on all of `layers`.
    """
    replace_each(model, layers, SAMPARSERLinear)
    return Adapted(model)
