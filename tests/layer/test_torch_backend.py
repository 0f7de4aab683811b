"""The factored PyTorch backend against the materialised reference: values and all gradients."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dcft_kernels import DCFTLinear, dcft_linear, dcft_update, delta_weight, torch_backend
from tests.adapter_cases import CASES, AdapterShape, Inputs, every_case, random_inputs
from tests.error_budget import assert_within_budget

NAMES = ("y", "gx", "gW", "gb", "gA", "gB", "gC")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])

PAPER = CASES[0]
SCALING = 0.7
Computation = Callable[[Inputs, str, float], tuple[Tensor, ...]]


def compare(
    names: tuple[str, ...],
    run: Computation,
    inputs: Inputs,
    actual: tuple[Tensor, ...] | None = None,
) -> None:
    """Check all results of the torch backend against float64, with the reference as the measure.

    Args:
        names: what `run` returns, in order.
        run: computes the results from inputs, a backend's name and a scaling.
        inputs: in the dtypes under test.
        actual: the torch backend's results, if they were computed from other inputs.
    """
    wide = inputs.to(torch.float64)
    squares = Inputs(*(tensor.square() for tensor in wide))
    results = (
        run(inputs, "torch", SCALING) if actual is None else actual,
        run(inputs, "reference", SCALING),
        run(wide, "reference", SCALING),
        tuple(square.sqrt() for square in run(squares, "reference", SCALING**2)),
    )
    for name, *values in zip(names, *results, strict=True):
        assert_within_budget(*values, dtype=inputs.x.dtype, what=name)


def layer_run(case: AdapterShape) -> Computation:
    """The output of `dcft_linear` and all six gradients."""

    def run(inputs: Inputs, backend: str, scaling: float) -> tuple[Tensor, ...]:
        inputs = inputs.requiring()
        y = dcft_linear(*inputs.operands, stride=case.stride, scaling=scaling, backend=backend)
        return (y.detach(), *torch.autograd.grad(y, inputs.operands, inputs.grad))

    return run


def run(inputs: Inputs, case: AdapterShape, backend: str) -> tuple[Tensor, ...]:
    """The output and all six gradients at the usual scaling."""
    return layer_run(case)(inputs, backend, SCALING)


def check(inputs: Inputs, case: AdapterShape) -> None:
    """Everything that the layer computes is within budget."""
    compare(NAMES, layer_run(case), inputs)


@every_dtype
@every_case
def test_parity(case: AdapterShape, dtype: torch.dtype) -> None:
    check(random_inputs(case, (33,), dtype), case)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_of_16_bit_factors_are_rounded_once(case, dtype) -> None:
    """They are the gradients of the same factors in float32, rounded at the end."""
    inputs = random_inputs(case, (33,), torch.float32, adapter_dtype=dtype)
    narrow, wide = (run(each, case, "torch")[4:] for each in (inputs, inputs.to(torch.float32)))
    for actual, expected in zip(narrow, wide, strict=True):
        assert torch.equal(actual, expected.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["", "fp32-adapter"])
@every_dtype
@every_case
def test_parity_on_a_gpu(
    case: AdapterShape, dtype: torch.dtype, adapter_dtype: torch.dtype | None
) -> None:
    inputs = random_inputs(case, (33,), dtype, adapter_dtype)
    check(Inputs(*(tensor.cuda() for tensor in inputs)), case)


@pytest.mark.gpu
def test_dropout_on_a_gpu_is_the_references() -> None:
    inputs = Inputs(*(tensor.cuda() for tensor in random_inputs(PAPER, (33,))))
    results = []
    for backend in ("torch", "reference"):
        torch.manual_seed(7)
        wanted = inputs.requiring()
        y = dcft_linear(*wanted.operands, dropout_p=0.5, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, wanted.operands, wanted.grad)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("slow", [False, True], ids=["native", "slow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_case
def test_with_and_without_16_bit_products(case, dtype, slow, monkeypatch) -> None:
    """Where the CPU has none, tokens are taken in blocks of rows; the last one is shorter here."""
    monkeypatch.setattr(torch_backend, "_SLOW_ON_CPU", {dtype} if slow else set())
    monkeypatch.setattr(torch_backend, "_BLOCK_ELEMENTS", 48 * 10)
    monkeypatch.setattr(torch_backend, "_WEIGHT_BLOCK_ELEMENTS", 48 * 10)
    check(random_inputs(case, (37,), dtype, torch.float32), case)


def test_the_backward_has_no_16_bit_products_where_the_cpu_has_none(monkeypatch) -> None:
    """The base layer's included: they would be right, and many times slower."""
    monkeypatch.setattr(torch_backend, "_SLOW_ON_CPU", {torch.bfloat16})
    inputs = random_inputs(PAPER, (9,), torch.bfloat16, torch.float32)
    inputs = inputs.requiring(True, False, False, True, True, True)
    y = dcft_linear(*inputs.operands, backend="torch")
    dtypes: set[torch.dtype] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "addmm_"):
                dtypes.update(tensor.dtype for tensor in args)
            return func(*args, **(kwargs or {}))

    with Record():
        y.backward(inputs.grad)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("leading", [(), (0,), (1,), (3, 0, 2), (2, 3, 4)], ids=str)
@every_dtype
def test_leading_dimensions(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    for case in (PAPER, CASES[1], CASES[3]):
        check(random_inputs(case, leading, dtype), case)


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def _every_other_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 0)[::2]


def _every_other_column(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)[:, ::2]


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def _offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_full((1, x.shape[1]), float("nan")), x])[1:]


@pytest.mark.parametrize(
    "layout", [_transposed, _every_other_row, _every_other_column, _expanded, _offset]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [PAPER, CASES[1], CASES[3], CASES[5]], ids=str)
def test_strides_of_input_and_gradient(case: AdapterShape, layout, dtype: torch.dtype) -> None:
    inputs = random_inputs(case, (12,), dtype)
    x = layout(inputs.x).requires_grad_()
    dense = inputs._replace(x=x.detach().contiguous(), grad=layout(inputs.grad).contiguous())
    others = [t.clone().requires_grad_() for t in inputs.operands[1:]]
    y = dcft_linear(x, *others, stride=case.stride, scaling=SCALING, backend="torch")
    actual = (y.detach(), *torch.autograd.grad(y, (x, *others), layout(inputs.grad)))
    compare(NAMES, layer_run(case), dense, actual)


def test_transposed_weight_and_factors() -> None:
    """GPT-2's Conv1D passes `weight.t()`; factors may be views as well."""
    case = CASES[1]
    inputs = random_inputs(case)
    views = inputs._replace(
        **{n: getattr(inputs, n).t().contiguous().t() for n in ("weight", "A", "B", "C")}
    )
    assert not views.weight.is_contiguous()
    for actual, expected in zip(run(views, case, "torch"), run(inputs, case, "torch"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_dtype
@every_case
def test_update(case: AdapterShape, dtype: torch.dtype) -> None:
    """The adapter alone: the base's output may come from anywhere and is not changed."""

    def run_update(inputs: Inputs, backend: str, scaling: float) -> tuple[Tensor, ...]:
        inputs = inputs.requiring()
        base = inputs.grad.flip(0).requires_grad_()
        before = base.detach().clone()
        operands = (base, inputs.x, inputs.A, inputs.B, inputs.C)
        y = dcft_update(*operands, stride=case.stride, scaling=scaling, backend=backend)
        assert torch.equal(base, before)
        return (y.detach(), *torch.autograd.grad(y, operands, inputs.grad))

    compare(("y", "gy", "gx", "gA", "gB", "gC"), run_update, random_inputs(case, (3, 4), dtype))


@every_dtype
@every_case
def test_delta_weight(case: AdapterShape, dtype: torch.dtype) -> None:
    """The dense increment and its gradients from a dense gradient."""
    sizes = {"in_features": case.in_features, "out_features": case.out_features}

    def run_delta(inputs: Inputs, backend: str, scaling: float) -> tuple[Tensor, ...]:
        inputs = inputs.requiring()
        factors = (inputs.A, inputs.B, inputs.C)
        dense = delta_weight(
            *factors, **sizes, stride=case.stride, scaling=scaling, backend=backend
        )
        return (dense.detach(), *torch.autograd.grad(dense, factors, inputs.weight.detach()))

    compare(("DW", "gA", "gB", "gC"), run_delta, random_inputs(case, dtype=dtype))


# Matrices that are kept


FACTORS = ("dcft_A", "dcft_B", "dcft_C")


def doubled(layer: DCFTLinear) -> dict[str, Tensor]:
    return {name: 2 * getattr(layer, name).detach() for name in FACTORS}


def changed_copy(layer: DCFTLinear) -> DCFTLinear:
    layer = copy.deepcopy(layer)
    layer.dcft_A.data.neg_()
    return layer


# What changes a layer, and perhaps returns another one.
CHANGES: dict[str, Callable[[DCFTLinear], object]] = {
    "in place": lambda layer: nn.init.ones_(layer.dcft_B),
    "data in place": lambda layer: layer.dcft_A.data.mul_(2),
    "other data": lambda layer: setattr(layer.dcft_C, "data", layer.dcft_C.data + 1),
    "by numpy": lambda layer: layer.dcft_B.detach().numpy().fill(0.5),
    "loaded": lambda layer: layer.load_state_dict(doubled(layer), strict=False),
    "copied": changed_copy,
    "scaling": lambda layer: setattr(layer, "alpha", 7.0),
    "other dtype": lambda layer: layer.bfloat16(),
    "other parameter": lambda layer: setattr(layer, "dcft_A", nn.Parameter(-layer.dcft_A)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_inference_follows_every_change_of_the_adapter(change) -> None:
    """Also those that leave the version of a tensor as it was."""
    layer = DCFTLinear(40, 24, rank=2, kernel_size=8, init="paper", backend="torch")
    for name in FACTORS:
        nn.init.normal_(getattr(layer, name))
    x = torch.randn(3, 40)
    with torch.inference_mode():
        before = layer(x)
        assert torch.equal(layer(x), before)
    other = change(layer)
    layer = other if isinstance(other, DCFTLinear) else layer
    x = x.to(layer.weight.dtype)
    after = layer(x)
    assert not torch.allclose(after.float(), before, rtol=1e-2)
    with torch.no_grad():
        assert torch.equal(layer(x), after)


def test_traced_inference_follows_the_adapter() -> None:
    layer, x = DCFTLinear(40, 24, init="paper", backend="torch"), torch.randn(3, 40)
    nn.init.normal_(layer.dcft_B)
    with torch.no_grad():
        layer(x)
        traced = make_fx(layer)(x)
        layer.dcft_B.neg_()
        assert torch.equal(traced(x), layer(x))


def test_threads_share_the_matrices_of_a_layer() -> None:
    layer = DCFTLinear(40, 24, rank=2, init="paper", backend="torch")
    nn.init.normal_(layer.dcft_B)
    x = torch.randn(3, 40)

    def infer(_: int) -> Tensor:
        with torch.no_grad():
            return layer(x)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            layer.dcft_A.data.neg_()
            expected = layer(x)
            assert all(torch.equal(y, expected) for y in pool.map(infer, range(16)))


def test_matrices_are_dropped_with_their_adapter() -> None:
    gc.collect()
    before = len(torch_backend._kept)
    layer = DCFTLinear(16, 16, backend="torch")
    with torch.no_grad():
        layer(torch.randn(2, 16))
    assert len(torch_backend._kept) == before + 1
    del layer
    gc.collect()
    assert len(torch_backend._kept) == before


def test_inference_is_the_base_layer_and_two_products() -> None:
    """And three comparisons, which tell whether the adapter has changed."""
    layer = DCFTLinear(16, 24, backend="torch")
    x = torch.randn(2, 16)
    names: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        layer(x)
        with Record():
            layer(x)
    products = [name for name in names if name not in ("t", "detach")]
    assert products == ["addmm", "equal", "equal", "equal", "mm", "addmm_"]


def test_results_repeat_bit_for_bit() -> None:
    inputs = random_inputs(CASES[1], (64,), torch.float32)
    first = run(inputs, CASES[1], "torch")
    for _ in range(3):
        assert all(map(torch.equal, first, run(inputs, CASES[1], "torch")))


def test_zero_increment_leaves_the_base_bit_for_bit() -> None:
    for dtype in DTYPES:
        inputs = random_inputs(PAPER, (33,), dtype)
        y = dcft_linear(inputs.x, inputs.weight, inputs.bias, inputs.A, inputs.B.zero_(), inputs.C)
        assert torch.equal(y, torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias))
