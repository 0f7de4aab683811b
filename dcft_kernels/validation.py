"""Argument checks. Errors name the argument, the value received, what was expected and the fix."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcft_kernels import autocast
from dcft_kernels.adapter import Geometry, Pair

# PyTorch's sizes are of 64 bits.
_LARGEST_SIZE = 2**63 - 1

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def module(name: str, value: Any) -> nn.Module:
    """`value` as an `nn.Module`."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(value).__name__}")
    return value


def positive_int(name: str, value: Any) -> int:
    """`value`, an int or NumPy's, as an int of at least 1."""
    if not _is_integer(value):
        raise TypeError(f"{name}: expected a positive int, got {_shown(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {_shown(value)}")
    if value > _LARGEST_SIZE:
        raise ValueError(f"{name}: expected at most 2^63 - 1, got {_shown(value)}")
    return int(value)


def pair(name: str, value: Any) -> Pair:
    """`value` as an `(out, in)` pair of positive ints; one int stands for both."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an int or a pair (out, in), got {_shown(value)}")
        return (positive_int(f"{name}[0]", value[0]), positive_int(f"{name}[1]", value[1]))
    if not _is_integer(value):
        raise TypeError(f"{name}: expected an int or a pair (out, in) of ints, got {_shown(value)}")
    return (positive_int(name, value),) * 2


def stride_pair(stride: Any, kernel_size: Pair) -> Pair:
    """`stride` as an `(out, in)` pair, at most the kernel; None is the kernel size itself."""
    if stride is None:
        return kernel_size
    strides = pair("stride", stride)
    for side, step, width in zip(("out", "in"), strides, kernel_size, strict=True):
        if step > width:
            raise ValueError(
                f"stride: expected at most the kernel size, {width} on the {side} side, got {step}:"
                " a larger stride leaves gaps in DW that no parameter reaches"
            )
    return strides


def one_of(name: str, value: Any, names: Sequence[str]) -> str:
    """`value` as one of the known names."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, names))}, got {value!r}")
    return value


def boolean(name: str, value: Any) -> bool:
    """`value` as a bool: a number there is an argument in the wrong place."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_shown(value)}")
    return value


def finite_number(name: str, value: Any) -> float:
    """`value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {_describe(value)}")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction
        number = math.inf
    # Comparisons, false for NaN too: the compiler does not trace math.isfinite.
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}")
    return number


def probability(name: str, value: Any) -> float:
    """`value` as a float in [0, 1)."""
    value = finite_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")
    return value


def float_dtype(name: str, dtype: Any) -> torch.dtype:
    """`dtype` as one of the float dtypes that DCFT computes in."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {_shown(dtype)}")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected one of {_dtype_names()}, got {dtype}")
    return dtype


def float_tensor(name: str, value: Any) -> Tensor:
    """`value` as a dense float tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected a tensor of {_dtype_names()}, got {value.dtype}; "
            f"convert it first, for example {name}.float()"
        )
    return value


def matrix(name: str, value: Any, *, stacked: bool = False) -> Tensor:
    """`value` as a 2-D float tensor; with `stacked` also as a 3-D one."""
    tensor = float_tensor(name, value)
    if tensor.dim() != 2 and not (stacked and tensor.dim() == 3):
        expected = "2-D or 3-D" if stacked else "2-D"
        raise ValueError(f"{name}: expected a {expected} tensor, got shape {list(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: expected positive sizes, got shape {list(tensor.shape)}")
    return tensor


def tokens(name: str, value: Any, features: int | None = None) -> Tensor:
    """`value` as a float tensor `[..., features]`."""
    tensor = float_tensor(name, value)
    if tensor.dim() == 0:
        raise ValueError(f"{name}: expected shape [..., features], got a scalar")
    if features is not None and tensor.shape[-1] != features:
        raise ValueError(
            f"{name}: expected a last dimension of {features}, got shape {list(tensor.shape)}"
        )
    if tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one feature, got shape {list(tensor.shape)}")
    return tensor


def factors(
    A: Any, B: Any, C: Any, *, in_features: int, out_features: int, stride: Any
) -> Geometry:
    """Check the three factors against the layer's sizes and return the geometry they describe."""
    A, B, C = matrix("dcft_A", A), matrix("dcft_B", B), matrix("dcft_C", C, stacked=True)
    kernel_size = (C.shape[-2], C.shape[-1])
    strides = stride_pair(stride, kernel_size)
    per_rank = C.dim() == 3
    geometry = Geometry.build(in_features, out_features, A.shape[0], kernel_size, strides, per_rank)
    context = f"rank={geometry.rank}, kernel_size={kernel_size}, stride={strides}"
    if A.shape[1] != geometry.inputs.windows:
        raise ValueError(
            f"dcft_A: expected shape {list(geometry.shape_A)} for in_features={in_features}, "
            f"{context}, got {list(A.shape)}"
        )
    if B.shape[1] != geometry.rank:
        raise ValueError(
            f"dcft_B: expected {geometry.rank} columns, the rank of dcft_A {list(A.shape)}, "
            f"got shape {list(B.shape)}"
        )
    if B.shape[0] != geometry.outputs.windows:
        raise ValueError(
            f"dcft_B: expected shape {list(geometry.shape_B)} for out_features={out_features}, "
            f"{context}, got {list(B.shape)}"
        )
    if C.shape != geometry.shape_C:
        raise ValueError(
            f"dcft_C: expected a kernel for each rank of dcft_A {list(A.shape)}, shape "
            f"{list(geometry.shape_C)}, or one for all, [{C.shape[1]}, {C.shape[2]}], "
            f"got shape {list(C.shape)}"
        )
    same_device("dcft_A", A, dcft_B=B, dcft_C=C)
    return geometry


def same_device(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless every tensor given lives where `tensor` does."""
    for other_name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(
                f"{other_name}: expected device {tensor.device}, where {name} is, "
                f"got {other.device}; move one with .to(...)"
            )


def same_dtype(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raise TypeError unless every tensor given has `tensor`'s dtype, cast as autocast wants."""
    autocast_dtype = autocast.dtype_for(tensor)
    dtype = autocast.dtype_after(tensor, autocast_dtype)
    for other_name, other in others.items():
        if other is None:
            continue
        got = autocast.dtype_after(other, autocast_dtype)
        if got != dtype:
            raise TypeError(
                f"{other_name}: expected {dtype}, the dtype of {name}, got {got}; "
                f"convert one with .to(...), or run under torch.autocast"
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _dtype_names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {_shown(value)}"


def _shown(value: Any) -> str:
    """The value's repr, cut to a length that fits a line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no int of more than 4300 digits
        return f"{type(value).__name__} of too many digits"
