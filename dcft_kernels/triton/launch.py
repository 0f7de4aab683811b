"""Launches that skip Triton's inspection of arguments after a kernel's first call.

To find the compiled kernel of a call, Triton inspects every argument: its dtype, whether it is one,
whether it is divisible by 16. That takes longer than a small kernel runs. Nearly all of it follows
from the dtypes and strides of the tensors and from the tile, so launchers prepare a `Launch` for
each such signature (`tiles.prepared`). A `Launch` keeps the `CompiledKernel` of its first call and
launches that one from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import torch
import triton
from torch import Tensor

from dcft_kernels.triton.tiles import Tile, architecture

# What a kernel is compiled for of an optional tensor, except its alignment: dtype and strides.
Signature: TypeAlias = tuple[torch.dtype, tuple[int, ...]] | None

# Stands in a launch's arguments for what every call passes: a tensor, a float, or an integer that
# the kernel does not specialise on.
PER_CALL: Final = object()

# Triton compiles a separate kernel for pointers that are divisible by this.
_ALIGNMENT = 16


class Launch:
    """A kernel and its arguments, complete except for what every call passes."""

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        arguments: Sequence[Any],
        tile: Tile,
        *,
        may_overlap: bool = False,
        **constants: Any,
    ) -> None:
        """Prepare a launch.

        Args:
            kernel: a `triton.jit` function.
            device: that it runs on.
            arguments: in the kernel's order, up to its first constant; with `PER_CALL` for each
                value that calls pass.
            tile: for its number of warps and stages.
            may_overlap: whether the kernel may start while the launch before it still runs (it
                waits for that one itself: programmatic dependent launch).
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
        self._options = {"num_warps": tile.warps, "num_stages": tile.stages}
        if may_overlap:
            self._options["launch_pdl"] = True
        self._arguments = [*arguments, *constants.values()]
        self._slots = [i for i, each in enumerate(arguments) if each is PER_CALL]
        # By the alignment of a call's tensors: all else is the same for every call.
        self._compiled: dict[tuple[bool, ...], Any] = {}
        self._types: list[object] | None = None  # of the first call, under the interpreter

    def __call__(self, programs: int, *values: Any) -> None:
        """Launch `programs` programs on the current stream, with a value for each `PER_CALL`."""
        if self._index is not None and self._index != torch.cuda.current_device():
            # Triton launches on the current device: make it the tensors'.
            with torch.cuda.device(self._index):
                self(programs, *values)
            return
        arguments = self._arguments.copy()
        for slot, value in zip(self._slots, values, strict=True):
            arguments[slot] = value
        aligned = tuple(
            [each.data_ptr() % _ALIGNMENT == 0 for each in values if isinstance(each, Tensor)]
        )
        compiled = self._compiled.get(aligned)
        if compiled is not None:
            compiled[(programs, 1, 1)](*arguments)
            return
        compiled = self._kernel[(programs,)](*arguments, **self._options)
        if compiled is None:
            self._check_types(values)
        # On AMD, Triton also specialises on a tensor's size.
        elif compiled.metadata.target.backend == "cuda":
            self._compiled[aligned] = compiled

    def _check_types(self, values: tuple[Any, ...]) -> None:
        """Check that a compiled kernel would serve every call; the interpreter compiles none."""
        types = [each.dtype if isinstance(each, Tensor) else type(each) for each in values]
        self._types = self._types or types
        if types != self._types:
            raise AssertionError(f"launch: prepared for {self._types}, got {types}")


def may_overlap(device: torch.device) -> bool:
    """Whether a launch may start before the one before it ends; not under the interpreter."""
    return architecture(device) == "sm_90" and not triton.knobs.runtime.interpret


def signatures(tensors: Sequence[Tensor | None]) -> tuple[Signature, ...]:
    """The tensors' signatures."""
    return tuple([None if t is None else (t.dtype, t.stride()) for t in tensors])


def strides(signature: Signature, dimensions: int) -> tuple[int, ...]:
    """The strides of an optional tensor argument, zeros if it is None."""
    return (0,) * dimensions if signature is None else signature[1]


def kernel_strides(C: Signature) -> tuple[int, ...]:
    """The strides of `C [k, d_out, d_in]`; 0 along the ranks if they share one kernel."""
    return (0, *strides(C, 2))[-3:]


def may_use_tf32(dtype: torch.dtype) -> bool:
    """Whether products of tokens in `dtype` are of float32, and PyTorch lets them run in tf32."""
    if dtype != torch.float32:
        return False
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.allow_tf32
    except RuntimeError:  # set by its newer name, after which the older one refuses to answer
        return matmul.fp32_precision == "tf32"


def dot_precision(device: torch.device, tf32: bool) -> str:
    """`input_precision` of products of float32.

    `tf32` only where `may_use_tf32`. Otherwise float32's own precision: on NVIDIA GPUs as three
    tf32 products of the operands' halves, which the matrix units compute; ordinary instructions,
    which take whole rows of operands in registers, spill them.
    """
    if architecture(device).startswith("gfx"):
        return "ieee"
    return "tf32" if tf32 else "tf32x3"
