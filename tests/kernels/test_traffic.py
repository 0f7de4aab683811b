"""What the kernels read and write, counted address by address under the interpreter.

Forward reads `x` once and writes `y` once; backward reads `g` and `x` once and writes `gx` once; a
merge reads and writes the weight once. `explain` counts the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dcft_kernels import DCFTLinear, explain
from dcft_kernels.triton.expand import expand, expand_backward
from dcft_kernels.triton.row_block import backward, shrink_expand
from tests.adapter_cases import CASES, AdapterShape, adapter_of, random_inputs
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts accesses in the interpreter")

TOKENS = 150  # more row blocks than programs
TILING = [case for case in CASES if case.stride == case.kernel_size]
ALL = (True, True, True)


class Accesses(NamedTuple):
    """Addresses of the elements that were loaded and stored, with repetition."""

    loads: list[np.ndarray]
    stores: list[np.ndarray]

    def of(self, tensor: Tensor, addresses: list[np.ndarray]) -> np.ndarray:
        """How often each element of a contiguous tensor was accessed, flat."""
        flat = (
            np.concatenate([a.ravel() for a in addresses]) if addresses else np.empty(0, np.int64)
        )
        index = (flat.astype(np.int64) - tensor.data_ptr()) // tensor.itemsize
        inside = (index >= 0) & (index < tensor.numel())
        return np.bincount(index[inside], minlength=tensor.numel())

    def reads(self, tensor: Tensor) -> np.ndarray:
        return self.of(tensor, self.loads)

    def writes(self, tensor: Tensor) -> np.ndarray:
        return self.of(tensor, self.stores)


@contextlib.contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accesses]:
    from triton.runtime.interpreter import InterpreterBuilder

    accesses = Accesses([], [])
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def taken(pointers, mask):
        # The interpreter makes integers of some masks.
        return pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]

    def counted_load(self, pointers, mask, *rest, **options):
        accesses.loads.append(taken(pointers, mask))
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self, pointers, value, mask, *rest, **options):
        accesses.stores.append(taken(pointers, mask))
        return store(self, pointers, value, mask, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        yield accesses


def once(counts: np.ndarray) -> bool:
    return bool((counts == 1).all())


def never(counts: np.ndarray) -> bool:
    return not counts.any()


class Layer:
    """The tensors of a layer, each in its own memory."""

    def __init__(self, case: AdapterShape) -> None:
        self.case = case
        self.inputs = random_inputs(case, (TOKENS,), torch.float32)
        self.adapter = adapter_of(self.inputs, case)
        self.x, self.g, self.weight = self.inputs.x, self.inputs.grad, self.inputs.weight
        self.u = torch.randn(TOKENS, case.rank * case.kernel_size[1])
        self.y = torch.empty(TOKENS, case.out_features)
        self.gx = torch.empty(TOKENS, case.in_features)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.inputs.A, self.inputs.B, self.inputs.C


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: AdapterShape, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(case)
    with recording(monkeypatch) as accesses:
        shrink_expand(layer.x, layer.adapter, u=layer.u, bias=layer.inputs.bias, y=layer.y)
    reads = accesses.reads(layer.x)
    if case in TILING:
        assert once(reads)
    else:  # every window over a feature reads it: from the caches
        windows = -(-case.kernel_size[1] // case.stride[1])
        assert reads.min() >= 1
        assert reads.max() <= windows
    assert once(accesses.writes(layer.y))
    assert once(accesses.writes(layer.u))
    for tensor in (layer.y, layer.u):
        assert never(accesses.reads(tensor))
    for tensor in (layer.x, layer.inputs.bias, *layer.factors):
        assert never(accesses.writes(tensor))


def test_update_reads_the_base_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(CASES[0])
    base = torch.randn_like(layer.y)
    with recording(monkeypatch) as accesses:
        shrink_expand(layer.x, layer.adapter, u=layer.u, base=base, y=layer.y)
    assert once(accesses.reads(base))
    assert never(accesses.writes(base))
    assert once(accesses.writes(layer.y))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: AdapterShape, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(case)
    with recording(monkeypatch) as accesses:
        backward(layer.g, layer.x, layer.u, layer.adapter, layer.gx, ALL)
    for side, tensor in ((0, layer.g), (1, layer.x)):
        windows = -(-case.kernel_size[side] // case.stride[side])
        reads = accesses.reads(tensor)
        assert reads.min() >= 1
        assert reads.max() <= windows  # once, if windows do not overlap
        assert never(accesses.writes(tensor))
    assert once(accesses.reads(layer.u))
    assert once(accesses.writes(layer.gx))
    assert never(accesses.reads(layer.gx))


def test_backward_reads_only_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(CASES[0])
    with recording(monkeypatch) as accesses:
        backward(layer.g, layer.x, layer.u, layer.adapter, None, (False, True, True))
    assert never(accesses.reads(layer.x)), "A is frozen: x is not read"
    with recording(monkeypatch) as accesses:
        backward(layer.g, layer.x, layer.u, layer.adapter, layer.gx, (False, False, False))
    assert never(accesses.reads(layer.u)), "B and C are frozen: U is not read"
    assert once(accesses.reads(layer.g))


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_merge(case: AdapterShape, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(case)
    with recording(monkeypatch) as accesses:
        expand(layer.adapter, out=layer.weight, weight=layer.weight)
    assert once(accesses.reads(layer.weight))
    assert once(accesses.writes(layer.weight))
    grad = torch.randn_like(layer.weight)
    with recording(monkeypatch) as accesses:
        expand_backward(grad, layer.adapter, ALL)
    if case in TILING:
        assert once(accesses.reads(grad))


@pytest.mark.parametrize("case", TILING, ids=str)
def test_explain_counts_these_bytes(case: AdapterShape, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(case)
    with recording(monkeypatch) as accesses:
        shrink_expand(layer.x, layer.adapter, u=layer.u, y=layer.y)
        backward(layer.g, layer.x, layer.u, layer.adapter, layer.gx, ALL)
    tensors = (layer.x, layer.g, layer.u, layer.y, layer.gx)
    elements = sum(int(accesses.reads(t).sum() + accesses.writes(t).sum()) for t in tensors)
    # The base's products read what they add to.
    elements += layer.y.numel() + layer.gx.numel()
    module = DCFTLinear(
        case.in_features, case.out_features, rank=case.rank, kernel_size=case.kernel_size
    )
    assert explain(module, tokens=TOKENS).adapter.bytes == 4 * elements
