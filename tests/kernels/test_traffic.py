"""What the kernels read and write, counted address by address under the interpreter.

The passes of the design: forward reads `x` once and writes `y` once; backward reads `g` once and
`x` once and writes `gx` once; a merge reads and writes the weight once. The cost model must count
the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dcft_kernels.adapter import Adapter
from dcft_kernels.cost_model import Call, kernels
from dcft_kernels.gradients import Needs
from dcft_kernels.triton.backward import Sums, backward
from dcft_kernels.triton.expand import expand, expand_backward
from dcft_kernels.triton.fused_backward import fused_backward
from dcft_kernels.triton.fused_linear import fused_linear
from dcft_kernels.triton.group import linear_group, linear_group_backward
from dcft_kernels.triton.shrink_expand import shrink_expand
from tests.adapter_cases import CASES, Case, adapter_of, random_inputs
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts accesses in the interpreter")

TOKENS = 150  # more row blocks than programs
TILING = [case for case in CASES if case.stride == case.kernel_size]
OVERLAPPING = [case for case in CASES if case.stride != case.kernel_size]


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

    def counted_load(self, pointers, mask, *rest):
        accesses.loads.append(taken(pointers, mask))
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        accesses.stores.append(taken(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        yield accesses


def once(counts: np.ndarray) -> bool:
    return bool((counts == 1).all())


def never(counts: np.ndarray) -> bool:
    return not counts.any()


class Layer:
    """The tensors of a layer, each in memory of its own."""

    def __init__(self, case: Case) -> None:
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
def test_forward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(case)
    with recording(monkeypatch) as accesses:
        backward(
            layer.adapter, g=layer.g, x=layer.x, u=layer.u, gx=layer.gx,
            needs_A=True, needs_B=True, needs_C=True,
        )  # fmt: skip
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
        backward(layer.adapter, g=layer.g, x=layer.x, u=layer.u, needs_B=True, needs_C=True)
    assert never(accesses.reads(layer.x)), "A is frozen: x is not read"
    with recording(monkeypatch) as accesses:
        backward(layer.adapter, g=layer.g, u=layer.u, gx=layer.gx)
    assert never(accesses.reads(layer.u)), "B and C are frozen: U is not read"
    assert once(accesses.reads(layer.g))


def test_fused_writes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(CASES[0])
    with recording(monkeypatch) as accesses:
        fused_linear(layer.x, layer.weight, layer.adapter, layer.y, u=layer.u)
    assert once(accesses.writes(layer.y))
    assert once(accesses.writes(layer.u))
    assert never(accesses.reads(layer.y))


def partial_sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The buffers of the programs' sums, as they come; each starts as NaN, which would show."""
    buffers = []
    total = Sums.total
    empty = Tensor.new_empty

    def poisoned(self: Tensor, *size, **options) -> Tensor:
        return empty(self, *size, **options).fill_(float("nan"))

    def kept(self: Sums, partial: Tensor, adapter: Adapter):
        buffers.append(partial)
        return total(self, partial, adapter)

    monkeypatch.setattr(Sums, "total", kept)
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    return buffers


@pytest.mark.parametrize("case", TILING, ids=str)
def test_fused_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(case)
    buffers = partial_sums(monkeypatch)
    with recording(monkeypatch) as accesses:
        grads = fused_backward(
            layer.g, layer.x, layer.u, layer.weight, layer.adapter, layer.gx,
            needs_A=True, needs_B=True, needs_C=True,
        )  # fmt: skip
    assert grads is not None
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert once(accesses.reads(layer.x))
    assert once(accesses.writes(layer.gx))
    assert never(accesses.reads(layer.gx))
    (partial,) = buffers
    assert partial.shape[0] == -(-TOKENS // 16)  # one to a block of rows
    assert once(accesses.writes(partial))
    # A product reads its left side once for every block of columns, and no more for the sums.
    reads = accesses.reads(layer.g)
    assert reads.min() == reads.max() == accesses.reads(layer.u).max()
    for tensor in (layer.g, layer.x, layer.u, layer.weight, *layer.factors):
        assert never(accesses.writes(tensor))


@pytest.mark.parametrize("needed", ["A", "B", "C", "AB", "AC", "BC"])
def test_fused_backward_reads_only_what_is_needed(
    needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(CASES[0])
    buffers = partial_sums(monkeypatch)
    needs = {f"needs_{name}": name in needed for name in "ABC"}
    x, u = layer.x if "A" in needed else None, layer.u if needed != "A" else None
    with recording(monkeypatch) as accesses:
        grads = fused_backward(layer.g, x, u, layer.weight, layer.adapter, layer.gx, **needs)
    assert grads is not None
    assert [grad is not None for grad in grads] == list(needs.values())
    assert never(accesses.reads(layer.x)) == ("A" not in needed)
    assert never(accesses.reads(layer.u)) == (needed == "A")
    assert once(accesses.writes(layer.gx))
    assert once(accesses.writes(buffers[0]))
    whole = backward(
        layer.adapter, g=layer.g, x=layer.x, u=layer.u, needs_A=True, needs_B=True, needs_C=True
    )
    for grad, expected in zip(grads, whole, strict=True):
        if grad is not None:
            # The same products in float32, summed in another order: an epsilon for every addition.
            terms = TOKENS * max(layer.case.kernel_size)
            bound = terms * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (grad - expected).abs().max() <= bound


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_merge(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(case)
    with recording(monkeypatch) as accesses:
        expand(layer.adapter, out=layer.weight, weight=layer.weight)
    assert once(accesses.reads(layer.weight))
    assert once(accesses.writes(layer.weight))
    grad = torch.randn_like(layer.weight)
    with recording(monkeypatch) as accesses:
        expand_backward(grad, layer.adapter, True, True, True)
    if case in TILING:
        assert once(accesses.reads(grad))


def test_a_group_reads_its_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers: one pass over `x` forward, and backward one over `x` and one over each `g`."""
    layers = [Layer(Case(48, m, 1, (8, 8), (8, 8))) for m in (64, 16, 16)]
    x = layers[0].x
    weights = [layer.weight for layer in layers]
    adapters = [layer.adapter for layer in layers]
    with recording(monkeypatch) as accesses:
        _, u = linear_group(x, weights, [None] * 3, adapters)
    assert once(accesses.reads(x))
    gs = [layer.g for layer in layers]
    needs = [Needs(True, False, False, True, True, True)] * 3
    with recording(monkeypatch) as accesses:
        gradients = linear_group_backward(gs, x, u, weights, adapters, needs)
    assert once(accesses.reads(x))
    for g in gs:
        assert once(accesses.reads(g))
    assert once(accesses.writes(gradients[0].x))


@pytest.mark.parametrize("case", TILING, ids=str)
def test_the_cost_model_counts_these_bytes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(case)
    call = Call(TOKENS, case.geometry, torch.float32, torch.float32, "sm_90")
    (forward, _), (gradients, sums, _) = kernels("row_block", call)
    tensors = (layer.x, layer.g, layer.u, layer.y, layer.gx, *layer.factors)

    def bytes_of(accesses: Accesses) -> int:
        return sum(
            int((accesses.reads(t) > 0).sum() + (accesses.writes(t) > 0).sum()) * t.itemsize
            for t in tensors
        )

    with recording(monkeypatch) as accesses:
        shrink_expand(layer.x, layer.adapter, u=layer.u, y=layer.y)
    assert bytes_of(accesses) == forward.bytes
    with recording(monkeypatch) as accesses:
        backward(
            layer.adapter, g=layer.g, x=layer.x, u=layer.u, gx=layer.gx,
            needs_A=True, needs_B=True, needs_C=True,
        )  # fmt: skip
    # The buffer of partial sums is as large as there are programs: on this device, two.
    factors = sum(factor.numel() * factor.itemsize for factor in layer.factors)
    assert bytes_of(accesses) == gradients.bytes - (sums.bytes - factors)


@pytest.mark.parametrize("case", TILING, ids=str)
def test_the_cost_model_counts_the_fused_backward_s_bytes(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor once, as caches keep what a product reads again."""
    layer = Layer(case)
    call = Call(TOKENS, case.geometry, torch.bfloat16, torch.float32, "sm_90")
    _, backward_kernels = kernels("fused", call)
    if len(backward_kernels) > 2:
        pytest.skip("more columns than one product has room for")
    gradients, sums = backward_kernels
    with recording(monkeypatch) as accesses:
        fused_backward(
            layer.g, layer.x, layer.u, layer.weight, layer.adapter, layer.gx,
            needs_A=True, needs_B=True, needs_C=True,
        )  # fmt: skip
    tokens = (layer.x, layer.g, layer.u, layer.weight, layer.gx)
    touched = [(accesses.reads(t) > 0).sum() + (accesses.writes(t) > 0).sum() for t in tokens]
    factors = sum(factor.numel() * factor.itemsize for factor in layer.factors)
    # Tokens are of two bytes there; the buffer of sums is as large as there are blocks of rows.
    assert 2 * int(sum(touched)) + factors == gradients.bytes - (sums.bytes - factors)
