"""The tests of `tests/layer/test_autograd.py` on the Triton kernels, and what only these have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcft_kernels import add_delta_weight_
from dcft_kernels.dropout import draw_seed
from tests.adapter_cases import AdapterShape
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


@small_case
@with_and_without_dropout
def test_opcheck(case: AdapterShape, dropout_p: float, backend, device) -> None:
    inputs = drawn(case, 5, device, backend).requiring()
    x, weight, bias, *factors = inputs.operands
    geometry = case.geometry
    flat = [geometry.rank, *geometry.outputs, *geometry.inputs]
    seed = draw_seed(device) if dropout_p else None
    adapter = (*factors, seed, 0.7, flat, dropout_p)
    y = inputs.grad.clone().requires_grad_()
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dropout_p and case is SMALL[1]:
        tests.append("test_aot_dispatch_dynamic")
    for base in ((weight, bias, None), (weight, None, None), (None, None, y)):
        torch.library.opcheck(OPS.forward.default, (x, *base, *adapter), test_utils=tests)
    with torch.no_grad():
        g, u = OPS.forward(x, weight, bias, None, *adapter)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in (x, weight, *adapter)]
    x, weight, *adapter = detached
    for needs in ([True] * 6, [False, True] * 3):
        torch.library.opcheck(
            OPS.backward.default,
            (g, x, u, weight, *adapter, needs),
            test_utils=["test_schema", "test_faketensor"],
        )


@small_case
def test_opcheck_of_delta_weight_and_merge(device, backend, case) -> None:
    inputs = drawn(case, 1, device, backend).requiring()
    geometry = case.geometry
    flat = [geometry.rank, *geometry.outputs, *geometry.inputs]
    factors = (inputs.A, inputs.B, inputs.C, 0.7, flat)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.delta_weight.default, factors, test_utils=tests)
    detached = tuple(each.detach() if isinstance(each, Tensor) else each for each in factors)
    grad = torch.randn(case.out_features, case.in_features, device=device)
    torch.library.opcheck(
        OPS.delta_weight_backward.default, (grad, *detached, [True, False, True]), test_utils=tests
    )
    for seed in (None, draw_seed(device)):
        weight = torch.randn_like(grad).bfloat16()
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
