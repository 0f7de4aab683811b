"""Layers that share one input, as one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dcft_kernels import autocast, ops, validation
from dcft_kernels.dispatch import select, takes_group
from dcft_kernels.functional import checked_layer, with_dropout
from dcft_kernels.geometry import Pair


class GroupMember(NamedTuple):
    """One layer of `dcft_linear_group`; its arguments as `dcft_linear` takes them."""

    weight: Tensor  # [m, n]
    bias: Tensor | None  # [m]
    dcft_A: Tensor  # [k, I]
    dcft_B: Tensor  # [J, k]
    dcft_C: Tensor  # [d_out, d_in]
    scaling: float = 1.0


def dcft_linear_group(
    x: Tensor,
    members: Sequence[GroupMember | tuple[Any, ...]],
    *,
    stride: int | Pair | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Layers that share their input, such as q, k, v or gate, up: `dcft_linear` of each.

    On a GPU the adapters read `x` once for all layers, and once more on the way back; wherever the
    kernels cannot take the group as one, every layer is computed for itself. Dropout drops the same
    elements of `x` for all layers.

    Args:
        x: `[..., n]`, float; any leading dimensions, any strides, empty too.
        members: `(weight, bias, dcft_A, dcft_B, dcft_C)`, and `scaling` if it is not 1, of each
            layer; output sizes and ranks may differ.
        stride: distance between windows, an int or `(out, in)`; None is the kernel size.
        dropout_p: probability of zeroing an element of the adapters' own view of `x`.
        training: whether dropout is active.
        backend: `"auto"`, `"torch"`, `"reference"` or `"triton"`.

    Returns:
        One `[..., m]` for each layer, as `dcft_linear` returns it.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: no members, shapes, devices or numbers that do not fit.
        RuntimeError: a backend named explicitly that cannot run.
    """
    if not members:
        raise ValueError("members: expected at least one layer, got none")
    x = autocast.cast(validation.tokens("x", x))  # once for all
    layers = []
    for index, member in enumerate(members):
        weight, bias, A, B, C, scaling = _fields(index, member)
        try:
            layers.append(
                checked_layer(
                    x, weight, bias, A, B, C,
                    scaling=scaling, stride=stride, dropout_p=dropout_p,
                )
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise type(error)(f"members[{index}]: {error}") from error
    xs, weights, biases, adapters = map(list, zip(*layers, strict=True))
    x, leading = xs[0].reshape(-1, xs[0].shape[-1]), xs[0].shape[:-1]
    dropout = bool(training) and dropout_p > 0.0
    backends = [select(backend, adapter, x.dtype, dropout=dropout) for adapter in adapters]
    if dropout:
        seed = with_dropout(adapters[0], training, x.device).seed
        adapters = [
            adapter._replace(scaling=adapter.scaling / (1.0 - dropout_p), seed=seed)
            for adapter in adapters
        ]
    if takes_group(backend, x, adapters):
        outputs = ops.linear_group(x, weights, biases, adapters)
    else:
        outputs = [
            each.linear(x, weight, bias, adapter)
            for each, weight, bias, adapter in zip(backends, weights, biases, adapters, strict=True)
        ]
    return tuple(y.reshape(*leading, y.shape[-1]) for y in outputs)


def _fields(index: int, member: Any) -> GroupMember:
    """A member with its scaling."""
    if not isinstance(member, tuple) or len(member) not in (5, 6):
        size = f" of {len(member)}" if isinstance(member, tuple) else ""
        raise TypeError(
            f"members[{index}]: expected (weight, bias, dcft_A, dcft_B, dcft_C) and perhaps a "
            f"scaling, got {type(member).__name__}{size}"
        )
    return GroupMember(*member)
