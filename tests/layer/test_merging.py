"""`add_delta_weight_`: in place, rounded once, or stochastically; the same on every backend."""

from __future__ import annotations

import pytest
import torch

from dcft_kernels import add_delta_weight_, delta_weight
from dcft_kernels.rounding import store
from tests.adapter_cases import CASES, Case, every_case, random_inputs

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
backends = pytest.mark.parametrize("backend", ["torch", "reference"])
sixteen_bits = pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bf16", "fp16"])


@backends
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
def test_adds_in_place_and_rounds_once(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs = random_inputs(case, (1,), dtype)
    weight, before = inputs.weight.clone(), inputs.weight.clone()
    factors = (inputs.A, inputs.B, inputs.C)
    wide = torch.promote_types(dtype, torch.float32)
    increment = delta_weight(
        *(factor.to(wide) for factor in factors),
        in_features=case.in_features, out_features=case.out_features,
        stride=case.stride, scaling=0.7, backend=backend,
    )  # fmt: skip
    result = add_delta_weight_(weight, *factors, stride=case.stride, scaling=0.7, backend=backend)
    assert result is weight
    assert torch.equal(weight, (before + increment).to(dtype))


def test_any_strides_and_parameters() -> None:
    inputs = random_inputs(CASES[3], (1,), torch.float32)
    expected = add_delta_weight_(inputs.weight.clone(), inputs.A, inputs.B, inputs.C)
    stored = torch.nn.Parameter(inputs.weight.t().contiguous())
    add_delta_weight_(stored.t(), inputs.A, inputs.B, inputs.C)
    assert torch.equal(stored.t(), expected)
    assert stored.grad_fn is None


def test_the_negative_takes_it_back() -> None:
    inputs = random_inputs(CASES[0], (1,), torch.float32)
    weight = inputs.weight.clone()
    for scaling in (0.7, -0.7):
        add_delta_weight_(weight, inputs.A, inputs.B, inputs.C, scaling=scaling)
    torch.testing.assert_close(weight, inputs.weight)


@backends
@sixteen_bits
def test_small_increments_arrive_in_the_mean(dtype: torch.dtype, backend: str) -> None:
    """A tenth of a unit in the last place, a hundred times over: nearest drops all of it."""
    weight = torch.ones(64, 64, dtype=dtype)
    tenth = torch.finfo(dtype).eps / 10
    factors = (torch.ones(1, 8), torch.full((8, 1), tenth), torch.ones(8, 8))
    nearest, stochastic = weight.clone(), weight.clone()
    for _ in range(100):
        add_delta_weight_(nearest, *factors, backend=backend)
        add_delta_weight_(stochastic, *factors, stochastic_rounding=True, backend=backend)
    assert torch.equal(nearest, weight)
    arrived = float((stochastic.double() - 1).mean()) / (100 * tenth)
    # Each step is a coin that lands on a unit one time in ten; five standard deviations.
    assert abs(arrived - 1) < 5 * (0.1 * 0.9 * 100 / weight.numel()) ** 0.5 / 10


@sixteen_bits
def test_stochastic_rounding_is_to_a_neighbour(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    scales = torch.tensor([1e-7, 1e-5, 1e-3, 1.0, 100.0]).repeat_interleave(200)
    values = torch.randn(1000) * scales
    seed = torch.tensor(5)
    out = torch.empty(1000, dtype=dtype)
    store(values, out, seed)
    nearest = values.to(dtype)
    inf = torch.tensor(float("inf"), dtype=dtype)
    below = torch.where(nearest.float() > values, torch.nextafter(nearest, -inf), nearest)
    above = torch.where(nearest.float() < values, torch.nextafter(nearest, inf), nearest)
    assert bool(((out == below) | (out == above)).all())
    assert not torch.equal(out, nearest)
    again = torch.empty_like(out)
    store(values, again, seed)
    assert torch.equal(again, out)


@sixteen_bits
def test_stochastic_rounding_leaves_what_is_exact_and_what_is_not_finite(dtype) -> None:
    least = torch.finfo(dtype).smallest_normal
    exact = torch.tensor([0.0, 1.0, -1.5, 2.0**-14, least, -least, torch.finfo(dtype).max])
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e38 if dtype is
                            torch.float16 else 3.4e38])  # fmt: skip
    for seed in range(20):
        out = torch.empty(len(exact), dtype=dtype)
        store(exact, out, torch.tensor(seed))
        assert torch.equal(out.float(), exact)
        out = torch.empty(len(special), dtype=dtype)
        store(special, out, torch.tensor(seed))
        torch.testing.assert_close(out, special.to(dtype), equal_nan=True, rtol=0, atol=0)
