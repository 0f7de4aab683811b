"""A model's adapters to and from disk: which tensors are saved, and which models they fit.

The weights file holds `<layer>.dcft_A`, `.dcft_B` and `.dcft_C`, the config the layers' settings.
From version 2 on, the weights file also holds the tensors that the config's "modules_to_save"
names; in version 3, layers may have a kernel per rank. A save has the lowest version that holds it.
Names are those of the model without wrappers (see `wrappers`).
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcft_kernels import adapter_folder, validation
from dcft_kernels.adapter import PER_RANK, SHARED, Geometry
from dcft_kernels.adapter_folder import CONFIG_FILE
from dcft_kernels.linear import DCFTLinear, DCFTOptions, linear_sizes, why_not_adaptable
from dcft_kernels.model import dcft_layers, find_dcft_layers, is_or_is_inside, swap_each
from dcft_kernels.targets import Targets, check_holds_its_layers, check_patterns
from dcft_kernels.trained_state import FACTORS, own_tensors, trained_names
from dcft_kernels.wrappers import (
    canonical_names,
    copy_whole,
    is_sharded,
    join,
    once,
    strip,
    visit,
    whole,
)

_NO_TENSOR = "no parameter or persistent buffer of the model; if pruned or parametrised, undo that"
_SIZES = ("in_features", "out_features")
_SETTINGS = ("rank", "kernel_size", "stride", "alpha", "dropout", "init")
_OPTIONAL = {"nonlinearity", "kernels"}


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What the config says of one layer."""

    in_features: int
    out_features: int
    options: DCFTOptions

    @property
    def geometry(self) -> Geometry:
        """The adapter's shapes."""
        kernel_size = validation.pair("kernel_size", self.options.kernel_size)
        stride = validation.stride_pair(self.options.stride, kernel_size)
        per_rank = self.options.kernels == PER_RANK
        return Geometry.build(
            self.in_features, self.out_features, self.options.rank, kernel_size, stride, per_rank
        )

    def to_json(self) -> dict[str, Any]:
        """The layer's entry in the config."""
        record = {name: getattr(self, name) for name in _SIZES}
        record |= {name: getattr(self.options, name) for name in _SETTINGS}
        # Only if they are set: versions without these options read all other files, and refuse
        # these, which they would compute wrongly.
        if self.options.nonlinearity is not None:
            record["nonlinearity"] = self.options.nonlinearity
        if self.options.kernels != SHARED:
            record["kernels"] = self.options.kernels
        return record

    @classmethod
    def from_json(cls, record: Any, dtype: torch.dtype) -> LayerRecord:
        """Check an entry of the config; ValueError or TypeError for one that is no layer's."""
        if not isinstance(record, dict):
            found = reprlib.repr(record)
            raise ValueError(f"expected an object with the layer's settings, got {found}")
        known = {*_SIZES, *_SETTINGS}
        missing, unknown = known - record.keys(), record.keys() - known - _OPTIONAL
        if missing or unknown:
            what = [f"has no {name!r}" for name in sorted(missing)]
            what += [f"has an unknown setting {name!r}" for name in sorted(unknown)]
            raise ValueError(", ".join(what))
        n, m = (validation.positive_int(name, record[name]) for name in _SIZES)
        settings = {name: record[name] for name in record if name not in _SIZES}
        return cls(n, m, DCFTOptions(**settings, adapter_dtype=dtype))

    @classmethod
    def of(cls, layer: DCFTLinear) -> LayerRecord:
        """The record of a layer of a model."""
        options = layer.options
        if options.alpha is None:
            # As a number, so that a saved adapter does not depend on the scaling of `init`.
            options = dataclasses.replace(options, alpha=layer._default_alpha)
        return cls(layer.in_features, layer.out_features, options)


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    modules_to_save: Targets | None = None,
) -> None:
    """Write the adapters of `model`, merged or not, to `folder`, which is created if needed.

    By default, everything else that training changes is saved too, such as a classification head:
    parameters that require a gradient, the persistent buffers of the modules that hold them, and
    the running statistics of normalization layers.

    For a sharded model (FSDP, tensor parallelism), call this on all ranks; rank 0 writes. For any
    other model, including DDP, one rank is enough.

    Args:
        model: a model with `DCFTLinear` layers, possibly wrapped (`torch.compile`, DDP, EMA).
        folder: directory; an adapter saved there before is replaced, other files are left alone.
        modules_to_save: what to save with the adapters instead: modules, parameters or buffers,
            trainable or not, named as for `freeze_base`; `()` for none. A warning names trainable
            parameters that are left out.

    Raises:
        TypeError: `folder` or `modules_to_save` of the wrong type.
        ValueError: no adapted layers; an entry of `modules_to_save` that matches nothing; a factor
            that is computed (pruned, parametrised), sharded in an unknown way, or without values.
        OSError: the folder cannot be written; an adapter saved there before is intact.
    """
    layers = dcft_layers(model)
    folder = _as_path(folder)
    if modules_to_save is not None:
        check_patterns("modules_to_save", modules_to_save)
    names = canonical_names(model)
    records = {names[name]: LayerRecord.of(layer) for name, layer in layers.items()}
    factors, others, left_out = _tensors_to_save(model, records.keys(), modules_to_save)
    once(model, lambda: write_adapter(folder, records, factors, others))
    if left_out:
        more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
        warnings.warn(
            f"save_adapter: trainable but not saved: {', '.join(left_out[:8])}{more}; add them to "
            "modules_to_save, or omit that argument to save everything trainable",
            stacklevel=2,
        )


def write_adapter(
    folder: Path,
    records: dict[str, LayerRecord],
    factors: dict[str, Tensor],
    others: dict[str, Tensor],
) -> None:
    """Write what `read_adapter` reads; the tensors as for `adapter_folder.write`."""
    layers = {name: record.to_json() for name, record in records.items()}
    per_rank = any(record.geometry.per_rank for record in records.values())
    version = 3 if per_rank else 2 if others else 1
    config: dict[str, Any] = {"format_version": version, "layers": layers}
    config |= {"modules_to_save": sorted(others)} if others else {}
    adapter_folder.write(folder, config, factors | others)


def _tensors_to_save(
    model: nn.Module, layers: Collection[str], modules_to_save: Targets | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Copies of the factors and of the other tensors to save; names of trainable ones left out."""
    factors: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    if modules_to_save is None or isinstance(modules_to_save, str):
        entries: list[Targets] = [] if modules_to_save is None else [modules_to_save]
    else:
        entries = [[entry] for entry in modules_to_save]
    matched: list[Targets] = []
    taken: set[Tensor] = set()  # shared tensors once, under the first name that is wanted
    trainable: dict[Tensor, str] = {}

    def take(name: str, module: nn.Module) -> None:
        tensors, trained = own_tensors(module), trained_names(module)
        if isinstance(module, DCFTLinear) and name in layers:
            for factor, shape in factor_shapes(module.geometry).items():
                if factor not in tensors:
                    raise ValueError(f"model: {name}.{factor}: {_NO_TENSOR}")
                key = f"{name}.{factor}"
                factors[key] = _copied(key, tensors[factor], shape)
        for own, tensor in tensors.items():
            path = join(name, own)
            meant = [entry for entry in entries if is_or_is_inside(path, entry)]
            matched.extend(meant)
            if isinstance(module, DCFTLinear) and own.startswith("dcft_"):
                continue
            if tensor.requires_grad:
                trainable.setdefault(tensor, path)
            if (own in trained if modules_to_save is None else meant) and tensor not in taken:
                taken.add(tensor)
                others[path] = _copied(path, tensor, getattr(tensor, "ds_shape", tensor.shape))

    visit(model, take)
    for entry in entries:
        if entry not in matched:
            raise ValueError(
                f"modules_to_save: {entry if isinstance(entry, str) else entry[0]!r} matches no "
                "parameter or buffer of the model; names are those without wrappers (module., "
                "_orig_mod.)"
            )
    return factors, others, [path for tensor, path in trainable.items() if tensor not in taken]


def _copied(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """All values of a tensor of the model, on the CPU."""
    if tensor.is_meta:
        raise ValueError(
            f"model: {name} is on the meta device; load its values, or leave it out of "
            "modules_to_save"
        )
    values = whole(tensor).detach()
    if tuple(values.shape) != tuple(shape):
        raise ValueError(
            f"model: {name}: expected shape {list(shape)}, got {list(values.shape)}: is it sharded "
            "by DeepSpeed ZeRO-3? Save and load within deepspeed.zero.GatheredParameters"
        )
    return values.cpu().clone(memory_format=torch.contiguous_format)


def factor_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """The shape of each factor, by its name."""
    shapes = (geometry.shape_A, geometry.shape_B, geometry.shape_C)
    return dict(zip(FACTORS, shapes, strict=True))


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Load what `save_adapter` wrote into `model`, in place, all or nothing.

    `requires_grad` changes only in layers that are swapped. For a sharded model, call this on all
    ranks; rank 0 reads.

    Args:
        model: either a base model without adapters, whose layers are then swapped as the config
            says, or one with the same layers swapped with the same settings. Both may be wrapped,
            whether or not the saved model was; only the latter may be sharded.
        folder: the directory given to `save_adapter`.

    Returns:
        The names of the layers loaded, for `model.get_submodule`.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: a file that is truncated, foreign or of a newer format version; or a model that
            differs, with a list of the differences. The model is unchanged.
        RuntimeError: a layer is merged.
    """
    validation.module("model", model)
    path = _as_path(folder)
    records, tensors = once(model, lambda: read_adapter(path))
    names = canonical_names(model)
    swapped = {names[name]: layer for name, layer in find_dcft_layers(model).items()}
    merged = [name for name, layer in swapped.items() if layer.merged]
    if merged:
        raise RuntimeError(f"model: {merged[0]!r} is merged; call unmerge_model(model) first")
    if is_sharded(model) and not swapped:
        raise ValueError("model: is sharded already; load the adapter before sharding the model")
    records, tensors = _as_named_in(names, records, tensors)
    # A wrapper comes before what it wraps.
    actual = {canonical: name for name, canonical in names.items()}
    if swapped:
        differences = _differences_of_swapped(swapped, records)
        compared = tensors
    else:
        differences = _differences_of_base(model, actual, records)
        factors = {join(name, factor) for name in records for factor in FACTORS}
        compared = {key: tensor for key, tensor in tensors.items() if key not in factors}
    differences = differences or _differences_of_values(model, compared)
    if differences:
        shown = "\n  ".join(differences[:20])
        more = f"\n  and {len(differences) - 20} more" if len(differences) > 20 else ""
        raise ValueError(
            f"model: does not fit the adapter in {os.fspath(folder)!r}; build it like the saved "
            "model, or save that without what differs (modules_to_save) "
            f"({len(differences)} differences; nothing was loaded):\n  {shown}{more}"
        )
    if not swapped:
        swap_each(model, {actual[name]: record.options for name, record in records.items()})
        for name in records:
            layer = model.get_submodule(actual[name])
            for factor in FACTORS:
                parameter = getattr(layer, factor)
                parameter.data = parameter.data.to(tensors[join(name, factor)].dtype)

    def fill(name: str, module: nn.Module) -> None:
        for own, tensor in own_tensors(module).items():
            if join(name, own) in tensors:
                copy_whole(tensor, tensors[join(name, own)])

    with torch.no_grad():
        visit(model, fill, write=True)
    return [actual[name] for name in records]


def read_adapter(folder: Path) -> tuple[dict[str, LayerRecord], dict[str, Tensor]]:
    """Read and check both files, without a model."""
    config, tensors = adapter_folder.read(folder)
    layers, others = config["layers"], config.get("modules_to_save", [])
    named = {f"{name}.{factor}" for name in layers for factor in FACTORS} | set(others)
    if tensors.keys() != named:
        unknown, missing = sorted(tensors.keys() - named), sorted(named - tensors.keys())
        raise ValueError(
            f"{folder / config['weights']['file']}: "
            + (f"has no tensor {', '.join(missing)}, which {CONFIG_FILE} names" if missing else
               f"holds tensors that {CONFIG_FILE} does not name: {', '.join(unknown)}")
        )  # fmt: skip
    path = folder / CONFIG_FILE
    return {n: _checked_record(path, n, record, tensors) for n, record in layers.items()}, tensors


def _as_named_in(
    names: dict[str, str], records: dict[str, LayerRecord], tensors: dict[str, Tensor]
) -> tuple[dict[str, LayerRecord], dict[str, Tensor]]:
    """Rename layers as in the model: earlier versions saved names with wrappers."""
    known = set(names.values())
    renamed = {
        layer: next((n for n in (layer, names.get(layer), strip(layer)) if n in known), layer)
        for layer in records
    }
    if len(set(renamed.values())) < len(renamed):
        renamed = {}
    split = {key: key.rpartition(".") for key in tensors}
    return (
        {renamed.get(layer, layer): record for layer, record in records.items()},
        {join(renamed.get(o, o), own): tensors[key] for key, (o, _, own) in split.items()},
    )


def _checked_record(path: Path, name: str, record: Any, tensors: dict[str, Tensor]) -> LayerRecord:
    """One layer of the config, checked against its tensors."""
    try:
        checked = LayerRecord.from_json(record, tensors[f"{name}.dcft_A"].dtype)
        geometry = checked.geometry
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: layer {name!r}: {error}") from None
    for factor, shape in factor_shapes(geometry).items():
        tensor = tensors[f"{name}.{factor}"]
        if tensor.dtype not in validation.FLOAT_DTYPES:
            raise ValueError(f"{path}: {name}.{factor}: expected a float dtype, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{path}: {name}.{factor}: expected shape {list(shape)}, got {list(tensor.shape)}"
            )
    return checked


def _differences_of_swapped(
    swapped: dict[str, DCFTLinear], records: dict[str, LayerRecord]
) -> list[str]:
    """Why the adapters cannot be copied into layers that are swapped already."""
    differences = [
        f"{name}: adapted in the model, not in the file" for name in swapped.keys() - records
    ]
    for name, record in records.items():
        if name not in swapped:
            differences.append(f"{name}: adapted in the file, not in the model")
            continue
        here, there = (
            {"kernels": SHARED} | each.to_json() for each in (LayerRecord.of(swapped[name]), record)
        )
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


def _differences_of_values(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Why the model's parameters and buffers cannot hold `tensors`."""
    differences: list[str] = []
    missing = set(tensors)
    first: dict[Tensor, str] = {}

    def compare(name: str, module: nn.Module) -> None:
        for own, here in own_tensors(module).items():
            key = join(name, own)
            if key in tensors:
                missing.discard(key)
                difference = _difference_of_value(here, tensors[key])
                other = first.setdefault(here, key)
                if (
                    not difference
                    and other != key
                    and not torch.equal(tensors[other], tensors[key].to(tensors[other].dtype))
                ):
                    difference = f"tied to {other} in the model, not in the file"
                if difference:
                    differences.append(f"{key}: {difference}")

    visit(model, compare)
    return sorted(differences + [f"{key}: {_NO_TENSOR}" for key in missing])


def _difference_of_value(here: Tensor, there: Tensor) -> str | None:
    if here.is_meta:
        return "on the meta device, which holds no values"
    if here.shape != there.shape:
        return f"shape is {list(here.shape)} in the model, {list(there.shape)} in the file"
    if here.dtype == there.dtype:
        return None
    if not (here.is_floating_point() and there.is_floating_point()):
        return f"dtype is {here.dtype} in the model, {there.dtype} in the file"
    # In float64, since the narrowest dtypes lack isfinite.
    converted, there = there.to(here.dtype).double(), there.double()
    if bool((there.isfinite() & ~converted.isfinite()).any()):
        return f"values in the file overflow {here.dtype}"
    return None


def _differences_of_base(
    model: nn.Module, actual: dict[str, str], records: dict[str, LayerRecord]
) -> list[str]:
    """Why the layers of a base model cannot be swapped as the file says."""
    if "" in records:
        check_holds_its_layers(model)
    differences = {
        name: _difference_of_base(model.get_submodule(actual[name]), record)
        if name in actual
        else "not in the model"
        for name, record in records.items()
    }
    return [f"{name}: {difference}" for name, difference in differences.items() if difference]


def _difference_of_base(layer: nn.Module, record: LayerRecord) -> str | None:
    reason = why_not_adaptable(layer)
    if reason is not None:
        return reason
    if layer.weight.is_meta:
        return "on the meta device; load the base model's weights first"
    here, there = linear_sizes(layer), (record.in_features, record.out_features)
    if here != there:
        return f"(in_features, out_features) is {here} in the model, {there} in the file"
    return None


def _as_path(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder: expected a path, got {folder!r}")
    return Path(folder)
