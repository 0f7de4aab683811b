"""How `torch.autocast` applies: once, to the base layer's operands, and to nothing inside."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_NOTHING = contextlib.nullcontext()


def cast(tensor: Tensor) -> Tensor:
    """Cast as `nn.Linear` does under `torch.autocast`: all but float64, to autocast's dtype."""
    return tensor.to(dtype_after(tensor, dtype_for(tensor)))


def dtype_for(tensor: Tensor) -> torch.dtype | None:
    """What autocast has tensors on this one's device cast to; None where it is off."""
    return torch.get_autocast_dtype(tensor.device.type) if _is_on(tensor) else None


def dtype_after(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that `cast` gives a tensor, where `dtype_for` it is `dtype`."""
    return tensor.dtype if dtype is None or tensor.dtype == torch.float64 else dtype


def suspended(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keep autocast, on `like`'s device, out of a block whose dtypes are chosen already."""
    if _is_on(like):
        return torch.autocast(like.device.type, enabled=False)
    return _NOTHING


def _is_on(tensor: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    # The meta device is not one that autocast can be asked about.
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)
