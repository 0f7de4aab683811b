"""What training changes in a model, and checkpoints that hold only that."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dcft_kernels import validation
from dcft_kernels.linear import DCFTLinear
from dcft_kernels.wrappers import is_sharded, join, strip

FACTORS = ("dcft_A", "dcft_B", "dcft_C")

_small: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of `module` itself; of a merged layer, the base's."""
    tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    for name in module._non_persistent_buffers_set:
        tensors.pop(name, None)
    if isinstance(module, DCFTLinear) and module.merged:
        tensors["weight"] = module._base_while_merged[0]
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def trained_names(module: nn.Module) -> set[str]:
    """Which of `own_tensors(module)` training changes, the factors included.

    These are the parameters that require a gradient, the buffers beside them, and the running
    statistics of normalization layers, whose parameters may be frozen.
    """
    tensors = own_tensors(module)
    names = {name for name, tensor in tensors.items() if tensor.requires_grad}
    factors = {name for name in tensors if isinstance(module, DCFTLinear) and name in FACTORS}
    if names - factors or isinstance(module, _NormBase):
        names |= tensors.keys() & module._buffers.keys()
    return names | factors


@contextlib.contextmanager
def small_checkpoints(model: nn.Module) -> Iterator[None]:
    """Within, `model.state_dict()` leaves out the frozen parameters, and `load_state_dict` may.

    What is left resumes training exactly: adapters, what else requires a gradient, and buffers.

        with dcft_kernels.small_checkpoints(model):
            trainer.train(resume_from_checkpoint=...)

    This also holds for state dicts of modules that contain `model`, as of DDP. Those of sharded
    models stay whole.

    Do not export within: `model.save_pretrained` would write a model without its base. That is why
    this is a context and not a setting.

    Args:
        model: the model whose checkpoints are written, with its base weights loaded.
    """
    validation.module("model", model)
    hooks = (
        model.register_state_dict_post_hook(_drop_frozen),
        model.register_load_state_dict_post_hook(_do_not_miss_frozen),
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
    frozen = _frozen_names(model)
    for key in list(state_dict):
        if key.startswith(prefix) and strip(key[len(prefix) :]) in frozen:
            del state_dict[key]


def _do_not_miss_frozen(model: nn.Module, incompatible_keys: Any) -> None:
    frozen = _frozen_names(model)
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if strip(key) not in frozen]


def _frozen_names(model: nn.Module) -> set[str]:
    """What state dicts of `model` leave out; nothing if it is a copy made within the context."""
    if model not in _small or is_sharded(model):
        return set()
    return {
        strip(join(name, own))
        for name, module in model.named_modules(remove_duplicate=False)
        for own in module._parameters.keys() - trained_names(module)
    }
