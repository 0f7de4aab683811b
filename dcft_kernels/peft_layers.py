"""LoRA and DCFT layers of the library PEFT, recognised by their attributes: nothing imports it.

A LoRA layer has two containers, `lora_A` and `lora_B`, with one factor for each adapter's name:
layers (LoRA) or bare parameters (AdaLoRA), `A [r, n]` on the input side and `B [m, r]` on the
output side. A layer of `dcft_kernels.peft` has `dcft_A` and `dcft_B`, bare parameters.

A nonlinearity of LoRA is a forward hook on the module that computes `A x`, so the names in the
state dict do not change. Methods that would still multiply `B` with `A`, such as merging, raise
while the hook is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dcft_kernels.nonlinearity import function_of, not_mergeable

_GUARDED = ("merge", "get_delta_weight")


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` with `lora_A` and `lora_B`, by name."""
    return _layers_with(model, "lora_A", "lora_B")


def dcft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that `dcft_kernels.peft` made, by name."""
    return _layers_with(model, "dcft_A", "dcft_B")


def _layers_with(model: nn.Module, *factors: str) -> dict[str, nn.Module]:
    containers = (nn.ModuleDict, nn.ParameterDict)
    return {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, factor, None), containers) for factor in factors)
    }


def active_adapters(layer: nn.Module) -> list[str]:
    """The names of the layer's active adapters, of those that it has factors of."""
    held = _factors(layer)
    return [name for name in _active_names(layer) if name in held]


def active_factors(layer: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """`(A [r, n], B [m, r])` of every active adapter.

    Adapters of convolutions and of bare parameters (`target_parameters`) hold no such matrices, and
    an embedding's are in other containers: these yield nothing.
    """
    if hasattr(layer, "parameter_name"):
        return
    for name in active_adapters(layer):
        factors = (_factors(layer, side)[name] for side in "AB")
        A, B = (getattr(factor, "weight", factor) for factor in factors)
        if A.dim() == B.dim() == 2:
            yield A, B


def why_no_nonlinearity(layer: nn.Module) -> str | None:
    """Why the active adapters cannot have a nonlinearity, or None if they can."""
    bypassed = f"is a {type(layer).__name__}, which multiplies its factors without calling them"
    if hasattr(layer, "parameter_name"):
        return bypassed
    if isinstance(getattr(layer, "base_layer", None), nn.MultiheadAttention):
        return bypassed
    for name in active_adapters(layer):
        if not isinstance(_factors(layer)[name], nn.Module):
            return bypassed
        variant = _setting(layer, "lora_variant", name)
        if variant is not None or _setting(layer, "use_dora", name):
            kind = "DoRA" if variant is None else type(variant).__name__
            return f"has the adapter {name!r} of the kind {kind}, not plain LoRA"
    return None


def nonlinearity_of(layer: nn.Module) -> str | None:
    """The nonlinearity that `put_nonlinearity` put, or None."""
    guard = _guard(layer, "merge")
    return None if guard is None else guard.nonlinearity


def put_nonlinearity(layer: nn.Module, nonlinearity: str, adapters: frozenset[str]) -> None:
    """Put it between the factors of the layer's active adapters, and refuse to merge `adapters`.

    Args:
        layer: one of `lora_layers`, for which `why_no_nonlinearity` is None.
        nonlinearity: the name of the function.
        adapters: all that get it anywhere in the model. A model is merged layer by layer: if only
            those with a hook refused, it could be left half merged.
    """
    for name in active_adapters(layer):
        _factors(layer)[name].register_forward_hook(_NonlinearityHook(nonlinearity))
    guard = _MergeGuard(layer, nonlinearity, adapters)
    for method in _GUARDED:
        setattr(layer, method, getattr(guard, method))


def take_nonlinearity(layer: nn.Module) -> None:
    """Undo `put_nonlinearity`, if it was called."""
    for factor in _factors(layer).values():
        hooks = factor._forward_hooks if isinstance(factor, nn.Module) else {}
        for key, hook in list(hooks.items()):
            if isinstance(hook, _NonlinearityHook):
                del hooks[key]
    for method in _GUARDED:
        if _guard(layer, method) is not None:
            delattr(layer, method)


# Classes, not closures, so that models can be copied and pickled.
class _NonlinearityHook:
    def __init__(self, nonlinearity: str) -> None:
        self.nonlinearity = nonlinearity

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return function_of(self.nonlinearity)(output)


class _MergeGuard:
    """Replaces the methods of a layer that multiply the factors of an adapter."""

    def __init__(self, layer: nn.Module, nonlinearity: str, adapters: frozenset[str]) -> None:
        self.layer, self.nonlinearity, self.adapters = layer, nonlinearity, adapters

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = _active_names(self.layer) if adapter_names is None else adapter_names
        self._refuse("merge", names)
        self._original("merge")(self.layer, safe_merge=safe_merge, adapter_names=adapter_names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        self._refuse("get_delta_weight", [adapter])
        return self._original("get_delta_weight")(self.layer, adapter)

    def _original(self, method: str) -> Any:
        return getattr(type(self.layer), method)

    def _refuse(self, method: str, names: list[str]) -> None:
        for name in names:
            if name in self.adapters:
                raise not_mergeable(f"{method}: the adapter {name!r}", self.nonlinearity)


def _guard(layer: nn.Module, method: str) -> _MergeGuard | None:
    """The guard that replaces the layer's method, or None."""
    guard = getattr(layer.__dict__.get(method), "__self__", None)
    return guard if isinstance(guard, _MergeGuard) else None


def _active_names(layer: nn.Module) -> list[str]:
    active: Any = getattr(layer, "active_adapters", None)
    if active is None:
        return list(_factors(layer))
    return [active] if isinstance(active, str) else list(active)


def _factors(layer: nn.Module, side: str = "A") -> Any:
    """The container of one side's factors, by adapter."""
    return getattr(layer, f"lora_{side}" if hasattr(layer, "lora_A") else f"dcft_{side}")


def _setting(layer: nn.Module, name: str, adapter: str) -> Any:
    """A layer's setting of an adapter; None if the layer has no such table."""
    table: Any = getattr(layer, name, None)
    return table.get(adapter) if isinstance(table, dict) else None
