"""Launches that are prepared once for each kind of call, and what every launcher does alike.

To find the compiled kernel of a call, Triton looks at every argument: its dtype, whether it is one,
whether it is divisible by 16. That takes longer than a small kernel runs. All of it follows from
what a `Launch` is prepared for, but for the alignment of tensors, which is looked at in each call.
So a launcher keeps its launches (`prepared`), by all that their arguments and their tile follow
from:

    launch = _prepare(geometry, tokens, device, ..., forms(tensors))
    launch(tensors, numbers)

`python -m benchmarks.host` measures what of a call is the processor's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Final, TypeAlias, TypeVar

import torch
from torch import Tensor

from dcft_kernels.precision import tf32_is_allowed
from dcft_kernels.triton.tiles import architecture, when_changed

# Of an optional tensor, all that a kernel is compiled for but its alignment: dtype and strides.
Form: TypeAlias = tuple[torch.dtype, tuple[int, ...]] | None


class Varying(Enum):
    """What stands in a launch's arguments for something that every call passes anew."""

    TENSOR = 0
    NUMBER = 1  # a float, or a tensor descriptor


TENSOR: Final = Varying.TENSOR
NUMBER: Final = Varying.NUMBER

# What Triton compiles differently for when a pointer is divisible by it.
_ALIGNMENT = 16
# Launches that a launcher keeps; the least recently used go.
_KEPT = 2048

_Prepare = TypeVar("_Prepare", bound=Callable[..., Any])
_caches: list[Any] = []


def prepared(prepare: _Prepare) -> _Prepare:
    """Keep what `prepare` returns, by its arguments."""
    cached = functools.lru_cache(maxsize=_KEPT)(prepare)
    _caches.append(cached)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Drop every prepared launch: other tiles are looked up from now on."""
    for cache in _caches:
        cache.cache_clear()


when_changed(forget)


def forms(tensors: Sequence[Tensor | None]) -> tuple[Form, ...]:
    """The tensors' forms."""
    return tuple([None if t is None else (t.dtype, t.stride()) for t in tensors])


class Launch:
    """A kernel, its grid and its arguments, complete but for the tensors and numbers of a call.

    Triton's own way into the kernel is taken until it has once been through with aligned tensors,
    and for tensors that are not. It is the only one under the interpreter.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        device: torch.device,
        arguments: Sequence[Any],
        options: dict[str, Any],
        **constants: Any,
    ) -> None:
        """Prepare a launch.

        Args:
            kernel: a `triton.jit` function.
            programs: how many of them the grid is.
            device: that it runs on.
            arguments: in the kernel's order, up to its first constant; `TENSOR` and `NUMBER` stand
                for what calls pass.
            options: `num_warps`, `num_stages`.
            **constants: the kernel's remaining arguments, in its order.

        Raises:
            TypeError: constants other than the kernel's, or in another order.
        """
        expected = kernel.arg_names[len(arguments) :]
        if list(constants) != list(expected):
            raise TypeError(
                f"constants: expected {', '.join(expected)} in this order, got "
                f"{', '.join(constants)}"
            )
        self._kernel = kernel
        self._grid = (programs,)
        self._device = device
        self._tensors = [i for i, argument in enumerate(arguments) if argument is TENSOR]
        self._numbers = [i for i, argument in enumerate(arguments) if argument is NUMBER]
        self._arguments = [None if isinstance(a, Varying) else a for a in arguments]
        self._constants = constants
        self._options = options
        # What runs the compiled kernel, given all arguments, and pointers as integers.
        self._run: Callable[..., object] | None = None

    def __call__(self, tensors: Sequence[Tensor | None], numbers: Sequence[Any] = ()) -> None:
        """Launch on the current stream.

        Args:
            tensors: for each `TENSOR` in turn, of the form that the launch was prepared for.
            numbers: for each `NUMBER` in turn.
        """
        arguments = self._arguments.copy()
        for where, number in zip(self._numbers, numbers, strict=True):
            arguments[where] = number
        if self._run is None:
            self._through_triton(arguments, tensors)
            return
        bits = 0
        for where, tensor in zip(self._tensors, tensors, strict=True):
            if tensor is not None:
                pointer = tensor.data_ptr()
                bits |= pointer
                arguments[where] = pointer
        if bits % _ALIGNMENT:
            self._through_triton(arguments, tensors)
            return
        with _on(self._device):
            self._run(*arguments, *self._constants.values())

    def _through_triton(self, arguments: list[Any], tensors: Sequence[Tensor | None]) -> None:
        """Launch as Triton does, and keep the kernel that it compiled or found."""
        for where, tensor in zip(self._tensors, tensors, strict=True):
            arguments[where] = tensor
        with _on(self._device):
            compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        # The interpreter compiles nothing, nor does somebody who only records what would be.
        # For AMD, Triton also asks how large a tensor's memory is.
        if compiled is None or torch.version.hip is not None:
            return
        if all(t is None or t.data_ptr() % _ALIGNMENT == 0 for t in tensors):
            self._run = compiled[(*self._grid, 1, 1)]


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def may_use_tf32(dtype: torch.dtype) -> bool:
    """Whether products of tokens in `dtype` are of float32, and PyTorch lets them run in tf32."""
    return dtype == torch.float32 and tf32_is_allowed()


def dot_precision(device: torch.device, tf32: bool) -> str:
    """`input_precision` of products of float32.

    `tf32` only where `may_use_tf32`. Otherwise float32's own precision: on NVIDIA GPUs as three
    tf32 products of the operands' halves, which the matrix units compute; ordinary instructions,
    which take whole rows of operands in registers, spill them.
    """
    if architecture(device).startswith("gfx"):
        return "ieee"
    return "tf32" if tf32 else "tf32x3"


def strides(form: Form, dimensions: int) -> tuple[int, ...]:
    """The strides of an optional tensor argument, zeros where there is none."""
    return (0,) * dimensions if form is None else form[1]


def itemsize_of(form: Form) -> int:
    """Bytes an element of a tensor that there is."""
    if form is None:
        raise TypeError("form: expected a tensor's, got None")
    return form[0].itemsize
