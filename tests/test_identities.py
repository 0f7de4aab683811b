"""The algebra that everything rests on, identity by identity, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcft_kernels import dcft_linear, delta_weight, reference
from dcft_kernels.adapter import Adapter
from dcft_kernels.dropout import draw_seed
from dcft_kernels.geometry import Geometry, window_count
from tests.adapter_cases import Case, adapter_of, every_case, random_inputs

TILING = [
    Case(48, 64, 1, (8, 8), (8, 8)),
    Case(24, 36, 2, (6, 12), (6, 12)),
    Case(16, 24, 2, (1, 1), (1, 1)),
]
tiling_case = pytest.mark.parametrize("case", TILING, ids=str)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("size", "width", "stride", "count"),
    [
        (768, 8, 8, 96),
        (768, 8, 1, 761),
        (768, 8, 2, 381),
        (50, 8, 8, 7),
        (3, 8, 8, 1),
        (9, 4, 3, 3),
    ],
)
def test_window_count(size: int, width: int, stride: int, count: int) -> None:
    assert window_count(size, width, stride) == count
    side = Geometry.build(size, size, 1, (width, width), (stride, stride)).inputs
    assert side.span >= size
    # One window fewer would not reach the end.
    assert count == 1 or side.span - stride < size


@tiling_case
def test_reference_is_the_kronecker_product(case: Case) -> None:
    inputs = random_inputs(case)
    dense = reference.delta_weight(adapter_of(inputs, case, scaling=0.7))
    close(dense, 0.7 * torch.kron(inputs.B @ inputs.A, inputs.C))


@every_case
def test_reference_is_the_sum_over_windows(case: Case) -> None:
    """`DW[j*s+q, i*s+p] += F[j,i] C[q,p]`, written as loops: independent of conv_transpose2d."""
    inputs = random_inputs(case)
    outputs, inputs_side = case.geometry.outputs, case.geometry.inputs
    product = inputs.B @ inputs.A
    full = torch.zeros(outputs.span, inputs_side.span, dtype=torch.float64)
    for j in range(outputs.windows):
        for i in range(inputs_side.windows):
            top, left = j * outputs.stride, i * inputs_side.stride
            full[top : top + outputs.width, left : left + inputs_side.width] += (
                product[j, i] * inputs.C
            )
    expected = full[: case.out_features, : case.in_features]
    close(reference.delta_weight(adapter_of(inputs, case)), expected)


@tiling_case
def test_shrink_mix_expand(case: Case) -> None:
    """The three steps of the identity, as index sums, equal `x DW^T`."""
    inputs = random_inputs(case)
    outputs, side = case.geometry.outputs, case.geometry.inputs
    x = inputs.x.unflatten(-1, (side.windows, side.width))
    U = torch.einsum("tip,ki->tpk", x, inputs.A)
    V = torch.einsum("qp,tpk->tqk", inputs.C, U)
    y = torch.einsum("jk,tqk->tjq", inputs.B, V).reshape(-1, outputs.size)
    close(y, F.linear(inputs.x, reference.delta_weight(adapter_of(inputs, case))))


@tiling_case
def test_plain_lora_form(case: Case) -> None:
    """`lora_A = kron(A, I)`, `lora_B = s kron(B, C)` of rank `k d_in` is the same adapter."""
    inputs = random_inputs(case)
    lora_A = torch.kron(inputs.A, torch.eye(case.kernel_size[1], dtype=torch.float64))
    lora_B = 0.7 * torch.kron(inputs.B, inputs.C)
    assert lora_A.shape == (case.rank * case.kernel_size[1], case.in_features)
    close(lora_B @ lora_A, reference.delta_weight(adapter_of(inputs, case, scaling=0.7)))


@every_case
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_closed_form_gradients(case: Case, dropout_p: float) -> None:
    """The hand-derived gradients of the reference agree with autograd through it."""
    inputs = random_inputs(case).requiring()
    seed = draw_seed(torch.device("cpu")) if dropout_p else None
    adapter = Adapter(inputs.A, inputs.B, inputs.C, 0.7, case.geometry, dropout_p, seed)
    y = reference.linear(inputs.x, inputs.weight, inputs.bias, adapter)
    by_autograd = torch.autograd.grad(y, inputs.operands, inputs.grad)
    with torch.no_grad():
        by_hand = reference.closed_form_gradients(inputs.grad, inputs.x, inputs.weight, adapter)
    for actual, expected in zip(by_hand, by_autograd, strict=True):
        close(actual, expected)


def test_factored_gradients_of_the_paper_case() -> None:
    """The backward formulas of the identity, as index sums, against the closed form."""
    case = Case(48, 64, 2, (8, 8), (8, 8))
    inputs, s = random_inputs(case), 0.7
    expected = reference.closed_form_gradients(
        inputs.grad, inputs.x, inputs.weight, adapter_of(inputs, case, scaling=s)
    )
    x, g = inputs.x.unflatten(-1, (6, 8)), inputs.grad.unflatten(-1, (8, 8))
    U = torch.einsum("tip,ki->tpk", x, inputs.A)
    V = torch.einsum("qp,tpk->tqk", inputs.C, U)
    Vb = s * torch.einsum("tjq,jk->tqk", g, inputs.B)
    Ub = torch.einsum("qp,tqk->tpk", inputs.C, Vb)
    close(s * torch.einsum("tjq,tqk->jk", g, V), expected.B)
    close(torch.einsum("tqk,tpk->qp", Vb, U), expected.C)
    close(torch.einsum("tip,tpk->ki", x, Ub), expected.A)
    through_adapter = torch.einsum("ki,tpk->tip", inputs.A, Ub).flatten(1)
    close(inputs.grad @ inputs.weight + through_adapter, expected.x)


@every_case
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layer_is_its_delta_weight(case: Case, backend: str) -> None:
    """`dcft_linear` applies exactly what `delta_weight` returns."""
    inputs = random_inputs(case)
    options = {"stride": case.stride, "scaling": 0.7, "backend": backend}
    y = dcft_linear(inputs.x, inputs.weight, None, inputs.A, inputs.B, inputs.C, **options)
    dense = delta_weight(
        inputs.A,
        inputs.B,
        inputs.C,
        in_features=case.in_features,
        out_features=case.out_features,
        **options,
    )
    close(y, F.linear(inputs.x, inputs.weight + dense))
