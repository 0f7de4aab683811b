"""The factored identity in plain PyTorch, for any device: fast, and never as large as `DW`."""

from dcft_kernels.torch_backend.passes import (
    add_adapter_,
    add_nonlinear_adapter_,
    backward,
    delta_weight,
    linear,
    merge,
    update,
)

__all__ = [
    "add_adapter_",
    "add_nonlinear_adapter_",
    "backward",
    "delta_weight",
    "linear",
    "merge",
    "update",
]
