"""Checks that a saved adapter belongs to a model, which PEFT leaves out.

The shapes of the factors do not show the features of a layer whose last window is cropped. PEFT
ignores saved layers that a model lacks, and only warns of missing weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dcft_kernels.linear import is_conv1d
from dcft_kernels.peft.layer import FACTORS, layers_with

PREFIX = "base_model.model."  # of the base model's names in a `PeftModel` and in PEFT's files


def without_compiler(name: str) -> str:
    """A name of a module or parameter as it is where no module inside is compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def base_name(name: str) -> str:
    """The base model's name of a module or parameter, also in a `PeftModel`."""
    return without_compiler(name).removeprefix(PREFIX)


def sizes(model: nn.Module, adapter_name: str) -> dict[str, list[int]]:
    """`[out, in]` features of the layers with this adapter, by the base model's names."""
    return {
        base_name(name): [layer.out_features, layer.in_features]
        for name, layer in layers_with(model, adapter_name).items()
    }


def check_sizes(model: nn.Module, expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if the model has layers of these names in other sizes."""
    differences = []
    for name, module in model.named_modules():
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        found = [getattr(base, "out_features", None), getattr(base, "in_features", None)]
        if is_conv1d(base):
            found = [*base.weight.shape[::-1]]
        wanted = list(expected.get(base_name(name), found))
        if None not in found and found != wanted:
            differences.append(f"{name} is {found} in the model, {wanted} in the adapter")
    if differences:
        raise ValueError(
            "model: is not the base model that the adapter was trained for; [out, in] features of "
            f"{len(differences)} layers differ: {'; '.join(differences[:5])}"
        )


def check_weights(model: nn.Module, adapter_name: str, keys: Collection[str]) -> None:
    """Raise ValueError if a state dict has only some factors of a layer, or layers of no use.

    Args:
        model: with the adapter.
        adapter_name: the adapter to load.
        keys: of the state dict; the model's own for what it has.
    """
    surplus = [key for key in keys if key.rpartition(".")[2] in FACTORS]
    if surplus:
        raise ValueError(
            f"state_dict: {base_name(surplus[0])} and {len(surplus) - 1} other weights are of "
            "layers without this adapter; were they saved for another base model?"
        )
    found = {
        layer: [factor for factor in FACTORS if f"{layer}.{factor}.{adapter_name}" in keys]
        for layer in layers_with(model, adapter_name)
    }
    if found and not any(found.values()):
        raise ValueError("state_dict: has no weights of DCFT; were they saved by another method?")
    for layer, factors in found.items():
        if 0 < len(factors) < len(FACTORS):
            raise ValueError(
                f"state_dict: has only {', '.join(factors)} of {base_name(layer)}; the file is "
                "incomplete"
            )
