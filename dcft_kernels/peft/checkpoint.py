"""What tells a saved adapter's base model from others, and its weights from incomplete ones.

PEFT would load both: the factors do not show where the last window is cropped, and of missing
tensors it only warns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dcft_kernels.linear import is_conv1d
from dcft_kernels.peft.layer import FACTORS, layers_with

PREFIX = "base_model.model."  # of the base model's names in a `PeftModel` and in PEFT's files


def sizes(model: nn.Module, adapter_name: str) -> dict[str, list[int]]:
    """`[out, in]` features of the layers with this adapter, by the base model's names."""
    return {
        name.removeprefix("_orig_mod.").removeprefix(PREFIX): [
            layer.out_features,
            layer.in_features,
        ]
        for name, layer in layers_with(model, adapter_name).items()
    }


def check_sizes(model: nn.Module, expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if layers of these names have other sizes."""
    differences = []
    for name, module in model.named_modules():
        if name not in expected:
            continue
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        found = [getattr(base, "out_features", None), getattr(base, "in_features", None)]
        if is_conv1d(base):
            found = list(base.weight.shape[::-1])
        if None not in found and found != list(expected[name]):
            differences.append(f"{name} is {found} in the model, {expected[name]} in the adapter")
    if differences:
        raise ValueError(
            "model: is not the base model that the adapter was trained for; [out, in] features of "
            f"{len(differences)} layers differ: {'; '.join(differences[:5])}"
        )


def check_complete(keys: Iterable[str], expected: Collection[str]) -> None:
    """Raise ValueError for a state dict without adapters, or with some of a layer's factors.

    Args:
        keys: of the state dict.
        expected: layers that the adapter has in the model.
    """
    found: dict[str, set[str]] = {}
    for key in keys:
        layer, _, factor = key.rpartition(".")
        if factor in FACTORS:
            found.setdefault(layer, set()).add(factor)
    if expected and not found:
        raise ValueError(
            "state_dict: the weights hold no DCFT adapter; are they of another method?"
        )
    for layer, factors in found.items():
        if len(factors) < len(FACTORS):
            raise ValueError(
                f"state_dict: the weights have only {', '.join(sorted(factors))} of {layer}; is a "
                "file truncated?"
            )
