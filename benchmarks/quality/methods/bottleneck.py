"""Adapters with a bottleneck and a nonlinearity `h`: Houlsby, Pfeiffer, parallel.

As in section 4.3 of arXiv 2407.05417, without biases and with the layer norms frozen. The
up-projection is zero at the start, so that the model is the base model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.methods import option_checks
from benchmarks.quality.methods.adapted import Adapted
from benchmarks.quality.methods.linear_layers import AdaptedLinear, linear_layers, replace_each
from benchmarks.quality.roles import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, known_endings, with_role
from dcft_kernels import validation
from dcft_kernels.nonlinearity import NONLINEARITIES, function_of


class Bottleneck(AdaptedLinear):
    """`z -> h(z A^T) B^T` beside a linear layer, `A` `[r, features of z]` and `B` `[m, r]`.

    These are the transposes of the paper's `A` and `B`.
    """

    def __init__(self, base: nn.Linear, features: int, r: int, activation: str) -> None:
        super().__init__(base)
        self.h = function_of(activation)
        self.A = self.zeros(r, features)
        self.B = self.zeros(base.out_features, r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def bottleneck(self, z: Tensor) -> Tensor:
        """`h(z A^T) B^T`."""
        return F.linear(self.h(F.linear(z, self.A)), self.B)


class SerialAdapter(Bottleneck):
    """`z + h(z A^T) B^T` of the output `z = x W^T + b` (equation 22)."""

    def __init__(self, base: nn.Linear, r: int, activation: str) -> None:
        super().__init__(base, base.out_features, r, activation)

    def forward(self, x: Tensor) -> Tensor:
        z = self.base_output(x)
        return z + self.bottleneck(z).to(z.dtype)


class ParallelAdapter(Bottleneck):
    """`x W^T + b + h(x A^T) B^T` (equation 25)."""

    def __init__(self, base: nn.Linear, r: int, activation: str) -> None:
        super().__init__(base, base.in_features, r, activation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_output(x)
        return y + self.bottleneck(x).to(y.dtype)


def houlsby(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    r: int = 8,
    activation: str = "gelu",
) -> Adapted:
    """Adapters after the attention's output and after the feed-forward's (Houlsby et al. 2019).

    Equation 22 of arXiv 2407.05417. Of `layers`, only those outputs are adapted, before their
    dropout and the residual sum.

    Raises:
        ValueError: `layers` without outputs of attentions, or without outputs of feed-forwards.
    """
    names = _outputs("houlsby", model, layers, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT)
    return _bottleneck(SerialAdapter, model, names, r, activation)


def pfeiffer(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    r: int = 16,
    activation: str = "relu",
) -> Adapted:
    """Adapters after the feed-forward's output only (Pfeiffer et al. 2020).

    Equation 22 of arXiv 2407.05417. Of `layers`, only those outputs are adapted, before their
    dropout and the residual sum.

    Raises:
        ValueError: `layers` without outputs of feed-forwards.
    """
    names = _outputs("pfeiffer", model, layers, FEED_FORWARD_OUTPUT)
    return _bottleneck(SerialAdapter, model, names, r, activation)


def parallel_adapter(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    r: int = 1,
    activation: str = "gelu",
) -> Adapted:
    """An adapter beside every layer of `layers` (He et al. 2021).

    Equation 25 of arXiv 2407.05417. LoRA with a nonlinearity, and as many parameters. Not ReLU, as
    He et al. have it: at `r=1` a layer whose only unit is off for all tokens would never learn.
    """
    return _bottleneck(ParallelAdapter, model, layers, r, activation)


def _outputs(method: str, model: nn.Module, layers: Sequence[str], *roles: str) -> list[str]:
    """Those of `layers` that have one of the roles; each role has to be there."""
    names = list(linear_layers(model, layers))
    for role in roles:
        if not with_role(names, role):
            endings = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"layers: {method} expected at least one {role}, a name ending in one of "
                f"{known_endings(role)}, got names ending in {', '.join(endings)}"
            )
    return with_role(names, *roles)


def _bottleneck(
    kind: type[SerialAdapter] | type[ParallelAdapter],
    model: nn.Module,
    names: Sequence[str],
    r: int,
    activation: str,
) -> Adapted:
    rank = validation.positive_int("r", r)
    activation = option_checks.choice("activation", activation, NONLINEARITIES)
    replace_each(model, names, lambda layer: kind(layer, rank, activation))
    return Adapted(model)
