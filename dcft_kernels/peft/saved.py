"""Saved adapters as values: what a folder of PEFT or of `save_adapter` holds, checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from dcft_kernels.initialization import default_alpha, scaling_of
from dcft_kernels.linear import DCFTOptions
from dcft_kernels.peft.checkpoint import PREFIX, base_name, sizes
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
        scaling = scaling_of(record.geometry, record.options.init, record.options.alpha)
        return Adapter(A, B, C, scaling, record.geometry)

    def peft_name(self, key: str) -> str:
        """PEFT's name of a tensor of `others`: those of adapted layers are the base layers'."""
        owner, _, own = key.rpartition(".")
        return f"{owner}.base_layer.{own}" if owner in self.layers else key

    def check_modules_are_whole(self) -> None:
        """Raise ValueError for modules trained in part: PEFT saves and loads them whole."""
        for key in self.others:
            owner, _, own = key.rpartition(".")
            weight = f"{owner}.weight"
            if own == "bias" and owner not in self.layers and weight not in self.others:
                raise ValueError(
                    f"{weight}: not in the adapter, which has {key}; PEFT saves modules whole: "
                    "train and save both or none (freeze_base(trainable=), modules_to_save=)"
                )


def read(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Read a folder of `PeftModel.save_pretrained` or of `save_adapter`.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: files that are truncated, of another method, or that do not fit together; or
            two adapters in one folder.
    """
    path = Path(folder)
    if (path / adapter_folder.CONFIG_FILE).exists():
        if (path / CONFIG_FILE).exists():
            raise ValueError(
                f"folder: {os.fspath(path)!r} has both {adapter_folder.CONFIG_FILE} and "
                f"{CONFIG_FILE}; move the adapter that is not meant to another folder"
            )
        return _read_dcft(path)
    if not path.is_dir():
        raise FileNotFoundError(f"folder: {os.fspath(path)!r} is not a directory")
    return _read_peft(path)


def _read_dcft(folder: Path) -> SavedAdapter:
    records, tensors = read_adapter(folder)
    keys = {f"{name}.{factor}" for name in records for factor in FACTORS}
    others = {key: tensor for key, tensor in tensors.items() if key not in keys}
    owners = {key.rpartition(".")[0] for key in others} - records.keys()
    outermost = [o for o in sorted(owners) if not any(o.startswith(f"{p}.") for p in owners)]
    return SavedAdapter(records, {key: tensors[key] for key in keys}, others, outermost)


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
    if not config.layer_sizes:
        raise ValueError(
            f"{path}: has no layer_sizes; load the adapter into its base model with "
            "PeftModel.from_pretrained, and save it again or pass that model"
        )
    weights = folder / WEIGHTS_FILE
    if not weights.exists() and (folder / "adapter_model.bin").exists():
        weights = folder / "adapter_model.bin"
    return _checked(config, config.layer_sizes, load_tensors(weights), path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a file of safetensors or `torch.save`, without running any code in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is truncated, or holds anything but a dict of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # of many types, by where the file ends
        raise ValueError(f"{path}: truncated, or not a file of tensors alone: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path}: expected a dict of tensors by name")
    return found


def from_model(model: nn.Module, adapter_name: str) -> SavedAdapter:
    """What `PeftModel.save_pretrained` would save of an adapter of `model`, on the CPU."""
    configs: Any = model.peft_config
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {key: tensor.detach().cpu() for key, tensor in state.items()}
    return _checked(configs[adapter_name], sizes(model, adapter_name), tensors, "model")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile` and DistributedDataParallel."""
    while True:
        is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        inner = model.module if is_ddp else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _checked(
    config: DCFTConfig,
    layer_sizes: Mapping[str, Sequence[int]],
    state: Mapping[str, Tensor],
    source: object,
) -> SavedAdapter:
    """An adapter from PEFT's config and state dict; `source` is what messages call it."""
    tensors = {base_name(key): tensor for key, tensor in state.items()}
    layers, factors = {}, {}
    for name, (out_features, in_features) in layer_sizes.items():
        A = tensors.get(f"{name}.dcft_A")
        if A is None:
            raise ValueError(f"{source}: the weights have no {name}.dcft_A; they are incomplete")
        layers[name] = _record(config, name, in_features, out_features, A.dtype)
        for factor, shape in factor_shapes(layers[name].geometry).items():
            key = f"{name}.{factor}"
            found = None if key not in tensors else tensors.pop(key)
            if found is None or tuple(found.shape) != shape or not found.is_floating_point():
                what = "none" if found is None else f"{found.dtype} {list(found.shape)}"
                raise ValueError(f"{source}: {key}: expected floats {list(shape)}, got {what}")
            factors[key] = found
    unknown = [key for key in tensors if key.rpartition(".")[2] in FACTORS]
    if unknown:
        raise ValueError(f"{source}: layer_sizes does not name the layer of {unknown[0]}")
    others = {}
    for key, tensor in tensors.items():
        owner, _, own = key.rpartition(".")
        layer = owner.removesuffix(".base_layer")
        if ".base_layer." in key and layer not in layers:
            raise ValueError(
                f"{source}: {key} is part of another adapter, inside of this one; merge that first"
            )
        others[f"{layer}.{own}"] = tensor
    return SavedAdapter(
        layers, factors, others, list(config.modules_to_save or []),
        config.base_model_name_or_path, config.task_type,
    )  # fmt: skip


def _record(
    config: DCFTConfig, name: str, in_features: int, out_features: int, dtype: torch.dtype
) -> LayerRecord:
    settings = layer_settings(config, name)
    options = DCFTOptions(
        settings["r"], settings["kernel_size"], settings["stride"], settings["alpha"],
        config.dropout, config.init, adapter_dtype=dtype, kernels=config.kernels,
    )  # fmt: skip
    record = LayerRecord(in_features, out_features, options)
    if options.alpha is None:
        alpha = default_alpha(record.geometry, config.init)
        record = dataclasses.replace(record, options=dataclasses.replace(options, alpha=alpha))
    return record


def refuse_other_kinds(folder: str | os.PathLike[str], kind: str) -> None:
    """Raise ValueError if `folder` has an adapter of another kind, which would be lost or hidden.

    Args:
        folder: to be written.
        kind: `"save_adapter"` or PEFT's name of the method.
    """
    found = {"save_adapter"} if (Path(folder) / adapter_folder.CONFIG_FILE).exists() else set()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        try:
            config = json.loads((Path(folder) / CONFIG_FILE).read_text("utf-8"))
            found.add(str(config["peft_type"]))
        except (ValueError, TypeError, KeyError):
            found.add(f"a {CONFIG_FILE} that cannot be read")
    if others := found - {kind}:
        raise ValueError(
            f"folder: {os.fspath(folder)!r} already holds an adapter of another kind "
            f"({', '.join(sorted(others))}); choose another folder"
        )


def write(
    folder: str | os.PathLike[str], config: peft.PeftConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Save an adapter as PEFT does, under the base model's names; all or nothing, see `staged`."""
    refuse_other_kinds(folder, str(config.peft_type.value))
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
    """`model.save_pretrained(folder, **options)`, but a failure leaves `folder` as it was.

    PEFT overwrites the files in place, and a full disk truncates them. This writes to a temporary
    folder first, and replaces the files when all are complete.

    Raises:
        ValueError: `safe_serialization=False`; an adapter of another kind in the folder.
        NotADirectoryError: `folder` is a file.
        OSError: the disk cannot be written; what was in `folder` is intact.
    """
    if not options.get("safe_serialization", True):
        raise ValueError(
            "safe_serialization: expected True, got False: PEFT would go on to load an older "
            f"{WEIGHTS_FILE} in the same folder"
        )
    for name in options.get("selected_adapters") or model.peft_config:
        own_folder = Path(folder) if name == "default" else Path(folder, name)
        refuse_other_kinds(own_folder, str(model.peft_config[name].peft_type.value))
    with staged(folder) as staging:
        existing = Path(folder) / "README.md"
        if existing.exists():  # PEFT updates it
            (staging / "README.md").write_bytes(existing.read_bytes())
        try:
            model.save_pretrained(os.fspath(staging), **options)
        except SafetensorError as error:
            raise OSError(f"folder: {os.fspath(folder)!r}: {error}; nothing was changed") from error
