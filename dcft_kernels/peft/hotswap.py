"""A saved adapter's values in the place of a loaded one's."""

from __future__ import annotations

import os

import torch
from peft.utils import set_peft_model_state_dict
from torch import nn

from dcft_kernels.peft import saved
from dcft_kernels.peft.checkpoint import PREFIX
from dcft_kernels.peft.layer import layers_with


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Overwrite a loaded adapter with a saved one, in place: a compiled model is not recompiled.

    The layers keep their scaling; where the saved adapter has another one, `dcft_B` takes it up.

    Args:
        model: a PEFT model, possibly compiled, with the adapter `adapter_name`.
        folder: of `PeftModel.save_pretrained`; same layers, ranks, kernel sizes and strides.
        adapter_name: the adapter to overwrite.

    Raises:
        ValueError: no such adapter, one that is merged, or one that differs in more than values.
        The model is unchanged then.
    """
    inner = getattr(model, "_orig_mod", model)
    layers = {
        name.removeprefix(PREFIX): layer for name, layer in layers_with(inner, adapter_name).items()
    }
    if not layers:
        raise ValueError(f"adapter_name: the model has no DCFT adapter {adapter_name!r}")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"adapter_name: {adapter_name!r} is merged; call unmerge_adapter() first")
    new, old = saved.read(folder), saved.from_model(inner, adapter_name)
    here, there = ({n: record.geometry for n, record in a.layers.items()} for a in (old, new))
    names = [n for n in sorted(here.keys() | there.keys()) if here.get(n) != there.get(n)]
    if names:
        raise ValueError(
            f"folder: {os.fspath(folder)!r} differs from the adapter {adapter_name!r} in "
            f"{len(names)} layers, such as {names[0]!r}: {there.get(names[0])} in the folder, "
            f"{here.get(names[0])} in the model; load it with load_adapter"
        )
    if {k: t.shape for k, t in old.others.items()} != {k: t.shape for k, t in new.others.items()}:
        raise ValueError(
            f"folder: {os.fspath(folder)!r} has other modules_to_save than the adapter "
            f"{adapter_name!r}: {sorted(new.others)} and {sorted(old.others)}"
        )
    state = {PREFIX + name: tensor for name, tensor in (new.factors | new.others).items()}
    for name, layer in layers.items():
        ratio = new.adapter(name).scaling / layer.scaling[adapter_name]
        if ratio != 1.0:
            state[f"{PREFIX}{name}.dcft_B"] = state[f"{PREFIX}{name}.dcft_B"] * ratio
        if f"{name}.bias" in new.others:  # trained with it
            state[f"{PREFIX}{name}.base_layer.bias"] = state.pop(f"{PREFIX}{name}.bias")
    set_peft_model_state_dict(inner, state, adapter_name=adapter_name)
