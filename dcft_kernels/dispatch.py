"""The one place that decides which backend computes a call.

| `backend` | runs |
| --- | --- |
| `"auto"` | the Triton kernels on a GPU that can run them, `torch` everywhere else |
| `"torch"` | the factored identity as PyTorch operators, on any device |
| `"reference"` | the paper's equation, materialised: the oracle; `torch.func` transforms need it |
| `"triton"` | the Triton kernels; raises, and says why, where they cannot run |

`"auto"` falls back to `torch` by this rule and no other: where the kernels cannot run on the device
(`triton.why_unavailable`) or do not take the adapter (`strategy.why_kernels_cannot`). A call of no
tokens launches nothing and is always PyTorch's. Among the kernels' strategies, and between
them and `torch`, `dcft_kernels.strategy` chooses.

A layer with a nonlinearity between its factors is PyTorch's wherever it runs, by `"auto"` and
`"torch"`; the two others do not compute it, and say so (`select_nonlinear`).

Inside `vmap` the reference runs without dropout only: its mask is drawn from a seed's value.

There is no silent fallback: a backend that was asked for by name runs or raises.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from dcft_kernels import ops
from dcft_kernels.adapter import Adapter
from dcft_kernels.geometry import Geometry
from dcft_kernels.nonlinearity import check_nonlinearity
from dcft_kernels.strategy import (
    Call,
    check_strategy,
    requested_strategy,
    why_kernels_cannot,
    why_strategy_cannot,
)

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

    def merge(self, weight: Tensor, adapter: Adapter, seed: Tensor | None) -> Tensor:
        """A new `weight + scaling * DW` `[m, n]`, rounded once; with a seed, stochastically."""

    def merge_(self, weight: Tensor, adapter: Adapter, seed: Tensor | None) -> None:
        """The same in place."""


class _Operators(NamedTuple):
    """The operators of `ops`, run with one strategy."""

    strategy: str

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
        return ops.linear(x, weight, bias, adapter, self.strategy)

    def update(self, y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
        return ops.update(y, x, adapter, self.strategy)

    def delta_weight(self, adapter: Adapter) -> Tensor:
        return ops.delta_weight(adapter, self.strategy)

    def merge(self, weight: Tensor, adapter: Adapter, seed: Tensor | None) -> Tensor:
        return ops.merge(weight, adapter, seed, self.strategy)

    def merge_(self, weight: Tensor, adapter: Adapter, seed: Tensor | None) -> None:
        ops.merge_(weight, adapter, seed, self.strategy)


class _Nonlinear(NamedTuple):
    """The two operations that a layer with a nonlinearity has; it has no `DW` to build or merge."""

    nonlinearity: str

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
        return ops.nonlinear_linear(x, weight, bias, adapter, self.nonlinearity)

    def update(self, y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
        return ops.nonlinear_update(y, x, adapter, self.nonlinearity)


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is a known name."""
    if backend not in BACKENDS:
        raise ValueError(
            f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )


def select(
    backend: str,
    adapter: Adapter,
    dtype: torch.dtype,
    strategy: str = "auto",
    *,
    dropout: bool = False,
) -> Backend:
    """Who runs a call.

    Args:
        backend: the name that was asked for.
        adapter: the call's adapter, checked; its device is the call's.
        dtype: of the tokens, or of the result of `delta_weight`.
        strategy: the strategy that was asked for.
        dropout: whether the call drops elements.

    Raises:
        ValueError: an unknown backend or strategy, or a strategy that cannot take the adapter.
        RuntimeError: a backend that was asked for by name and cannot run.
    """
    check_backend(backend)
    check_strategy(strategy)
    factors = (adapter.A.dtype, adapter.B.dtype, adapter.C.dtype)
    asked = (backend, strategy, adapter.geometry, adapter.A.device, dtype, factors, dropout)
    # A compiled graph asks when its operators run, so that it serves whatever is asked for then.
    if torch.compiler.is_compiling():
        return _select(*asked, "auto")
    if backend != "reference" and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"backend={backend!r}: torch.func transforms (vmap, grad, jvp) cannot pass through "
            "its operators; use backend='reference' inside them"
        )
    return _selected(*asked, requested_strategy("auto")[0])


def _select(
    backend: str,
    strategy: str,
    geometry: Geometry,
    device: torch.device,
    dtype: torch.dtype,
    factors: tuple[torch.dtype, ...],
    dropout: bool,
    by_environment: str,
) -> Backend:
    """`select`, given all that it depends on: `factors` are the dtypes of `A`, `B` and `C`."""
    if backend in ("torch", "reference") and strategy not in ("auto", "torch"):
        raise ValueError(
            f"strategy: {strategy!r} is one of the Triton kernels', got backend={backend!r}; "
            "use backend='auto' or 'triton'"
        )
    if backend == "triton" and strategy == "torch":
        raise ValueError("strategy: 'torch' is not one of backend='triton'; use backend='torch'")
    if backend == "reference":
        from dcft_kernels import reference  # loaded only when asked for by name

        return reference
    by_default = strategy == "auto" and backend == "auto"
    if "torch" in (backend, strategy) or (by_default and by_environment == "torch"):
        return _Operators("torch")
    reason = _why_not_triton(geometry, device, dtype, factors)
    if reason is None:
        if strategy != "auto":
            call = Call(1, geometry, dtype, factors[0], "any", dropout=dropout)
            reason = why_strategy_cannot(strategy, call)
            if reason is not None:
                raise ValueError(f"strategy: {strategy!r} cannot take this layer: {reason}")
        elif backend == "triton":
            return _Operators(ops.KERNELS)
        return _Operators(strategy)
    if strategy != "auto":
        raise RuntimeError(
            f"strategy={strategy!r} cannot run: {reason}; use strategy='auto' or 'torch'"
        )
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {reason}; use backend='auto' or 'torch'")
    return _Operators("torch")


def select_nonlinear(nonlinearity: str, backend: str, strategy: str = "auto") -> _Nonlinear:
    """Who runs a call with a nonlinearity between its factors: PyTorch.

    Raises:
        ValueError: an unknown name, or a backend or strategy that does not compute nonlinearities.
    """
    check_nonlinearity(nonlinearity)
    check_backend(backend)
    check_strategy(strategy)
    if backend in ("triton", "reference"):
        raise ValueError(
            f"backend: {backend!r} does not compute nonlinearity={nonlinearity!r}, PyTorch "
            "operations do; use backend='auto' or 'torch', or leave the nonlinearity out"
        )
    if strategy not in ("auto", "torch"):
        raise ValueError(
            f"strategy: {strategy!r} is one of the Triton kernels', which do not compute "
            f"nonlinearity={nonlinearity!r}; use strategy='auto', or leave the nonlinearity out"
        )
    return _Nonlinear(nonlinearity)


def why_not_triton(adapter: Adapter, dtype: torch.dtype) -> str | None:
    """The reason why `"auto"` runs PyTorch for this call, or None if it runs the kernels."""
    factors = (adapter.A.dtype, adapter.B.dtype, adapter.C.dtype)
    asked = (adapter.geometry, adapter.A.device, dtype, factors)
    return _why_not_triton(*asked) if torch.compiler.is_compiling() else _reason(*asked)


def _why_not_triton(
    geometry: Geometry, device: torch.device, dtype: torch.dtype, factors: tuple[torch.dtype, ...]
) -> str | None:
    from dcft_kernels.triton import why_unavailable

    reason = why_unavailable(device)
    if reason is not None:
        return reason
    for factor in factors:
        reason = why_kernels_cannot(geometry, dtype, factor)
        if reason is not None:
            return reason
    return None


def takes_group(backend: str, x: Tensor, adapters: Sequence[Adapter]) -> bool:
    """Whether the kernels take layers that share their input `x [T, n]` as one.

    They do if they take each of them, all have one kind of windows on the input side, and one
    adapter with the sum of their ranks is no more than they take.
    """
    if backend not in ("auto", "triton") or len(adapters) < 2 or x.shape[0] == 0:
        return False
    if requested_strategy("auto")[0] not in ("auto", "row_block"):
        return False
    geometries = [adapter.geometry for adapter in adapters]
    if any(each.inputs != geometries[0].inputs for each in geometries):
        return False
    first = geometries[0]
    joint = first._replace(
        rank=sum(each.rank for each in geometries),
        outputs=first.outputs._replace(width=max(each.outputs.width for each in geometries)),
    )
    return all(
        why_not_triton(adapter._replace(geometry=geometry), x.dtype) is None
        for adapter in adapters
        for geometry in (adapter.geometry, joint)
    )


# A training step asks the same over and over.
_selected = functools.lru_cache(maxsize=4096)(_select)
_reason = functools.lru_cache(maxsize=4096)(_why_not_triton)


def forget() -> None:
    """Ask again who can run what, after a change of what can."""
    _selected.cache_clear()
    _reason.cache_clear()
