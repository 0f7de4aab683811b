"""DCFT as functions: they check, apply autocast, flatten, and call `autograd`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dcft_kernels import autocast, autograd, validation
from dcft_kernels.adapter import Adapter, Geometry, Pair
from dcft_kernels.backends import select
from dcft_kernels.dropout import draw_seed


def dcft_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dcft_A: Tensor,
    dcft_B: Tensor,
    dcft_C: Tensor,
    *,
    scaling: float = 1.0,
    stride: int | Pair | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
    strategy: str = "auto",
    nonlinearity: str | None = None,
) -> Tensor:
    """A linear layer and its DCFT increment: `x W^T + b + scaling * dropout(x) DW^T`.

    `DW = ConvTranspose2d(dcft_B @ dcft_A, dcft_C)`, equations 5 and 6 of arXiv 2503.01419; for
    `stride` equal to the kernel size it is `kron(dcft_B @ dcft_A, dcft_C)`. With windows
    `I = ceil((n - d_in) / s_in) + 1` along the input and `J` along the output, sizes
    that the windows do not fit are covered by one window more and cropped.

    Args:
        x: `[..., n]`, float; any leading dimensions, any strides, empty too.
        weight: `[m, n]`, in `x`'s dtype; frozen or trainable.
        bias: `[m]` or None.
        dcft_A: `[k, I]`, the input-side factor; any float dtype, like `dcft_B`, `dcft_C`.
        dcft_B: `[J, k]`, the output-side factor.
        dcft_C: `[d_out, d_in]`, the transposed-convolution kernel.
        scaling: factor of the increment.
        stride: distance between windows, an int or `(out, in)`; None is the kernel size.
        dropout_p: probability of zeroing an element of the adapter's own view of `x`.
        training: whether dropout is active.
        backend: `"auto"`, `"torch"`, `"reference"` or `"triton"`, see `dcft_kernels.backends`.
        strategy: `"auto"`, `"row_block"` or `"torch"`, see `dcft_kernels.backends`.
        nonlinearity: None, or `"relu"`, `"gelu"`, `"silu"`, `"tanh"`: the function `h` of
            `y = x W^T + b + scaling * expand(dcft_C h(U))`, where `U` is what `dcft_A` makes of
            `dropout(x)` (MPC_n, see `dcft_kernels.constraints`). There is no `DW` then.

    Returns:
        `[..., m]` in `x`'s dtype, or in autocast's where autocast is on.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit.
        RuntimeError: a backend requested by name cannot run.
    """
    tensors = (x, weight, bias, dcft_A, dcft_B, dcft_C)
    geometry = _not_recorded(_checked_geometry, tensors, stride)
    adapter = _adapter(dcft_A, dcft_B, dcft_C, geometry, scaling, dropout_p)
    if autocast.dtype_for(x) is not None:
        x, weight = autocast.cast(x), autocast.cast(weight)
        bias = None if bias is None else autocast.cast(bias)
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    runs = select(backend, adapter, x.dtype, strategy, nonlinearity)
    adapter = _with_dropout(adapter, training, x.device, runs)
    y = autograd.linear(tokens, weight, bias, adapter, runs, nonlinearity)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def dcft_update(  # noqa: D417 - the others are `dcft_linear`'s
    y: Tensor,
    x: Tensor,
    dcft_A: Tensor,
    dcft_B: Tensor,
    dcft_C: Tensor,
    *,
    scaling: float = 1.0,
    stride: int | Pair | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
    nonlinearity: str | None = None,
) -> Tensor:
    """The DCFT increment alone, added to a base layer's output: `y + scaling * dropout(x) DW^T`.

    For base layers that are not a plain dense weight: quantised, sharded, fused.

    Args:
        y: `[..., m]`, the base layer's output, in `x`'s dtype. It is not changed.
        x: `[..., n]`, the base layer's input; leading dimensions as `y`'s.
        dcft_A: `[k, I]`; see `dcft_linear` for this and the arguments not listed.

    Returns:
        `[..., m]`, a new tensor in `y`'s dtype, or in autocast's where autocast is on.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit.
        RuntimeError: a backend requested by name cannot run.
    """
    geometry = _not_recorded(_check_update, (y, x, dcft_A, dcft_B, dcft_C), stride)
    adapter = _adapter(dcft_A, dcft_B, dcft_C, geometry, scaling, dropout_p)
    validation.same_device("x", x, y=y, dcft_A=dcft_A)
    y, x = autocast.cast(y), autocast.cast(x)
    validation.same_dtype("x", x, y=y)
    flat_y, flat_x = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    runs = select(backend, adapter, x.dtype, nonlinearity=nonlinearity)
    adapter = _with_dropout(adapter, training, x.device, runs)
    out = autograd.update(flat_y, flat_x, adapter, runs, nonlinearity)
    return out.reshape(y.shape)


def delta_weight(  # noqa: D417 - the others are `dcft_linear`'s
    dcft_A: Tensor,
    dcft_B: Tensor,
    dcft_C: Tensor,
    *,
    in_features: int,
    out_features: int,
    stride: int | Pair | None = None,
    scaling: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The increment itself, `scaling * DW` `[m, n]`: for merging and inspection, not for training.

    Args:
        dcft_A: `[k, I]`; see `dcft_linear` for this and the arguments not listed.
        in_features: `n`; the factors alone leave it open where the last window is cropped.
        out_features: `m`.

    Returns:
        `[m, n]` in the factors' common dtype, differentiable with respect to all three.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit.
        RuntimeError: a backend requested by name cannot run.
    """
    geometry = _not_recorded(
        validation.factors, dcft_A, dcft_B, dcft_C,
        in_features=validation.positive_int("in_features", in_features),
        out_features=validation.positive_int("out_features", out_features),
        stride=stride,
    )  # fmt: skip
    adapter = _adapter(dcft_A, dcft_B, dcft_C, geometry, scaling)
    with autocast.suspended(adapter.A):
        return autograd.delta_weight(adapter, select(backend, adapter, dcft_A.dtype))


@torch.no_grad()
def add_delta_weight_(  # noqa: D417 - the others are `dcft_linear`'s
    weight: Tensor,
    dcft_A: Tensor,
    dcft_B: Tensor,
    dcft_C: Tensor,
    *,
    stride: int | Pair | None = None,
    scaling: float = 1.0,
    stochastic_rounding: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Merge in place: `weight += scaling * DW`, computed in float32 or wider and rounded once.

    On a GPU it is one pass over `weight`, with no second tensor of its size.

    Args:
        weight: `[m, n]`, any float dtype and strides; changed, without a record for autograd.
        dcft_A: `[k, I]`; see `dcft_linear` for this and the arguments not listed.
        scaling: factor of the increment; a negative one undoes a merge, up to rounding.
        stochastic_rounding: of a 16-bit `weight`: round up with the probability that makes the
            mean exact, so that increments below half a unit in the last place are not lost.

    Returns:
        `weight`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit.
        RuntimeError: a backend requested by name cannot run.
    """
    weight = validation.matrix("weight", weight)
    validation.boolean("stochastic_rounding", stochastic_rounding)
    if stochastic_rounding and weight.dtype.itemsize != 2:
        raise ValueError(
            "stochastic_rounding: expected a float16 or bfloat16 weight to round to, "
            f"got {weight.dtype}; leave it out"
        )
    geometry = validation.factors(
        dcft_A, dcft_B, dcft_C,
        in_features=weight.shape[1], out_features=weight.shape[0], stride=stride,
    )  # fmt: skip
    adapter = _adapter(dcft_A, dcft_B, dcft_C, geometry, scaling)
    validation.same_device("weight", weight, dcft_A=dcft_A)
    runs = select(backend, adapter, weight.dtype)
    seed = draw_seed(weight.device) if stochastic_rounding else None
    with autocast.suspended(weight):
        autograd.merge_(weight, adapter, seed, runs)
    return weight


@torch.no_grad()
def merged_weight(weight: Tensor, adapter: Adapter, backend: str) -> Tensor:
    """A new `weight + scaling * DW`, rounded once; strides as `weight`'s."""
    with autocast.suspended(weight):
        return autograd.merge(weight, adapter, None, select(backend, adapter, weight.dtype))


# Geometries of operands that have passed `_check_layer`, by signature: training steps repeat the
# same calls, and the checks take as long as a small product.
_checked: dict[Any, Geometry] = {}
_MAX_CHECKED = 4096


def _checked_geometry(tensors: Sequence[Any], stride: Any) -> Geometry:
    """The geometry of `x`, weight, bias, `A`, `B` and `C`, checked against each other."""
    key = _signature(tensors, stride)
    geometry = None if key is None else _checked.get(key)
    if geometry is None:
        geometry = _check_layer(tensors, stride)
        if key is not None:
            if len(_checked) >= _MAX_CHECKED:
                _checked.clear()
            _checked[key] = geometry
    return geometry


def _not_recorded(check: Callable[..., Geometry], *arguments: Any, **named: Any) -> Geometry:
    """Run a check unseen by `torch.jit.trace`, which would turn all sizes into tensors."""
    state = torch._C._get_tracing_state()
    if state is None:
        return check(*arguments, **named)
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return check(*arguments, **named)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _signature(tensors: Sequence[Any], stride: Any) -> Any:
    """Everything that `_check_layer` depends on, hashable; None for operands it has to see.

    Those are tensor subclasses, non-tensors, and whatever a compiler traces.
    """
    if torch.compiler.is_compiling():
        return None
    signature: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            signature.append(None)
        elif type(tensor) is Tensor or type(tensor) is Parameter:
            signature += (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        else:
            return None
    shape = signature[0]
    steps = stride if type(stride) is tuple else (1 if stride is None else stride,)
    # True equals 1 and 2.0 equals 2 as keys, but they are refused.
    if not shape or not all(type(step) is int for step in steps):
        return None
    signature[0] = shape[-1]  # any number of tokens
    return (*signature, autocast.dtype_for(tensors[0]), stride)


def _check_layer(tensors: Sequence[Any], stride: Any) -> Geometry:
    """Check `dcft_linear`'s tensors against each other."""
    x, weight, bias, dcft_A, dcft_B, dcft_C = tensors
    weight = validation.matrix("weight", weight)
    out_features, in_features = weight.shape
    x = validation.tokens("x", x, in_features)
    if bias is not None:
        bias = validation.float_tensor("bias", bias)
        if bias.shape != (out_features,):
            raise ValueError(f"bias: expected shape [{out_features}], got {list(bias.shape)}")
    geometry = validation.factors(
        dcft_A, dcft_B, dcft_C, in_features=in_features, out_features=out_features, stride=stride
    )
    validation.same_device("x", x, weight=weight, bias=bias, dcft_A=dcft_A)
    validation.same_dtype("x", x, weight=weight, bias=bias)
    return geometry


def _check_update(tensors: Sequence[Any], stride: Any) -> Geometry:
    """Check the shapes of `dcft_update`'s tensors against each other."""
    y, x, *factors = tensors
    y, x = validation.tokens("y", y), validation.tokens("x", x)
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y: expected leading dimensions {list(x.shape[:-1])}, those of x, "
            f"got shape {list(y.shape)}"
        )
    sizes = {"in_features": x.shape[-1], "out_features": y.shape[-1]}
    return validation.factors(*factors, **sizes, stride=stride)


def _adapter(
    A: Tensor, B: Tensor, C: Tensor, geometry: Geometry, scaling: float, dropout_p: float = 0.0
) -> Adapter:
    """The adapter, its numbers checked, without a dropout seed."""
    scaling = validation.finite_number("scaling", scaling)
    return Adapter(A, B, C, scaling, geometry, validation.probability("dropout_p", dropout_p))


def _with_dropout(adapter: Adapter, training: bool, device: torch.device, runs: str) -> Adapter:
    """The adapter with a seed if dropout is active: drawn last, so that a failing call draws none.

    Its scaling includes dropout's `1 / (1 - p)`. (`plain` applies PyTorch's dropout instead.)
    """
    if adapter.dropout_p == 0.0:
        return adapter
    if not training:
        return adapter._replace(dropout_p=0.0)
    if runs == "plain":
        return adapter
    scaling = adapter.scaling / (1.0 - adapter.dropout_p)
    return adapter._replace(scaling=scaling, seed=draw_seed(device))
