"""The operators' library: what all of them have in common.

An adapter travels to an operator as tensors and numbers. `strategy` says who computes: `"torch"`
the PyTorch backend, anything else the Triton kernels. `"auto"` is settled when the operator runs
and not when it is traced, so that a compiled graph serves every number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from dcft_kernels.adapter import Adapter
from dcft_kernels.geometry import Geometry
from dcft_kernels.gpu_rates import INTERPRETER, identify
from dcft_kernels.precision import tf32_is_allowed
from dcft_kernels.strategy import Call, bucket, choose, requested_strategy

LIBRARY = torch.library.Library("dcft_kernels", "DEF")

ADAPTER_SCHEMA = (
    "Tensor dcft_A, Tensor dcft_B, Tensor dcft_C, Tensor? seed, "
    "float scaling, int[] stride, float dropout_p, str strategy"
)
# How many arguments the adapter's part of an operator has; they follow its leading tensors.
ADAPTER_ARGUMENTS = 8

# The strategy of an operator that may choose, but among the kernels': `backend="triton"`.
KERNELS = "kernels"


def needs_dispatcher(x: Tensor) -> bool:
    """Whether somebody looks on for whom the operators are meant: a compiler, a fake tensor."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, Parameter)


def records() -> bool:
    """Whether autograd looks on: backward, or forward, which the layer has no formula for."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def flatten(adapter: Adapter, strategy: str) -> tuple[Any, ...]:
    """An adapter as operator arguments, which are tensors and numbers only."""
    geometry = adapter.geometry
    return (
        adapter.A,
        adapter.B,
        adapter.C,
        adapter.seed,
        adapter.scaling,
        [geometry.outputs.stride, geometry.inputs.stride],
        adapter.dropout_p,
        strategy,
    )


def unflatten(arguments: Sequence[Any], in_features: int, out_features: int) -> tuple[Adapter, str]:
    """The inverse of `flatten`, given the sizes that the other tensors of the call tell."""
    A, B, C, seed, scaling, stride, dropout_p, strategy = arguments
    geometry = Geometry.build(
        in_features, out_features, A.shape[0], (C.shape[0], C.shape[1]), (stride[0], stride[1])
    )
    return Adapter(A, B, C, scaling, geometry, dropout_p, seed), strategy


def resolve(strategy: str, tokens: Tensor, adapter: Adapter, *, base: bool = True) -> str:
    """Settle `"auto"` for this very call: who runs it, now that the number of tokens is known.

    Args:
        strategy: as asked for.
        tokens: `x` or `g`: both passes of a call that has a base settle on the same.
        adapter: of the call.
        base: whether a base layer is computed along; if not, there is one way for kernels to go.
    """
    geometry = adapter.geometry
    if strategy == "torch" or 0 in (tokens.shape[0], geometry.inputs.size, geometry.outputs.size):
        return "torch"
    dtype = tokens.dtype
    return _resolve(
        strategy,
        requested_strategy("auto" if strategy == KERNELS else strategy)[0],
        bucket(tokens.shape[0]),
        geometry,
        dtype,
        adapter.A.dtype,
        tokens.device,
        base,
        adapter.seed is not None,
        dtype == torch.float32 and tf32_is_allowed(),
    )


@functools.lru_cache(maxsize=4096)
def _resolve(
    strategy: str,
    asked_for: str,
    tokens: int,
    geometry: Geometry,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device,
    base: bool,
    dropout: bool,
    tf32: bool,
) -> str:
    """`resolve`, given all that it depends on: `asked_for` by the environment too."""
    if asked_for in ("fused", "scratch") and not base:
        return "row_block"
    architecture, name = identify(device)
    if asked_for == "auto" and architecture is None:  # the interpreter: nothing to predict
        return "row_block"
    call = Call(
        tokens,
        geometry,
        dtype,
        adapter_dtype,
        architecture or INTERPRETER,
        name,
        base=base,
        dropout=dropout,
        tf32=tf32,
        kernels_only=strategy == KERNELS,
    )
    return choose(call, "auto" if strategy == KERNELS else strategy).strategy
