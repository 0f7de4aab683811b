"""Adapters on disk: a JSON config and a safetensors file, kilobytes, never half-written.

    folder/dcft_config.json                   format version, weights file, layers' settings
    folder/dcft_adapter-<digest>.safetensors  `<layer>.dcft_A`, `.dcft_B`, `.dcft_C`

The weights file is named by its content, and the config, which names it, is written after it and
renamed into place: that rename is the moment at which a save takes effect. A crash before it leaves
the former adapter intact; a crash after it, at most an unreferenced file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialize_safetensors
from torch import Tensor, nn

from dcft_kernels import validation
from dcft_kernels.adapter import Geometry
from dcft_kernels.linear import DCFTLinear, DCFTOptions, linear_sizes, why_not_adaptable
from dcft_kernels.model import dcft_layers, find_dcft_layers, swap_each
from dcft_kernels.targets import check_holds_its_layers

CONFIG_FILE = "dcft_config.json"
FORMAT = "dcft_adapter"
FORMAT_VERSION = 1
_OWN_WEIGHTS = re.compile(rf"{FORMAT}-[0-9a-f]{{12}}\.safetensors")
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
    weights = serialize_safetensors(tensors, metadata={"format": FORMAT})
    digest = hashlib.sha256(weights).hexdigest()
    weights_file = f"{FORMAT}-{digest[:12]}.safetensors"
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "weights": {"file": weights_file, "sha256": digest},
        "layers": {name: _LayerRecord.of(layer).to_json() for name, layer in layers.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / weights_file, weights)
    _write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())
    for file in folder.iterdir():
        if file.name != weights_file and _OWN_WEIGHTS.fullmatch(file.name):
            # The save has taken effect, and a leftover file does no harm.
            with contextlib.suppress(OSError):
                file.unlink()


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
    config_path = folder / CONFIG_FILE
    config = _parse_config(config_path, _read_bytes(config_path, "save_adapter writes it"))
    weights_path = folder / config["weights"]["file"]
    weights = _read_bytes(weights_path, f"{CONFIG_FILE} names it")
    if hashlib.sha256(weights).hexdigest() != config["weights"]["sha256"]:
        raise ValueError(
            f"{weights_path}: truncated or changed since it was saved: its SHA-256 is not the one "
            f"in {CONFIG_FILE}; copy the folder again"
        )
    try:
        tensors = parse_safetensors(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights_path}: not a safetensors file: {error}") from None
    records = {
        name: _checked_record(config_path, name, record, tensors)
        for name, record in config["layers"].items()
    }
    unknown = tensors.keys() - {f"{name}.{factor}" for name in records for factor in _FACTORS}
    if unknown:
        raise ValueError(f"{weights_path}: holds tensors that {CONFIG_FILE} does not: {unknown}")
    return records, tensors


def _parse_config(path: Path, content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: truncated or not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f'{path}: not a DCFT adapter: expected "format": "{FORMAT}"; '
            "was it written by another library?"
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}; "
            "it needs another version of dcft_kernels"
        )
    weights, layers = config.get("weights"), config.get("layers")
    if not (
        isinstance(weights, dict)
        and isinstance(weights.get("file"), str)
        and isinstance(weights.get("sha256"), str)
        and isinstance(layers, dict)
        and layers
    ):
        raise ValueError(f'{path}: expected "weights" with "file" and "sha256", and "layers"')
    if weights["file"] in ("", "..") or Path(weights["file"]).name != weights["file"]:
        raise ValueError(f"{path}: expected a plain file name, got {weights['file']!r}")
    return config


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


def _read_bytes(path: Path, origin: str) -> bytes:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder: {os.fspath(path.parent)!r} is not a directory")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {origin}")
    return path.read_bytes()


def _write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file next to `path` and rename it, each step flushed to the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _flush_directory(path.parent)


def _flush_directory(folder: Path) -> None:
    """Make a rename survive a power failure, where the system lets directories be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
