"""Adapters of a model to and from disk: what of a model is saved, and into which models it fits.

The weights file holds `<layer>.dcft_A`, `.dcft_B` and `.dcft_C`, the config the layers' settings.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcft_kernels import adapter_folder, validation
from dcft_kernels.adapter import Geometry
from dcft_kernels.adapter_folder import CONFIG_FILE
from dcft_kernels.linear import DCFTLinear, DCFTOptions, linear_sizes, why_not_adaptable
from dcft_kernels.model import dcft_layers, find_dcft_layers, swap_each
from dcft_kernels.targets import check_holds_its_layers

FORMAT_VERSION = 1
_FACTORS = ("dcft_A", "dcft_B", "dcft_C")
_SIZES = ("in_features", "out_features")
_SETTINGS = ("rank", "kernel_size", "stride", "alpha", "dropout", "init")


@dataclasses.dataclass(frozen=True)
class _LayerRecord:
    """What the config says of one layer."""

    in_features: int
    out_features: int
    options: DCFTOptions

    def to_json(self) -> dict[str, Any]:
        record = {name: getattr(self, name) for name in _SIZES}
        record |= {name: getattr(self.options, name) for name in _SETTINGS}
        # Only if it is set: versions without nonlinearities read all other files, and refuse these,
        # which they would compute wrongly.
        if self.options.nonlinearity is not None:
            record["nonlinearity"] = self.options.nonlinearity
        return record

    @classmethod
    def from_json(cls, record: Any, dtype: torch.dtype) -> _LayerRecord:
        if not isinstance(record, dict):
            raise ValueError(f"expected an object with the layer's settings, got {record!r}")
        known = {*_SIZES, *_SETTINGS}
        missing, unknown = known - record.keys(), record.keys() - known - {"nonlinearity"}
        if missing or unknown:
            what = [f"has no {name!r}" for name in sorted(missing)]
            what += [f"has an unknown setting {name!r}" for name in sorted(unknown)]
            raise ValueError(", ".join(what))
        n, m = (validation.positive_int(name, record[name]) for name in _SIZES)
        settings = {name: record[name] for name in record if name not in _SIZES}
        return cls(n, m, DCFTOptions(**settings, adapter_dtype=dtype))

    @classmethod
    def of(cls, layer: DCFTLinear) -> _LayerRecord:
        options = layer.options
        if options.alpha is None:
            # As a number, so that a saved adapter does not depend on the scaling of `init`.
            options = dataclasses.replace(options, alpha=layer._default_alpha)
        return cls(layer.in_features, layer.out_features, options)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters of `model`, merged or not, to `folder`, which is created if needed.

    Only the DCFT parameters and their settings are written; saving a trained classification head
    is up to the caller.

    Args:
        model: a model with `DCFTLinear` layers.
        folder: directory; an adapter saved there before is replaced, other files are left alone.

    Raises:
        ValueError: no adapted layers.
        OSError: the folder cannot be written; an adapter saved there before is intact.
    """
    layers = dcft_layers(model)
    folder = _as_path(folder)
    for name, layer in layers.items():
        if any(getattr(layer, factor).is_meta for factor in _FACTORS):
            raise ValueError(
                f"model: {name}.dcft_A is on the meta device: there is nothing to save"
            )
    tensors = {
        f"{name}.{factor}": getattr(layer, factor)
        .detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, layer in layers.items()
        for factor in _FACTORS
    }
    config = {
        "format_version": FORMAT_VERSION,
        "layers": {name: _LayerRecord.of(layer).to_json() for name, layer in layers.items()},
    }
    adapter_folder.write(folder, config, tensors)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Load what `save_adapter` wrote into `model`, in place, all or nothing.

    Args:
        model: either a base model without adapters, whose layers are then swapped as the config
            says, or one with the same layers swapped with the same settings.
        folder: the directory given to `save_adapter`.

    Returns:
        The names of the layers loaded.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: a file that is truncated, foreign or of a newer format version; or a model that
            differs, with a list of the differences. The model is unchanged.
        RuntimeError: a layer is merged.
    """
    validation.module("model", model)
    records, tensors = _read(_as_path(folder))
    swapped = find_dcft_layers(model)
    merged = [name for name, layer in swapped.items() if layer.merged]
    if merged:
        raise RuntimeError(f"model: {merged[0]!r} is merged; call unmerge_model(model) first")
    differences = (
        _differences_of_swapped(swapped, records)
        if swapped
        else _differences_of_base(model, records)
    )
    differences += _differences_of_values(swapped, tensors)
    if differences:
        shown = "\n  ".join(differences[:20])
        more = f"\n  and {len(differences) - 20} more" if len(differences) > 20 else ""
        raise ValueError(
            f"model: does not fit the adapter in {os.fspath(folder)!r} "
            f"({len(differences)} differences; nothing was loaded):\n  {shown}{more}"
        )
    if not swapped:
        swap_each(model, {name: record.options for name, record in records.items()})
    with torch.no_grad():
        for name in records:
            layer = model.get_submodule(name)
            for factor in _FACTORS:
                getattr(layer, factor).copy_(tensors[f"{name}.{factor}"])
    return list(records)


def _read(folder: Path) -> tuple[dict[str, _LayerRecord], dict[str, Tensor]]:
    """Read and check both files, without a model."""
    config, tensors = adapter_folder.read(folder)
    config_path = folder / CONFIG_FILE
    records = {
        name: _checked_record(config_path, name, record, tensors)
        for name, record in config["layers"].items()
    }
    unknown = tensors.keys() - {f"{name}.{factor}" for name in records for factor in _FACTORS}
    if unknown:
        weights_path = folder / config["weights"]["file"]
        raise ValueError(f"{weights_path}: holds tensors that {CONFIG_FILE} does not: {unknown}")
    return records, tensors


def _checked_record(path: Path, name: str, record: Any, tensors: dict[str, Tensor]) -> _LayerRecord:
    """One layer of the config, checked against its tensors."""
    missing = [f"{name}.{factor}" for factor in _FACTORS if f"{name}.{factor}" not in tensors]
    if missing:
        raise ValueError(f"{path}: layer {name!r} has no tensor {', '.join(missing)}")
    try:
        checked = _LayerRecord.from_json(record, tensors[f"{name}.dcft_A"].dtype)
        n, m, options = checked.in_features, checked.out_features, checked.options
        kernel_size = validation.pair("kernel_size", options.kernel_size)
        stride = validation.stride_pair(options.stride, kernel_size)
        geometry = Geometry.build(n, m, options.rank, kernel_size, stride)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: layer {name!r}: {error}") from None
    shapes = (geometry.shape_A, geometry.shape_B, geometry.shape_C)
    for factor, shape in zip(_FACTORS, shapes, strict=True):
        tensor = tensors[f"{name}.{factor}"]
        if tensor.dtype not in validation.FLOAT_DTYPES:
            raise ValueError(f"{path}: {name}.{factor}: expected a float dtype, got {tensor.dtype}")
        found = tuple(tensor.shape)
        if found != shape:
            raise ValueError(
                f"{path}: {name}.{factor}: expected shape {list(shape)}, got {list(found)}"
            )
    return checked


def _differences_of_swapped(
    swapped: dict[str, DCFTLinear], records: dict[str, _LayerRecord]
) -> list[str]:
    """Why the adapters cannot be copied into layers that are swapped already."""
    differences = [
        f"{name}: adapted in the model, not in the file" for name in swapped.keys() - records
    ]
    for name, record in records.items():
        if name not in swapped:
            differences.append(f"{name}: adapted in the file, not in the model")
            continue
        here, there = _LayerRecord.of(swapped[name]).to_json(), record.to_json()
        # Neither changes what a loaded adapter computes.
        for setting in ("dropout", "init"):
            del here[setting], there[setting]
        differences += [
            f"{name}: {setting} is {here.get(setting)} in the model, "
            f"{there.get(setting)} in the file"
            for setting in here.keys() | there.keys()
            if here.get(setting) != there.get(setting)
        ]
    return sorted(differences)


def _differences_of_values(swapped: dict[str, DCFTLinear], tensors: dict[str, Tensor]) -> list[str]:
    """Why the model's parameters cannot hold the values."""
    differences = []
    for name, layer in swapped.items():
        for factor in _FACTORS:
            here, there = getattr(layer, factor), tensors.get(f"{name}.{factor}")
            if here.is_meta:
                differences.append(f"{name}.{factor}: on the meta device, which holds no values")
            elif there is not None and bool(
                (there.to(here.dtype).isinf() & there.isfinite()).any()
            ):
                differences.append(f"{name}.{factor}: values in the file overflow {here.dtype}")
    return differences


def _differences_of_base(model: nn.Module, records: dict[str, _LayerRecord]) -> list[str]:
    """Why the layers of a base model cannot be swapped as the file says."""
    if "" in records:
        check_holds_its_layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    differences = []
    for name, record in records.items():
        if name not in modules:
            differences.append(f"{name}: not in the model")
            continue
        reason = why_not_adaptable(modules[name])
        if reason is not None:
            differences.append(f"{name}: {reason}")
            continue
        if modules[name].weight.is_meta:
            differences.append(f"{name}: on the meta device; load the base model's weights first")
            continue
        sizes = linear_sizes(modules[name])
        if sizes != (record.in_features, record.out_features):
            differences.append(
                f"{name}: (in_features, out_features) is {sizes} in the model, "
                f"{(record.in_features, record.out_features)} in the file"
            )
    return differences


def _as_path(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder: expected a path, got {folder!r}")
    return Path(folder)
