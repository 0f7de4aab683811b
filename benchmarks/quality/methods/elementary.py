"""Methods without new matrices: parts of the model are trained, or scales of a frozen weight.

arXiv 2407.05417 writes `x W` with `W` `[n, m]`, so `D1 W D2` (equation 7) scales the input with
`D1` and the output with `D2`. Here that is `((x * d1) W^T) * d2`; the scaled weight is never
formed. The bias is not part of `W`. (IA)3, in `peft_methods`, scales the output's side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.methods.adapted import Adapted, AdaptedLinear, replace_each


def head(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """Nothing but the task's head."""
    return Adapted(model)


def full(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """Every parameter of the model."""
    return Adapted(model.requires_grad_(True))


def bitfit(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """Every bias, those of the layer norms too: BitFit (Zaken et al. 2021), equation 8."""
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] == "bias":
            parameter.requires_grad_(True)
    return Adapted(model)


class SSLLinear(AdaptedLinear):
    """SSL: `y = (x * d1) W^T + b` (equation 7 with `D2 = I`)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.d1 = self.ones(base.in_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base((x * self.d1).to(x.dtype))
        return y


class SSBLinear(AdaptedLinear):
    """SSB: `y = ((x * d1) W^T) * d2 + b` (equation 7)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.d1 = self.ones(base.in_features)
        self.d2 = self.ones(base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_both_sides(self.base.weight, self.base.bias, x, self.d1, self.d2)


class SAMPARSERLinear(AdaptedLinear):
    """SAM-PARSER (Peng et al. 2024): `W = U diag(sigma) V` with `sigma` trained (equation 4).

    Computed as the base's output plus `x (U diag(sigma - sigma0) V)^T`: an SVD reproduces `W` only
    up to rounding, and this starts exactly at the base model.
    """

    U: Tensor
    V: Tensor
    sigma0: Tensor

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        weight = base.weight.detach()
        factors = torch.linalg.svd(weight.double(), full_matrices=False)
        U, sigma0, V = (factor.to(weight.dtype).contiguous() for factor in factors)
        self.register_buffer("U", U)  # [m, k], k = min(m, n)
        self.register_buffer("V", V)  # [k, n]
        self.register_buffer("sigma0", sigma0)
        self.sigma = nn.Parameter(sigma0.clone())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        shifted = F.linear(x, self.V) * (self.sigma - self.sigma0)
        return y + F.linear(shifted.to(x.dtype), self.U).to(y.dtype)


def scaled_both_sides(W: Tensor, b: Tensor | None, x: Tensor, d1: Tensor, d2: Tensor) -> Tensor:
    """`((x * d1) W^T) * d2 + b`."""
    y = F.linear((x * d1).to(x.dtype), W, b)
    scaled = y * d2
    if b is not None:
        # Rounded in the base's order, so that scales of one give exactly the base's output.
        scaled = scaled + b * (1.0 - d2)
    return scaled.to(y.dtype)


def each(kind: type[AdaptedLinear]) -> Callable[..., Adapted]:
    """The method that replaces every layer by one of this kind."""
    return lambda model, layers, steps: replace_each(model, layers, kind)
