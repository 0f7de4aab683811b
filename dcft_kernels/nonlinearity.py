"""The functions that may stand between an adapter's two factors: MPC_n of arXiv 2407.05417, 4.2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

NonlinearityName = Literal["relu", "gelu", "silu", "tanh"]
NONLINEARITIES: tuple[str, ...] = get_args(NonlinearityName)

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def check_nonlinearity(nonlinearity: object) -> str:
    """`nonlinearity` as a known name; ValueError lists those for any other."""
    if not isinstance(nonlinearity, str) or nonlinearity not in NONLINEARITIES:
        raise ValueError(
            f"nonlinearity: expected one of {', '.join(map(repr, NONLINEARITIES))}, "
            f"got {nonlinearity!r}"
        )
    return nonlinearity


def not_mergeable(what: str, nonlinearity: str) -> RuntimeError:
    """The error for merging an adapter that has a nonlinearity; `what` names the action and it."""
    return RuntimeError(
        f"{what} has nonlinearity={nonlinearity!r} between its factors, so what it adds is no "
        "matrix that a weight could take in; run it as it is, or take the nonlinearity out with "
        "dcft_kernels.constraints.remove_nonlinearity"
    )


def function_of(nonlinearity: str) -> Callable[[Tensor], Tensor]:
    """The function of this name, elementwise and differentiable; GELU is the exact one."""
    return _FUNCTIONS[check_nonlinearity(nonlinearity)]
