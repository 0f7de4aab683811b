"""Launches that are prepared once for each kind of call, and what every launcher does alike.

To find the compiled kernel of a call, Triton looks at every argument: its dtype, whether it is one,
whether it is divisible by 16. That takes longer than a small kernel runs. All of it follows from
what a `Launch` is prepared for, but for the alignment of tensors, which is looked at in each call.
So a launcher keeps its launches (`prepared`), by all that their arguments and their tile follow
from; the number of tokens is not among it, or every new one would be prepared for:

    launch = _prepare(geometry, crowd(tokens, device), ..., forms(tensors))
    launch(programs, tensors, numbers)

`python -m benchmarks.host` measures what of a call is the processor's.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import torch
import triton
from torch import Tensor

from dcft_kernels.precision import tf32_is_allowed
from dcft_kernels.triton.tiles import architecture, when_changed

# Of an optional tensor, all that a kernel is compiled for but its alignment: dtype and strides.
Form: TypeAlias = tuple[torch.dtype, tuple[int, ...]] | None


class Varying(Enum):
    """What stands in a launch's arguments for something that every call passes anew."""

    TENSOR = 0
    NUMBER = 1  # a float, a tensor descriptor, or an integer that nothing is compiled for


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
    """A kernel and its arguments, complete but for the tensors and numbers of a call.

    Triton's own way into the kernel is taken until it has once been through with aligned tensors,
    for tensors that are not, and while a profiler's hooks are set. It is the only one under the
    interpreter. Other settings of Triton's that are made after a first launch (its debug mode, its
    instrumentation) are not looked at again.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        arguments: Sequence[Any],
        options: dict[str, Any],
        **constants: Any,
    ) -> None:
        """Prepare a launch.

        Args:
            kernel: a `triton.jit` function.
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
        self._index = device.index  # None on the CPU, where only the interpreter runs
        self._options = options
        # All arguments are picked from a call's tensors, its numbers, and then these.
        everything = [*arguments, *constants.values()]
        self._fixed = [each for each in everything if not isinstance(each, Varying)]
        tensors, numbers = arguments.count(TENSOR), arguments.count(NUMBER)
        next_tensor = itertools.count(0)
        next_number = itertools.count(tensors)
        next_fixed = itertools.count(tensors + numbers)
        self._order = operator.itemgetter(
            *(
                next(
                    next_tensor if each is TENSOR
                    else next_number if each is NUMBER
                    else next_fixed
                )
                for each in everything
            )
        )  # fmt: skip
        self._compiled: _Compiled | None = None

    def __call__(
        self, programs: int, tensors: Sequence[Tensor | None], numbers: Sequence[Any] = ()
    ) -> None:
        """Launch on the current stream.

        Args:
            programs: how many of them the grid is.
            tensors: for each `TENSOR` in turn, of the form that the launch was prepared for.
            numbers: for each `NUMBER` in turn.
        """
        index = self._index
        if index is not None and index != torch.cuda.current_device():
            # Triton launches on the current device: make it the tensors'.
            with torch.cuda.device(index):
                self(programs, tensors, numbers)
            return
        # Triton leaves out what it was told is None, so that 0 does as well as any other number.
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = functools.reduce(operator.or_, pointers) % _ALIGNMENT == 0
        compiled = self._compiled
        if compiled is None or not aligned or _hooks_are_set():
            found = self._kernel[(programs,)](
                *self._order((*tensors, *numbers, *self._fixed)), **self._options
            )
            if aligned:
                self._compiled = _compiled(found)
            return
        compiled.run(
            programs, 1, 1,
            compiled.stream_of(index), compiled.function, compiled.metadata, None, None, None,
            *self._order((*pointers, *numbers, *self._fixed)),
        )  # fmt: skip


class _Compiled(NamedTuple):
    """What it takes to launch a compiled kernel as Triton itself does, in versions tried."""

    run: Callable[..., object]
    function: object
    metadata: object
    stream_of: Callable[[int | None], int]


def _compiled(kernel: Any) -> _Compiled | None:
    """What launches a compiled kernel; None where every launch is to go through Triton.

    The interpreter compiles nothing, nor does somebody who only records what would be. For AMD,
    Triton also looks at how large a tensor's memory is.
    """
    if kernel is None or not _IS_TRIED or kernel.metadata.target.backend != "cuda":
        return None
    stream_of = triton.runtime.driver.active.get_current_stream
    return _Compiled(kernel.run, kernel.function, kernel.packed_metadata, stream_of)


# Versions of Triton whose compiled kernels are known to be launched like this. Others look at the
# arguments of every launch.
_IS_TRIED = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])


def _hooks_are_set() -> bool:
    """Whether a profiler wants to be told of launches: one in a chain, or in place of a chain."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


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
