"""The tests of `tests/layer/test_autograd.py` on the Triton kernels, and what only these have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcft_kernels import DCFTLinear, add_delta_weight_, delta_weight
from dcft_kernels.backends import KERNELS, STRATEGIES
from dcft_kernels.dropout import draw_seed
from tests.adapter_cases import AdapterShape, Inputs, random_inputs
from tests.kernels.parity import to
from tests.layer.test_autograd import (  # noqa: F401 - tests, with this folder's fixtures
    OPS,
    SMALL,
    _fresh_compiler,
    drawn,
    small_case,
    test_autocast_is_the_cast_layer,
    test_backward_inside_autocast,
    test_checkpointing,
    test_compiled_equals_eager,
    test_compiled_forward_and_backward_draw_one_mask,
    test_compiled_update_and_delta_weight,
    test_double_backward,
    test_double_backward_in_16_bits,
    test_double_backward_of_delta_weight,
    test_every_subset_of_gradients,
    test_fake_tensors,
    test_float16_gradients_are_finite_where_the_output_is,
    test_forward_mode_through_a_backward_pass,
    test_never_allocates_as_much_as_the_weight,
    test_new_token_counts_do_not_recompile,
    test_no_graph_is_recorded_without_gradients,
    test_saves_a_seed_and_no_mask_with_dropout,
    test_saves_the_input_itself_and_U,
    with_and_without_dropout,
)


def check_operators(inputs: Inputs, case: AdapterShape, strategy: str, seed: Tensor | None) -> None:
    """`opcheck` of both directions, with a base layer and without one."""
    x, weight, bias, *factors = inputs.requiring().operands
    geometry = case.geometry
    flat = [geometry.rank, *geometry.outputs, *geometry.inputs, geometry.per_rank]
    adapter = (*factors, seed, 0.7, flat, 0.0 if seed is None else 0.3)
    y = inputs.grad.clone().requires_grad_()
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if seed is not None and case is SMALL[1]:
        tests.append("test_aot_dispatch_dynamic")
    for base in ((weight, bias, None), (weight, None, None), (None, None, y)):
        torch.library.opcheck(OPS.forward.default, (x, *base, *adapter, strategy), test_utils=tests)
    with torch.no_grad():
        g, u = OPS.forward(x, weight, bias, None, *adapter, strategy)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in (x, weight, *adapter)]
    x, weight, *adapter = detached
    for needs in ([True] * 6, [False, True] * 3):
        torch.library.opcheck(
            OPS.backward.default,
            (g, x, u, weight, *adapter, needs, strategy),
            test_utils=["test_schema", "test_faketensor"],
        )


@small_case
@with_and_without_dropout
def test_opcheck(case: AdapterShape, dropout_p: float, backend, device) -> None:
    inputs = drawn(case, 5, device, backend)
    check_operators(inputs, case, "triton", draw_seed(device) if dropout_p else None)


# Nothing that a tile divides, on a GPU that runs `seeded`.
SEEDABLE = AdapterShape(264, 328, 2, (8, 8), (8, 8))


@pytest.mark.parametrize("strategy", KERNELS)
def test_opcheck_of_strategies(strategy: str, device, hopper) -> None:
    inputs = to(random_inputs(SEEDABLE, (5,), torch.bfloat16, torch.float32), device)
    check_operators(inputs, SEEDABLE, strategy, None)


@pytest.mark.parametrize("strategy", STRATEGIES[:-1])
def test_compiled_strategies_equal_eager(strategy: str, device, hopper) -> None:
    """Of any number of tokens, by the same kernels."""
    layer = DCFTLinear(264, 328, rank=2, dtype=torch.bfloat16, strategy=strategy, device=device)
    nn.init.normal_(layer.dcft_B)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 140):
        x = torch.randn(tokens, 264, dtype=torch.bfloat16, device=device, requires_grad=True)
        operands = (x, layer.dcft_A, layer.dcft_B, layer.dcft_C)
        results = []
        for run in (compiled, layer):
            y = run(x)
            results.append([y, *torch.autograd.grad(y, operands, torch.ones_like(y))])
        assert all(map(torch.equal, *results))


def test_backward_of_delta_weight_inside_autocast(device, backend) -> None:
    """It computes what one outside of it computes."""
    factors = to(random_inputs(SEEDABLE, (1,), torch.float32), device).requiring().operands[3:]
    dense = delta_weight(*factors, in_features=264, out_features=328, backend=backend)
    grad = torch.randn_like(dense)
    results = []
    for inside in (True, False):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=inside):
            results.append(torch.autograd.grad(dense, factors, grad, retain_graph=True))
    assert all(map(torch.equal, *results))


@small_case
def test_opcheck_of_delta_weight_and_merge(device, backend, case) -> None:
    inputs = drawn(case, 1, device, backend).requiring()
    geometry = case.geometry
    flat = [geometry.rank, *geometry.outputs, *geometry.inputs, geometry.per_rank]
    factors = (inputs.A, inputs.B, inputs.C, 0.7, flat)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.delta_weight.default, factors, test_utils=tests)
    detached = tuple(each.detach() if isinstance(each, Tensor) else each for each in factors)
    for seed in (None, draw_seed(device)):
        weight = inputs.weight.detach().bfloat16()
        torch.library.opcheck(OPS.merge.default, (weight, *detached, seed), test_utils=tests)


@pytest.mark.parametrize("stochastic", [False, True])
def test_compiled_merge(device, backend, stochastic: bool) -> None:
    inputs = drawn(SMALL[1], 1, device, backend)
    factors = (inputs.A, inputs.B, inputs.C)

    def merge(weight: Tensor) -> Tensor:
        return add_delta_weight_(weight, *factors, stochastic_rounding=stochastic, backend=backend)

    before = inputs.weight.bfloat16()
    weight, expected = before.clone(), before.clone()
    merge(expected)
    result = torch.compile(merge, fullgraph=True, backend="aot_eager")(weight)
    if not stochastic:
        assert torch.equal(weight, expected)
    assert torch.equal(result, weight)
    assert not torch.equal(weight, before)
