"""The tuner: finds the layers to adapt, and combines adapters."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from dcft_kernels.linear import is_conv1d
from dcft_kernels.model import leave_fused_paths
from dcft_kernels.peft.checkpoint import check_sizes, check_weights, sizes, without_compiler
from dcft_kernels.peft.combination import combine
from dcft_kernels.peft.config import PATTERNS, SIZES_TO_SAVE, DCFTConfig
from dcft_kernels.peft.layer import BASE_ONLY, FACTORS, DCFTLinearLayer, layers_with


class DCFTModel(BaseTuner):
    """A model whose linear layers have DCFT adapters; `peft.get_peft_model` makes it."""

    prefix = "dcft_"
    tuner_layer_cls = DCFTLinearLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter to every target, or to none.

        Raises:
            ValueError: a name that cannot be a folder's; layers of other sizes than those that the
                adapter was saved from; and what PEFT raises. The layers are as they were then.
        """
        if not re.fullmatch(r"[^\x00-\x1f./\\]+", adapter_name):
            raise ValueError(
                "adapter_name: expected a name without '.', '/', '\\' and control characters, "
                f"since it names the folder that the adapter is saved in, got {adapter_name!r}"
            )
        if hasattr(nn.ParameterDict(), adapter_name):
            raise ValueError(
                f"adapter_name: {adapter_name!r} is an attribute of torch.nn.ParameterDict, which "
                "holds the adapters; choose another name"
            )
        config = self.peft_config[adapter_name]
        check_sizes(model, config.layer_sizes or {})
        config.__dict__.pop(SIZES_TO_SAVE, None)  # of another model
        had_it = layers_with(model, adapter_name).keys()
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            for name in layers_with(model, adapter_name).keys() - had_it:
                _take_out(model, name, adapter_name)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
        adapted = layers_with(model, adapter_name)
        for argument in ("kernel_size_pattern", "stride_pattern"):  # PEFT checks the others
            pattern = getattr(config, argument)
            if unused := pattern.keys() - {get_pattern_key(pattern, name) for name in adapted}:
                warnings.warn(
                    f"The following {argument} keys did not match any targeted module and were "
                    f"ignored: {sorted(unused)}.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        leave_fused_paths(model, DCFTLinearLayer)

    def _create_and_replace(
        self,
        peft_config: DCFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        settings = layer_settings(peft_config, current_key)
        if isinstance(target, DCFTLinearLayer):
            target.update_layer(adapter_name, peft_config, settings)
            return
        _check_supported(target, current_key)
        layer = DCFTLinearLayer(
            target, adapter_name, peft_config, settings, **get_quantization_kwargs(self)
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, DCFTLinearLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # A base layer again. PEFT would also set its weight, which not all quantised ones have.
            setattr(parent, child_name, new_module)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` on to the layers; PEFT wraps every forward pass in this."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, DCFTLinearLayer)]
        known = {BASE_ONLY}.union(*(layer.dcft_A.keys() for layer in layers))
        if unknown := sorted(set(adapter_names) - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # Beam search repeats each row, but not before an encoder.
        beams = kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) else 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        in_encoder: set[nn.Module] = set()
        if beams > 1 and hasattr(self.model, "get_encoder"):
            encoder = self.model.get_encoder()
            if encoder is not self.model:
                in_encoder = set(encoder.modules())

        def add_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            names = adapter_names if module in in_encoder else repeated
            return args, kwargs | {"adapter_names": names}

        handles = [
            module.register_forward_pre_hook(add_names, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (DCFTLinearLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Add an adapter whose increment is the weighted sum of others', up to rounding.

        In each layer, the ranks of the others are concatenated. If their kernels `dcft_C` differ,
        the sum has a kernel per rank.

        Args:
            adapters: adapters of this model; in each layer with equal kernel sizes and strides.
            weights: one for each adapter, of any sign.
            adapter_name: the name of the new adapter, which does not become active.
            combination_type: only `"cat"`.

        Raises:
            ValueError: unknown adapters, an adapter of that name, different numbers of adapters and
                weights, kernel sizes or strides that differ, or an adapter with `modules_to_save`
                or biases.
            The model is unchanged then.
        """
        if combination_type != "cat":
            raise ValueError(
                f"combination_type: expected 'cat', got {combination_type!r}: no other is exact; "
                "for those of LoRA, export the adapters with export_lora"
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        config, sums = combine(self.model, self.peft_config, adapters, weights)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for name, adapter in sums.items():
            layer = self.model.get_submodule(name)
            for factor, values in zip(FACTORS, adapter, strict=False):
                getattr(layer, factor)[adapter_name].data = values

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: DCFTConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Also note the layers' sizes for the config, which PEFT saves next."""
        config.__dict__[SIZES_TO_SAVE] = sizes(model, adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT translates keys by this in both directions, also for compiled blocks."""
        return without_compiler(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DCFTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Also refuse weights that do not fit, of which PEFT would only warn."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_weights(model, adapter_name, remapped)
        return remapped


def _take_out(model: nn.Module, name: str, adapter_name: str) -> None:
    """Remove an adapter from a layer, and the layer if it has no other."""
    layer: Any = model.get_submodule(name)
    layer.delete_adapter(adapter_name)
    if not layer.geometry:
        parent, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent), child_name, layer.base_layer)


def layer_settings(config: DCFTConfig, name: str) -> dict[str, Any]:
    """`r`, `kernel_size`, `stride` and `alpha` of the layer of this name."""
    patterns = {setting: getattr(config, name) for setting, name in PATTERNS.items()}
    return {
        setting: pattern.get(get_pattern_key(pattern, name), getattr(config, setting))
        for setting, pattern in patterns.items()
    }


def _check_supported(target: nn.Module, name: str) -> None:
    """Raise TypeError for anything that is not a linear layer, possibly quantised or adapted."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base).__name__ == "NonDynamicallyQuantizableLinear":
        raise TypeError(
            f"Target module {name} is not supported: nn.MultiheadAttention reads its weight "
            "without calling it. Leave it out with `exclude_modules`."
        )
    if isinstance(base, nn.Linear) or is_conv1d(base):
        return
    backend = resolve_quantization_backend(base)
    if backend is not None and backend.layer_type == "linear":
        return
    hint = ""
    if isinstance(base, nn.Embedding):
        hint = " To train an embedding, name it in `modules_to_save`."
    raise TypeError(
        f"Target module {name} is not supported: {type(base).__name__}. Currently, only "
        "`torch.nn.Linear` (optionally quantized) and `transformers.pytorch_utils.Conv1D` are "
        f"supported.{hint}"
    )
