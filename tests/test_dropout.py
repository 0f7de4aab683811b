"""Dropout on the adapter's input: which elements, how often, how scaled, and when not at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcft_kernels import DCFTLinear, dcft_linear
from dcft_kernels.dropout import draw_seed, drop, keep_scale
from tests.adapter_cases import CASES, random_inputs

CPU = torch.device("cpu")


def test_mask_is_a_function_of_its_seed() -> None:
    seed, other = draw_seed(), draw_seed()
    shape, p = (64, 33), 0.3
    mask = keep_scale(seed, p, shape, torch.float32, CPU)
    assert torch.equal(mask, keep_scale(seed, p, shape, torch.float32, CPU))
    assert not torch.equal(mask, keep_scale(other, p, shape, torch.float32, CPU))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_frequency_and_scale(p: float) -> None:
    mask = keep_scale(draw_seed(), p, (400, 500), torch.float64, CPU)
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    # Five standard deviations of a binomial share.
    tolerance = 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) < tolerance


def test_mask_does_not_depend_on_strides() -> None:
    x = torch.randn(12, 7)
    seed = draw_seed()
    assert torch.equal(drop(x, 0.4, seed), drop(x.t().contiguous().t(), 0.4, seed))


def test_only_the_adapter_sees_dropout() -> None:
    """`y - base` is the increment of the dropped input; the base part is untouched."""
    case = CASES[0]
    inputs = random_inputs(case, (9,))
    torch.manual_seed(5)
    y = dcft_linear(*inputs.operands, dropout_p=0.5, backend="torch")
    torch.manual_seed(5)
    dropped = drop(inputs.x, 0.5, draw_seed())
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    increment = F.linear(dropped, torch.kron(inputs.B @ inputs.A, inputs.C))
    torch.testing.assert_close(y, base + increment, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6]], ids=str)
@pytest.mark.parametrize("frozen_A", [False, True])
def test_backends_drop_the_same_elements(case, frozen_A: bool) -> None:
    results = []
    for backend in ("torch", "reference"):
        inputs = random_inputs(case, (9,)).requiring(True, True, True, not frozen_A, True, True)
        torch.manual_seed(7)
        y = dcft_linear(*inputs.operands, stride=case.stride, dropout_p=0.5, backend=backend)
        y.backward(inputs.grad)
        results.append([y.detach(), *(t.grad for t in inputs.operands if t.requires_grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_inactive_in_eval_and_at_zero() -> None:
    layer = DCFTLinear(48, 64, dropout=0.5)
    x = torch.randn(5, 48)
    state = torch.get_rng_state()
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    layer.dropout = 0.0
    assert torch.equal(layer(x), layer(x))
    # Nothing above drew a random number.
    assert torch.equal(torch.get_rng_state(), state)
    layer.dropout = 0.5
    assert not torch.equal(layer(x), layer(x))


def test_manual_seed_repeats_training() -> None:
    layer = DCFTLinear(48, 64, dropout=0.5)
    x = torch.randn(5, 48)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
