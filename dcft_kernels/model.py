"""Operations on whole models: swap layers in, freeze, count, merge."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import nn

from dcft_kernels import validation
from dcft_kernels.linear import SETTINGS, DCFTLinear, DCFTOptions
from dcft_kernels.nonlinearity import not_mergeable
from dcft_kernels.targets import (
    ALL_LINEAR,
    Targets,
    ancestry,
    check_patterns,
    matches,
    select_layers,
)
from dcft_kernels.wrappers import is_sharded

_ADAPTER_PREFIX = "dcft_"


def swap_linear(
    model: nn.Module,
    targets: Targets = ALL_LINEAR,
    *,
    exclude: Targets = (),
    **dcft_options: Any,
) -> list[str]:
    """Replace linear layers of `model` by `DCFTLinear`, in place; the base weights are shared.

    By default the model's output does not change until it is trained: every increment starts at
    zero, with a scaling derived from the layer's sizes, so that LoRA's learning rates fit.

    Args:
        model: any module; transformers' GPT-2 style `Conv1D` layers count as linear.
        targets: `"all-linear"`: every plain linear layer (no subclasses, which may compute
            something else) except the output head, layers tied to an embedding, and those that
            PEFT has adapted or made. A list: names or endings of names (`["query", "value"]`).
            Any other string: one of these, or a regular expression for the whole name.
        exclude: layers to leave alone, a list or a string as for `targets`.
        **dcft_options: `rank`, `kernel_size`, `stride`, `alpha`, `dropout`, `init`, `backend`,
            `adapter_dtype`, `strategy`, `nonlinearity`, `kernels`, see `DCFTLinear`.

    Returns:
        The names of the swapped layers, in the model's order. A layer registered under several
        names stays one layer and is listed under each.

    Raises:
        TypeError: an unknown option, or a target that is not a plain linear layer or belongs to an
            adapter of PEFT.
        ValueError: a target that matches nothing (near misses are listed) or is swapped already.
        The model is untouched then.
    """
    validation.module("model", model)
    options = DCFTOptions.from_keywords(dcft_options)
    return swap_each(model, dict.fromkeys(select_layers(model, targets, exclude), options))


def swap_each(model: nn.Module, options: dict[str, DCFTOptions]) -> list[str]:
    """Replace the layers named by `options`, each with its own settings; all checks are done."""
    adapted: dict[nn.Module, DCFTLinear] = {}
    for name, layer_options in options.items():
        linear = model.get_submodule(name)
        if linear not in adapted:
            adapted[linear] = DCFTLinear.wrap(linear, layer_options)
    # Nothing can fail from here on.
    replace_modules(model, adapted)
    leave_fused_paths(model, DCFTLinear)
    _keep_settings_out_of_ddp(model)
    for layer in adapted.values():
        layer.freeze_base()
    return list(options)


def replace_modules(model: nn.Module, replacements: dict[nn.Module, Any]) -> None:
    """Put each replacement in every place where its key is registered."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
                if name == "_orig_mod":  # torch.compile has captured the former child
                    parent._initialize()  # type: ignore[operator]


def leave_fused_paths(model: nn.Module, adapted: type[nn.Module]) -> None:
    """Turn off PyTorch's fused encoder, which reads weights without calling the adapted layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, adapted) for child in module.children()
        ):
            # Disables the fused path.
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(
            isinstance(inner, adapted) for inner in module.modules()
        ):
            module.use_nested_tensor = False


def _keep_settings_out_of_ddp(model: nn.Module) -> None:
    """Keep DistributedDataParallel from broadcasting these constants in every forward pass.

    A forward pass on rank 0 alone, such as an evaluation, would wait for the other ranks.
    """
    ignored: Any = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    ignored = {*ignored, *(f"{name}.{SETTINGS}" for name in find_dcft_layers(model))}
    model._ddp_params_and_buffers_to_ignore = ignored


def dcft_layers(model: nn.Module) -> dict[str, DCFTLinear]:
    """The adapted layers of `model` by name; ValueError if there is none."""
    layers = find_dcft_layers(model)
    if not layers:
        raise ValueError("model: has no DCFTLinear layers; call swap_linear(model) first")
    return layers


def find_dcft_layers(model: nn.Module) -> dict[str, DCFTLinear]:
    """The adapted layers of `model` by name, possibly none."""
    modules = validation.module("model", model).named_modules()
    return {name: module for name, module in modules if isinstance(module, DCFTLinear)}


def merge_model(model: nn.Module, *, unload: bool = False) -> None:
    """Merge every adapted layer, all or none.

    The state dict of a merged model, and so what `save_pretrained` writes, still holds the base
    weights and the adapters. To save the merged weights, as a plain model, use `unload`.

    Args:
        model: a model with `DCFTLinear` layers, none of them merged.
        unload: also replace every merged layer by a plain one, of the kind it was before the swap,
            and drop the adapters: for export. It cannot be undone. PyTorch's fused encoder path
            stays off, as the swap left it.

    Raises:
        RuntimeError: some layers are merged already, or have a nonlinearity.
        ValueError: no adapted layers, a sharded model, or a weight that `DCFTLinear.merge` refuses.
        The model is untouched then.
    """
    layers = dcft_layers(model)
    for name, layer in layers.items():
        if layer.nonlinearity is not None:
            raise not_mergeable(f"model: {name!r}: this DCFTLinear", layer.nonlinearity)
    # Asked of the model: after a forward pass, FSDP's weights look like any others.
    if is_sharded(model):
        raise ValueError(
            "model: is sharded (FSDP or tensor parallelism); load the saved adapter into a plain "
            "model and merge there"
        )
    if unload:
        if isinstance(model, DCFTLinear):
            raise ValueError(
                "model: is itself the layer to replace, which nothing holds; use its to_linear()"
            )
        plain: dict[nn.Module, nn.Module] = {}
        for name, layer in layers.items():
            plain[layer] = _naming(name, layer.to_linear)
        replace_modules(model, plain)
        return
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"model: {len(merged)} of {len(layers)} layers are merged already, {merged[0]!r} "
            "first; call unmerge_model(model) before"
        )
    done: list[DCFTLinear] = []
    try:
        for name, layer in layers.items():
            _naming(name, layer.merge)
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge_model(model: nn.Module) -> None:
    """Unmerge every merged layer: base weights come back bit for bit.

    Raises:
        RuntimeError: no layer is merged.
        ValueError: no adapted layers, or a weight that `DCFTLinear.unmerge` refuses.
        The model is untouched then.
    """
    merged = {name: layer for name, layer in dcft_layers(model).items() if layer.merged}
    if not merged:
        raise RuntimeError("model: no layer is merged; call merge_model(model) first")
    for name, layer in merged.items():
        _naming(name, functools.partial(layer._refuse_unless_plain, "unmerge", "weight"))
    for layer in merged.values():
        layer.unmerge()


def freeze_base(model: nn.Module, *, trainable: Targets = ()) -> None:
    """Leave only the DCFT adapters trainable; those of other libraries are frozen as well.

    Args:
        model: a model with `DCFTLinear` layers.
        trainable: modules or parameters to train as well, as `targets` of `swap_linear`:
            `freeze_base(model, trainable="classifier")` trains a new head,
            `trainable=["lora_A", "lora_B"]` PEFT's LoRA.

    Raises:
        RuntimeError: a layer is merged.
        ValueError: no adapted layers, or an entry of `trainable` that matches nothing.
    """
    merged = [name for name, layer in dcft_layers(model).items() if layer.merged]
    if merged:
        raise RuntimeError(f"model: {merged[0]!r} is merged; call unmerge_model(model) first")
    check_patterns("trainable", trainable)
    entries: list[Targets] = [trainable] if isinstance(trainable, str) else [[t] for t in trainable]
    # A tied parameter has several names, and the user may mean any of them.
    named = list(model.named_parameters(remove_duplicate=False))
    trained = {parameter for name, parameter in named if _is_adapter(name)}
    for entry in entries:
        wanted = {parameter for name, parameter in named if is_or_is_inside(name, entry)}
        if not wanted:
            raise ValueError(f"trainable: {entry!r} matches no parameter of the model")
        trained |= wanted
    for _, parameter in named:
        parameter.requires_grad_(parameter in trained)


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a model holds; shared parameters count once."""

    adapter: int
    """In `dcft_A`, `dcft_B` and `dcft_C` of all layers."""
    trainable: int
    """In parameters that require a gradient: the adapters and whatever else is not frozen."""
    total: int
    """In all parameters, the adapters included."""

    def __str__(self) -> str:
        share = 100 * self.adapter / self.total if self.total else 0.0
        return (
            f"adapter {self.adapter:,} ({share:.3f}%), trainable {self.trainable:,}, "
            f"total {self.total:,}"
        )


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count adapter, trainable and all parameters of `model`, which may have no adapters."""
    adapter = trainable = total = 0
    for name, parameter in validation.module("model", model).named_parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
        adapter += parameter.numel() if _is_adapter(name) else 0
    return ParameterCounts(adapter, trainable, total)


def _is_adapter(parameter_name: str) -> bool:
    return parameter_name.rsplit(".", 1)[-1].startswith(_ADAPTER_PREFIX)


def is_or_is_inside(parameter_name: str, patterns: Targets) -> bool:
    """Whether the parameter, or a module it lies in, is meant by `patterns`."""
    return any(matches(ancestor, patterns) for ancestor in ancestry(parameter_name))


def _naming(name: str, action: Any) -> Any:
    """Run `action`; an error about values names the layer."""
    try:
        return action()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
