"""What a fine-tuning method makes of a model, and how a method is described."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

LOW_RANK_RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)


@dataclass
class Adapted:
    """A model that trains what its method trains, and what training needs beside the task's loss.

    Attributes:
        model: the model to call; it may wrap the one that was given.
        penalty: a scalar to add to the loss of every step, differentiable.
        after_step: called after every step of the optimizer with the number of steps done.
    """

    model: nn.Module
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] | None = None


class Adapt(Protocol):
    """Put a method into a model whose parameters are all frozen.

    `layers` names the linear layers to adapt, `steps` is how many steps training will take. What
    the method trains must require a gradient when this returns; the head is not its business.
    """

    def __call__(
        self, model: nn.Module, layers: Sequence[str], steps: int, **options: Any
    ) -> Adapted: ...


@dataclass(frozen=True)
class Method:
    """A way to fine-tune a model.

    Attributes:
        name: what `--method` takes.
        description: one line, with the equation's source.
        adapt: puts it into a model.
        options: every option that `adapt` takes, with its default.
        learning_rates: what a search over learning rates tries, ascending.
        uses_layers: whether it adapts the linear layers that it is given.
    """

    name: str
    description: str
    adapt: Adapt
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = LOW_RANK_RATES
    uses_layers: bool = True

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError for an option that `adapt` does not take."""
        check_options(self.name, options, self.options)


def check_options(method: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise TypeError for an option of `given` that is not one of `known`, the method's."""
    for option in given:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(
                f"{option}: no option of {method}; expected one of "
                f"{', '.join(known) or 'none'}{hint}"
            )
