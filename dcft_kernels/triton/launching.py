"""What every launcher does alike: the device it launches on, the precision of its products."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dcft_kernels.precision import tf32_is_allowed
from dcft_kernels.triton.tiles import architecture


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """`input_precision` of products of float32, for tokens in `dtype`.

    `tf32` only for float32 tokens and if PyTorch allows it. Otherwise float32's own precision: on
    NVIDIA GPUs as three tf32 products of the operands' halves, which the matrix units compute;
    ordinary instructions, which take whole rows of operands in registers, spill them.
    """
    if architecture(device).startswith("gfx"):
        return "ieee"
    if dtype == torch.float32 and tf32_is_allowed():
        return "tf32"
    return "tf32x3"


def strides_or_zeros(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """The strides of an optional tensor argument."""
    return (0,) * dimensions if tensor is None else tensor.stride()
