"""The layer as PyTorch sees it: operators, gradients of any order, what is saved, compilation.

`tests/kernels/test_autograd.py` runs most of these tests again, on the Triton kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.speed import memory
from dcft_kernels import (
    DCFTLinear,
    autograd,
    dcft_linear,
    dcft_update,
    delta_weight,
    torch_backend,
)
from tests.adapter_cases import AdapterShape, Inputs, random_inputs

OPS = torch.ops.dcft_kernels
SMALL = [
    AdapterShape(8, 12, 1, (4, 4), (4, 4)),
    AdapterShape(7, 9, 2, (3, 4), (3, 4)),  # ragged, rectangular
    AdapterShape(10, 8, 2, (4, 4), (2, 1)),  # overlapping
    AdapterShape(7, 9, 2, (3, 4), (3, 4), True),  # a kernel per rank
]
SUBSETS = [(True,) * 3, (True, False, False), (False, True, False), (False, False, True)]
small_case = pytest.mark.parametrize("case", SMALL, ids=str)
with_and_without_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3])


@pytest.fixture
def backend() -> str:
    return "torch"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(case: AdapterShape, tokens: int, device: torch.device, backend: str) -> Inputs:
    """Inputs in the widest dtype that the backend computes in."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    return Inputs(*(tensor.to(device) for tensor in random_inputs(case, (tokens,), dtype)))


def layer_on(
    device: torch.device, backend: str, dropout: float = 0.0, **options: Any
) -> DCFTLinear:
    """A layer whose increment is as large as its base's output."""
    torch.manual_seed(0)
    layer = DCFTLinear(24, 32, dropout=dropout, init="paper", backend=backend, **options)
    for factor in (layer.dcft_A, layer.dcft_B, layer.dcft_C):
        nn.init.normal_(factor)
    return layer.to(device)


def step(run: Callable[[Tensor], Tensor], layer: nn.Module, tokens: int) -> list[Tensor]:
    """Output and all gradients of one training step, from the same seed every time."""
    torch.manual_seed(tokens)
    weight = next(layer.parameters())
    x = torch.randn(2, tokens, 24, dtype=weight.dtype, device=weight.device, requires_grad=True)
    layer.zero_grad()
    y = run(x)
    y.float().square().mean().backward()
    factors = [p for name, p in layer.named_parameters() if "dcft" in name]
    return [y.detach(), x.grad, *(p.grad.clone() for p in factors)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def assert_close_in_16_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


# Gradients


@small_case
def test_gradcheck(case: AdapterShape) -> None:
    inputs = random_inputs(case, (3,)).requiring()

    def layer(*operands: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dcft_linear(*operands, stride=case.stride, scaling=0.7, dropout_p=0.4)

    def update(y: Tensor, *operands: Tensor) -> Tensor:
        return dcft_update(y, *operands, stride=case.stride, scaling=0.7)

    y = inputs.grad.clone().requires_grad_()
    for function, operands in (
        (layer, inputs.operands),
        (update, (y, inputs.x, inputs.A, inputs.B, inputs.C)),
    ):
        assert gradcheck(function, operands)
        assert gradgradcheck(function, operands)


@small_case
@with_and_without_dropout
@pytest.mark.parametrize("trained", SUBSETS, ids=str)
def test_double_backward(case, dropout_p, trained, backend, device) -> None:
    """A gradient penalty has the reference's gradients, whichever factors are trained."""
    results = []
    for name in (backend, "reference"):
        inputs = drawn(case, 7, device, backend).requiring(True, False, False, *trained)
        operands = tuple(t for t in inputs.operands if t.requires_grad)
        torch.manual_seed(3)
        y = dcft_linear(*inputs.operands, stride=case.stride, dropout_p=dropout_p, backend=name)
        torch.manual_seed(3)
        factors = (inputs.A, inputs.B, inputs.C)
        y = dcft_update(
            y, inputs.x, *factors, stride=case.stride, dropout_p=dropout_p, backend=name
        )
        first = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, operands)])
    for actual, expected in zip(*results, strict=True):
        scale = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_double_backward_in_16_bits(dtype: torch.dtype, backend, device) -> None:
    """Of gradients that reach the factors through `U` alone."""
    results = []
    drawn_inputs = drawn(SMALL[1], 7, device, backend).to(dtype)
    for name, to in ((backend, dtype), ("reference", torch.float64)):
        inputs = drawn_inputs.to(to).requiring()
        y = dcft_linear(*inputs.operands, backend=name)
        first = torch.autograd.grad(y, (inputs.B, inputs.C), inputs.grad, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, (inputs.x, inputs.A))])
    for actual, expected in zip(*results, strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(actual.double(), expected, rtol=0.02, atol=0.02 * scale)


def test_double_backward_needs_no_graph_from_the_strategy(monkeypatch) -> None:
    """A kernel's backward pass records nothing; with `create_graph=True` it is not run."""
    opaque = SimpleNamespace(
        forward=torch_backend.forward, backward=torch.no_grad()(torch_backend.backward)
    )
    monkeypatch.setattr(autograd, "_passes", lambda strategy: opaque)
    inputs = random_inputs(SMALL[0], (3,)).requiring()
    assert gradgradcheck(dcft_linear, inputs.operands)


@small_case
def test_double_backward_of_delta_weight(case: AdapterShape, backend, device) -> None:
    results = []
    for name in (backend, "reference"):
        inputs = drawn(case, 1, device, backend).requiring()
        factors = (inputs.A, inputs.B, inputs.C)
        sizes = {"in_features": case.in_features, "out_features": case.out_features}
        dense = delta_weight(*factors, **sizes, stride=case.stride, backend=name)
        first = torch.autograd.grad(dense.square().sum(), factors, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([dense, *first, *torch.autograd.grad(penalty, factors)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_forward_mode_through_a_backward_pass(backend, device) -> None:
    """Gradients are linear in `g`: their tangents are the gradients for its tangent."""
    inputs = drawn(SMALL[0], 3, device, backend).requiring()
    factors = (inputs.A, inputs.B, inputs.C)
    y = dcft_linear(*inputs.operands, dropout_p=0.3, backend=backend)
    dense = delta_weight(*factors, in_features=8, out_features=12, backend=backend)
    for output, operands in ((y, inputs.operands), (dense, factors)):
        g = torch.randn_like(output)
        expected = torch.autograd.grad(output, operands, g, retain_graph=True)
        with forward_ad.dual_level():
            dual = torch.autograd.grad(output, operands, forward_ad.make_dual(0 * g, g))
            for each, gradient in zip(dual, expected, strict=True):
                tangent = forward_ad.unpack_dual(each).tangent
                torch.testing.assert_close(tangent, gradient, rtol=1e-4, atol=1e-4)


def test_fake_tensors(backend, device) -> None:
    """Memory estimators run models on tensors without data."""
    with FakeTensorMode():
        layer = DCFTLinear(48, 64, backend=backend, device=device)
        x = torch.randn(5, 48, device=device, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert y.shape == (5, 64)
    assert layer.dcft_A.grad.shape == layer.dcft_A.shape


# What is saved and allocated


def saved_by(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Everything that the forward saves for the backward, except the layer's own parameters."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    return [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saves_the_input_itself_and_U(dtype: torch.dtype, backend, device) -> None:
    layer = layer_on(device, backend, dtype=dtype, rank=2)
    x = torch.randn(3, 4, 24, dtype=dtype, device=device, requires_grad=True)
    saved_x, saved_u = saved_by(layer, x)
    assert saved_x.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert saved_u.shape == (12, 16)
    itemsize = torch_backend.compute_dtype(dtype, device).itemsize
    itemsize = dtype.itemsize if backend == "triton" else itemsize
    assert saved_u.untyped_storage().nbytes() == saved_u.numel() * itemsize
    layer.dcft_A.requires_grad_(False)
    (saved_u,) = saved_by(layer, x)
    assert saved_u.shape == (12, 16)
    layer.dcft_B.requires_grad_(False)
    layer.dcft_C.requires_grad_(False)
    assert saved_by(layer, x) == []


def test_saves_the_matrices_where_they_are_smaller_than_the_input() -> None:
    layer = DCFTLinear(24, 32, backend="torch")
    for tokens, expected in ((10, []), (100, [(8, 24), (8, 32), (8, 32), (8, 8)])):
        x = torch.randn(tokens, 24, requires_grad=True)
        found = [tensor.shape for tensor in saved_by(layer, x)]
        assert found == [(tokens, 24), (tokens, 8), *expected]


def test_saves_a_seed_and_no_mask_with_dropout(backend, device) -> None:
    layer = layer_on(device, backend, 0.3)
    saved_x, _, seed = saved_by(layer, torch.randn(12, 24, device=device, requires_grad=True))
    assert saved_x.shape == (12, 24)
    assert (seed.dtype, seed.numel()) == (torch.int64, 1)


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor that operations return, aside from views of `weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.elements = weight, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() != self.weight.untyped_storage().data_ptr():
                    self.elements = max(self.elements, storage.nbytes() // tensor.itemsize)
        return result


def test_never_allocates_as_much_as_the_weight(backend, device) -> None:
    layer = layer_on(device, backend)
    weight = nn.Parameter(torch.randn(320, 256, device=device), requires_grad=False)
    layer = DCFTLinear.from_linear(nn.Linear(256, 320, device=device), backend=backend)
    layer.weight = weight
    x = torch.randn(2, 256, device=device, requires_grad=True)
    for name, is_dense in ((backend, False), ("reference", True)):
        layer.backend = name
        with LargestAllocation(weight) as largest:
            layer(x).sum().backward()
        assert (largest.elements >= 256 * 320) == is_dense, name


@pytest.mark.parametrize(
    ("dtype", "stride", "slow"),
    [(torch.float32, 8, False), (torch.bfloat16, 8, False), (torch.bfloat16, 4, True)],
)
def test_peak_memory(dtype, stride, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step holds `y`, `gx`, `U` and two more of its size, and blocks of rows."""
    monkeypatch.setattr(torch_backend, "_BLOCK_ELEMENTS", 1 << 14)
    monkeypatch.setattr(torch_backend, "_WEIGHT_BLOCK_ELEMENTS", 1 << 14)
    monkeypatch.setattr(torch_backend, "_SLOW_ON_CPU", {dtype} if slow else set())
    tokens, size, rank = 2048, 256, 16
    layer = DCFTLinear(size, size, rank=rank, stride=stride, backend="torch", dtype=dtype)
    x = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, size, dtype=dtype)

    def run() -> None:
        layer(x).backward(g)

    nothing = SimpleNamespace(prepare=lambda: None, run=run, release=lambda: None)
    u, factors = tokens * rank * 8 * 4, 8 * rank * 8 * size * 4
    allowed = 2 * tokens * size * dtype.itemsize + 3 * u + factors
    allowed += tokens * size * 4 if slow else 0  # the sum in float32 that gx is rounded from
    assert memory.peak_bytes(nothing, torch.device("cpu")) <= allowed


# Rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_float32_factors_have_float32_gradients(dtype, monkeypatch) -> None:
    """On a CPU that has no products in the tokens' dtype."""
    monkeypatch.setattr(torch_backend, "_SLOW_ON_CPU", {dtype})
    case = AdapterShape(24, 32, 2, (8, 8), (8, 8))
    inputs = random_inputs(case, (9,), dtype, torch.float32)

    def gradients(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        some = inputs.requiring(False, False, False, True, True, True)
        y = dcft_linear(*some.operands, backend=backend)
        return torch.autograd.grad(y, (some.A, some.B, some.C), some.grad)

    wide = inputs.to(torch.float64)
    sizes = gradients(Inputs(*(tensor.abs() for tensor in wide)), "reference")
    actual, expected = gradients(inputs, "torch"), gradients(wide, "reference")
    # Each is three sums, one in the other, and each addition rounds by half a unit at most.
    roundings = 0.5 * torch.finfo(torch.float32).eps * (9 * 8 + 8 + 4)
    for name, found, truth, size in zip("ABC", actual, expected, sizes, strict=True):
        assert bool(((found - truth).abs() <= roundings * size).all()), name


def test_float16_gradients_are_finite_where_the_output_is(backend, device, monkeypatch) -> None:
    """`U` is beyond float16's range here, and the output is not; on any CPU."""
    monkeypatch.setattr(torch_backend, "_SLOW_ON_CPU", set())
    case = SMALL[0]
    inputs = drawn(case, 7, device, backend).to(torch.float16)
    A, C = torch.full_like(inputs.A, 3e4), 1e-5 * inputs.C.float()
    inputs = inputs._replace(x=inputs.x.abs() + 2, A=A, C=C)
    results = []
    for name in (backend, "reference"):
        some = (inputs if name == backend else inputs.to(torch.float64)).requiring()
        y = dcft_linear(*some.operands, stride=case.stride, backend=name)
        results.append([y, *torch.autograd.grad(y, some.operands, some.grad)])
    for actual, expected in zip(*results, strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2 * scale)


# Compilation, autocast, checkpointing


def test_operators_take_the_geometry_of_earlier_exports() -> None:
    """Which ends before the number that says whether there is a kernel per rank."""
    case = SMALL[1]
    inputs, geometry = random_inputs(case), case.geometry
    x, weight, bias, *factors = inputs.operands
    flat = [geometry.rank, *geometry.outputs, *geometry.inputs]
    y, _ = OPS.forward(x, weight, bias, None, *factors, None, 0.7, flat, 0.0, "torch")
    assert torch.equal(y, dcft_linear(*inputs.operands, stride=case.stride, scaling=0.7))


LAYERS = {
    "plain": {},
    "balanced": {"rank": 2},
    "dropout": {"dropout": 0.3},
    "bf16-base": {"dtype": torch.bfloat16},
    "overlap": {"stride": 4},
    "ragged": {"kernel_size": 5},
    "per_rank": {"rank": 2, "kernels": "per_rank"},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_compiled_equals_eager(options: dict[str, Any], backend, device) -> None:
    layer = layer_on(device, backend, **options)
    if layer.dropout and (backend == "torch" or device.type == "cuda"):
        pytest.skip("compiled programs draw other random numbers")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual, expected = step(compiled, layer, 5), step(layer, layer, 5)
    if layer.weight.dtype == torch.bfloat16 and backend == "torch":
        assert_close_in_16_bits(actual, expected)
    else:
        assert_same(actual, expected)


def test_compiled_update_and_delta_weight(backend, device) -> None:
    case = SMALL[1]
    inputs = drawn(case, 5, device, backend).requiring()
    factors = (inputs.A, inputs.B, inputs.C)
    sizes = {"in_features": case.in_features, "out_features": case.out_features}

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        dense = delta_weight(*factors, **sizes, backend=backend)
        return dcft_update((x @ dense.t()).tanh(), x, *factors, backend=backend)

    results = []
    for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        out = run(inputs.x, *factors)
        results.append([out, *torch.autograd.grad(out.sum(), (inputs.x, *factors))])
    assert_same(*results)


def test_compiled_backward_of_an_eager_forward() -> None:
    """Compiled autograd."""
    layer = layer_on(torch.device("cpu"), "torch", rank=2)
    x = torch.randn(5, 24, requires_grad=True)
    operands = [x, layer.dcft_A, layer.dcft_B, layer.dcft_C]
    expected = torch.autograd.grad(layer(x).square().sum(), operands)
    loss = layer(x).square().sum()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    assert_same([each.grad for each in operands], list(expected))


def test_new_token_counts_do_not_recompile(backend, device) -> None:
    layer = layer_on(device, backend)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for tokens in (5, 6, 33, 70):
        assert_same(step(compiled, layer, tokens), step(layer, layer, tokens))
        counts.append(graphs.frame_count)
    assert counts == counts[:1] * 4


def test_compilers_see_the_operations() -> None:
    """On a CPU; the kernels are opaque to them."""
    layer = layer_on(torch.device("cpu"), "auto")
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.append(graph.code)
        return graph.forward

    step(torch.compile(layer, fullgraph=True, backend=record), layer, 5)
    (code,) = seen
    assert "addmm" in code
    assert "dcft_kernels" not in code


@pytest.mark.slow
def test_default_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor, where it has a C++ compiler to call."""
    layer = nn.Sequential(layer_on(torch.device("cpu"), "auto"), nn.GELU())
    # The disk cache knows graphs of other versions of the operators.
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    compiled = torch.compile(layer, fullgraph=True)
    assert_same(step(compiled, layer, 5), step(layer, layer, 5))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_is_the_cast_layer(compiled: bool, backend, device) -> None:
    """What a 16-bit base with float32 factors computes, and float32 gradients."""
    layer = layer_on(device, backend)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return layer(x)

    def by_hand(x: Tensor) -> Tensor:
        base = (layer.weight.bfloat16(), layer.bias.bfloat16())
        factors = (layer.dcft_A, layer.dcft_B, layer.dcft_C)
        return dcft_linear(x.bfloat16(), *base, *factors, backend=backend)

    run = under_autocast
    if compiled:
        run = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    results = step(run, layer, 5)
    assert results[0].dtype == torch.bfloat16
    assert [each.dtype for each in results[1:]] == [torch.float32] * 4
    expected = step(by_hand, layer, 5)
    if compiled and backend == "torch":  # PyTorch's own backward pass
        assert_close_in_16_bits(results, expected)
    else:
        assert all(map(torch.equal, results, expected))


def test_backward_inside_autocast(backend, device) -> None:
    """A backward pass that runs under autocast computes what one outside of it computes."""
    layer = layer_on(device, backend)
    x = torch.randn(5, 24, device=device, requires_grad=True)
    operands = (x, layer.dcft_A, layer.dcft_B, layer.dcft_C)
    results = []
    for inside in (True, False):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = layer(x).float().square().sum()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=inside):
            results.append(torch.autograd.grad(loss, operands))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("use_reentrant", [False, True])
@with_and_without_dropout
def test_checkpointing(dropout_p: float, use_reentrant: bool, backend, device) -> None:
    """The recomputed forward draws the same mask, so the gradients are the same bits."""
    second = DCFTLinear(32, 24, dropout=dropout_p, init="paper", backend=backend).to(device)
    layer = nn.Sequential(layer_on(device, backend, dropout_p), nn.GELU(), second)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    assert all(map(torch.equal, step(checkpointed, layer, 5), step(layer, layer, 5)))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_compiled_forward_and_backward_draw_one_mask(checkpointed: bool, backend, device) -> None:
    """For a given mask the layer is a linear map L: `<g, L x> = <L^T g, x>`.

    Compared with itself, since a compiled program may draw other random numbers than an eager one.
    """
    layer = layer_on(device, backend, 0.5, bias=False)

    def run(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(40, 24, device=device, requires_grad=True)
    g = torch.randn(40, 32, device=device)
    y = compiled(x)
    (grad_x,) = torch.autograd.grad(y, x, g)
    left = g.double() * y.detach().double()
    right = grad_x.double() * x.detach().double()
    # Rounding: every product in the two sums is off by a few float32 roundings of its size.
    size = left.abs().sum() + right.abs().sum()
    assert abs(float(left.sum() - right.sum())) <= 64 * torch.finfo(torch.float32).eps * float(size)


def test_no_graph_is_recorded_without_gradients(backend, device) -> None:
    inputs = drawn(SMALL[0], 3, device, backend).requiring()
    recorded = dcft_linear(*inputs.operands, backend=backend)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = dcft_linear(*inputs.operands, backend=backend)
        assert torch.equal(y, recorded)
        assert not y.requires_grad


@pytest.mark.parametrize(
    "wanted", [flags for flags in itertools.product([False, True], repeat=6) if any(flags)], ids=str
)
def test_every_subset_of_gradients(wanted: tuple[bool, ...], backend, device) -> None:
    """What is requested does not change its value, and nothing else is computed."""
    case = SMALL[1]
    inputs = drawn(case, 5, device, backend)
    everything = inputs.requiring()
    y = dcft_linear(*everything.operands, backend=backend)
    expected = torch.autograd.grad(y, everything.operands, inputs.grad)
    some = inputs.requiring(*wanted)
    dcft_linear(*some.operands, backend=backend).backward(inputs.grad)
    for operand, grad in zip(some.operands, expected, strict=True):
        if operand.requires_grad:
            torch.testing.assert_close(operand.grad, grad, rtol=1e-5, atol=1e-5)
        else:
            assert operand.grad is None
