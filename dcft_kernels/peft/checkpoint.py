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


def base_name(name: str) -> str:
    """The base model's name of a module or parameter, also of compiled blocks in a `PeftModel`."""
    return name.replace("_orig_mod.", "").removeprefix(PREFIX)


def sizes(model: nn.Module, adapter_name: str) -> dict[str, list[int]]:
    """`[out, in]` features of the layers with this adapter, by the base model's names."""
    return {
        base_name(name): [layer.out_features, layer.in_features]
        for name, layer in layers_with(model, adapter_name).items()
    }


def check_sizes(model: nn.Module, expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if the model has these layers in other sizes, or only some of them.

    If it has none, names may have changed since; PEFT can map them.
    """
    found: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_conv1d(base):
            found[base_name(name)] = [*base.weight.shape[::-1]]
        else:
            found[base_name(name)] = [
                getattr(base, "out_features", 0),
                getattr(base, "in_features", 0),
            ]
    known = expected.keys() & found.keys()
    differences = [
        f"{name} is {found[name]} in the model, {list(expected[name])} in the adapter"
        for name in sorted(known)
        if all(found[name]) and found[name] != list(expected[name])
    ]
    if known:
        differences += [f"{name} is not in the model" for name in sorted(expected.keys() - known)]
    if differences:
        raise ValueError(
            "model: is not the base model that the adapter was trained for; [out, in] features of "
            f"{len(differences)} layers differ: {'; '.join(differences[:5])}"
        )


def check_weights(model: nn.Module, adapter_name: str, keys: Collection[str]) -> None:
    """Raise ValueError if a state dict with these keys lacks the adapter, or parts of a layer."""
    layers = layers_with(model, adapter_name)
    found = {
        layer: [factor for factor in FACTORS if f"{layer}.{factor}.{adapter_name}" in keys]
        for layer in layers
    }
    if layers and not any(found.values()):
        raise ValueError(
            "state_dict: has no weights for this adapter; were they saved by another method, or "
            "for another base model?"
        )
    for layer, factors in found.items():
        if 0 < len(factors) < len(FACTORS):
            raise ValueError(
                f"state_dict: has only {', '.join(factors)} of {base_name(layer)}; the file is "
                "incomplete"
            )
