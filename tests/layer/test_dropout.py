"""Dropout on the adapter's input: which elements, how often, how scaled, and when not at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcft_kernels import DCFTLinear, dcft_linear, dropout
from dcft_kernels.dropout import draw_seed, drop, keep_mask, philox_mask
from tests.adapter_cases import CASES, random_inputs

CPU = torch.device("cpu")


def test_mask_is_a_function_of_its_seed_and_shape():
    seed, other = draw_seed(CPU), draw_seed(CPU)
    shape, p = (64, 33), 0.3
    mask = keep_mask(seed, p, shape, torch.float32, CPU)
    assert torch.equal(mask, keep_mask(seed, p, shape, torch.float32, CPU))
    assert not torch.equal(mask, keep_mask(other, p, shape, torch.float32, CPU))
    x = torch.randn(shape)
    assert torch.equal(drop(x, p, seed), x * mask)
    assert torch.equal(drop(x.t().contiguous().t(), p, seed), x * mask)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("generator", ["cpu", "philox"])
def test_frequency(p, generator):
    if generator == "cpu":
        mask = keep_mask(draw_seed(CPU), p, (400, 500), torch.float64, CPU)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
    else:
        mask = philox_mask(draw_seed(CPU), p, (400, 500), CPU).double()
    # Standard deviations of a binomial share: five for the whole, six for the worst of 500 columns.
    for share, count, deviations in ((mask.mean(), mask.numel(), 5), (mask.mean(0), 400, 6)):
        tolerance = deviations * (p * (1 - p) / count) ** 0.5
        assert float((share - (1 - p)).abs().max()) < tolerance


def test_philox_words_are_the_published_ones():
    """Known answers of Philox4x32-10, from the generator's authors (Random123, kat_vectors)."""
    # key and counter all zero: words 6627e8d5 e169c58d bc57ac4c 9b00dbd8
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seed = torch.zeros((), dtype=torch.int64)
    for p in (0.35, 0.45, 0.65, 0.8, 0.9):
        expected = [(word >> 8) / 2**24 >= p for word in words]
        assert philox_mask(seed, p, (1, 4), CPU).tolist() == [expected]


def test_philox_mask_of_a_part_is_a_part_of_the_mask(monkeypatch):
    seed = draw_seed(CPU)
    whole = philox_mask(seed, 0.5, (20, 30), CPU)
    assert torch.equal(philox_mask(seed, 0.5, (13, 21), CPU), whole[:13, :21])
    monkeypatch.setattr(dropout, "_BLOCK_ELEMENTS", 70)
    assert torch.equal(philox_mask(seed, 0.5, (20, 30), CPU), whole)
    assert philox_mask(seed, 0.5, (0, 30), CPU).shape == (0, 30)


def test_only_the_adapter_sees_dropout():
    """`y - base` is the increment of the dropped input; the base part is untouched."""
    inputs = random_inputs(CASES[0], (9,))
    torch.manual_seed(5)
    y = dcft_linear(*inputs.operands, dropout_p=0.5, backend="torch")
    torch.manual_seed(5)
    dropped = drop(inputs.x, 0.5, draw_seed(CPU))
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    increment = F.linear(dropped, torch.kron(inputs.B @ inputs.A, inputs.C)) / (1 - 0.5)
    torch.testing.assert_close(y, base + increment, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("nonlinearity", [None, "silu"])
def test_training_repeats_by_seed_and_evaluation_draws_nothing(nonlinearity):
    layer = DCFTLinear(48, 64, dropout=0.5, init="paper", nonlinearity=nonlinearity)
    x = torch.randn(5, 48)
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    state = torch.get_rng_state()
    layer.eval()
    evaluated = layer(x)
    layer.train()
    layer.dropout = 0.0
    assert torch.equal(layer(x), evaluated)
    assert torch.equal(torch.get_rng_state(), state)
