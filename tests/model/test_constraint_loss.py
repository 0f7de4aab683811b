"""`constraint_loss` and `orthogonality_loss` against the equations of arXiv 2407.05417."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dcft_kernels import DCFTLinear, constraint_loss, orthogonality_loss, swap_linear
from tests.model import peft_models
from tests.model.peft_models import MODELS

# PEFT corrects it without help.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
every_constraint = pytest.mark.parametrize("constraint", ["orthogonal", "diagonal"])
every_form = pytest.mark.parametrize("form", ["paper", "published_code"])


def factors(model: nn.Module) -> dict[str, Tensor]:
    """`A` and `B` of every adapter, by parameter name."""
    sides = ("dcft_A", "dcft_B", "lora_A", "lora_B")
    return {n: p for n, p in model.named_parameters() if any(side in n for side in sides)}


def by_equation(model: nn.Module, constraint: str, form: str) -> Tensor:
    """Equations 20 and 21 for `A [n, r]` and `B [r, m]`, with the paper's own transposes.

    The form of the published code is that of AdaLoRA's `compute_orth_regu`.
    """
    residuals = []
    for name, parameter in factors(model).items():
        is_A, factor = "_A" in name, parameter.t()
        gram = factor.t() @ factor if is_A else factor @ factor.t()
        free_lengths = constraint == "diagonal" and not is_A
        target = torch.diag(gram.diagonal()) if free_lengths else torch.eye(len(gram)).to(gram)
        residuals.append(gram - target)
    if form == "paper":
        return sum(residual.norm() ** 2 for residual in residuals)
    return sum(residual.norm() for residual in residuals) / len(residuals)


@every_form
@every_constraint
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_equations(kind, constraint, form):
    model = MODELS[kind]()
    found, expected = constraint_loss(model, constraint, form), by_equation(model, constraint, form)
    assert len(factors(model)) == 2 * {"dcft": 3, "lora": 3, "adalora": 2, "both": 2}[kind]
    assert found.dtype == torch.float64
    assert found.shape == ()
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(expected, list(factors(model).values()))
    found.backward()
    for name, gradient in zip(factors(model), gradients, strict=True):
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    if (constraint, form) == ("orthogonal", "paper"):
        assert torch.equal(constraint_loss(model), found)
    others = [p for name, p in model.named_parameters() if name not in factors(model)]
    assert all(parameter.grad is None for parameter in others)


@every_form
def test_orthogonality_loss_is_of_dcft_layers_alone(form):
    model = peft_models.dcft()
    expected = constraint_loss(model, "orthogonal", form)
    assert torch.equal(orthogonality_loss(model, form=form), expected)
    mixed = peft_models.both()
    alone = orthogonality_loss(mixed.base_model.model.query, form=form)
    assert torch.equal(orthogonality_loss(mixed, form=form), alone)
    assert (form == "paper") == torch.equal(orthogonality_loss(mixed), alone)
    with pytest.raises(ValueError, match=r"^model: has no DCFTLinear layers"):
        orthogonality_loss(peft_models.lora(), form=form)


@every_form
@every_constraint
@pytest.mark.parametrize("rank", [1, 3])
def test_loss_is_zero_on_the_pattern(constraint, form, rank):
    """A norm has no derivative at zero, and training may start or end there."""
    layer = DCFTLinear(32, 32, rank=rank, kernel_size=4, dtype=torch.float64)
    lengths = torch.ones(rank) if constraint == "orthogonal" else torch.arange(2, 2 + rank)
    with torch.no_grad():
        layer.dcft_A.copy_(torch.eye(rank, 8))
        layer.dcft_B.copy_(torch.eye(8, rank) * lengths)
    loss = constraint_loss(layer, constraint, form)
    assert loss.item() == 0.0
    loss.backward()
    for factor in (layer.dcft_A, layer.dcft_B):
        assert torch.equal(factor.grad, torch.zeros_like(factor))
    nn.init.normal_(layer.dcft_B)
    # One column alone is diagonal whatever its length.
    free = constraint == "diagonal" and rank == 1
    assert bool(constraint_loss(layer, constraint, form) == 0) is free


@every_form
@every_constraint
@pytest.mark.parametrize("seed", range(2))
def test_descent_reaches_the_pattern(constraint, form, seed):
    """Gradient descent at rates whose distance from the pattern can be bounded.

    A step at the rate h takes A to `(1 - 4 h R) A` under the paper's form and to
    `(1 - h R / |R|) A` under the published one, where R is what the Gram matrix is off by; the same
    holds for B. With `g` for the squared lengths of the vectors, and to first order in R:

    - paper: an entry of R shrinks by `1 - 4 h (g_i + g_j)`. A constant rate contracts, and what
      is left of R after the last step is rounding.
    - published code: an entry of R shrinks by `h (g_i + g_j) R_ij / |R|`, whatever the size of R:
      descent ends within one such step of the kink, `|R| <= h max(g_i + g_j)` at the last rate,
      if rates decay no faster than R follows. Twice that leaves room for the second order.
    """
    torch.manual_seed(seed)
    layer = DCFTLinear(128, 128, rank=3, dtype=torch.float64)
    nn.init.normal_(layer.dcft_A)
    nn.init.normal_(layer.dcft_B)
    rates = [0.004] * 600 if form == "paper" else [0.1 * 0.98**step for step in range(400)]
    optimizer = torch.optim.SGD([layer.dcft_A, layer.dcft_B], lr=1.0)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        constraint_loss(layer, constraint, form).backward()
        optimizer.step()
    gram_A = (layer.dcft_A @ layer.dcft_A.t()).detach()
    gram_B = (layer.dcft_B.t() @ layer.dcft_B).detach()
    lengths = gram_B.diagonal()
    free = constraint == "diagonal"
    target_B = torch.diag(lengths) if free else torch.eye(3)
    longest = float(lengths.max()) if free else 1.0
    for gram, target, longest_length in ((gram_A, torch.eye(3), 1.0), (gram_B, target_B, longest)):
        bound = 1e-6 if form == "paper" else 2 * rates[-1] * 2 * longest_length
        assert float((gram - target).norm()) <= bound
    if free:
        assert float((lengths - 1).abs().max()) > 0.5  # nothing pulls these to one


@every_constraint
def test_only_active_adapters_count(constraint):
    model = peft_models.lora(["query"])
    peft_models.add_second(model, ["query", "value"])
    with_first = constraint_loss(model, constraint).detach()
    model.set_adapter("second")
    with_second = constraint_loss(model, constraint).detach()
    model.base_model.set_adapter(["default", "second"])
    total = constraint_loss(model, constraint).detach()
    torch.testing.assert_close(total, with_first + with_second)
    torch.testing.assert_close(total, by_equation(model, constraint, "paper").detach())


def test_embeddings_convolutions_and_bare_parameters_are_left_out():
    model = peft_models.lora(["embedding", "convolution", "query"])
    assert torch.equal(constraint_loss(model), constraint_loss(model.base_model.model.query))
    for others in (peft_models.bare_parameter(), peft_models.lora(["embedding", "convolution"])):
        with pytest.raises(ValueError, match=r"^model: has neither DCFTLinear layers nor active"):
            constraint_loss(others)


@every_form
@every_constraint
@pytest.mark.parametrize("kind", ["dcft", "lora"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_factors_are_widened(kind, dtype, constraint, form):
    model = MODELS[kind]().to(dtype)
    with torch.no_grad():
        for parameter in factors(model).values():
            parameter.mul_(100.0)  # the Gram matrix is beyond what float16 holds
    loss = constraint_loss(model, constraint, form)
    assert loss.dtype == torch.float32
    expected = constraint_loss(copy.deepcopy(model).double(), constraint, form)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(parameter.grad.dtype == dtype for parameter in factors(model).values())


@every_form
def test_autocast_makes_no_difference(form):
    """Near orthonormality, 16 bits cannot tell a Gram matrix from the identity."""
    model = peft_models.both().float()
    with torch.no_grad():
        for parameter in factors(model).values():
            parameter.mul_(0.002).add_(torch.eye(*parameter.shape))
    expected = constraint_loss(model, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(constraint_loss(model, form=form), expected)


def test_factors_of_several_dtypes_go_together():
    dtypes = (torch.bfloat16, torch.float64)
    layers = [DCFTLinear(16, 16, init="paper", dtype=dtype) for dtype in dtypes]
    total = sum(constraint_loss(layer).double() for layer in layers)
    torch.testing.assert_close(constraint_loss(nn.ModuleList(layers)), total)


@pytest.mark.gpu
def test_factors_on_several_devices_go_together():
    layers = [DCFTLinear(16, 16, init="paper", device=device) for device in ("cpu", "cuda")]
    loss = constraint_loss(nn.ModuleList(layers))
    assert loss.device.type == "cpu"
    torch.testing.assert_close(loss, sum(constraint_loss(layer).cpu() for layer in layers))
    loss.backward()
    assert layers[1].dcft_A.grad.is_cuda


def test_wrappers_sharing_and_merging_make_no_difference():
    model = peft_models.lora(["query", "value"])
    expected = constraint_loss(model)
    assert torch.equal(constraint_loss(nn.Sequential(model)), expected)
    model.merge_adapter()
    assert torch.equal(constraint_loss(model), expected)
    layer = nn.Linear(16, 16)
    shared = nn.ModuleList([layer, layer])
    swap_linear(shared)
    expected = constraint_loss(shared[0])
    shared[0].merge()
    assert torch.equal(constraint_loss(shared), expected)
