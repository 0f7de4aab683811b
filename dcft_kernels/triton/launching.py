"""What every launcher does alike: the device it launches on, the precision of its products."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products of tokens: `tf32` only for float32 and if PyTorch allows it."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def strides_or_zeros(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """The strides of an optional tensor argument."""
    return (0,) * dimensions if tensor is None else tensor.stride()
