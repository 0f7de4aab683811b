"""Adapters from one kind of file to another: PEFT's, `save_adapter`'s, the published code's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dcft_kernels import adapter_folder, validation
from dcft_kernels.adapter_files import LayerRecord, write_adapter
from dcft_kernels.linear import DCFTOptions
from dcft_kernels.peft import saved
from dcft_kernels.peft.config import PATTERNS, DCFTConfig, exactly, names_alone

_PUBLISHED = ("lora_A", "lora_B", "lora_C")


def convert_adapter(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Convert a folder of `PeftModel.save_pretrained` to one of `save_adapter`, or back.

    The factors keep their bits and dtypes, each layer its settings, and what else was trained its
    names; PEFT loads that as `modules_to_save`, each module whole. `save_adapter`'s files do not
    have PEFT's `task_type` and `base_model_name_or_path`; set them in the config if you need them.

    Args:
        source: the folder to read; its files tell which kind it is.
        target: the folder to write, in the other kind.

    Raises:
        ValueError: files that are truncated or of another method; a target with an adapter of
            another kind; or what PEFT cannot express: nonlinearities, modules trained in part, and
            dropout, initialisations or kinds of kernels that differ between layers.
        FileNotFoundError, NotADirectoryError, OSError: folders that cannot be read or written.
        What was in `target` is intact then.
    """
    adapter = saved.read(source)
    if (Path(source) / adapter_folder.CONFIG_FILE).exists():
        others = {adapter.peft_name(key): tensor for key, tensor in adapter.others.items()}
        saved.write(target, _config(adapter), adapter.factors | others)
        return
    saved.refuse_other_kinds(target, "save_adapter")
    write_adapter(Path(target), adapter.layers, adapter.factors, adapter.others)


def import_published(
    checkpoint: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    alpha: float,
    r: float,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Convert a checkpoint of the code published with arXiv 2503.01419 to a folder of PEFT.

    That code has `lora_A [k, I]`, `lora_B [J, k]` and `lora_C [1, 1, d, d]`, the transpose of
    `dcft_C`, for layers whose sizes `d` divides, and the scaling `alpha / (r + 1e-5)`, where `r` is
    only a divisor. The checkpoint holds neither number: the training scripts have `lora_alpha` 32
    and `lora_r` 8 or 3.

    Args:
        checkpoint: a file of `torch.save`, of which only tensors are loaded, or of safetensors;
            with or without the base model's tensors.
        target: the folder to write; `convert_adapter` makes one of `save_adapter` from it.
        alpha: `lora_alpha` of the training.
        r: `lora_r` of the training.
        modules_to_save: modules to take along, such as `["pooler", "classifier"]`.

    Raises:
        ValueError: a file that is truncated, or has no such adapter, or holds more than tensors;
            shapes that do not fit; a module that it does not hold.
        FileNotFoundError, NotADirectoryError, OSError: files that cannot be read or written.
    """
    if validation.finite_number("r", r) <= 0:
        raise ValueError(f"r: expected a positive number, got {r}")
    scaling = validation.finite_number("alpha", alpha) / (r + 1e-5)
    state = saved.load_tensors(Path(checkpoint))
    names = [key.removesuffix(".lora_C") for key in state if key.endswith(".lora_C")]
    if not names:
        raise ValueError(
            f"{checkpoint}: expected tensors <layer>.lora_A, .lora_B and .lora_C, found none"
        )
    layers: dict[str, LayerRecord] = {}
    factors: dict[str, Tensor] = {}
    for name in names:
        A, B, C = (_published(checkpoint, state, f"{name}.{factor}") for factor in _PUBLISHED)
        kernel = tuple(C.shape[-2:])
        if C.shape != (1, 1, *kernel) or kernel[0] != kernel[1] or A.shape[0] != B.shape[1]:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (A, B, C))
            raise ValueError(
                f"{checkpoint}: {name}: expected lora_A [k, I], lora_B [J, k] and lora_C "
                f"[1, 1, d, d], got {shapes}"
            )
        rank, d = A.shape[0], kernel[0]
        options = DCFTOptions(rank, d, alpha=scaling * rank, init="paper")
        layers[name] = LayerRecord(A.shape[1] * d, B.shape[0] * d, options)
        factors |= {f"{name}.dcft_A": A, f"{name}.dcft_B": B, f"{name}.dcft_C": C[0, 0].t()}
    others: dict[str, Tensor] = {}
    for module in modules_to_save:
        found = {key: value for key, value in state.items() if key.startswith(f"{module}.")}
        if not found:
            raise ValueError(f"modules_to_save: {checkpoint} has no tensors of {module!r}")
        others |= found
    left_out = [key for key in state if key not in others]
    if left_out:
        warnings.warn(
            f"import_published: left out {len(left_out)} other tensors of {checkpoint}, such as "
            f"{left_out[0]}; name in modules_to_save those that were trained",
            stacklevel=2,
        )
    adapter = saved.SavedAdapter(layers, factors, others, list(modules_to_save))
    saved.write(target, _config(adapter), factors | others)


def _published(checkpoint: object, state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"{checkpoint}: has no {key}; the file is incomplete")
    if not state[key].is_floating_point():
        raise ValueError(f"{checkpoint}: {key}: expected floats, got {state[key].dtype}")
    return state.pop(key)


def _config(adapter: saved.SavedAdapter) -> DCFTConfig:
    """PEFT's config of an adapter; ValueError for what it cannot express."""
    options = {name: record.options for name, record in adapter.layers.items()}
    for name, layer in options.items():
        if layer.nonlinearity is not None:
            raise ValueError(
                f"{name}: PEFT's DCFT has no nonlinearity, the layer has {layer.nonlinearity!r}"
            )
    adapter.check_modules_are_whole()
    settings: dict[str, dict[str, Any]] = {"alpha": {n: o.alpha for n, o in options.items()}}
    if {None} != set(settings["alpha"].values()):
        # A scaling of one is `alpha = r`.
        settings["alpha"] = {n: o.rank if o.alpha is None else o.alpha for n, o in options.items()}
    for field, name in (("r", "rank"), ("kernel_size",) * 2, ("stride",) * 2):
        settings[field] = {layer: getattr(o, name) for layer, o in options.items()}
    fields: dict[str, Any] = {}
    for field, values in settings.items():
        fields[field] = next(iter(values.values()))
        if len(set(values.values())) > 1:
            fields[PATTERNS[field]] = {exactly(layer): value for layer, value in values.items()}
    return DCFTConfig(
        **fields,
        dropout=_shared("dropout", {n: o.dropout for n, o in options.items()}),
        init_weights=_shared("init", {n: o.init for n, o in options.items()}),
        kernels=_shared("kernels", {n: o.kernels for n, o in options.items()}),
        target_modules=names_alone(options),
        modules_to_save=adapter.modules_to_save or None,
        bias="dcft_only" if any(f"{name}.bias" in adapter.others for name in options) else "none",
        layer_sizes={n: [r.out_features, r.in_features] for n, r in adapter.layers.items()},
        base_model_name_or_path=adapter.base_model,
        task_type=adapter.task_type,
    )


def _shared(name: str, values: Mapping[str, Hashable]) -> Any:
    """The one value that all layers have."""
    first, *others = set(values.values())
    if others:
        raise ValueError(
            f"{name}: PEFT has one for all layers, the adapter several: {dict(values)}; save an "
            "adapter whose layers agree"
        )
    return first
