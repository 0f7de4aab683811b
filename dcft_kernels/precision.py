"""Whether PyTorch lets products of float32 run in tf32: the kernels' then may as well."""

from __future__ import annotations

import torch


def tf32_is_allowed() -> bool:
    """`torch.backends.cuda.matmul.allow_tf32`, or what has come to stand for it."""
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.allow_tf32
    except RuntimeError:  # the setting was made by its newer name, and the older refuses to answer
        return matmul.fp32_precision == "tf32"
