"""What the kernels read and write, counted address by address under the interpreter.

Forward, `row_block` reads `x` once and writes `y` once; backward, it reads `g` and `x` once and
writes `gx` once. `seeded` reads `x` and `g` once more than its products do, and `x` once for gA. A
merge reads and writes the weight once. `explain` counts the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from dcft_kernels import DCFTLinear, explain
from dcft_kernels.adapter import Needs
from dcft_kernels.triton import seeded
from dcft_kernels.triton.expand import expand
from dcft_kernels.triton.launch import Launch
from dcft_kernels.triton.row_block import backward, ranks_per_launch, shrink_expand
from dcft_kernels.triton.shrink import partial_shape, shrink, shrink_backward
from tests.adapter_cases import CASES, AdapterShape, adapter_of, random_inputs
from tests.kernels import gluon_interpreter
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts accesses in the interpreter")

TOKENS = 150  # more row blocks than programs
# Adapters that a launch takes whole: each slice of the others reads the tokens.
WHOLE = [case for case in CASES if ranks_per_launch(case.geometry, 4) >= case.rank]
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

    def counted_tma_load(self, source, coordinates, bar, target, pred=True):
        if pred:
            window, _ = source.windows(coordinates, target)
            accesses.loads.append(addresses(source.tensor)[window])
        tma_load(self, source, coordinates, bar, target, pred)

    def counted_tma_store(self, target, coordinates, source):
        window, _ = target.windows(coordinates, source)
        accesses.stores.append(addresses(target.tensor)[window])
        tma_store(self, target, coordinates, source)

    def counted_gluon_store(pointer, value, mask=None):
        _, inside = pointer.lanes(mask)
        accesses.stores.append(addresses(pointer.memory)[inside.numpy()])
        gluon_store(pointer, value, mask)

    Program, language = gluon_interpreter.Program, gluon_interpreter.LANGUAGE
    tma_load, tma_store, gluon_store = Program.tma_load, Program.tma_store, language["store"]
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        patch.setattr(Program, "tma_load", counted_tma_load)
        patch.setattr(Program, "tma_store", counted_tma_store)
        patch.setitem(language, "store", counted_gluon_store)
        yield accesses


def addresses(tensor: Tensor) -> np.ndarray:
    """The address of every element."""
    steps = [torch.arange(n) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    offsets = sum(torch.meshgrid(*steps, indexing="ij"))
    return (tensor.data_ptr() + tensor.itemsize * offsets).numpy()


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


@pytest.mark.parametrize("case", WHOLE, ids=str)
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


@pytest.mark.parametrize("case", WHOLE, ids=str)
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


@pytest.mark.parametrize("needs", [(True, True), (False, False)], ids=str)
def test_passes_of_the_seeded_strategy(
    needs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = AdapterShape(600, 328, 2, (16, 8), (16, 8))
    inputs = random_inputs(case, (TOKENS,), torch.bfloat16)
    adapter, x, g = adapter_of(inputs, case), inputs.x, inputs.grad
    u = torch.empty(TOKENS, 16, dtype=torch.bfloat16)
    ub = torch.empty_like(u)
    Q, P = g.new_empty(328, 16), g.new_empty(16, 600)
    with recording(monkeypatch) as accesses:
        shrink(x, adapter, u=u, spread=Q)
    assert once(accesses.reads(x))
    assert once(accesses.writes(u))
    assert once(accesses.writes(Q))
    assert all(never(accesses.reads(tensor)) for tensor in (u, Q))
    partial = torch.empty(partial_shape(g, adapter, needs))
    with recording(monkeypatch) as accesses:
        shrink_backward(g, u, adapter, ub=ub, spread=P, partial=partial, needs=needs)
    assert once(accesses.reads(g))
    assert once(accesses.reads(u)) if any(needs) else never(accesses.reads(u))
    assert all(once(accesses.writes(tensor)) for tensor in (ub, P, partial))
    assert all(never(accesses.reads(tensor)) for tensor in (ub, P, partial))


class Allocations(TorchDispatchMode):
    """The tensors that operations make; kept, so that no two share memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        launch = Launch.__call__

        def launched(*arguments: Any) -> None:
            with _disable_current_modes():  # what the interpreters make does not count
                launch(*arguments)

        monkeypatch.setattr(Launch, "__call__", launched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        return result


def seeded_step(
    case: AdapterShape, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], Accesses, Accesses, list[Tensor]]:
    """The tensors of a step by name, the accesses of its directions, and the tensors it made."""
    inputs = random_inputs(case, (tokens,), torch.bfloat16, torch.float32)
    adapter, needs = adapter_of(inputs, case), Needs(True, False, False, True, True, True)
    x, g, W = inputs.x, inputs.grad, inputs.weight
    allocations = Allocations(monkeypatch)
    with allocations, recording(monkeypatch) as forward:
        y, U = seeded.forward(x, W, inputs.bias, adapter)
    with allocations, recording(monkeypatch) as backward:
        gradients = seeded.backward(g, x, U, W, adapter, needs)
    r = U.shape[1]
    names = {"Q": (case.out_features, r), "Ub": tuple(U.shape), "P": (r, case.in_features)}
    made = [each for each in allocations.made if each is not U]
    found = {k: next(t for t in made if tuple(t.shape) == shape) for k, shape in names.items()}
    tensors = {"x": x, "g": g, "W": W, "y": y, "U": U, "gx": gradients.x, **found}
    return tensors, forward, backward, allocations.made


def test_step_of_the_seeded_strategy(hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass reads `x` or `g` once; the product reads it once per column of tiles of the result."""
    case, tokens, rows = AdapterShape(264, 776, 2, (8, 8), (8, 8)), 257, 3
    tensors, forward, backward, made = seeded_step(case, tokens, monkeypatch)
    x, g, W, y, U, gx, Q, Ub, P = tensors.values()
    for accesses, operand, columns, result, u, spread in (
        (forward, x, 4, y, U, Q),
        (backward, g, 2, gx, Ub, P),
    ):
        assert (accesses.reads(operand) == 1 + columns).all()
        assert (accesses.reads(W) == rows).all()
        assert (accesses.reads(u) == columns).all()
        assert (accesses.reads(spread) == rows).all()
        assert never(accesses.reads(result))
        assert all(once(accesses.writes(tensor)) for tensor in (result, u, spread))
        assert all(never(accesses.writes(tensor)) for tensor in (x, g, W))
    assert once(backward.reads(x))
    assert once(backward.reads(U))
    # All that it makes besides grows with tokens and features, or is a 128th of `gx` per rank.
    least = min(y.numel(), gx.numel())
    assert [each.shape for each in made if 2 * each.numel() > least] == [y.shape, gx.shape]


def test_explain_counts_the_bytes_of_the_seeded_strategy(
    hopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one tile, so that products read their operands once."""
    case, tokens = AdapterShape(256, 256, 1, (8, 8), (8, 8)), 100
    tensors, *directions, _ = seeded_step(case, tokens, monkeypatch)
    named = {name: each for name, each in tensors.items() if name not in ("W", "y", "gx")}
    elements = sum(
        int(accesses.reads(tensor).sum() + accesses.writes(tensor).sum())
        for accesses in directions
        for tensor in named.values()
    )
    elements -= tensors["x"].numel() + tensors["g"].numel()  # as the base's own products do
    layer = DCFTLinear(256, 256, dtype=torch.bfloat16, strategy="seeded")
    assert explain(layer, tokens=tokens).adapter.bytes == 2 * elements


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_merge(case: AdapterShape, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(case)
    with recording(monkeypatch) as accesses:
        expand(layer.adapter, out=layer.weight, weight=layer.weight)
    assert once(accesses.reads(layer.weight))
    assert once(accesses.writes(layer.weight))


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
        case.in_features, case.out_features, rank=case.rank, kernel_size=case.kernel_size,
        kernels="per_rank" if case.per_rank else "shared",
    )  # fmt: skip
    assert explain(module, tokens=TOKENS).adapter.bytes == 4 * elements
