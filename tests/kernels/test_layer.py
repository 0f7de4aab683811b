"""The layer on the Triton kernels: every shape, dtype, stride and strategy, all gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dcft_kernels import DCFTLinear, add_delta_weight_, dcft_linear, dcft_update
from dcft_kernels.cost_model import ranks_of_a_launch
from dcft_kernels.strategy import why_kernels_cannot
from tests.adapter_cases import CASES, Case, Inputs, adapter_of, random_inputs
from tests.error_budget import assert_within_budget
from tests.kernels.conftest import INTERPRETED
from tests.kernels.parity import NAMES, check, run, to

# The most columns that the kernels take, in every way to fill them; and what has to be padded most.
WIDE = [
    Case(64, 72, 16, (8, 8), (8, 8)),
    Case(128, 192, 2, (64, 64), (64, 64)),
    Case(40, 24, 128, (1, 1), (1, 1)),
    Case(40, 52, 10, (12, 12), (12, 12)),
    Case(30, 41, 25, (5, 5), (5, 5)),
    Case(70, 20, 2, (1, 64), (1, 64)),
    Case(20, 70, 2, (64, 1), (64, 1)),
    Case(35, 35, 3, (6, 6), (4, 3)),
]
PAPER, RAGGED, OVERLAP = CASES[0], CASES[3], CASES[6]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRATEGIES = ["row_block", "fused", "scratch"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def runs(case: Case, strategy: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a strategy takes the case: the fused one no overlap, and what one launch holds."""
    fits = case.rank <= ranks_of_a_launch(case.geometry, dtype.itemsize)
    return strategy != "fused" or (case.stride == case.kernel_size and fits)


@every_dtype
@pytest.mark.parametrize(
    ("case", "strategy"),
    [(case, s) for case in CASES for s in ("row_block", "fused") if runs(case, s)],
    ids=str,
)
def test_parity(device, case: Case, strategy: str, dtype: torch.dtype) -> None:
    # 37 tokens: blocks of rows of which the last is not full, and more of them than programs.
    check(to(random_inputs(case, (37,), dtype), device), case, strategy)


@pytest.mark.parametrize(
    ("case", "strategy", "dtype"),
    [
        (case, strategy, dtype)
        for case in WIDE
        for strategy in ("row_block", "fused")
        for dtype in (torch.float32, torch.bfloat16)
        if runs(case, strategy, dtype)
    ],
    ids=str,
)
def test_parity_of_wide_adapters(device, case: Case, strategy: str, dtype: torch.dtype) -> None:
    check(to(random_inputs(case, (18,), dtype, torch.float32), device), case, strategy)


@pytest.mark.parametrize("case", [PAPER, RAGGED, OVERLAP], ids=str)
def test_parity_of_scratch(device, case: Case) -> None:
    """In float32 only: in 16 bit, it drops what the sum with the weight cannot hold."""
    check(to(random_inputs(case, (18,), torch.float32), device), case, "scratch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["row_block", "fused"])
def test_float32_adapter_over_16_bit_base(device, dtype: torch.dtype, strategy: str) -> None:
    inputs = to(random_inputs(PAPER, (33,), dtype, torch.float32), device)
    assert check(inputs, PAPER, strategy)[4].dtype == torch.float32


@every_strategy
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 150])
def test_any_number_of_tokens(device, tokens: int, strategy: str) -> None:
    check(to(random_inputs(PAPER, (tokens,), torch.float32), device), PAPER, strategy)


@every_strategy
def test_no_tokens(device, strategy: str) -> None:
    results = run(to(random_inputs(PAPER, (0,)), device).to(torch.float32), PAPER, "triton")
    assert results[0].shape == (0, PAPER.out_features)
    for name, grad in zip(NAMES[1:], results[1:], strict=True):
        assert float(grad.abs().sum()) == 0.0, name


def test_leading_dimensions(device) -> None:
    inputs = to(random_inputs(PAPER, (2, 3, 4), torch.float32), device)
    check(inputs, PAPER)
    check(Inputs(inputs.x[0, 0, 0], *inputs[1:-1], inputs.grad[0, 0, 0]), PAPER)


def scattered(tensor: Tensor) -> Tensor:
    """The same values with gaps between them along every dimension, in NaN."""
    wide = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    view = wide.to(tensor.device)[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("strategy", ["row_block", "fused"])
@pytest.mark.parametrize("rearrange", [lambda t: t.mT.contiguous().mT, scattered])
@pytest.mark.parametrize("which", range(len(Inputs._fields)), ids=Inputs._fields)
def test_any_strides(device, which: int, rearrange, strategy: str) -> None:
    inputs = to(random_inputs(RAGGED, (19,), torch.float32), device)
    if inputs[which].dim() == 1 and rearrange is not scattered:
        pytest.skip("one dimension cannot be transposed")
    strided = list(inputs)
    strided[which] = rearrange(strided[which])
    expected = run(inputs, RAGGED, "triton", strategy=strategy)
    actual = run(Inputs(*strided), RAGGED, "triton", strategy=strategy)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_offsets_beyond_32_bits(device) -> None:
    """Rows so far apart that their offsets overflow 32 bits; most memory is never touched."""
    case = Case(16, 16, 1, (8, 8), (8, 8))
    distance = 2**31 + 16
    inputs = to(random_inputs(case, (2,), torch.bfloat16), device)
    if device.type == "cpu":
        far = torch.from_numpy(np.empty(distance + 16, dtype=np.int16)).view(torch.bfloat16)
    else:
        far = torch.zeros(distance + 16, dtype=torch.bfloat16, device=device)
    rows = far.as_strided((2, 16), (distance, 1))
    expected = run(inputs, case, "triton")
    for which in ("x", "grad"):
        rows.copy_(getattr(inputs, which))
        actual = run(inputs._replace(**{which: rows}), case, "triton")
        assert all(map(torch.equal, actual, expected)), which


SUBSETS = [s for s in itertools.product([False, True], repeat=4) if any(s)]


@every_strategy
@pytest.mark.parametrize(
    "wanted", SUBSETS, ids=lambda s: "".join("xABC"[i] for i in range(4) if s[i])
)
def test_every_subset_of_gradients(device, wanted: tuple[bool, ...], strategy: str) -> None:
    """What is asked for does not change its value, and nothing else is computed."""
    inputs = to(random_inputs(PAPER, (37,), torch.bfloat16), device)
    expected = run(inputs, PAPER, "triton", strategy=strategy)
    need_x, *need_factors = wanted
    some = inputs.requiring(need_x, False, False, *need_factors)
    y = dcft_linear(*some.operands, scaling=0.7, backend="triton", strategy=strategy)
    y.backward(some.grad)
    for name, operand, grad in zip(NAMES[1:], some.operands, expected[1:], strict=True):
        if operand.requires_grad:
            assert torch.equal(operand.grad, grad), name
        else:
            assert operand.grad is None, name


@pytest.mark.parametrize(
    ("case", "strategy"),
    [(PAPER, s) for s in STRATEGIES] + [(OVERLAP, "row_block"), (WIDE[0], "row_block")],
    ids=str,
)
def test_repeats_to_the_bit(device, case: Case, strategy: str) -> None:
    repeats, tokens = (100, 5000) if device.type == "cuda" else (2, 70)
    inputs = to(random_inputs(case, (tokens,), torch.bfloat16), device)
    first = run(inputs, case, "triton", strategy=strategy)
    for _ in range(repeats - 1):
        assert all(map(torch.equal, run(inputs, case, "triton", strategy=strategy), first))


def test_arguments_are_not_changed(device) -> None:
    inputs = to(random_inputs(PAPER, (9,), torch.float32), device)
    before = [tensor.clone() for tensor in inputs]
    run(inputs, PAPER, "triton")
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("case", [PAPER, RAGGED, OVERLAP], ids=str)
@every_dtype
def test_update(device, case: Case, dtype: torch.dtype) -> None:
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
    results = (
        update(inputs, base, "triton", 0.7),
        update(inputs, base, "reference", 0.7),
        update(wide, base.double(), "reference", 0.7),
        tuple(v.sqrt() for v in update(squares, base.double().square(), "reference", 0.7**2)),
    )
    for name, *values in zip(("y", "gy", "gx", "gA", "gB", "gC"), *results, strict=True):
        assert_within_budget(*values, dtype=dtype, what=name)


@st.composite
def shapes(draw) -> tuple[Case, int, torch.dtype]:
    """Adapters of every kind that the kernels take, small."""
    kernel = tuple(draw(st.integers(1, 20)) for _ in range(2))
    stride = tuple(draw(st.integers(max(1, width // 3), width)) for width in kernel)
    if draw(st.booleans()):
        stride = kernel
    rank = draw(st.integers(1, 128 // max(kernel)))
    sizes = [draw(st.integers(1, 50)) for _ in range(2)]
    return (
        Case(*sizes, rank, kernel, stride),
        draw(st.integers(1, 40)),
        draw(st.sampled_from(DTYPES)),
    )


# On a GPU, every example has kernels of its own to compile.
@settings(max_examples=25 if INTERPRETED else 5, deadline=None, derandomize=True)
@given(shapes(), st.sampled_from(["row_block", "fused"]), st.sampled_from([0.0, 0.3]))
def test_any_shape(shape: tuple[Case, int, torch.dtype], strategy: str, dropout_p: float) -> None:
    case, tokens, dtype = shape
    device = torch.device("cpu" if INTERPRETED else "cuda")
    if not runs(case, strategy, dtype):
        strategy = "row_block"
    inputs = to(random_inputs(case, (tokens,), dtype, torch.float32), device)
    check(inputs, case, strategy, dropout_p=dropout_p)


def test_a_module_trains_on_the_kernels(device) -> None:
    torch.manual_seed(2)
    layer = DCFTLinear(48, 64, rank=2, backend="triton", init="zero", alpha=8).to(device)
    twin = DCFTLinear(48, 64, rank=2, backend="torch", init="zero", alpha=8).to(device)
    twin.load_state_dict(layer.state_dict())
    x, target = torch.randn(24, 48, device=device), torch.randn(24, 64, device=device)
    losses = []
    for each in (layer, twin):
        optimizer = torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for _ in range(5):
            loss = (each(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss))
        losses.append(curve)
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merge_on_the_kernels_is_the_others(device, dtype, fan_in_fan_out: bool) -> None:
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
    wide = Case(64, 64, 17, (8, 8), (8, 8))
    assert why_kernels_cannot(wide.geometry, torch.float32) is not None
    inputs = to(random_inputs(wide, (5,), torch.float32), device)
    with pytest.raises(RuntimeError, match=r"^backend='triton' cannot run: .*17 \* 8 = 136"):
        run(inputs, wide, "triton")
    run(inputs, wide, "auto")
    with pytest.raises(RuntimeError, match=r"^strategy='fused' cannot run: .*136.*'auto'"):
        run(inputs, wide, "auto", strategy="fused")
    inputs = to(random_inputs(OVERLAP, (5,), torch.float32), device)
    with pytest.raises(ValueError, match=r"^strategy: 'fused' cannot take this layer: .*overlap"):
        run(inputs, OVERLAP, "triton", strategy="fused")
    with pytest.raises(ValueError, match=r"^strategy: 'scratch' cannot take this layer: dropout"):
        run(inputs, OVERLAP, "triton", strategy="scratch", dropout_p=0.5)


def test_a_merge_in_place_shows_to_autograd(device) -> None:
    """What was saved of the weight before the merge is not there any more, and backward says so."""
    inputs = to(random_inputs(PAPER, (5,), torch.float32), device).requiring(
        True, False, False, True, True, True
    )
    y = dcft_linear(*inputs.operands, backend="triton")
    factors = (inputs.A.detach(), inputs.B.detach(), inputs.C.detach())
    add_delta_weight_(inputs.weight, *factors, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.grad)


@pytest.mark.parametrize("seed", [False, True], ids=["nearest", "stochastic"])
def test_a_compiled_merge(device, seed: bool) -> None:
    inputs = to(random_inputs(RAGGED, (1,), torch.bfloat16, torch.float32), device)
    factors = (inputs.A, inputs.B, inputs.C)

    def merge(weight: Tensor) -> Tensor:
        return add_delta_weight_(weight, *factors, stochastic_rounding=seed, backend="triton")

    weight, expected = inputs.weight.clone(), inputs.weight.clone()
    torch.manual_seed(2)
    merge(expected)
    torch.manual_seed(2)
    result = torch.compile(merge, fullgraph=True, backend="aot_eager")(weight)
    if not seed:  # compiled programs draw seeds of their own
        assert torch.equal(weight, expected)
    assert torch.equal(result, weight)
    assert not torch.equal(weight, inputs.weight)


def test_fake_tensors_see_the_operator(device) -> None:
    """Memory estimators run models on tensors without data."""
    with FakeTensorMode():
        layer = DCFTLinear(48, 64, backend="triton", device=device)
        y = layer(torch.randn(7, 48, device=device))
        y.sum().backward()
    assert y.shape == (7, 64)
    assert layer.dcft_A.grad.shape == layer.dcft_A.shape


@pytest.mark.parametrize("name", ["torch", "fused"])
def test_the_environment_names_a_strategy(device, name, monkeypatch) -> None:
    launches = []
    from dcft_kernels.triton import passes

    monkeypatch.setattr(passes, "expand", lambda *a, **k: launches.append("expand"))
    monkeypatch.setenv("DCFT_STRATEGY", name)
    inputs = to(random_inputs(PAPER, (1,), torch.float32), device)
    backend = "auto" if name == "torch" else "triton"
    add_delta_weight_(inputs.weight, inputs.A, inputs.B, inputs.C, backend=backend)
    assert launches == ([] if name == "torch" else ["expand"])
    monkeypatch.setenv("DCFT_STRATEGY", "bogus")
    with pytest.raises(ValueError, match=r"^DCFT_STRATEGY: expected one of .*got 'bogus'"):
        add_delta_weight_(inputs.weight, inputs.A, inputs.B, inputs.C)


def test_slices_of_ranks_add_to_what_there_is(device) -> None:
    # Triton is imported by what runs on it only.
    from dcft_kernels.triton.backward import backward

    case = Case(64, 72, 16, (8, 8), (8, 8))
    assert ranks_of_a_launch(case.geometry, 4) < case.rank
    inputs = to(random_inputs(case, (18,), torch.float32), device)
    adapter = adapter_of(inputs, case)
    before = torch.randn(18, 64, device=device)
    alone, added = torch.empty_like(before), before.clone()
    backward(adapter, g=inputs.grad, gx=alone)
    backward(adapter, g=inputs.grad, gx=added, add_gx=True)
    # The same slices, added one after the other to something else: a rounding for each.
    roundings = 4 * torch.finfo(torch.float32).eps * (before.abs() + alone.abs()).max()
    assert (added - before - alone).abs().max() <= roundings
