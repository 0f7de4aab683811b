"""Repairs to Triton's interpreter (3.6 to 3.9) that the tests need.

- It stores bfloat16 as the bits of an unsigned integer, truncates when it converts float32 to it,
  and multiplies the bits themselves in `tl.dot`. Repaired: round to nearest even as GPUs do, and
  multiply the values, which are exact in float32, as matrix units do.
- It wraps the whole language again whenever one `@triton.jit` function calls another, which takes
  most of the time. Repaired: only where it is not wrapped yet.
- It makes integers of the product of a mask and a scalar, and then refuses them (3.9).
- It reads loop bounds from arrays in a way that NumPy 2.4 has removed (3.6).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _cast(self: Any, source: Any, target_type: Any) -> Any:
    pair = (source.dtype.scalar, target_type.scalar)
    if pair == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(_float32_to_bfloat16(source.data), tl.bfloat16)
    if pair == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(_bfloat16_to_float32(source.data), tl.float32)
    return _original_cast(self, source, target_type)


def _dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    a, b = (
        interpreter.TensorHandle(_bfloat16_to_float32(each.data), tl.float32)
        if each.dtype.scalar == tl.bfloat16
        else each
        for each in (a, b)
    )
    return _original_dot(self, a, b, d, *options)


def _call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.full) for language in languages):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **keywords)


def _boolean(mask: Any) -> Any:
    return interpreter.TensorHandle(np.asarray(mask.data).astype(bool), tl.int1)


# Descriptor loads and stores pass the rest by keyword.
def _masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
    return _original_load(self, pointers, _boolean(mask), *rest, **options)


def _masked_store(
    self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any
) -> Any:
    return _original_store(self, pointers, value, _boolean(mask), *rest, **options)


def _patch_tensor(tensor: Any, *scope: Any) -> None:
    _original_patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(np.asarray(self.handle.data).item())


def repair() -> None:
    """Install the repairs in this process."""
    interpreter.InterpreterBuilder.create_masked_load = _masked_load
    interpreter.InterpreterBuilder.create_masked_store = _masked_store
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpretedFunction.__call__ = _call


_original_cast = interpreter.InterpreterBuilder.cast_impl
_original_dot = interpreter.InterpreterBuilder.create_dot
_original_load = interpreter.InterpreterBuilder.create_masked_load
_original_store = interpreter.InterpreterBuilder.create_masked_store
_original_patch_tensor = interpreter._patch_lang_tensor
