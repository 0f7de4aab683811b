"""The operators on the kernels: registration, compilation, what they keep, gradients of any order.

`tests/test_operators.py` and `tests/test_compile.py` ask the same of the PyTorch backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dcft_kernels import DCFTLinear, dcft_linear, dcft_update, delta_weight
from dcft_kernels.dropout import draw_seed
from dcft_kernels.gpu_rates import INTERPRETER
from dcft_kernels.gradients import Needs
from dcft_kernels.strategy import Call, why_strategy_cannot
from dcft_kernels.triton.tiles import multiprocessors
from tests.adapter_cases import CASES, Case, adapter_of, random_inputs
from tests.kernels import sanitizer_program
from tests.kernels.parity import to

pytest.importorskip("triton")

from dcft_kernels.triton import passes

OPS = torch.ops.dcft_kernels
STRATEGIES = ["row_block", "fused", "scratch"]
SMALL = [
    Case(16, 24, 1, (8, 8), (8, 8)),
    Case(13, 10, 1, (6, 4), (6, 4)),
    Case(12, 10, 1, (4, 4), (2, 2)),
]
PAPER, RAGGED, OVERLAP = CASES[0], CASES[3], CASES[6]
REGISTRATION = ("test_schema", "test_autograd_registration", "test_faketensor")
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def why_not(strategy: str, case: Case, *, dropout: bool = False, base: bool = True) -> str | None:
    """The reason why a strategy does not take a case."""
    call = Call(
        1, case.geometry, torch.float32, torch.float32, INTERPRETER, base=base, dropout=dropout
    )
    return why_strategy_cannot(strategy, call)


OP_CASES = [
    pytest.param(strategy, case, dropout, id=f"{strategy}-{case}{'-dropout' * dropout}")
    for strategy in STRATEGIES
    for case in SMALL
    for dropout in (False, True)
    if why_not(strategy, case, dropout=dropout) is None
]


def op_arguments(
    case: Case, device: torch.device, strategy: str, seed: Tensor | None
) -> tuple[Any, ...]:
    """What `linear` takes; 16-bit tokens and float32 factors."""
    inputs = to(random_inputs(case, (5,), torch.bfloat16, torch.float32), device).requiring()
    numbers = (seed, 0.7, list(case.stride), 0.0 if seed is None else 0.3, strategy)
    return (*inputs.operands, *numbers)


def detach(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.detach() if isinstance(a, Tensor) else a for a in arguments]


@pytest.mark.parametrize(("strategy", "case", "dropout"), OP_CASES)
def test_opcheck(device, strategy: str, case: Case, dropout: bool) -> None:
    seed = draw_seed(device) if dropout else None
    arguments = op_arguments(case, device, strategy, seed)
    x, weight, bias, *adapter = arguments
    tests = REGISTRATION
    if (strategy, case) == ("row_block", SMALL[1]) and dropout:
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.linear.default, arguments, test_utils=tests)
    if strategy == "row_block":
        y = torch.randn(5, case.out_features, dtype=x.dtype, device=device, requires_grad=True)
        torch.library.opcheck(OPS.update.default, (y, x, *adapter), test_utils=REGISTRATION)
    x, weight, bias, *adapter = detach(arguments)
    g, u = OPS.linear(x, weight, bias, *adapter)
    for needs in ([True] * 6, [False, True] * 3):
        torch.library.opcheck(
            OPS.backward.default,
            (g, x, u, weight, *adapter, case.in_features, needs, None),
            test_utils=("test_schema", "test_faketensor"),
        )
    torch.library.opcheck(
        OPS.backward.default,
        (g, None, None, weight, *adapter, case.in_features, [True] + [False] * 5, None),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32) * 2])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck_of_expand(device, case: Case, dtypes: tuple[torch.dtype, ...]) -> None:
    inputs = to(random_inputs(case, (1,), torch.bfloat16), device)
    factors = [
        factor.to(dtype).requires_grad_()
        for factor, dtype in zip((inputs.A, inputs.B, inputs.C), dtypes, strict=False)
    ]
    numbers = (0.7, list(case.stride), case.in_features, case.out_features)
    tests = REGISTRATION
    if case == SMALL[1]:
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.expand.default, (*factors, *numbers), test_utils=tests)
    detached = detach((*factors, *numbers))
    grad = OPS.expand(*detached)
    assert grad.dtype == torch.float32
    for needs in ([True] * 3, [False, True, False]):
        torch.library.opcheck(
            OPS.expand_backward.default,
            (grad, *detached, needs),
            test_utils=("test_schema", "test_faketensor"),
        )


@every_strategy
def test_fake_results_are_like_the_real_ones(device, strategy: str) -> None:
    """In shape, dtype and strides, also where the inputs' strides are odd."""
    case = SMALL[0]
    x, weight, bias, *adapter = detach(op_arguments(case, device, strategy, None))
    x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    calls = [(OPS.linear, (x, weight, bias, *adapter))]
    y, u = OPS.linear(x, weight, bias, *adapter)
    g = y.t().contiguous().t()
    calls.append((OPS.update, (g, x, *adapter)))
    calls.append((OPS.backward, (g, x, u, weight, *adapter, 16, [True] * 6, None)))
    for op, arguments in calls:
        mode = torch._subclasses.FakeTensorMode()
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        with mode:
            fake_results = op(*fakes)
        for real, fake in zip(op(*arguments), fake_results, strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
            # The stride along a dimension of one element means nothing.
            strides = zip(real.shape, real.stride(), fake.stride(), strict=True)
            assert all(size == 1 or a == b for size, a, b in strides)


def layer_on(
    device: torch.device, dropout: float = 0.0, dtype: torch.dtype | None = None, **options: Any
) -> DCFTLinear:
    torch.manual_seed(0)
    options |= {"dropout": dropout, "init": "paper", "backend": "triton"}
    layer = DCFTLinear(16, 24, dtype=dtype, **options)
    for factor in (layer.dcft_A, layer.dcft_B, layer.dcft_C):
        nn.init.normal_(factor)
    return layer.to(device)


def step(run: Any, layer: nn.Module, tokens: int) -> list[Tensor]:
    """Output and all gradients of one training step, from the same seed every time."""
    parameter = next(layer.parameters())
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 16).to(parameter).requires_grad_()
    layer.zero_grad()
    y = run(x)
    y.float().square().mean().backward()
    factors = [p for name, p in layer.named_parameters() if "dcft" in name]
    return [y.detach(), x.grad, *(p.grad.clone() for p in factors)]


def test_compiled_once_for_every_number_of_tokens(device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what computes it is settled at every call, not when it is compiled."""
    ran = spied(monkeypatch)
    layer = layer_on(device, dropout=0.3)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for tokens, strategy in ((3, "row_block"), (17, "fused"), (40, "row_block"), (100, "fused")):
        monkeypatch.setenv("DCFT_STRATEGY", strategy)
        ran.clear()
        for actual, expected in zip(
            step(compiled, layer, tokens), step(layer, layer, tokens), strict=True
        ):
            torch.testing.assert_close(actual, expected)
        assert ran == [strategy] * 4  # forward and backward, compiled and eager
        counts.append(graphs.frame_count)
    assert counts == counts[:1] * 4


def test_compiled_update_and_delta_weight(device) -> None:
    inputs = to(random_inputs(SMALL[1], (5,), torch.float32), device).requiring()
    factors = (inputs.A, inputs.B, inputs.C)

    def update(x: Tensor, *factors: Tensor) -> Tensor:
        dense = delta_weight(*factors, in_features=13, out_features=10, backend="triton")
        return dcft_update((x @ dense.t()).tanh(), x, *factors, backend="triton")

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, update):
        out = run(inputs.x, *factors)
        results.append([out, *torch.autograd.grad(out.sum(), (inputs.x, *factors))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_autocast_is_the_cast_layer(device) -> None:
    """Eager and compiled: what a 16-bit base with float32 factors gives; float32 gradients."""
    layer = layer_on(device, 0.3)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return layer(x)

    def by_hand(x: Tensor) -> Tensor:
        return dcft_linear(
            x.bfloat16(),
            layer.weight.bfloat16(),
            layer.bias.bfloat16(),
            layer.dcft_A,
            layer.dcft_B,
            layer.dcft_C,
            dropout_p=0.3,
            backend="triton",
        )

    expected = step(by_hand, layer, 5)
    assert expected[0].dtype == torch.bfloat16
    compiled = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    for run in (under_autocast, compiled):
        results = step(run, layer, 5)
        assert [each.dtype for each in results[1:]] == [torch.float32] * 4
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_checkpointing(device, dropout: float, use_reentrant: bool) -> None:
    """The recomputed forward draws the same mask, so the gradients are the same bits."""
    second = DCFTLinear(24, 16, dropout=dropout, init="paper", backend="triton").to(device)
    layer = nn.Sequential(layer_on(device, dropout), nn.GELU(), second)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    assert all(map(torch.equal, step(checkpointed, layer, 5), step(layer, layer, 5)))


def test_checkpointing_compiled(device) -> None:
    layer = layer_on(device, 0.3)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(step(compiled, layer, 5), step(layer, layer, 5), strict=True):
        torch.testing.assert_close(actual, expected)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for roundings of sums of float32, whose size is that of the largest value."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize("trained", [(True,) * 6, (True, False, False, False, True, False)])
@pytest.mark.parametrize(
    ("case", "strategy", "dropout_p"),
    [
        (SMALL[0], "fused", 0.0),
        (SMALL[0], "scratch", 0.0),
        (SMALL[1], "row_block", 0.3),
        (SMALL[2], "row_block", 0.0),
    ],
    ids=str,
)
def test_double_backward(device, case, strategy, dropout_p, trained: tuple[bool, ...]) -> None:
    """A gradient penalty differentiates as that of the reference, whatever is trained."""
    results = []
    for backend, how in (("triton", strategy), ("reference", "auto")):
        inputs = to(random_inputs(case, (7,), torch.float32), device).requiring(*trained)
        operands = tuple(t for t in inputs.operands if t.requires_grad)
        torch.manual_seed(3)
        y = dcft_linear(
            *inputs.operands,
            stride=case.stride,
            scaling=0.7,
            dropout_p=dropout_p,
            backend=backend,
            strategy=how,
        )
        first = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, operands)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_double_backward_of_delta_weight(device, case: Case) -> None:
    results = []
    for backend in ("triton", "reference"):
        inputs = to(random_inputs(case, (1,), torch.float32), device).requiring()
        factors = (inputs.A, inputs.B, inputs.C)
        dense = delta_weight(
            *factors,
            in_features=case.in_features,
            out_features=case.out_features,
            stride=case.stride,
            scaling=0.7,
            backend=backend,
        )
        first = torch.autograd.grad(dense.square().sum(), factors, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([dense, *first, *torch.autograd.grad(penalty, factors)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_double_backward_of_update(device) -> None:
    case, results = SMALL[2], []
    for backend in ("triton", "reference"):
        inputs = to(random_inputs(case, (7,), torch.float32), device).requiring()
        y = inputs.grad.clone().requires_grad_()
        operands = (y, inputs.x, inputs.A, inputs.B, inputs.C)
        out = dcft_update(*operands, stride=case.stride, backend=backend)
        first = torch.autograd.grad(out.square().sum(), operands, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, operands)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


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


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saves_the_input_itself_and_U(
    device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, strategy: str
) -> None:
    monkeypatch.setenv("DCFT_STRATEGY", strategy)
    layer = layer_on(device, dtype=dtype, rank=1)
    x = torch.randn(3, 4, 16, dtype=dtype, device=device, requires_grad=True)
    saved_x, saved_u = saved_by(layer, x)
    assert saved_x.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert saved_u.shape == (12, 1, 8)
    assert saved_u.untyped_storage().nbytes() == saved_u.numel() * dtype.itemsize

    layer.dcft_A.requires_grad_(False)
    (saved_u,) = saved_by(layer, x)
    assert saved_u.shape == (12, 1, 8)
    layer.dcft_B.requires_grad_(False)
    layer.dcft_C.requires_grad_(False)
    assert saved_by(layer, x) == []


def test_saves_a_seed_and_no_mask_with_dropout(device) -> None:
    layer = layer_on(device, 0.3)
    x = torch.randn(12, 16, device=device, requires_grad=True)
    saved_x, _, seed = saved_by(layer, x)
    assert saved_x.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert (seed.dtype, seed.numel()) == (torch.int64, 1)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the strategies that the kernels' passes run; `torch` runs none of them."""
    ran: list[str] = []

    def spy(original: Callable[..., Any], *arguments: Any) -> Any:
        ran.append(arguments[-1])
        return original(*arguments)

    for name in ("linear", "backward"):
        monkeypatch.setattr(passes, name, partial(spy, getattr(passes, name)))
    return ran


@pytest.mark.parametrize("value", ["row_block", "fused", "scratch", "torch", ""])
def test_the_environment_chooses(device, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    layer = layer_on(device)
    layer.backend = "auto"
    expected = step(layer, layer, 7)
    ran = spied(monkeypatch)
    monkeypatch.setenv("DCFT_STRATEGY", value)
    for actual, other in zip(step(layer, layer, 7), expected, strict=True):
        close(actual, other)
    if value or device.type == "cpu":
        assert ran == ([] if value == "torch" else [value or "row_block"] * 2)


def test_the_environment_cannot_turn_away_a_backend_named(device, monkeypatch) -> None:
    """`backend="triton"` runs the kernels or raises, whatever is quicker and whoever says so."""
    layer = layer_on(device)
    monkeypatch.setenv("DCFT_STRATEGY", "torch")
    with pytest.raises(ValueError, match=r"^DCFT_STRATEGY: 'torch' .*backend='triton' was asked"):
        step(layer, layer, 7)


def test_an_argument_outranks_the_environment(device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = to(random_inputs(SMALL[0], (5,), torch.float32), device).requiring()
    ran = spied(monkeypatch)
    monkeypatch.setenv("DCFT_STRATEGY", "scratch")
    dcft_linear(*inputs.operands, backend="triton", strategy="fused").backward(inputs.grad)
    assert ran == ["fused", "fused"]


def test_errors_of_the_environment(device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_on(device), torch.randn(5, 16, device=device)
    monkeypatch.setenv("DCFT_STRATEGY", "fastest")
    with pytest.raises(ValueError, match=r"^DCFT_STRATEGY: expected one of .*got 'fastest'"):
        layer(x)
    monkeypatch.setenv("DCFT_STRATEGY", "scratch")
    with pytest.raises(ValueError, match=r"^DCFT_STRATEGY: 'scratch' cannot run here: dropout"):
        layer_on(device, 0.3)(x)
    monkeypatch.setenv("DCFT_STRATEGY", "fused")
    with pytest.raises(ValueError, match=r"^DCFT_STRATEGY: 'fused' cannot run here: .*overlap"):
        layer_on(device, stride=4)(x)


@every_strategy
def test_never_as_large_as_the_weight(device, strategy: str) -> None:
    """Forward and backward of few tokens allocate nothing of `m * n` elements; `scratch` does."""
    case = Case(64, 96, 1, (8, 8), (8, 8))
    inputs = to(random_inputs(case, (2,), torch.float32), device)
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
        _, u = passes.linear(inputs.x, inputs.weight, inputs.bias, adapter, strategy)
        passes.backward(
            inputs.grad,
            inputs.x,
            u,
            inputs.weight,
            adapter,
            Needs(True, False, True, True, True, True),
            strategy,
        )
    if strategy == "scratch":
        assert max(sizes) == 64 * 96, "the watch sees what is materialised"
    else:
        # The largest are y and gx, and the factors' gradients summed by every program.
        factors = sum(factor.numel() for factor in (inputs.A, inputs.B, inputs.C))
        assert device.type != "cpu" or max(sizes) <= max(2 * 96, 2 * factors)
        assert device.type == "cpu" or max(sizes) < 64 * 96


def compiled_kernels() -> dict[str, int]:
    """How many variants of each kernel are compiled in this process."""
    import importlib

    counts = {}
    for module in ("shrink_expand", "backward", "fused_linear", "fused_backward", "expand"):
        for name, kernel in vars(importlib.import_module(f"dcft_kernels.triton.{module}")).items():
            if name.endswith("_kernel"):
                caches = getattr(kernel, "device_caches", None)
                if caches is None:
                    raise AttributeError(f"{name}: this Triton keeps no device_caches")
                counts[name] = sum(len(cache[0]) for cache in caches.values())
    return counts


@pytest.mark.gpu
def test_no_kernel_is_compiled_again_for_other_tokens(device) -> None:
    """The number of tokens is an ordinary argument: three heights of tiles serve them all."""
    if device.type == "cpu":
        pytest.skip("needs a GPU: the interpreter compiles nothing")
    busy = multiprocessors(device)  # blocks that it takes to have a program for each
    inputs = random_inputs(Case(136, 152, 1, (8, 8), (8, 8)), (100 * busy,), torch.bfloat16)
    inputs = to(inputs, device)

    def run(tokens: int) -> None:
        some = inputs._replace(x=inputs.x[:tokens], grad=inputs.grad[:tokens])
        for strategy in ("row_block", "fused"):
            each = some.requiring()
            y = dcft_linear(*each.operands, backend="triton", strategy=strategy)
            y.backward(each.grad)

    before = compiled_kernels()
    for rows in (10, 40, 100):  # blocks of 16, 32 and 64 rows
        run(rows * busy)
    first = compiled_kernels()
    for tokens in (1, 2, 16, 17, 64, 333, 1024, 1999, 33 * busy, 50 * busy + 1, 70 * busy + 3):
        run(tokens)
    after = compiled_kernels()
    assert after != before
    assert after == first


def test_the_sanitizers_program(device) -> None:
    """What `test_gpu.py` runs under a sanitizer launches every kernel, and gives no NaN."""
    sanitizer_program.main(device)


@pytest.mark.parametrize("seeded", [False, True], ids=["nearest", "stochastic"])
def test_opcheck_of_merging(device, seeded: bool) -> None:
    inputs = to(random_inputs(SMALL[0], (1,), torch.bfloat16, torch.float32), device)
    seed = torch.tensor(3, device=device) if seeded else None
    arguments = (inputs.A, inputs.B, inputs.C, seed, 0.7, list(SMALL[0].stride))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator in (torch.ops.dcft_kernels.merge, torch.ops.dcft_kernels.merge_):
        torch.library.opcheck(
            operator.default, (inputs.weight.clone(), *arguments), test_utils=tests
        )
