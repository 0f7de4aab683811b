"""What a layer computes, on any geometry: the oracle against loops, PyTorch's path against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcft_kernels import DCFTLinear, dcft_linear, delta_weight
from tests.adapter_cases import any_case, random_inputs

seeds = st.integers(0, 2**31)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@given(size=st.integers(1, 500), width=st.integers(1, 40), data=st.data())
def test_windows_cover_the_side_and_no_more(size, width, data):
    """Equation 9: the fewest windows that reach the end, at least one."""
    stride = data.draw(st.integers(1, width))
    layer = DCFTLinear(size, size, kernel_size=width, stride=stride, device="meta")
    windows = layer.dcft_A.shape[1]
    assert layer.dcft_B.shape[0] == windows
    assert (windows - 1) * stride + width >= size
    assert windows == 1 or (windows - 2) * stride + width < size


@given(case=any_case(), seed=seeds)
def test_reference_is_the_sum_over_windows(case, seed):
    """`DW[j*s+q, i*s+p] += b_κ[j] a_κ[i] C_κ[q,p]`, in loops, without conv_transpose2d."""
    inputs = random_inputs(case, seed=seed)
    J, I = len(inputs.B), inputs.A.shape[1]  # noqa: E741
    kernels = inputs.C if case.per_rank else [inputs.C] * case.rank
    terms = [
        torch.kron(torch.outer(b, a), C)
        for b, a, C in zip(inputs.B.t(), inputs.A, kernels, strict=True)
    ]
    windows = sum(terms).unflatten(0, (J, -1)).unflatten(2, (I, -1))  # [J, d_out, I, d_in]
    d_out, d_in = case.kernel_size
    s_out, s_in = case.stride
    full = torch.zeros((J - 1) * s_out + d_out, (I - 1) * s_in + d_in, dtype=torch.float64)
    for j in range(J):
        for i in range(I):
            rows, columns = slice(j * s_out, j * s_out + d_out), slice(i * s_in, i * s_in + d_in)
            full[rows, columns] += windows[j, :, i]
    found = delta_weight(
        inputs.A, inputs.B, inputs.C, in_features=case.in_features, out_features=case.out_features,
        stride=case.stride, scaling=0.7, backend="reference",
    )  # fmt: skip
    close(found, 0.7 * full[: case.out_features, : case.in_features])
    if case.stride == case.kernel_size:
        close(full, sum(terms))


@given(case=any_case(), p=st.sampled_from([0.0, 0.4]), seed=seeds)
def test_one_rank_with_its_own_kernel_is_a_shared_kernel_to_the_bit(case, p, seed):
    """Drawn factors, output and gradients."""
    sizes = (case.in_features, case.out_features)
    results = []
    for kernels in ("shared", "per_rank"):
        torch.manual_seed(seed)
        layer = DCFTLinear(
            *sizes, kernel_size=case.kernel_size, stride=case.stride, dropout=p, init="paper",
            kernels=kernels,
        )  # fmt: skip
        x = torch.randn(3, case.in_features, requires_grad=True)
        y = layer(x)
        factors = (layer.dcft_A, layer.dcft_B, layer.dcft_C)
        gradients = torch.autograd.grad(y.square().sum(), (x, *factors))
        results.append([y, layer.delta_weight(), *gradients, *factors])
    assert all(torch.equal(a, b.view_as(a)) for a, b in zip(*results, strict=True))


@given(
    case=any_case(),
    leading=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    p=st.sampled_from([0.0, 0.4]),
    frozen_A=st.booleans(),
    seed=seeds,
)
def test_torch_backend_equals_the_reference(case, leading, p, frozen_A, seed):
    """Output, all gradients and `DW`; with dropout, both backends drop the same elements."""
    sizes = {"in_features": case.in_features, "out_features": case.out_features}
    options = {"stride": case.stride, "scaling": -1.3}
    results = []
    for backend in ("torch", "reference"):
        inputs = random_inputs(case, leading, seed=seed)
        inputs = inputs.requiring(True, True, True, not frozen_A, True, True)
        operands = [operand for operand in inputs.operands if operand.requires_grad]
        torch.manual_seed(seed)
        y = dcft_linear(*inputs.operands, **options, dropout_p=p, backend=backend)
        assert y.shape == (*leading, case.out_features)
        factors = (inputs.A, inputs.B, inputs.C)
        DW = delta_weight(*factors, **sizes, **options, backend=backend).detach()
        if p == 0.0:
            close(y.detach(), F.linear(inputs.x, inputs.weight + DW, inputs.bias).detach())
        results.append((y.detach(), DW, *torch.autograd.grad(y, operands, inputs.grad)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
