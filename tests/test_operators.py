"""The operators as PyTorch sees them: registration, what they save, gradients of any order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from dcft_kernels import DCFTLinear, dcft_linear, dcft_update
from dcft_kernels.dropout import draw_seed
from dcft_kernels.gradients import Needs
from dcft_kernels.ops import layer as layer_ops
from dcft_kernels.torch_backend import passes
from tests.adapter_cases import CASES, Case, adapter_of, every_case, random_inputs

OPS = torch.ops.dcft_kernels
SMALL = [
    Case(8, 12, 1, (4, 4), (4, 4)),
    Case(7, 9, 2, (3, 4), (3, 4)),
    Case(10, 8, 2, (4, 4), (2, 1)),
    Case(18, 9, 4, (3, 3), (3, 3)),
]
small_case = pytest.mark.parametrize("case", SMALL, ids=str)


@small_case
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(case: Case, backend: str) -> None:
    inputs = random_inputs(case, (3,)).requiring()

    def layer(*operands: Tensor) -> Tensor:
        return dcft_linear(*operands, stride=case.stride, scaling=0.7, backend=backend)

    assert gradcheck(layer, inputs.operands)
    assert gradgradcheck(layer, inputs.operands)


@small_case
def test_gradcheck_of_update(case: Case) -> None:
    inputs = random_inputs(case, (3,)).requiring()
    operands = (inputs.grad.clone().requires_grad_(), inputs.x, inputs.A, inputs.B, inputs.C)

    def update(*operands: Tensor) -> Tensor:
        return dcft_update(*operands, stride=case.stride, scaling=0.7, backend="torch")

    assert gradcheck(update, operands)
    assert gradgradcheck(update, operands)


def test_gradcheck_with_dropout() -> None:
    case = SMALL[0]
    inputs = random_inputs(case, (4,)).requiring()

    def layer(*operands: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dcft_linear(*operands, dropout_p=0.4, backend="torch")

    assert gradcheck(layer, inputs.operands)
    assert gradgradcheck(layer, inputs.operands)


@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=3)), ids=str)
def test_double_backward_for_every_subset_of_factors(trained: tuple[bool, ...]) -> None:
    """A gradient penalty differentiates through U, saved or not, whatever is trained."""
    case = SMALL[1]
    inputs = random_inputs(case, (3,)).requiring(True, False, False, *trained)
    operands = tuple(t for t in inputs.operands if t.requires_grad)

    def penalty(backend: str) -> tuple[Tensor, ...]:
        y = dcft_linear(*inputs.operands, stride=case.stride, backend=backend)
        first = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), operands)

    for actual, expected in zip(penalty("torch"), penalty("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def op_arguments(case: Case, dtype: torch.dtype, seed: Tensor | None) -> tuple[Any, ...]:
    inputs = random_inputs(case, (5,), dtype).requiring()
    return (*inputs.operands, seed, 0.7, list(case.stride), 0.0 if seed is None else 0.3, "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@every_case
def test_opcheck(case: Case, dtype: torch.dtype, dropout: bool) -> None:
    arguments = op_arguments(case, dtype, draw_seed(torch.device("cpu")) if dropout else None)
    x, weight, _, *adapter = arguments
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if case in (CASES[0], CASES[6]):
        tests = (*tests, "test_aot_dispatch_dynamic")
    y = torch.randn(5, case.out_features, dtype=dtype, requires_grad=True)
    torch.library.opcheck(OPS.linear.default, arguments, test_utils=tests)
    torch.library.opcheck(OPS.linear.default, (x, weight, None, *adapter), test_utils=tests)
    torch.library.opcheck(OPS.update.default, (y, x, *adapter), test_utils=tests)
    u = torch.randn(5, case.rank, case.kernel_size[1], dtype=dtype)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in adapter]
    for needs in ([True] * 6, [False, True] * 3):
        torch.library.opcheck(
            OPS.backward.default,
            (y.detach(), x.detach(), u, weight.detach(), *detached, case.in_features, needs, None),
            test_utils=("test_schema", "test_faketensor"),
        )


def saved_by(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Everything that the layer's forward keeps for the backward, but for its own parameters."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    return [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("input_needs_grad", [False, True])
def test_saves_the_input_itself_and_U(dtype: torch.dtype, input_needs_grad: bool) -> None:
    tokens, rank, width = 12, 2, 8
    layer = DCFTLinear(48, 64, rank=rank, kernel_size=width, dtype=dtype)
    x = torch.randn(3, 4, 48, dtype=dtype, requires_grad=input_needs_grad)
    saved_x, saved_u = saved_by(layer, x)
    assert saved_x.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert saved_u.numel() == tokens * rank * width
    assert saved_u.untyped_storage().nbytes() == saved_u.numel() * dtype.itemsize


def test_saves_no_input_when_A_is_frozen() -> None:
    layer = DCFTLinear(48, 64)
    layer.dcft_A.requires_grad_(False)
    (saved_u,) = saved_by(layer, torch.randn(12, 48, requires_grad=True))
    assert saved_u.shape == (12, 1, 8)


def test_saves_nothing_of_the_size_of_the_input_when_all_factors_are_frozen() -> None:
    layer = DCFTLinear(48, 64)
    for factor in (layer.dcft_A, layer.dcft_B, layer.dcft_C):
        factor.requires_grad_(False)
    assert saved_by(layer, torch.randn(12, 48, requires_grad=True)) == []


def test_saves_no_mask_with_dropout() -> None:
    layer = DCFTLinear(48, 64, dropout=0.3)
    saved_x, _, seed = saved_by(layer, torch.randn(12, 48, requires_grad=True))
    assert saved_x.shape == (12, 48)
    assert seed.numel() == 1
    assert seed.dtype == torch.int64


def test_never_as_large_as_the_weight() -> None:
    """Forward and backward of few tokens allocate nothing of `m * n` elements."""
    case = Case(256, 320, 1, (8, 8), (8, 8))
    inputs = random_inputs(case, (2,), torch.float32).requiring(
        True, False, False, True, True, True
    )
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            base = inputs.weight.untyped_storage().data_ptr()
            sizes.extend(
                tensor.untyped_storage().nbytes() // 4
                for tensor in torch.utils._pytree.tree_leaves(result)
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != base
            )
            return result

    adapter = adapter_of(inputs, case)
    with Watch(), torch.no_grad():
        U = passes.add_adapter_(torch.zeros(2, 320), inputs.x, adapter)
        needs = Needs(True, False, True, True, True, True)
        passes.backward(inputs.grad, inputs.x, U, inputs.weight, adapter, needs)
    # The spread factors, k * d * max(n, m) elements, are the largest tensors there are.
    assert max(sizes) == 8 * 320

    sizes.clear()
    with Watch():
        dcft_linear(*inputs.operands, backend="reference")
    assert max(sizes) >= 256 * 320, "the watch sees what is materialised"


def test_vmap_runs_on_the_reference() -> None:
    """Per-sample gradients: `torch.func` maps over the reference backend."""
    case = SMALL[0]
    inputs = random_inputs(case, (5,))

    def loss(A: Tensor, x: Tensor, backend: str) -> Tensor:
        y = dcft_linear(x, inputs.weight, None, A, inputs.B, inputs.C, backend=backend)
        return y.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))
    gradients = per_sample(inputs.A, inputs.x, "reference")
    for gradient, x in zip(gradients, inputs.x, strict=True):
        A = inputs.A.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(A, x, "torch"), A)[0])
    for backend in ("auto", "torch"):
        with pytest.raises(RuntimeError, match=r"vmap.*use backend='reference'"):
            per_sample(inputs.A, inputs.x, backend)


def test_no_node_where_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(SMALL[0], (3,)).requiring()
    recorded = dcft_linear(*inputs.operands, stride=SMALL[0].stride)
    assert "Eager" in type(recorded.grad_fn).__name__

    def refused(*arguments: Any) -> Any:
        raise AssertionError("a node was made")

    monkeypatch.setattr(layer_ops._EagerLinear, "apply", refused)
    monkeypatch.setattr(layer_ops._EagerUpdate, "apply", refused)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = dcft_linear(*inputs.operands, stride=SMALL[0].stride)
            out = dcft_update(
                inputs.grad, inputs.x, inputs.A, inputs.B, inputs.C, stride=SMALL[0].stride
            )
        assert torch.equal(y, recorded)
        assert (y.requires_grad, out.requires_grad) == (False, False)
