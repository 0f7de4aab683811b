"""Everything that a failed operation on a model must leave unchanged."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from dcft_kernels import DCFTLinear


class ModelSnapshot:
    """Modules, parameters, values, requires_grad, modes and merge states at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._facts, self._values = _facts(model), _values(model)

    def assert_unchanged(self) -> None:
        """Fail, and say which fact differs, unless the model is as it was."""
        facts, values = _facts(self._model), _values(self._model)
        differing = {
            name: (self._facts.get(name), facts.get(name))
            for name in facts.keys() | self._facts.keys()
            if facts.get(name) != self._facts.get(name)
        }
        assert not differing, f"(before, after): {differing}"
        changed = [name for name in values if values[name] != self._values[name]]
        assert not changed, f"values changed: {changed}"


def _facts(model: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        facts[f"module {name!r}"] = (id(module), type(module).__name__, module.training)
        if isinstance(module, DCFTLinear):
            facts[f"adapter {name!r}"] = (module.merged, module.options)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        facts[f"parameter {name!r}"] = (
            id(parameter),
            tuple(parameter.shape),
            parameter.dtype,
            parameter.device,
            parameter.requires_grad,
            parameter.grad is None,
        )
    return facts


def _values(model: nn.Module) -> dict[str, bytes]:
    """The bits of every tensor, so that -0.0 for 0.0 is a change and NaN for NaN is not."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    # Only the state dict shows a merged layer's base weight.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the state dict of a merged DCFTLinear")
        tensors |= {f"state {name}": tensor for name, tensor in model.state_dict().items()}
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
        if tensor.device.type == "cpu"
    }
