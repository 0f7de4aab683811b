"""The linear layers that a method adapts: found by name, replaced in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class AdaptedLinear(nn.Module):
    """A frozen linear layer, `base`, and what is trained beside it.

    In `nn.Linear`'s layout `W` is `[m, n]` and the base computes `x W^T + b`. Papers that write
    `x W` lay it out `[n, m]`: their left side of `W` is the input, their right side the output.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def zeros(self, *shape: int) -> nn.Parameter:
        """A new parameter with the base's dtype and device."""
        return nn.Parameter(self.base.weight.detach().new_zeros(shape))

    def base_output(self, x: Tensor) -> Tensor:
        """`x W^T + b`."""
        y: Tensor = self.base(x)
        return y


def linear_layers(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers of these full names.

    Raises:
        TypeError: names that are no sequence of strings, or a layer that is no plain `nn.Linear`.
        ValueError: no names, a name twice, or one that the model does not have.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"layers: expected a sequence of names, got {names!r}")
    if not names:
        raise ValueError("layers: expected the name of at least one linear layer, got none")
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Linear] = {}
    for name in names:
        if name not in modules:
            raise ValueError(
                f"layers: expected full names of layers of {type(model).__name__}, got {name!r}"
            )
        if name in found:
            raise ValueError(f"layers: expected every name once, got {name!r} twice")
        layer = modules[name]
        # Subclasses may compute something else than `x W^T + b`.
        if type(layer) is not nn.Linear:
            raise TypeError(
                f"layers: expected nn.Linear, got {type(layer).__qualname__} for {name!r}"
            )
        found[name] = layer
    return found


def replace_each(
    model: nn.Module, names: Sequence[str], build: Callable[[nn.Linear], nn.Module]
) -> None:
    """Put `build(layer)` in the place of every layer named; all are built before any is replaced.

    Raises:
        TypeError, ValueError: as `linear_layers`, or from `build`; the model is as it was then.
    """
    built = {name: build(layer) for name, layer in linear_layers(model, names).items()}
    for name, module in built.items():
        module.train(model.get_submodule(name).training)
        model.set_submodule(name, module)
