"""The factored identity in plain PyTorch, for any device: fast, and never as large as `DW`."""

from dcft_kernels.torch_backend.ops import linear, update
from dcft_kernels.torch_backend.passes import delta_weight

__all__ = ["delta_weight", "linear", "update"]
