"""Fine-tuning methods: DCFT, and those that it is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from benchmarks.quality.errors import unknown


@dataclass
class Adapted:
    """An adapted model, and what training has to do for it."""

    model: nn.Module
    penalty: Callable[[], Tensor] | None = None  # added to the loss of every step
    after_step: Callable[[int], None] | None = None  # called with the number of steps done


@dataclass(frozen=True)
class Method:
    """A way to fine-tune a model.

    `adapt(model, layers, steps, **options)` puts the method into a frozen model, on the linear
    layers with these names, for a training of so many steps. What it trains requires a gradient
    afterwards; the task's head is not its concern.
    """

    adapt: Callable[..., Adapted]
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 3e-3, 1e-2)  # candidates, ascending
    uses_layers: bool = True
    options_of: tuple[Callable[..., Any], ...] = ()  # whose keywords are the options; or `adapt`'s

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
