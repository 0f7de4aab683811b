"""Methods that replace single linear layers, each as a function of the layer.

In `nn.Linear`'s layout `W` is `[m, n]` and the layer computes `x W^T + b`. Papers that write `x W`
have it as `[n, m]`: their left side of `W` is the input, and their factors `A` and `B` in `x A B`
are the transposes of `A` `[r, n]` and `B` `[m, r]` here. Equations are those of arXiv 2407.05417.
All methods start at the base model, and initialize as their published code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.methods import Adapted
from benchmarks.quality.models import with_role
from dcft_kernels import validation
from dcft_kernels.nonlinearity import function_of

Compute = Callable[[Tensor], Tensor]


class AdaptedLinear(nn.Module):
    """Computes `compute(x)` in the place of the frozen layer `base`, with these parameters."""

    def __init__(self, base: nn.Linear, compute: Compute, **parameters: nn.Parameter) -> None:
        super().__init__()
        self.base = base
        self.compute = compute
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


def each(build: Callable[..., AdaptedLinear], *roles: str) -> Callable[..., Adapted]:
    """The method that replaces every layer, or those with these roles, by `build(layer)`."""

    def adapt(model: nn.Module, layers: Sequence[str], steps: int, **options: object) -> Adapted:
        names = with_role(layers, *roles) if roles else layers
        built = {name: build(model.get_submodule(name), **options) for name in names}
        for name, module in built.items():
            model.set_submodule(name, module.train(model.get_submodule(name).training))
        return Adapted(model)

    return adapt


def _full(base: nn.Linear, value: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(base.weight.detach().new_full(shape, value))


def _uniform(base: nn.Linear, *shape: int) -> nn.Parameter:
    """As LoRA draws `A`."""
    parameter = _full(base, 0.0, *shape)
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    return parameter


# Scales


def ssl(base: nn.Linear) -> AdaptedLinear:
    """SSL: `y = (x * d1) W^T + b` (equation 7 with `D2 = I`)."""
    d1 = _full(base, 1.0, base.in_features)
    return AdaptedLinear(base, lambda x: base((x * d1).to(x.dtype)), d1=d1)


def ssb(base: nn.Linear) -> AdaptedLinear:
    """SSB: `y = ((x * d1) W^T) * d2 + b` (equation 7)."""
    d1, d2 = _full(base, 1.0, base.in_features), _full(base, 1.0, base.out_features)

    def compute(x: Tensor) -> Tensor:
        return scaled_both_sides(base.weight, base.bias, x, d1, d2)

    return AdaptedLinear(base, compute, d1=d1, d2=d2)


def scaled_both_sides(W: Tensor, b: Tensor | None, x: Tensor, d1: Tensor, d2: Tensor) -> Tensor:
    """`((x * d1) W^T) * d2 + b`, without forming a scaled weight."""
    y = F.linear((x * d1).to(x.dtype), W, b)
    scaled = y * d2
    if b is not None:
        # Rounded in the base's order, so that scales of one give exactly the base's output.
        scaled = scaled + b * (1.0 - d2)
    return scaled.to(y.dtype)


def sam_parser(base: nn.Linear) -> AdaptedLinear:
    """SAM-PARSER (Peng et al. 2024): `W = U diag(sigma) V` with `sigma` trained (equation 4).

    Computed as the base's output plus `x (U diag(sigma - sigma0) V)^T`: an SVD reproduces `W` only
    up to rounding, and this starts exactly at the base model.
    """
    weight = base.weight.detach()
    factors = torch.linalg.svd(weight.double(), full_matrices=False)
    rounded = (factor.to(weight.dtype).contiguous() for factor in factors)
    U, sigma0, V = (nn.Parameter(factor, requires_grad=False) for factor in rounded)
    sigma = nn.Parameter(sigma0.detach().clone())

    def compute(x: Tensor) -> Tensor:
        y: Tensor = base(x)
        shifted = F.linear(x, V) * (sigma - sigma0)
        return y + F.linear(shifted.to(x.dtype), U).to(y.dtype)

    return AdaptedLinear(base, compute, U=U, sigma0=sigma0, V=V, sigma=sigma)


# LoRA's relatives: `y = x W^T + b + s core(x A^T) B^T` with `s = alpha / r`; None is `alpha = r`


def _low_rank(
    base: nn.Linear,
    alpha: float | None,
    A: nn.Parameter,
    B: nn.Parameter,
    core: Compute = lambda h: h,
    **others: nn.Parameter,
) -> AdaptedLinear:
    scaling = 1.0 if alpha is None else validation.finite_number("alpha", alpha) / len(A)

    def compute(x: Tensor) -> Tensor:
        y: Tensor = base(x)
        increment = F.linear(core(F.linear(x, A)), B)
        return y + (scaling * increment).to(y.dtype)

    return AdaptedLinear(base, compute, A=A, B=B, **others)


def lora_fa(base: nn.Linear, *, r: int = 1, alpha: float | None = None) -> AdaptedLinear:
    """LoRA-FA (arXiv 2308.03303): LoRA with `A` frozen as it was drawn.

    `peft.optimizers.create_lorafa_optimizer` also preconditions the gradient of `B`; the stored
    runs trained it with AdamW, like the factors of all other methods.
    """
    A, B = _factors(base, r)
    A.requires_grad_(False)
    return _low_rank(base, alpha, A, B)


def sora(base: nn.Linear, *, r: int = 8, alpha: float | None = None) -> AdaptedLinear:
    """SoRA (Ding et al. 2023): `DW = B diag(g) A` with the gate `g` drawn from N(0, 1)."""
    A, B = _factors(base, r)
    g = _full(base, 0.0, r)
    nn.init.normal_(g)
    return _low_rank(base, alpha, A, B, lambda h: h * g, g=g)


def trilora(base: nn.Linear, *, r: int = 2, alpha: float | None = None) -> AdaptedLinear:
    """TriLoRA (Feng et al. 2024): `A D B` with a diagonal `D` (equation 12), zero at the start."""
    A, _ = _factors(base, r)
    B, D = _uniform(base, base.out_features, r), _full(base, 0.0, r)
    return _low_rank(base, alpha, A, B, lambda h: h * D, D=D)


def flora(base: nn.Linear, *, r: int = 2, alpha: float | None = None) -> AdaptedLinear:
    """FLoRA (Si et al. 2024): `A G B` with any `G` `[r, r]` (equation 12), zero at the start."""
    A, B = _factors(base, r)
    G = _full(base, 0.0, r, r)
    for factor in (A, B):
        nn.init.normal_(factor, std=0.02)
    return _low_rank(base, alpha, A, B, lambda h: h @ G, G=G)


def _factors(base: nn.Linear, r: int, features: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    """`A` drawn like LoRA's, and `B` zero."""
    r = validation.positive_int("r", r)
    return _uniform(base, r, features or base.in_features), _full(base, 0.0, base.out_features, r)


def thresholded_sora(
    model: nn.Module, layers: Sequence[str], steps: int, *, threshold: float = 3e-4, **options: Any
) -> Adapted:
    """SoRA on every layer, with gates that are soft-thresholded by `threshold` after every step."""
    adapted = each(sora)(model, layers, steps, **options)
    gates = [model.get_parameter(f"{name}.g") for name in layers]

    def shrink_gates(step: int) -> None:
        for gate in gates:
            gate.data.copy_(F.softshrink(gate.data, threshold))

    adapted.after_step = shrink_gates
    return adapted


# Bottleneck adapters without biases, as in section 4.3: serial ones come before dropout and the
# residual sum, and layer norms stay frozen


def _bottleneck(base: nn.Linear, r: int, activation: str, parallel: bool) -> AdaptedLinear:
    """`z + h(z A^T) B^T` of the output `z = x W^T + b`; parallel, `x W^T + b + h(x A^T) B^T`."""
    A, B = _factors(base, r, base.in_features if parallel else base.out_features)
    h = function_of(activation)

    def compute(x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y + F.linear(h(F.linear(x if parallel else y, A)), B).to(y.dtype)

    return AdaptedLinear(base, compute, A=A, B=B)


def houlsby(base: nn.Linear, *, r: int = 8, activation: str = "gelu") -> AdaptedLinear:
    """Houlsby et al. 2019, equation 22: after the attention's and the feed-forward's output."""
    return _bottleneck(base, r, activation, parallel=False)


def pfeiffer(base: nn.Linear, *, r: int = 16, activation: str = "relu") -> AdaptedLinear:
    """Pfeiffer et al. 2020, equation 22: after the feed-forward's output only."""
    return _bottleneck(base, r, activation, parallel=False)


def parallel_adapter(base: nn.Linear, *, r: int = 1, activation: str = "gelu") -> AdaptedLinear:
    """He et al. 2021, equation 25. Not their ReLU: a single unit that is off would never learn."""
    return _bottleneck(base, r, activation, parallel=True)
