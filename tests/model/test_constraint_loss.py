"""`orthogonality_loss` against its formulas, written out on the full matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcft_kernels import DCFTLinear, orthogonality_loss, swap_linear

FORMS = ["paper", "published_code"]


def _model(rank: int, dtype: torch.dtype = torch.float64, layers: int = 3) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(32, 24 + 8 * i, dtype=dtype) for i in range(layers)))
    swap_linear(model, rank=rank, kernel_size=(8, 4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dcft_" in name:
                parameter.normal_()
    return model


def _squared_norms(model: nn.Module) -> list[Tensor]:
    """||A A^T - I||_F^2 and ||B^T B - I||_F^2 of every layer, entry by entry."""
    norms = []
    for layer in model:
        A, B = layer.dcft_A.detach(), layer.dcft_B.detach()
        for rows in (A, B.t()):
            total = torch.zeros((), dtype=rows.dtype)
            for i, first in enumerate(rows):
                for j, second in enumerate(rows):
                    total += ((first * second).sum() - (1.0 if i == j else 0.0)) ** 2
            norms.append(total)
    return norms


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_paper_form_sums_squared_norms(rank):
    """Equation 4 of arXiv 2503.01419, summed over the adapted layers."""
    model = _model(rank)
    expected = sum(_squared_norms(model))
    torch.testing.assert_close(orthogonality_loss(model).detach(), expected)
    torch.testing.assert_close(orthogonality_loss(model, form="paper").detach(), expected)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_published_form_averages_norms(rank):
    model = _model(rank)
    norms = [norm.sqrt() for norm in _squared_norms(model)]
    assert len(norms) == 6
    found = orthogonality_loss(model, form="published_code").detach()
    torch.testing.assert_close(found, sum(norms) / 6)


def test_forms_grow_differently_with_the_layers():
    one, three = _model(2, layers=1), _model(2, layers=3)
    for layer in (*one, *three):
        with torch.no_grad():
            layer.dcft_A.fill_(0.5)
            layer.dcft_B.zero_()
    paper = [orthogonality_loss(model).item() for model in (one, three)]
    published = [orthogonality_loss(m, form="published_code").item() for m in (one, three)]
    assert paper[1] == pytest.approx(3 * paper[0])
    assert published[1] == pytest.approx(published[0])


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_the_formula(form):
    model = _model(2, layers=1)
    layer = model[0]
    A, B = (p.detach().clone().requires_grad_() for p in (layer.dcft_A, layer.dcft_B))
    eye = torch.eye(2, dtype=torch.float64)
    if form == "paper":
        expected = (A @ A.t() - eye).pow(2).sum() + (B.t() @ B - eye).pow(2).sum()
    else:
        expected = ((A @ A.t() - eye).norm() + (B.t() @ B - eye).norm()) / 2
    expected.backward()

    loss = orthogonality_loss(model, form=form)
    loss.backward()

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(layer.dcft_A.grad, A.grad)
    torch.testing.assert_close(layer.dcft_B.grad, B.grad)
    assert layer.dcft_C.grad is None
    assert layer.weight.grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3])
def test_orthonormal_factors_cost_nothing_and_have_a_finite_gradient(form, rank):
    """A norm has no derivative at zero, and training may start or end there."""
    model = _model(rank)
    with torch.no_grad():
        for layer in model:
            layer.dcft_A.copy_(torch.eye(*layer.dcft_A.shape))
            layer.dcft_B.copy_(torch.eye(*layer.dcft_B.shape))
    loss = orthogonality_loss(model, form=form)
    assert loss.item() == 0.0
    loss.backward()
    for layer in model:
        for factor in (layer.dcft_A, layer.dcft_B):
            assert torch.equal(factor.grad, torch.zeros_like(factor))


@pytest.mark.parametrize("form", FORMS)
def test_descent_makes_factors_orthonormal(form):
    model = _model(3, layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        orthogonality_loss(model, form=form).backward()
        optimizer.step()
    layer = model[0]
    assert (layer.dcft_A @ layer.dcft_A.t() - torch.eye(3)).abs().max() < 0.05
    assert (layer.dcft_B.t() @ layer.dcft_B - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_result_is_a_scalar_of_at_least_float32(form, dtype, expected):
    layer = DCFTLinear(16, 16, rank=2, dtype=dtype, adapter_dtype=dtype)
    with torch.no_grad():
        layer.dcft_A.fill_(300.0)  # the Gram matrix is beyond what float16 holds
    loss = orthogonality_loss(layer, form=form)
    assert loss.shape == ()
    assert loss.dtype == expected
    assert loss.isfinite()
    loss.backward()
    assert layer.dcft_A.grad.dtype == dtype


@pytest.mark.parametrize("form", FORMS)
def test_autocast_makes_no_difference(form):
    """Near orthonormality, 16 bits cannot tell a Gram matrix from the identity."""
    layer = DCFTLinear(64, 64, rank=2)
    with torch.no_grad():
        layer.dcft_A.copy_(torch.eye(2, 8) + 0.002 * torch.randn(2, 8))
        layer.dcft_B.copy_(torch.eye(8, 2) + 0.002 * torch.randn(8, 2))
    expected = orthogonality_loss(layer, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = orthogonality_loss(layer, form=form)
    assert torch.equal(found, expected)


def test_a_shared_layer_counts_once():
    layer = nn.Linear(16, 16)
    model = nn.ModuleList([layer, layer])
    swap_linear(model)
    assert torch.equal(orthogonality_loss(model), orthogonality_loss(model[0]))


def test_merging_makes_no_difference():
    layer = DCFTLinear(16, 16, rank=2)
    before = orthogonality_loss(layer)
    layer.merge()
    assert torch.equal(orthogonality_loss(layer), before)
