"""The passes of the strategy `seeded`: `U` and `Q` from `x`; `Ub`, gradients and `P` from `g`."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcft_kernels.adapter import Adapter
from tests.adapter_cases import AdapterShape, adapter_of, random_inputs
from tests.error_budget import assert_within_budget
from tests.kernels.conftest import INTERPRETED

pytest.importorskip("triton")

from dcft_kernels.triton.shrink import partial_shape, shrink, shrink_backward
from dcft_kernels.triton.tiles import architecture, entries

SCALING = 0.7
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
PAPER = AdapterShape(600, 1048, 1, (8, 8), (8, 8))  # several steps a row, on either side
RAGGED = AdapterShape(72, 136, 3, (64, 16), (64, 16))
PER_RANK = AdapterShape(264, 328, 4, (8, 8), (8, 8), True)

both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _needs_tiles() -> None:
    if INTERPRETED or torch.cuda.is_available():
        name = architecture(DEVICE)
        if not entries(name, "shrink", 2):
            pytest.skip(f"{name} has no tiles for these kernels")


class Problem(NamedTuple):
    x: Tensor
    g: Tensor
    U: Tensor  # what the backward pass is given
    adapter: Adapter

    def to(self, dtype: torch.dtype, power: int = 1) -> Problem:
        """The same on the CPU, or of the powers of all numbers."""
        x, g, U, A, B, C = (t.cpu().to(dtype) ** power for t in (*self[:3], *self.adapter[:3]))
        scaling = self.adapter.scaling**power
        return Problem(x, g, U, self.adapter._replace(A=A, B=B, C=C, scaling=scaling))


def problem(
    case: AdapterShape,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    u_dtype: torch.dtype = torch.float32,
) -> Problem:
    inputs = random_inputs(case, (tokens,), torch.bfloat16, torch.bfloat16)
    inputs = inputs._replace(
        x=inputs.x.to(dtype),
        grad=inputs.grad.to(dtype),
        **{name: getattr(inputs, name).to(adapter_dtype) for name in "ABC"},
    )
    adapter = adapter_of(inputs, case, SCALING)
    A, B, C = (factor.to(DEVICE) for factor in adapter[:3])
    u = torch.randn(tokens, case.rank * case.kernel_size[1]).to(DEVICE, u_dtype)
    return Problem(inputs.x.to(DEVICE), inputs.grad.to(DEVICE), u, adapter._replace(A=A, B=B, C=C))


def computed(p: Problem) -> dict[str, Tensor]:
    """Everything in plain PyTorch, in the problem's dtype."""
    A, B, C, scaling, geometry, *_ = p.adapter
    rank, outputs, inputs, per_rank = geometry
    C = C if per_rank else C.expand(rank, -1, -1)

    def windows(tokens: Tensor, width: int) -> Tensor:
        padded = torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % width))
        return padded.unflatten(1, (-1, width))

    g = windows(p.g, outputs.width)
    U = p.U.unflatten(1, (rank, inputs.width))
    V = scaling * torch.einsum("kqp,tkp->tkq", C, U)
    Vb = scaling * torch.einsum("tjq,jk->tkq", g, B)
    return {
        "U": torch.einsum("tip,ki->tkp", windows(p.x, inputs.width), A).flatten(1),
        "Q": scaling * torch.einsum("jk,kqp->jqkp", B, C).flatten(2).flatten(0, 1)[: outputs.size],
        "P": torch.kron(A, torch.eye(inputs.width, dtype=A.dtype))[:, : inputs.size],
        "Ub": torch.einsum("kqp,tkq->tkp", C, Vb).flatten(1),
        "gB": torch.einsum("tjq,tkq->jk", g, V),
        "gC": torch.einsum(f"tkq,tkp->{'k' * per_rank}qp", Vb, U),
    }


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def forward(p: Problem, u_dtype: torch.dtype) -> dict[str, Tensor]:
    u = nan(*p.U.shape, dtype=u_dtype)
    spread = nan(p.g.shape[1], p.U.shape[1], dtype=p.x.dtype)
    shrink(p.x, p.adapter, u=u, spread=spread)
    return {"U": u, "Q": spread}


def backward(p: Problem, needs: tuple[bool, bool] = (True, True)) -> dict[str, Tensor]:
    ub = nan(*p.U.shape, dtype=p.g.dtype)
    spread = nan(p.U.shape[1], p.x.shape[1], dtype=p.g.dtype)
    programs, columns = partial_shape(p.g, p.adapter, needs)
    partial = nan(programs, columns, dtype=torch.float32) if any(needs) else None
    u = p.U if any(needs) else None
    shrink_backward(p.g, u, p.adapter, ub=ub, spread=spread, partial=partial, needs=needs)
    found = {"Ub": ub, "P": spread}
    if partial is not None:
        sums = partial.sum(0)
        offset = p.adapter.B.numel() * needs[0]
        found["gB"] = sums[:offset].view_as(p.adapter.B) if needs[0] else None
        found["gC"] = sums[offset:].view_as(p.adapter.C) if needs[1] else None
    return {name: value for name, value in found.items() if value is not None}


def check(results: dict[str, Tensor], p: Problem) -> None:
    """Within twice the error of the same formulas in float32, rounded once."""
    truth, peer = computed(p.to(torch.float64)), computed(p.to(torch.float32))
    squares = computed(p.to(torch.float64, power=2))
    for name, actual in results.items():
        assert_within_budget(
            actual.cpu(),
            peer[name].to(actual.dtype),
            truth[name],
            squares[name].sqrt(),
            actual.dtype,
            name,
        )


@both_dtypes
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [PAPER, RAGGED, PER_RANK], ids=str)
def test_all_results(case: AdapterShape, adapter_dtype: torch.dtype, dtype: torch.dtype) -> None:
    # 11 tokens: more blocks of rows than programs, and the last one is not full.
    for u_dtype in (torch.float32, dtype):
        p = problem(case, 11, dtype, adapter_dtype, u_dtype)
        check(forward(p, u_dtype), p)
        check(backward(p), p)


@st.composite
def shapes(draw) -> tuple[AdapterShape, int]:
    """What the passes are for, small."""
    width = st.sampled_from([4, 8, 16, 32, 64])
    kernel = (draw(width), draw(width))
    sizes = [8 * draw(st.integers(1, 80)) for _ in range(2)]
    rank, per_rank = draw(st.integers(1, 4)), draw(st.booleans())
    return AdapterShape(*sizes, rank, kernel, kernel, per_rank), draw(st.integers(1, 9))


# On a GPU, the kernels are recompiled for every example.
@settings(max_examples=25 if INTERPRETED else 5, deadline=None, derandomize=True)
@given(shapes())
def test_any_shape(shape: tuple[AdapterShape, int]) -> None:
    p = problem(*shape)
    check(forward(p, torch.float32), p)
    check(backward(p), p)


def test_only_what_is_needed() -> None:
    p = problem(RAGGED, 5)
    complete = backward(p)
    for needs in itertools.product([False, True], repeat=2):
        found = backward(p, needs)
        wanted = zip(("gB", "gC", "Ub", "P"), (*needs, True, True), strict=True)
        assert found.keys() == {name for name, wants in wanted if wants}
        for name, value in found.items():
            assert torch.equal(value, complete[name]), (name, needs)


@pytest.mark.parametrize("which", ["x", "g"])
def test_rows_apart(which: str) -> None:
    p = problem(RAGGED, 5)
    rows = getattr(p, which)
    wide = nan(rows.shape[0] + 1, rows.shape[1] + 24, dtype=rows.dtype)
    view = wide[:-1, 8 : rows.shape[1] + 8].copy_(rows)
    apart = p._replace(**{which: view})
    check(forward(apart, torch.float32), p)
    check(backward(apart), p)


def test_offsets_beyond_32_bits() -> None:
    """Rows so far apart that their offsets overflow 32 bits; most memory is never touched."""
    p = problem(AdapterShape(16, 16, 1, (8, 8), (8, 8)), 3)
    distance = 2**30 + 16  # fits 32 bits, and two of them do not
    if DEVICE.type == "cpu":
        far = torch.from_numpy(np.empty(2 * distance + 16, dtype=np.int16)).view(torch.bfloat16)
    else:
        far = torch.zeros(2 * distance + 16, dtype=torch.bfloat16, device=DEVICE)
    rows = far.as_strided((3, 16), (distance, 1))
    check(forward(p._replace(x=rows.copy_(p.x)), torch.float32), p)
    check(backward(p._replace(g=rows.copy_(p.g))), p)


def test_repeats_to_the_bit() -> None:
    repeats, tokens = (100, 5000) if DEVICE.type == "cuda" else (2, 11)
    p = problem(PAPER, tokens)
    first = forward(p, torch.bfloat16) | backward(p)
    for _ in range(repeats - 1):
        again = forward(p, torch.bfloat16) | backward(p)
        assert all(torch.equal(again[name], value) for name, value in first.items())
