"""What a fine-tuning method is, and what it makes of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from benchmarks.quality.errors import unknown

LOW_RANK_RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)


@dataclass
class Adapted:
    """An adapted model, and what training has to do for it.

    Attributes:
        model: the model to call.
        penalty: a differentiable scalar that is added to the loss of every step.
        after_step: called after every step of the optimizer with the number of steps done.
    """

    model: nn.Module
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Method:
    """A way to fine-tune a model.

    Attributes:
        adapt: `adapt(model, layers, steps, **options)` puts the method into a frozen model, on the
            linear layers with these names, for a training of so many steps. What it trains
            requires a gradient afterwards; the task's head is not its concern.
        learning_rates: candidates for a search, in ascending order.
        uses_layers: whether it adapts the layers that it is given.
        options_of: the functions whose keyword-only arguments are its options; () for `adapt`.
    """

    adapt: Callable[..., Adapted]
    learning_rates: tuple[float, ...] = LOW_RANK_RATES
    uses_layers: bool = True
    options_of: tuple[Callable[..., Any], ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The options with their defaults."""
        signatures = map(inspect.signature, self.options_of or (self.adapt,))
        parameters = [p for signature in signatures for p in signature.parameters.values()]
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def check_options(self, name: str, given: Mapping[str, Any]) -> None:
        """Raise QualityError for an option that the method of this name does not have."""
        known = self.options
        for option in given:
            if option not in known:
                raise unknown(f"--option of {name}", option, known or ["none"])


class AdaptedLinear(nn.Module):
    """A frozen linear layer, `base`, and what is trained next to it.

    In `nn.Linear`'s layout `W` is `[m, n]` and the base computes `x W^T + b`. Papers that write
    `x W` have it as `[n, m]`: their left side of `W` is the input, their right side the output.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def zeros(self, *shape: int) -> nn.Parameter:
        """A new parameter with the base's dtype and device."""
        return nn.Parameter(self.base.weight.detach().new_zeros(shape))

    def ones(self, size: int) -> nn.Parameter:
        """A new vector of scales with the base's dtype and device."""
        return nn.Parameter(self.base.weight.detach().new_ones(size))


def replace_each(
    model: nn.Module, names: Sequence[str], build: Callable[[nn.Linear], nn.Module]
) -> Adapted:
    """Replace every named layer by `build(layer)`."""
    built = {name: build(model.get_submodule(name)) for name in names}  # type: ignore[arg-type]
    for name, module in built.items():
        model.set_submodule(name, module.train(model.get_submodule(name).training))
    return Adapted(model)
