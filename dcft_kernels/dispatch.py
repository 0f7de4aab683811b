"""The one place that decides which backend computes a call.

| `backend` | runs |
| --- | --- |
| `"auto"` | the fastest backend that can run the call on its device: `torch` in this release |
| `"torch"` | the factored identity as PyTorch operators, on any device |
| `"reference"` | the paper's equation, materialised: the oracle; `torch.func` transforms need it |
| `"triton"` | fused GPU kernels; raises, and says why, where they cannot run |

Inside `vmap` the reference runs without dropout only: its mask is drawn from a seed's value.

There is no silent fallback: a backend that was asked for by name runs or raises.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from dcft_kernels import torch_backend
from dcft_kernels.adapter import Adapter

BackendName = Literal["auto", "torch", "reference", "triton"]
BACKENDS: tuple[str, ...] = get_args(BackendName)


class Backend(Protocol):
    """What a backend provides; tensors are 2-D and checked, `x [T, n]`, `y [T, m]`."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
        """`x W^T + b + dropout(x) DW^T`."""

    def update(self, y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
        """`y + dropout(x) DW^T`."""

    def delta_weight(self, adapter: Adapter) -> Tensor:
        """`scaling * DW`, `[m, n]`."""


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is a known name."""
    if backend not in BACKENDS:
        raise ValueError(
            f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )


def select(backend: str) -> Backend:
    """The backend that runs for a requested name; ValueError or RuntimeError says why none does."""
    check_backend(backend)
    if backend == "reference":
        from dcft_kernels import reference  # loaded only when asked for by name

        return reference
    if backend == "triton":
        from dcft_kernels.triton import why_unavailable

        raise RuntimeError(
            f"backend='triton' cannot run: {why_unavailable()}; use backend='auto' or 'torch'"
        )
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"backend={backend!r}: torch.func transforms (vmap, grad, jvp) cannot pass through "
            "its operators; use backend='reference' inside them"
        )
    return torch_backend
