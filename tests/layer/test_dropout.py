"""Dropout on the adapter's input: which elements, how often, how scaled, and when not at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcft_kernels import DCFTLinear, dcft_linear, dropout
from dcft_kernels.dropout import draw_seed, drop, keep_mask, philox_mask
from tests.adapter_cases import CASES, random_inputs

CPU = torch.device("cpu")


def test_mask_is_a_function_of_its_seed() -> None:
    seed, other = draw_seed(CPU), draw_seed(CPU)
    shape, p = (64, 33), 0.3
    mask = keep_mask(seed, p, shape, torch.float32, CPU)
    assert torch.equal(mask, keep_mask(seed, p, shape, torch.float32, CPU))
    assert not torch.equal(mask, keep_mask(other, p, shape, torch.float32, CPU))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("draw", [keep_mask, philox_mask])
def test_frequency(p: float, draw) -> None:
    if draw is keep_mask:
        mask = keep_mask(draw_seed(CPU), p, (400, 500), torch.float64, CPU)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
    else:
        mask = philox_mask(draw_seed(CPU), p, (400, 500), CPU)
    # Five standard deviations of a binomial share: of all, and of every row and column.
    for shares, count in ((mask.double().mean(), mask.numel()), (mask.double().mean(0), 400)):
        tolerance = (5 if shares.dim() == 0 else 6) * (p * (1 - p) / count) ** 0.5
        assert float((shares - (1 - p)).abs().max()) < tolerance


def test_philox_words_are_the_published_ones() -> None:
    """Known answers of Philox4x32-10, from the generator's authors (Random123, kat_vectors)."""
    # key and counter all zero: words 6627e8d5 e169c58d bc57ac4c 9b00dbd8
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seed = torch.zeros((), dtype=torch.int64)
    for p in (0.35, 0.45, 0.65, 0.8, 0.9):
        expected = [(word >> 8) / 2**24 >= p for word in words]
        assert philox_mask(seed, p, (1, 4), CPU).tolist() == [expected]


def test_philox_mask_of_a_part_is_a_part_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = draw_seed(CPU)
    whole = philox_mask(seed, 0.5, (20, 30), CPU)
    assert torch.equal(philox_mask(seed, 0.5, (13, 21), CPU), whole[:13, :21])
    monkeypatch.setattr(dropout, "_BLOCK_ELEMENTS", 70)
    assert torch.equal(philox_mask(seed, 0.5, (20, 30), CPU), whole)
    assert philox_mask(seed, 0.5, (0, 30), CPU).shape == (0, 30)


def test_mask_does_not_depend_on_strides() -> None:
    x = torch.randn(12, 7)
    seed = draw_seed(CPU)
    assert torch.equal(drop(x, 0.4, seed), drop(x.t().contiguous().t(), 0.4, seed))


def test_only_the_adapter_sees_dropout() -> None:
    """`y - base` is the increment of the dropped input; the base part is untouched."""
    case = CASES[0]
    inputs = random_inputs(case, (9,))
    torch.manual_seed(5)
    y = dcft_linear(*inputs.operands, dropout_p=0.5, backend="torch")
    torch.manual_seed(5)
    dropped = drop(inputs.x, 0.5, draw_seed(CPU))
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    increment = F.linear(dropped, torch.kron(inputs.B @ inputs.A, inputs.C)) / (1 - 0.5)
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
    layer = DCFTLinear(48, 64, dropout=0.5, init="paper")
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
    layer = DCFTLinear(48, 64, dropout=0.5, init="paper")
    x = torch.randn(5, 48)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
