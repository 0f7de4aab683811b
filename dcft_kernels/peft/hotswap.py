"""A saved adapter's values in the place of a loaded one's."""

from __future__ import annotations

import os

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from torch import nn

from dcft_kernels.peft import saved
from dcft_kernels.peft.checkpoint import PREFIX, base_name
from dcft_kernels.peft.layer import layers_with


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Overwrite a loaded adapter with a saved one, in place: a compiled model is not recompiled.

    The layers keep their scaling; where the saved adapter has another one, `dcft_B` is multiplied.

    Args:
        model: a PEFT model, possibly compiled, with the adapter `adapter_name`.
        folder: of `PeftModel.save_pretrained`; same layers, ranks, kernel sizes, strides and kinds
            of kernels.
        adapter_name: the adapter to overwrite.

    Raises:
        ValueError: no such adapter, one that is merged, or one that differs in more than values.
        The model is unchanged then.
    """
    inner = saved.unwrapped(model)
    layers = {base_name(name): layer for name, layer in layers_with(inner, adapter_name).items()}
    if not layers:
        raise ValueError(f"adapter_name: the model has no DCFT adapter {adapter_name!r}")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"adapter_name: {adapter_name!r} is merged; call unmerge_adapter() first")
    new, old = saved.read(folder), saved.from_model(inner, adapter_name)
    have, want = ({n: record.geometry for n, record in a.layers.items()} for a in (old, new))
    names = [n for n in sorted(have.keys() | want.keys()) if have.get(n) != want.get(n)]
    if names:
        raise ValueError(
            f"folder: {os.fspath(folder)!r} differs from the adapter {adapter_name!r} in "
            f"{len(names)} layers, such as {names[0]!r}: {want.get(names[0])} in the folder, "
            f"{have.get(names[0])} in the model; load it with load_adapter"
        )
    if {k: t.shape for k, t in old.others.items()} != {k: t.shape for k, t in new.others.items()}:
        raise ValueError(
            f"folder: {os.fspath(folder)!r} has other modules_to_save than the adapter "
            f"{adapter_name!r}: {sorted(new.others)} and {sorted(old.others)}"
        )
    state = new.factors | {new.peft_name(key): tensor for key, tensor in new.others.items()}
    for name, layer in layers.items():
        scaling, here = new.adapter(name).scaling, layer.scaling[adapter_name]
        if scaling != here:
            if here == 0.0:
                raise ValueError(f"adapter_name: {adapter_name!r} has a scaling of zero in {name}")
            state[f"{name}.dcft_B"] = state[f"{name}.dcft_B"] * (scaling / here)
    prefix = PREFIX if isinstance(inner, PeftModel) else ""
    named = {prefix + name: tensor for name, tensor in state.items()}
    set_peft_model_state_dict(inner, named, adapter_name=adapter_name)
