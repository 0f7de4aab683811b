"""Property tests: any geometry, any dtypes, any strides; hypothesis prints the failing example."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcft_kernels import DCFTLinear, dcft_linear, delta_weight
from dcft_kernels.geometry import Geometry, window_count
from tests.adapter_cases import Case, random_inputs

quickly = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    stride = (draw(st.integers(1, kernel[0])), draw(st.integers(1, kernel[1])))
    if draw(st.booleans()):
        stride = kernel
    return Case(
        draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 5)), kernel, stride
    )


@quickly
@given(size=st.integers(1, 500), width=st.integers(1, 40), data=st.data())
def test_windows_cover_the_side_and_no_more(size: int, width: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, width))
    count = window_count(size, width, stride)
    side = Geometry.build(size, size, 1, (width, width), (stride, stride)).inputs
    assert side.span >= size
    assert count == 1 or side.span - stride < size
    assert side.tile == (stride == width and size % width == 0)


@quickly
@given(case=cases(), tokens=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_torch_backend_equals_the_reference(case: Case, tokens: int, seed: int) -> None:
    results = []
    for backend in ("torch", "reference"):
        inputs = random_inputs(case, (tokens,), seed=seed).requiring()
        y = dcft_linear(*inputs.operands, stride=case.stride, scaling=-1.3, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, inputs.operands, inputs.grad)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@quickly
@given(
    case=cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    adapter_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layouts=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_dtypes_and_strides_do_not_change_the_result(
    case: Case,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    layouts: tuple[bool, bool],
    seed: int,
) -> None:
    """Every gradient has its operand's dtype and is near the float64 one, for any strides."""
    inputs = random_inputs(case, (6,), dtype, adapter_dtype, seed)
    if layouts[0]:
        inputs = inputs._replace(x=inputs.x.t().contiguous().t())
    if layouts[1]:
        inputs = inputs._replace(grad=inputs.grad.repeat_interleave(2, 1)[:, ::2])
    wide = inputs.to(torch.float64)
    inputs, wide = inputs.requiring(), wide.requiring()
    y = dcft_linear(*inputs.operands, stride=case.stride, backend="torch")
    truth = dcft_linear(*wide.operands, stride=case.stride, backend="reference")
    gradients = torch.autograd.grad(y, inputs.operands, inputs.grad)
    expected = torch.autograd.grad(truth, wide.operands, wide.grad)
    narrowest = max(torch.finfo(dtype).eps, torch.finfo(adapter_dtype).eps)
    for actual, operand, exact in zip(gradients, inputs.operands, expected, strict=True):
        assert actual.dtype == operand.dtype
        # Sums of at most 40 windows of 12: a coarse bound; test_torch_backend has the tight one.
        size = 1.0 + float(exact.abs().max())
        assert float((actual.double() - exact).abs().max()) <= 60 * narrowest * size
    assert y.dtype == dtype


@quickly
@given(case=cases(), seed=st.integers(0, 2**31))
def test_merge_is_the_increment(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    layer = DCFTLinear(
        case.in_features,
        case.out_features,
        rank=case.rank,
        kernel_size=case.kernel_size,
        stride=case.stride,
        alpha=3.0,
        dtype=torch.float64,
    )
    for factor in (layer.dcft_A, layer.dcft_B, layer.dcft_C):
        torch.nn.init.normal_(factor)
    x = torch.randn(3, case.in_features, dtype=torch.float64)
    y, base = layer(x), layer.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-10, atol=1e-10)
    dense = delta_weight(
        layer.dcft_A,
        layer.dcft_B,
        layer.dcft_C,
        in_features=case.in_features,
        out_features=case.out_features,
        stride=case.stride,
        scaling=3.0 / case.rank,
    )
    torch.testing.assert_close(layer.weight - base, dense.detach(), rtol=1e-10, atol=1e-10)
    layer.unmerge()
    assert torch.equal(layer.weight, base)
