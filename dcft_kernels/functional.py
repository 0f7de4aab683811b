"""DCFT as functions: they check, apply autocast, flatten, and call `autograd`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dcft_kernels import autocast, autograd, validation
from dcft_kernels.adapter import Adapter, Geometry, Pair
from dcft_kernels.backends import select, select_for_call
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
    that the windows do not fit are covered by one window more and cropped. With a kernel per rank,
    `DW` is the sum over the ranks of the increments `ConvTranspose2d(b_κ a_κ, C_κ)`.

    Args:
        x: `[..., n]`, float; any leading dimensions, any strides, empty too.
        weight: `[m, n]`, in `x`'s dtype; frozen or trainable.
        bias: `[m]` or None.
        dcft_A: `[k, I]`, the input-side factor; any float dtype, like `dcft_B`, `dcft_C`.
        dcft_B: `[J, k]`, the output-side factor.
        dcft_C: the transposed-convolution kernel, `[d_out, d_in]`, or one for each rank,
            `[k, d_out, d_in]`.
        scaling: factor of the increment.
        stride: distance between windows, an int or `(out, in)`; None is the kernel size.
        dropout_p: probability of zeroing an element of the adapter's own view of `x`.
        training: whether dropout is active.
        backend: `"auto"`, `"torch"`, `"reference"` or `"triton"`, see `dcft_kernels.backends`.
        strategy: `"auto"`, `"seeded"`, `"row_block"` or `"torch"`, see `dcft_kernels.backends`.
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
    geometry, runs = _checked(
        _check_layer, (x, weight, bias, dcft_A, dcft_B, dcft_C),
        stride, scaling, dropout_p, backend, strategy, nonlinearity,
    )  # fmt: skip
    runs = select_for_call(runs, backend, strategy, traced=autograd.is_traced(x))
    if autocast.dtype_for(x) is not None:
        x, weight = autocast.cast(x), autocast.cast(weight)
        bias = None if bias is None else autocast.cast(bias)
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    adapter = Adapter(dcft_A, dcft_B, dcft_C, float(scaling), geometry, float(dropout_p))
    if dropout_p != 0.0:
        adapter = _with_dropout(adapter, training, x.device, runs)
    y = autograd.linear(tokens, weight, bias, None, adapter, runs, nonlinearity)
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
    geometry, runs = _checked(
        _check_update, (x, y, dcft_A, dcft_B, dcft_C),
        stride, scaling, dropout_p, backend, "auto", nonlinearity,
    )  # fmt: skip
    runs = select_for_call(runs, backend, traced=autograd.is_traced(x))
    y, x = autocast.cast(y), autocast.cast(x)
    flat_y, flat_x = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    adapter = Adapter(dcft_A, dcft_B, dcft_C, float(scaling), geometry, float(dropout_p))
    if dropout_p != 0.0:
        adapter = _with_dropout(adapter, training, x.device, runs)
    out = autograd.linear(flat_x, None, None, flat_y, adapter, runs, nonlinearity)
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
        return autograd.delta_weight(adapter, _selected(backend, adapter, dcft_A.dtype))


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
    runs = _selected(backend, adapter, weight.dtype)
    seed = draw_seed(weight.device) if stochastic_rounding else None
    with autocast.suspended(weight):
        autograd.merge_(weight, adapter, seed, runs)
    return weight


@torch.no_grad()
def merged_weight(weight: Tensor, adapter: Adapter, backend: str) -> Tensor:
    """A new `weight + scaling * DW`, rounded once; strides as `weight`'s."""
    with autocast.suspended(weight):
        return autograd.merge(weight, adapter, None, _selected(backend, adapter, weight.dtype))


def _selected(backend: str, adapter: Adapter, dtype: torch.dtype) -> str:
    """What computes a dense increment."""
    return select_for_call(select(backend, adapter, dtype), backend, traced=False)


def _checked(
    check: Callable[..., Geometry], tensors: Sequence[Any], stride: Any, *settings: Any
) -> tuple[Geometry, str]:
    """The geometry of a call's operands and what runs it, all arguments checked.

    Args:
        check: checks the tensors, given the stride.
        tensors: `x` first, the factors last.
        stride: as passed.
        settings: as passed: scaling, dropout_p, backend, strategy, nonlinearity.
    """
    key = _signature(check, tensors, stride, settings)
    found = None if key is None else _checked_calls.get(key)
    if found is None:
        geometry = _not_recorded(check, tensors, stride)
        scaling, dropout_p, backend, *names = settings
        validation.finite_number("scaling", scaling)
        validation.probability("dropout_p", dropout_p)
        x, *_, A, B, C = tensors
        adapter = Adapter(A, B, C, scaling, geometry)
        dtype = autocast.dtype_after(x, autocast.dtype_for(x))
        found = geometry, select(backend, adapter, dtype, *names)
        if key is not None:
            if len(_checked_calls) >= _MAX_CHECKED_CALLS:
                _checked_calls.clear()
            _checked_calls[key] = found
    return found


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


# What the checks found, by signature: training steps and inference repeat the same calls, and the
# checks take as long as a small product.
_checked_calls: dict[Any, tuple[Geometry, str]] = {}
_MAX_CHECKED_CALLS = 4096
# Of these types alone: True equals 1 and 2.0 equals 2 as keys, but they are refused.
_STEP_TYPES = frozenset((int, type(None)))
_SETTING_TYPES = frozenset((int, float, str, type(None)))


def _signature(check: Any, tensors: Sequence[Any], stride: Any, settings: tuple[Any, ...]) -> Any:
    """Everything that the checks depend on, hashable; None for arguments they have to see.

    Those are tensor subclasses, arguments of unusual types, and whatever a compiler traces.
    """
    if torch.compiler.is_compiling():
        return None
    steps = stride if type(stride) is tuple else (stride,)
    if not _STEP_TYPES.issuperset(map(type, steps)):
        return None
    if not _SETTING_TYPES.issuperset(map(type, settings)):
        return None
    signature: list[Any] = []
    for tensor in tensors:
        if type(tensor) is Tensor or type(tensor) is Parameter:
            signature += (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        elif tensor is None:
            signature.append(None)
        else:
            return None
    if signature[0] is None:
        return None
    # Any number of tokens. The entries of a tensor are four; its shape is the first.
    x, y, *_ = tensors
    if check is _check_layer:
        signature[0] = x.shape[-1:]
    elif y is not None and x.shape[:-1] == y.shape[:-1]:
        signature[0], signature[4] = x.shape[-1:], y.shape[-1:]
    return (check, autocast.dtype_for(tensors[0]), stride, *settings, *signature)


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
    """Check `dcft_update`'s tensors against each other."""
    x, y, *factors = tensors
    y, x = validation.tokens("y", y), validation.tokens("x", x)
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y: expected leading dimensions {list(x.shape[:-1])}, those of x, "
            f"got shape {list(y.shape)}"
        )
    sizes = {"in_features": x.shape[-1], "out_features": y.shape[-1]}
    geometry = validation.factors(*factors, **sizes, stride=stride)
    validation.same_device("x", x, y=y, dcft_A=factors[0])
    validation.same_dtype("x", x, y=y)
    return geometry


def _adapter(A: Tensor, B: Tensor, C: Tensor, geometry: Geometry, scaling: float) -> Adapter:
    """The adapter, its scaling checked."""
    return Adapter(A, B, C, validation.finite_number("scaling", scaling), geometry)


def _with_dropout(adapter: Adapter, training: bool, device: torch.device, runs: str) -> Adapter:
    """The adapter with a seed if training: drawn last, so that a failing call draws none.

    Its scaling includes dropout's `1 / (1 - p)`. (`composite` applies PyTorch's dropout instead.)
    """
    if not training:
        return adapter._replace(dropout_p=0.0)
    if runs == "composite":
        return adapter
    scaling = adapter.scaling / (1.0 - adapter.dropout_p)
    return adapter._replace(scaling=scaling, seed=draw_seed(device))
