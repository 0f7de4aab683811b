"""The layer on the Triton kernels: every shape, dtype and stride, all gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcft_kernels import DCFTLinear, add_delta_weight_, dcft_linear, dcft_update
from tests.adapter_cases import CASES, AdapterShape, Inputs, random_inputs
from tests.error_budget import assert_within_budget
from tests.kernels.conftest import INTERPRETED
from tests.kernels.parity import check, roundings, run, to

# The most columns that the kernels take, filled in every way; and what is padded most.
WIDE = [
    AdapterShape(64, 72, 16, (8, 8), (8, 8)),
    AdapterShape(128, 192, 2, (64, 64), (64, 64)),
    AdapterShape(40, 24, 128, (1, 1), (1, 1)),
    AdapterShape(40, 52, 10, (12, 12), (12, 12)),
    AdapterShape(70, 20, 2, (1, 64), (1, 64)),
    AdapterShape(20, 70, 2, (64, 1), (64, 1)),
    AdapterShape(35, 35, 3, (6, 6), (4, 3)),
    AdapterShape(64, 72, 16, (8, 8), (8, 8), True),
    AdapterShape(40, 24, 40, (1, 2), (1, 1), True),
]
PAPER, RAGGED, OVERLAP = CASES[0], CASES[3], CASES[6]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(device, case: AdapterShape, dtype: torch.dtype) -> None:
    # 37 tokens: blocks of rows of which the last is not full, and more of them than programs.
    check(to(random_inputs(case, (37,), dtype), device), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_parity_of_wide_adapters(device, case: AdapterShape, dtype: torch.dtype) -> None:
    results = check(to(random_inputs(case, (18,), dtype, torch.float32), device), case)
    assert results[4].dtype == torch.float32


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 150])
def test_any_number_of_tokens(device, tokens: int) -> None:
    check(to(random_inputs(PAPER, (tokens,), torch.float32), device), PAPER)


def test_leading_dimensions(device) -> None:
    inputs = to(random_inputs(PAPER, (2, 3, 4), torch.float32), device)
    check(inputs, PAPER)
    check(Inputs(inputs.x[0, 0, 0], *inputs[1:-1], inputs.grad[0, 0, 0]), PAPER)


def scattered(tensor: Tensor) -> Tensor:
    """The same values with NaN between and around them along every dimension."""
    wide = torch.full([2 * size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    view = wide.to(tensor.device)[tuple(slice(2, 2 * size + 2, 2) for size in tensor.shape)]
    return view.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


@pytest.mark.parametrize("rearrange", [transposed, scattered])
@pytest.mark.parametrize("case", [RAGGED, OVERLAP], ids=str)
@pytest.mark.parametrize("which", range(len(Inputs._fields)), ids=Inputs._fields)
def test_any_strides(device, which: int, case: AdapterShape, rearrange) -> None:
    inputs = to(random_inputs(case, (19,), torch.float32), device)
    strided = list(inputs)
    strided[which] = rearrange(strided[which])
    check(Inputs(*strided), case)


def test_offsets_beyond_32_bits(device) -> None:
    """Rows so far apart that their offsets overflow 32 bits; most memory is never touched."""
    case = AdapterShape(16, 16, 1, (8, 8), (8, 8))
    distance = 2**30 + 16  # fits 32 bits, and two of them do not
    inputs = to(random_inputs(case, (3,), torch.bfloat16), device)
    if device.type == "cpu":
        far = torch.from_numpy(np.empty(2 * distance + 16, dtype=np.int16)).view(torch.bfloat16)
    else:
        far = torch.zeros(2 * distance + 16, dtype=torch.bfloat16, device=device)
    rows = far.as_strided((3, 16), (distance, 1))

    def update(inputs: Inputs) -> tuple[Tensor, ...]:
        # Without a base layer, whose product is not under test.
        some = inputs.requiring(True, False, False, True, True, True)
        operands = (some.x, some.A, some.B, some.C)
        y = dcft_update(torch.zeros_like(inputs.grad), *operands, backend="triton")
        return (y.detach(), *torch.autograd.grad(y, operands, some.grad))

    expected = update(inputs)
    for which in ("x", "grad"):
        rows.copy_(getattr(inputs, which))
        actual = update(inputs._replace(**{which: rows}))
        for name, a, b in zip(("y", "gx", "gA", "gB", "gC"), actual, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", [PAPER, OVERLAP, WIDE[0]], ids=str)
def test_repeats_to_the_bit(device, case: AdapterShape) -> None:
    repeats, tokens = (100, 5000) if device.type == "cuda" else (2, 70)
    inputs = to(random_inputs(case, (tokens,), torch.bfloat16), device)
    before = [tensor.clone() for tensor in inputs]
    first = run(inputs, case, "triton")
    for _ in range(repeats - 1):
        assert all(map(torch.equal, run(inputs, case, "triton"), first))
    assert all(map(torch.equal, inputs, before)), "arguments are not changed"


@pytest.mark.parametrize("case", [PAPER, RAGGED, OVERLAP], ids=str)
@every_dtype
def test_update(device, case: AdapterShape, dtype: torch.dtype) -> None:
    """`dcft_update` adds to a base that it does not change."""
    inputs = to(random_inputs(case, (21,), dtype), device)
    base = torch.randn(21, case.out_features, dtype=dtype, device=device)
    wide = inputs.to(torch.float64)

    def update(inputs: Inputs, base: Tensor, backend: str, scaling: float) -> tuple[Tensor, ...]:
        some = inputs.requiring(True, False, False, True, True, True)
        y = base.clone().requires_grad_()
        operands = (y, some.x, some.A, some.B, some.C)
        out = dcft_update(*operands, stride=case.stride, scaling=scaling, backend=backend)
        assert torch.equal(y, base)
        return (out.detach(), *torch.autograd.grad(out, operands, some.grad))

    squares = Inputs(*(tensor.square() for tensor in wide))
    sizes = update(squares, base.double().square(), "reference", 0.7**2)
    results = (
        update(inputs, base, "triton", 0.7),
        update(inputs, base, "reference", 0.7),
        update(wide, base.double(), "reference", 0.7),
        tuple(size.sqrt() * roundings(inputs.x) for size in sizes),
    )
    for name, *values in zip(("y", "gy", "gx", "gA", "gB", "gC"), *results, strict=True):
        assert_within_budget(*values, dtype=dtype, what=name)


@st.composite
def shapes(draw) -> tuple[AdapterShape, int, torch.dtype]:
    """Adapters of every kind that the kernels take, small."""
    kernel = tuple(draw(st.integers(1, 20)) for _ in range(2))
    stride = tuple(draw(st.integers(max(1, width // 3), width)) for width in kernel)
    if draw(st.booleans()):
        stride = kernel
    rank = draw(st.integers(1, 128 // max(kernel)))
    sizes = [draw(st.integers(1, 50)) for _ in range(2)]
    return (
        AdapterShape(*sizes, rank, kernel, stride),
        draw(st.integers(1, 40)),
        draw(st.sampled_from(DTYPES)),
    )


# On a GPU, the kernels are recompiled for every example.
@settings(max_examples=25 if INTERPRETED else 5, deadline=None, derandomize=True)
@given(shapes(), st.sampled_from([0.0, 0.3]))
def test_any_shape(shape: tuple[AdapterShape, int, torch.dtype], dropout_p: float) -> None:
    case, tokens, dtype = shape
    device = torch.device("cpu" if INTERPRETED else "cuda")
    inputs = to(random_inputs(case, (tokens,), dtype, torch.float32), device)
    check(inputs, case, dropout_p=dropout_p)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merge_matches_the_torch_backend(device, dtype, fan_in_fan_out: bool) -> None:
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(4)
        layer = DCFTLinear(50, 37, rank=2, init="paper", backend=backend, dtype=dtype)
        for factor in (layer.dcft_A, layer.dcft_B, layer.dcft_C):
            torch.nn.init.normal_(factor)
        layer.to(device)
        if fan_in_fan_out:
            layer.weight = torch.nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)
            layer.fan_in_fan_out = True
        layer.merge()
        assert layer.weight.is_contiguous()
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)


def test_what_the_kernels_refuse(device) -> None:
    inputs = to(random_inputs(PAPER, (5,)), device)
    with pytest.raises(RuntimeError, match=r"^backend='triton' cannot run: .*float64.*'torch'"):
        run(inputs, PAPER, "triton")
    wide = AdapterShape(64, 64, 17, (8, 8), (8, 8))
    inputs = to(random_inputs(wide, (5,), torch.float32), device)
    with pytest.raises(RuntimeError, match=r"^backend='triton' cannot run: .*17 \* 8 = 136"):
        run(inputs, wide, "triton")
    run(inputs, wide, "auto")
    with pytest.raises(RuntimeError, match=r"^strategy='row_block' cannot run: .*136.*'auto'"):
        dcft_linear(*inputs.operands, strategy="row_block")


def test_merge_in_place_invalidates_what_autograd_saved(device) -> None:
    inputs = to(random_inputs(PAPER, (5,), torch.float32), device).requiring(
        True, False, False, True, True, True
    )
    y = dcft_linear(*inputs.operands, backend="triton")
    factors = (inputs.A.detach(), inputs.B.detach(), inputs.C.detach())
    add_delta_weight_(inputs.weight, *factors, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.grad)
