"""Calls that are followed operation by operation: by tracers, exports, transforms, forward mode."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from dcft_kernels import DCFTLinear, dcft_linear, dcft_update, delta_weight, torch_backend

N, M = 15, 10
OPTIONS = {
    "tiling": {"rank": 2, "kernel_size": 5},
    "ragged": {"kernel_size": (3, 4)},
    "overlap": {"rank": 2, "kernel_size": (4, 5), "stride": (2, 3)},
    "per_rank": {"rank": 2, "kernel_size": (4, 5), "kernels": "per_rank"},
    "nonlinear": {"rank": 2, "kernel_size": 5, "nonlinearity": "gelu"},
}
every_layer = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
every_linear_layer = pytest.mark.parametrize(
    "options", [OPTIONS[name] for name in ("tiling", "ragged", "overlap", "per_rank")], ids=str
)
FACTORS = ("dcft_A", "dcft_B", "dcft_C")


def layer_with(options: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    layer = DCFTLinear(N, M, dtype=dtype, **options, **more)
    for name in FACTORS:
        nn.init.normal_(getattr(layer, name))
    return layer


def as_function(layer: nn.Module) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The layer as a function of its input and factors, and values for these."""
    factors = [getattr(layer, name).detach() for name in FACTORS]

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(FACTORS, factors, strict=True)), (x,))

    return function, (torch.randn(3, N, dtype=factors[0].dtype), *factors)


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# Tracers and exports


@every_layer
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_traced_module_takes_other_sizes(options: dict[str, Any]) -> None:
    layer = layer_with(options)
    traced = torch.jit.trace(layer, torch.randn(3, N).double())
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    x = torch.randn(7, N, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (torch.jit.load(stored), layer):
        y = run(x)
        factors = [p for name, p in run.named_parameters() if name in FACTORS]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *factors])])
    assert_same(*results)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_traced_delta_weight() -> None:
    layer = layer_with(OPTIONS["overlap"])
    traced = torch.jit.trace_module(layer, {"delta_weight": ()})
    assert_same(traced.delta_weight(), layer.delta_weight())


@every_layer
@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_needs_no_operator(options: dict[str, Any], strict: bool) -> None:
    layer = layer_with(options)
    sizes = ({0: torch.export.Dim("tokens")},)
    example = (torch.randn(3, N).double(),)
    program = torch.export.export(layer, example, dynamic_shapes=sizes, strict=strict)
    assert "dcft_kernels" not in program.graph_module.code
    x = torch.randn(7, N, dtype=torch.float64)
    assert_same(program.module()(x), layer(x))


@every_layer
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx(options: dict[str, Any], dynamo: bool, tmp_path: Path) -> None:
    import onnx.reference

    layer = layer_with(options, torch.float32, dropout=0.5).eval()
    tokens = {0: torch.export.Dim("tokens")}
    sizes = {"dynamic_shapes": (tokens,)} if dynamo else {"dynamic_axes": {"x": {0: "tokens"}}}
    file = tmp_path / "layer.onnx"
    torch.onnx.export(
        layer, (torch.randn(3, N),), file, input_names=["x"], dynamo=dynamo, verbose=False, **sizes
    )
    x = torch.randn(7, N)
    (y,) = onnx.reference.ReferenceEvaluator(str(file)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.as_tensor(y), layer(x).detach(), rtol=1e-4, atol=1e-4)


# Gradients in batches


@every_layer
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobian(options: dict[str, Any], strategy: str) -> None:
    function, operands = as_function(layer_with(options))
    assert_same(
        jacobian(function, operands, vectorize=True, strategy=strategy),
        jacobian(function, operands),
    )


@every_layer
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_batched_gradients(options: dict[str, Any], dropout: float, way: str) -> None:
    """With dropout, all gradients go through the mask of the forward pass."""
    layer = layer_with(options, dropout=dropout)
    x = torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    operands = (x, *[getattr(layer, name) for name in FACTORS])
    many = torch.randn(4, *y.shape, dtype=torch.float64)

    def gradients(g: Tensor, **batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, operands, g, retain_graph=True, **batched)

    actual = vmap(gradients)(many) if way == "vmap" else gradients(many, is_grads_batched=True)
    expected = zip(*[gradients(g) for g in many], strict=True)
    assert_same(actual, tuple(torch.stack(each) for each in expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_batched_gradients_of_16_bit_layers(dtype, monkeypatch) -> None:
    """The factors' gradients are float32's where the CPU has no 16-bit products."""
    monkeypatch.setattr(torch_backend, "_SLOW_ON_CPU", {dtype})
    layer = layer_with(OPTIONS["tiling"], dtype)
    x = torch.randn(3, N, dtype=dtype, requires_grad=True)
    y = layer(x)
    operands = (layer.dcft_A, layer.dcft_B, layer.dcft_C)
    many = torch.randn(4, *y.shape, dtype=dtype)
    actual = torch.autograd.grad(y, operands, many, retain_graph=True, is_grads_batched=True)
    for i, g in enumerate(many):
        expected = torch.autograd.grad(y, operands, g, retain_graph=True)
        found = [each[i] for each in actual]
        torch.testing.assert_close(found, list(expected), rtol=1e-3, atol=1e-3)


# torch.func and forward mode


@every_layer
def test_second_derivatives(options: dict[str, Any]) -> None:
    function, operands = as_function(layer_with(options))

    def loss(*operands: Tensor) -> Tensor:
        return function(*operands).square().sum()

    expected = hessian(loss, operands)
    assert_same(hessian(loss, operands, vectorize=True), expected)
    assert_same(torch.func.hessian(loss, (0, 1, 2, 3))(*operands), expected)


@every_layer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_per_sample_gradients(options: dict[str, Any], compiled: bool) -> None:
    layer = layer_with(options)
    function, (x, *factors) = as_function(layer)

    def per_sample(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        def loss(x: Tensor, *factors: Tensor) -> Tensor:
            return function(x, *factors).square().sum()

        return vmap(grad(loss, (0, 1, 2, 3)), (0, None, None, None))(x, *factors)

    run = per_sample
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    actual = run(x, *factors)
    for i, row in enumerate(x.requires_grad_()):
        operands = (row, *[getattr(layer, name) for name in FACTORS])
        expected = torch.autograd.grad(layer(row).square().sum(), operands)
        assert_same(tuple(each[i] for each in actual), expected)


@every_layer
def test_jacobians_of_torch_func(options: dict[str, Any]) -> None:
    function, operands = as_function(layer_with(options))
    expected = jacobian(function, operands)
    assert_same(jacrev(function, (0, 1, 2, 3))(*operands), expected)
    assert_same(jacfwd(function, (0, 1, 2, 3))(*operands), expected)


@every_layer
def test_forward_mode(options: dict[str, Any]) -> None:
    function, operands = as_function(layer_with(options))
    tangents = tuple(torch.randn_like(each) for each in operands)
    parts = zip(jacobian(function, operands), tangents, strict=True)
    expected = sum((part * tangent).flatten(2).sum(2) for part, tangent in parts)
    assert_same(jvp(function, operands, tangents)[1], expected)
    with forward_ad.dual_level():
        dual = map(forward_ad.make_dual, operands, tangents)
        assert_same(forward_ad.unpack_dual(function(*dual)).tangent, expected)


@every_linear_layer
def test_functions_equal_the_reference(options: dict[str, Any]) -> None:
    """`dcft_linear`, `dcft_update` and `delta_weight`, vectorised over all factors at once."""
    layer = layer_with(options)
    x, y = torch.randn(5, N).double(), torch.randn(5, M).double()
    stacks = [torch.randn(4, *getattr(layer, name).shape).double() for name in FACTORS]
    settings = {"stride": layer.stride, "scaling": 0.7}
    sizes = {"in_features": N, "out_features": M}

    def every(*factors: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (
            dcft_linear(x, layer.weight, layer.bias, *factors, **settings, backend=backend),
            dcft_update(y, x, *factors, **settings, backend=backend),
            delta_weight(*factors, **sizes, **settings, backend=backend),
        )

    actual = vmap(lambda *factors: every(*factors, backend="auto"))(*stacks)
    single = [every(*factors, backend="reference") for factors in zip(*stacks, strict=True)]
    assert_same(actual, tuple(torch.stack(each) for each in zip(*single, strict=True)))


def test_dropout_inside_a_transform() -> None:
    """It is PyTorch's own: of the input, for the adapter only, scaled."""
    layer = layer_with(OPTIONS["overlap"], dropout=0.5)
    function, (x, *factors) = as_function(layer)
    torch.manual_seed(3)
    y, tangent = jvp(lambda x: function(x, *factors), (x,), (x,))
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    increment = dropped @ layer.delta_weight().detach().t()
    assert_same(y, F.linear(x, layer.weight, layer.bias).detach() + increment)
    assert_same(tangent, (x @ layer.weight.t()).detach() + increment)
