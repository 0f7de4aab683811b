"""Saved adapters as values: what a folder of PEFT or of `save_adapter` holds, checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from dcft_kernels import adapter_folder
from dcft_kernels.adapter import Adapter
from dcft_kernels.adapter_files import LayerRecord, factor_shapes, read_adapter
from dcft_kernels.initialization import default_alpha
from dcft_kernels.linear import DCFTOptions
from dcft_kernels.peft.checkpoint import PREFIX
from dcft_kernels.peft.config import DCFTConfig, DcftType
from dcft_kernels.peft.layer import FACTORS
from dcft_kernels.peft.model import layer_settings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """One adapter, whatever it was saved as. Names are those of the base model."""

    layers: dict[str, LayerRecord]
    factors: dict[str, Tensor]  # "<layer>.dcft_A" and so on
    others: dict[str, Tensor]  # what else was trained, such as a head
    modules_to_save: list[str]  # the modules that `others` belong to
    base_model: str | None = None
    task_type: str | None = None

    def adapter(self, name: str) -> Adapter:
        """The adapter of one layer, as backends take it."""
        record = self.layers[name]
        A, B, C = (self.factors[f"{name}.{factor}"] for factor in FACTORS)
        alpha = _alpha(record)
        scaling = 1.0 if alpha is None else alpha / record.options.rank
        return Adapter(A, B, C, scaling, record.geometry)

    def check_modules_are_whole(self) -> None:
        """Raise ValueError for modules trained in part: PEFT saves and loads them whole."""
        for key in self.others:
            weight = f"{key.rpartition('.')[0]}.weight"
            if key.endswith(".bias") and weight not in self.others:
                raise ValueError(
                    f"{weight}: not in the adapter, which has {key}; PEFT saves modules whole: "
                    "train and save both or none (freeze_base(trainable=), modules_to_save=)"
                )


def read(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Read a folder of `PeftModel.save_pretrained` or of `save_adapter`.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: files that are truncated, of another method, or that do not fit together.
    """
    path = Path(folder)
    if (path / adapter_folder.CONFIG_FILE).exists():
        return _read_dcft(path)
    if not path.is_dir():
        raise FileNotFoundError(f"folder: {os.fspath(path)!r} is not a directory")
    return _read_peft(path)


def _read_dcft(folder: Path) -> SavedAdapter:
    records, tensors = read_adapter(folder)
    keys = {f"{name}.{factor}" for name in records for factor in FACTORS}
    others = {key: tensor for key, tensor in tensors.items() if key not in keys}
    owners = sorted({key.rpartition(".")[0] for key in others})
    return SavedAdapter(records, {key: tensors[key] for key in keys}, others, owners)


def _read_peft(folder: Path) -> SavedAdapter:
    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_text("utf-8"))
        kind = settings["peft_type"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; PeftModel.save_pretrained writes it"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: truncated or no config of PEFT: {error!r}") from None
    if kind != DcftType.DCFT:
        raise ValueError(f"{path}: expected an adapter of peft_type 'DCFT', got {kind!r}")
    try:
        config = DCFTConfig.from_pretrained(os.fspath(folder))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return from_state(config, _read_weights(folder), path)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / "adapter_model.bin").exists():
        return load_pickle(folder / "adapter_model.bin")
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; PeftModel.save_pretrained writes it"
        ) from None
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file: {error}") from None


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a file of `torch.save`, without running code that it may hold."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # of many types, by where the file ends
        raise ValueError(
            f"{path}: truncated, or holds more than tensors, which is not loaded: {error}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path}: expected a dict of tensors by name")
    return found


def from_model(model: nn.Module, adapter_name: str) -> SavedAdapter:
    """What `PeftModel.save_pretrained` would save of an adapter of `model`."""
    configs: Any = model.peft_config
    config: DCFTConfig = configs[adapter_name]
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, unwrap_compiled=True)
    adapter = from_state(config, {key: t.cpu() for key, t in state.items()}, "model")
    config.layer_sizes = None  # the state dict's, see DCFTModel
    return adapter


def from_state(config: DCFTConfig, state: Mapping[str, Tensor], source: object) -> SavedAdapter:
    """An adapter from PEFT's config and state dict; `source` is what messages call it."""
    sizes = config.layer_sizes
    if not sizes:
        raise ValueError(
            f"{source}: has no layer_sizes; load the adapter into its base model with "
            "PeftModel.from_pretrained, and save it again or pass that model"
        )
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    layers, factors = {}, {}
    for name, (out_features, in_features) in sizes.items():
        A = tensors.get(f"{name}.dcft_A")
        if A is None:
            raise ValueError(f"{source}: the weights have no {name}.dcft_A; is a file truncated?")
        layers[name] = _record(config, name, in_features, out_features, A.dtype)
        for factor, shape in factor_shapes(layers[name].geometry).items():
            key = f"{name}.{factor}"
            found = None if key not in tensors else tensors.pop(key)
            if found is None or tuple(found.shape) != shape:
                what = "none" if found is None else f"shape {list(found.shape)}"
                raise ValueError(f"{source}: {key}: expected shape {list(shape)}, got {what}")
            factors[key] = found
    unknown = [key for key in tensors if key.rpartition(".")[2] in FACTORS]
    if unknown:
        raise ValueError(f"{source}: layer_sizes does not name the layer of {unknown[0]}")
    others = {key.replace(".base_layer.", "."): tensor for key, tensor in tensors.items()}
    return SavedAdapter(
        layers, factors, others, list(config.modules_to_save or []),
        config.base_model_name_or_path, config.task_type,
    )  # fmt: skip


def _record(
    config: DCFTConfig, name: str, in_features: int, out_features: int, dtype: torch.dtype
) -> LayerRecord:
    settings = layer_settings(config, name)
    init = config.init_weights if isinstance(config.init_weights, str) else "balanced"
    options = DCFTOptions(
        settings["r"], settings["kernel_size"], settings["stride"], settings["alpha"],
        config.dropout, init, adapter_dtype=dtype,
    )  # fmt: skip
    record = LayerRecord(in_features, out_features, options)
    return LayerRecord(
        in_features, out_features, dataclasses.replace(options, alpha=_alpha(record))
    )


def _alpha(record: LayerRecord) -> float | None:
    """The layer's alpha; where none is given, what goes with its initialisation."""
    options = record.options
    if options.alpha is None:
        return default_alpha(record.geometry, options.init)
    return options.alpha


def write(
    folder: str | os.PathLike[str], config: peft.PeftConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Save an adapter as PEFT does, under the base model's names; all or nothing, see `staged`."""
    state = {PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with staged(folder) as staging:
        (staging / WEIGHTS_FILE).write_bytes(serialize(state, metadata={"format": "pt"}))
        config.inference_mode = True
        config.save_pretrained(os.fspath(staging))


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files take the place of those in `folder` when the block ends.

    If the block or writing to disk fails, as on a full disk, what `folder` held stays as it was.
    Each file is replaced at once; a crash between two replacements leaves some of them.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: the disk cannot be written.
    """
    target = Path(folder).absolute()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"folder: expected a directory, {os.fspath(target)!r} is a file")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dcft-", dir=target) as name:
        yield Path(name)
        files = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for path in files:
            destination = target / path.relative_to(name)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, destination)


def save_pretrained(model: peft.PeftModel, folder: str | os.PathLike[str], **options: Any) -> None:
    """`model.save_pretrained(folder, **options)`, but an adapter saved there before cannot be lost.

    PEFT writes over the files in place, and a disk that fills up leaves them truncated. This writes
    them beside, and replaces them when all are complete.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: the disk cannot be written; what was in `folder` is intact.
    """
    with staged(folder) as staging:
        existing = Path(folder) / "README.md"
        if existing.exists():  # PEFT updates it
            (staging / "README.md").write_bytes(existing.read_bytes())
        try:
            model.save_pretrained(os.fspath(staging), **options)
        except SafetensorError as error:
            raise OSError(f"folder: {os.fspath(folder)!r}: {error}; nothing was changed") from error
