"""A nonlinearity between the factors of a DCFT layer, against its equation in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from dcft_kernels import DCFTLinear, dcft_linear, dcft_update, torch_backend
from tests.adapter_cases import CASES, AdapterShape, Inputs, any_case, random_inputs

FACTORS = ("dcft_A", "dcft_B", "dcft_C")
FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def by_equation(
    x: Tensor,
    adapter_x: Tensor,
    inputs: Inputs,
    case: AdapterShape,
    scaling: float,
    nonlinearity: str,
) -> Tensor:
    """`x W^T + b + s expand(C h(shrink(x)))`, window by window, the adapter on its own input."""
    inner, outer = case.geometry.inputs, case.geometry.outputs
    windows = F.pad(adapter_x, (0, inner.span - inner.size)).unfold(1, inner.width, inner.stride)
    U = torch.einsum("tip,ki->tkp", windows, inputs.A)
    C = inputs.C.expand(case.rank, *case.kernel_size)
    V = scaling * torch.einsum("kqp,tkp->tkq", C, FUNCTIONS[nonlinearity](U))
    increment = x.new_zeros(x.shape[0], outer.span)
    for j in range(outer.windows):
        first = j * outer.stride
        row = torch.einsum("tkq,k->tq", V, inputs.B[j])
        increment = increment + F.pad(row, (first, outer.span - first - outer.width))
    return F.linear(x, inputs.weight, inputs.bias) + increment[:, : case.out_features]


def seeded(call: Callable[[], Tensor], seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return call()


@given(
    case=any_case(),
    nonlinearity=st.sampled_from(sorted(FUNCTIONS)),
    leading=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0, 3)]),
    p=st.sampled_from([0.0, 0.5]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_output_and_gradients_are_those_of_the_equation(
    case, nonlinearity, leading, p, transposed, seed
):
    """Dropout acts on the adapter's input, ahead of the nonlinearity; any leading dimensions."""
    inputs = random_inputs(case, leading, seed=seed)
    if transposed:
        inputs = inputs._replace(x=inputs.x.mT.contiguous().mT if len(leading) > 0 else inputs.x)
    ours, theirs = inputs.requiring(), inputs.requiring()
    options = {"stride": case.stride, "dropout_p": p, "nonlinearity": nonlinearity}
    y = seeded(lambda: dcft_linear(*ours.operands, scaling=0.7, **options))
    assert y.shape == (*leading, case.out_features)
    x = dropped = theirs.x.reshape(-1, case.in_features)
    if p:
        dropped = seeded(lambda: F.dropout(x, p))
    expected = by_equation(x, dropped, theirs, case, 0.7, nonlinearity).reshape(y.shape)
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    factors = (inputs.A, inputs.B, inputs.C)
    updated = seeded(lambda: dcft_update(base, inputs.x, *factors, scaling=0.7, **options))
    found = (y, updated, *torch.autograd.grad(y, ours.operands, inputs.grad))
    gradients = torch.autograd.grad(expected, theirs.operands, inputs.grad)
    for actual, wanted in zip(found, (expected, expected, *gradients), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("nonlinearity", FUNCTIONS)
def test_gradcheck(nonlinearity):
    case = AdapterShape(7, 5, 2, (3, 2), (2, 1))
    inputs = random_inputs(case, (2,)).requiring()

    def layer(*operands: Tensor) -> Tensor:
        options = {"stride": case.stride, "dropout_p": 0.4, "nonlinearity": nonlinearity}
        return seeded(lambda: dcft_linear(*operands, scaling=0.7, **options))

    assert gradcheck(layer, inputs.operands)
    assert gradgradcheck(layer, inputs.operands)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6]], ids=str)
def test_16_bits(case, dtype, monkeypatch):
    """A CPU without such products computes in float32: base and sum are rounded once each."""
    monkeypatch.setattr(torch_backend, "_SLOW_ON_CPU", {dtype})
    inputs = random_inputs(case, (9,), dtype, torch.float32).requiring()
    y = dcft_linear(*inputs.operands, stride=case.stride, nonlinearity="gelu")
    assert y.dtype == dtype
    y.backward(inputs.grad)
    wide = inputs.to(torch.float64).requiring()
    truth = by_equation(wide.x, wide.x, wide, case, 1.0, "gelu")
    truth.backward(wide.grad)
    base = F.linear(wide.x, wide.weight, wide.bias)
    eps = torch.finfo(dtype).eps
    # Twice the two roundings of half a unit each; those of float32 are far below.
    assert bool(((y.double() - truth).abs() <= eps * (base.abs() + truth.abs()) + 1e-4).all())
    for name in ("A", "B", "C"):
        found, expected = getattr(inputs, name).grad, getattr(wide, name).grad
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def _layer(**options: Any) -> DCFTLinear:
    layer = DCFTLinear(45, 61, rank=2, **{"nonlinearity": "silu", "init": "paper"} | options)
    for name in FACTORS:
        nn.init.normal_(getattr(layer, name))
    return layer


def _step(run: Any, layer: nn.Module) -> list[Tensor]:
    """Output and gradients of a step, from the same seed every time."""
    torch.manual_seed(4)
    x = torch.randn(2, 5, 45).to(next(layer.parameters()).dtype).requires_grad_()
    layer.zero_grad()
    y = run(x)
    y.float().square().mean().backward()
    factors = [p for n, p in layer.named_parameters() if "dcft_" in n]
    return [y.detach(), x.grad, *(p.grad.clone() for p in factors)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_the_cast_layer(dtype):
    layer = _layer(dropout=0.3)
    half = copy.deepcopy(layer)
    half.weight.data, half.bias.data = layer.weight.to(dtype), layer.bias.to(dtype)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return layer(x)

    found = _step(under_autocast, layer)
    assert [found[0].dtype, found[1].dtype] == [dtype, torch.float32]
    for actual, expected in zip(found, _step(lambda x: half(x.to(dtype)), half), strict=True):
        assert torch.equal(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("way", ["compiled", "checkpointed", "checkpointed-reentrant"])
def test_other_ways_to_run_give_the_same_step(way):
    """Recomputed, dropout draws the same mask; compiled programs draw other random numbers."""
    layer = _layer(dropout=0.0 if way == "compiled" else 0.4)
    expected = _step(layer, layer)
    torch._dynamo.reset()
    run: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if way != "compiled":
        run = partial(checkpoint, layer, use_reentrant=way.endswith("reentrant"))
    for actual, wanted in zip(_step(run, layer), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6]], ids=str)
def test_on_a_gpu(case, dtype):
    inputs = Inputs(*(t.cuda() for t in random_inputs(case, (9,), dtype))).requiring()
    y = dcft_linear(*inputs.operands, stride=case.stride, nonlinearity="gelu")
    y.backward(inputs.grad)
    wide = inputs.to(torch.float64).requiring()
    truth = by_equation(wide.x, wide.x, wide, case, 1.0, "gelu")
    truth.backward(wide.grad)
    tolerance = 16 * torch.finfo(dtype).eps
    pairs = [(y, truth), (inputs.x.grad, wide.x.grad)]
    pairs += [(getattr(inputs, n).grad, getattr(wide, n).grad) for n in "ABC"]
    for found, expected in pairs:
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol)


def test_never_as_large_as_the_weight():
    """Forward and backward of few tokens allocate nothing of `m * n` elements."""
    inputs = random_inputs(AdapterShape(256, 320, 1, (8, 8), (8, 8)), (2,), torch.float32)
    inputs = inputs.requiring(True, False, False, True, True, True)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            base = inputs.weight.untyped_storage().data_ptr()
            sizes.extend(
                tensor.untyped_storage().nbytes() // 4
                for tensor in torch.utils._pytree.tree_leaves(result)
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != base
            )
            return result

    with Watch():
        dcft_linear(*inputs.operands, nonlinearity="relu").backward(inputs.grad)
    # The spread factors, k * d * (max(n, m) + 1) elements, are the largest tensors.
    assert 0 < max(sizes) <= 8 * 321


def test_it_is_an_option_that_changes_no_parameter():
    layer, x = _layer(), torch.randn(3, 45)
    plain = copy.deepcopy(layer)
    plain.nonlinearity = None
    assert plain.state_dict().keys() == layer.state_dict().keys()
    assert not torch.allclose(layer(x), plain(x))
    nn.init.zeros_(layer.dcft_B)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # as a fresh adapter
    assert "nonlinearity='silu'" in repr(layer)
    assert "nonlinearity" not in repr(plain)
