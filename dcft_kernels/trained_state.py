"""What training changes in a model, and checkpoints that hold only that."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from dcft_kernels import validation
from dcft_kernels.linear import DCFTLinear
from dcft_kernels.wrappers import is_sharded, join

FACTORS = ("dcft_A", "dcft_B", "dcft_C")

_small: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and persistent buffers; of a merged layer, its base weight."""
    tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    for name in module._non_persistent_buffers_set:
        tensors.pop(name, None)
    if isinstance(module, DCFTLinear) and module.merged:
        tensors["weight"] = module._base_while_merged[0]
    if isinstance(module, ParametrizationList):
        # The buffers of spectral_norm are in a submodule that has no parameters.
        tensors |= dict(module.named_buffers())
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def trained_names(module: nn.Module) -> set[str]:
    """Which of `own_tensors(module)` training changes, the factors included.

    Parameters that require a gradient, the buffers of the same module, and the running statistics
    of normalization layers, even if the parameters of those are frozen.
    """
    tensors = own_tensors(module)
    names = {name for name, tensor in tensors.items() if tensor.requires_grad}
    factors = {name for name in tensors if isinstance(module, DCFTLinear) and name in FACTORS}
    if names - factors or isinstance(module, _NormBase):
        names |= tensors.keys() - module._parameters.keys()
    return names | factors


@contextlib.contextmanager
def small_checkpoints(model: nn.Module) -> Iterator[None]:
    """While active, `model.state_dict()` has no frozen parameters, and none need to be loaded.

    What remains resumes training exactly: adapters, other trainable parameters, and buffers.

        with dcft_kernels.small_checkpoints(model):
            trainer.train(resume_from_checkpoint=...)

    State dicts of modules that contain `model`, such as DDP, are reduced too. Those of sharded
    models are not.

    Do not export the model in this context: `model.save_pretrained` would leave out the base.

    Args:
        model: the model whose checkpoints are written, with its base weights loaded.
    """
    validation.module("model", model)
    hooks = (
        model.register_state_dict_post_hook(_drop_frozen),
        model.register_load_state_dict_pre_hook(_add_frozen),
    )
    _small.add(model)
    try:
        yield
    finally:
        _small.discard(model)
        for hook in hooks:
            hook.remove()


def _drop_frozen(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for key in _frozen(model):
        state_dict.pop(prefix + key, None)


def _add_frozen(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the model's own parameters, which are then copied to themselves: no key is missing."""
    for key, parameter in _frozen(model).items():
        state_dict.setdefault(prefix + key, parameter)


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """The frozen parameters by state dict key; none if `model` is a copy made in the context."""
    if model not in _small or is_sharded(model):
        return {}
    return {
        # checkpoint_wrapper removes its own name from state dicts.
        join(name, own).replace("_checkpoint_wrapped_module.", ""): parameter
        for name, module in model.named_modules(remove_duplicate=False)
        for own, parameter in module._parameters.items()
        if parameter is not None and own not in trained_names(module)
    }
