"""How `torch.autocast` applies: to the base layer's operands, once, and to nothing inside."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def cast(tensor: Tensor) -> Tensor:
    """Cast as `nn.Linear` does under `torch.autocast`: all but float64, to autocast's dtype."""
    if not _is_on(tensor) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def suspended(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keep autocast, on `like`'s device, out of a block whose dtypes are chosen already."""
    if _is_on(like):
        return torch.autocast(like.device.type, enabled=False)
    return contextlib.nullcontext()


def _is_on(tensor: Tensor) -> bool:
    # The meta device is not one that autocast can be asked about.
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)
