"""The functions that may stand between an adapter's two factors: MPC_n of arXiv 2407.05417, 4.2."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dcft_kernels.validation import one_of

# New ones go last: state dicts hold their positions.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
NONLINEARITIES = tuple(_FUNCTIONS)


def not_mergeable(what: str, nonlinearity: str) -> RuntimeError:
    """The error for merging an adapter with a nonlinearity; `what` names the action and adapter."""
    return RuntimeError(
        f"{what} has nonlinearity={nonlinearity!r} between its factors: its update is not a "
        "matrix and cannot be merged; use it unmerged, or remove the nonlinearity with "
        "dcft_kernels.constraints.remove_nonlinearity"
    )


def function_of(nonlinearity: str) -> Callable[[Tensor], Tensor]:
    """The function of this name, elementwise and differentiable; GELU is the exact one."""
    return _FUNCTIONS[one_of("nonlinearity", nonlinearity, NONLINEARITIES)]
