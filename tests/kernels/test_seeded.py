"""The strategy `seeded` with the tiles that ship: the layer, all gradients, and when it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dcft_kernels import DCFTLinear, dcft_linear, dcft_update, explain
from tests.adapter_cases import AdapterShape, Inputs, random_inputs
from tests.error_budget import assert_within_budget
from tests.kernels.conftest import INTERPRETED
from tests.kernels.parity import NAMES, SCALING, check, run, to

pytest.importorskip("triton")

from dcft_kernels.triton import gemm, row_block, seeded, shrink
from dcft_kernels.triton.launch import signatures
from dcft_kernels.triton.tiles import as_architecture, token_bucket

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPE = torch.bfloat16


def shape(n: int, m: int, rank: int = 1, width: int | tuple[int, int] = 8) -> AdapterShape:
    kernel = width if isinstance(width, tuple) else (width, width)
    return AdapterShape(n, m, rank, kernel, kernel)


SMALL = shape(264, 328, 2)  # nothing that a tile divides
RAGGED = shape(328, 264, 1, (16, 64))  # the last windows stick out; the narrower tile


@pytest.fixture(autouse=True)
def _hopper(hopper) -> None:
    pass


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the strategies' launchers, as they are called."""
    names: list[str] = []

    def record(module: object, name: str) -> None:
        launcher: Callable[..., object] = getattr(module, name)

        def recorded(*arguments: object, **named: object) -> object:
            names.append(name)
            return launcher(*arguments, **named)

        monkeypatch.setattr(module, name, recorded)

    record(shrink, "shrink")
    record(shrink, "shrink_backward")
    record(gemm, "linear")
    record(gemm, "input_gradient")
    record(row_block, "shrink_expand")
    record(row_block, "backward")
    return names


FORWARD = {"seeded": ["shrink", "linear"], "row_block": ["shrink_expand"]}
BACKWARD = {"seeded": ["shrink_backward", "input_gradient"], "row_block": ["backward"]}


def drawn(
    case: AdapterShape, tokens: int, adapter_dtype: torch.dtype = torch.float32, seed: int = 0
) -> Inputs:
    return to(random_inputs(case, (tokens,), DTYPE, adapter_dtype, seed), DEVICE)


# Results


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        # Two multiprocessors take the tiles of these in turns: whole ones, and ragged ones.
        (shape(512, 512), 256),
        (shape(264, 776), 257),
        (shape(256, 264), 1100),  # more rows of tiles than are done together
        (shape(256, 256), 1024),  # just as many
        (shape(776, 264, 2), 150),
        (shape(328, 392, 4, 16), 130),
        (SMALL, 129),
        (RAGGED, 70),
        (shape(256, 256), 1),
        (shape(320, 264, 3), 127),
        (shape(320, 264, 3)._replace(per_rank=True), 65),
        (shape(264, 272, 4, (4, 8)), 33),
        (shape(272, 264, 2, (32, 4)), 17),
        (shape(320, 328, 1, 64), 5),
    ],
    ids=str,
)
def test_parity(case: AdapterShape, tokens: int, launched: list[str]) -> None:
    check(drawn(case, tokens), case, strategy="seeded")
    assert launched == FORWARD["seeded"] + BACKWARD["seeded"]


def test_factors_in_16_bits() -> None:
    for case in (SMALL, RAGGED):
        results = check(drawn(case, 40, DTYPE), case, strategy="seeded")
        assert {each.dtype for each in results} == {DTYPE}


def test_no_bias() -> None:
    inputs = drawn(SMALL, 40)
    factors = (inputs.A, inputs.B, inputs.C)
    without = dcft_linear(inputs.x, inputs.weight, None, *factors, strategy="seeded")
    zero = torch.zeros_like(inputs.bias)
    assert torch.equal(
        without, dcft_linear(inputs.x, inputs.weight, zero, *factors, strategy="seeded")
    )


@st.composite
def shapes(draw) -> tuple[AdapterShape, int]:
    """What the strategy takes, small."""
    d_in = draw(st.sampled_from([4, 8, 16, 32, 64]))
    d_out = draw(st.sampled_from([4, 8, 16, 32, 64]))
    rank = draw(st.integers(1, min(4, 64 // d_in)).filter(lambda rank: rank * d_in % 8 == 0))
    n, m = (8 * draw(st.integers(32, 48)) for _ in range(2))
    case = shape(n, m, rank, (d_out, d_in))._replace(per_rank=draw(st.booleans()))
    return case, draw(st.integers(1, 140))


# On a GPU, the kernels are recompiled for every example.
@settings(
    max_examples=8 if INTERPRETED else 5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(shapes())
def test_any_shape(drawn_shape: tuple[AdapterShape, int]) -> None:
    case, tokens = drawn_shape
    assert seeded.why_not(case.geometry, DTYPE, DEVICE) is None
    check(drawn(case, tokens), case, strategy="seeded")


# Rows that descriptors do not describe, which are copied


def unaligned(tensor: Tensor) -> Tensor:
    """The same values, beginning 2 bytes after a multiple of 16."""
    wide = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype, device=DEVICE)
    return wide[1:].view_as(tensor).copy_(tensor)


def apart(tensor: Tensor) -> Tensor:
    """The same values with rows that begin at odd multiples of 2 bytes, or every other value."""
    shape = (*tensor.shape[:-1], tensor.shape[-1] + 1) if tensor.dim() > 1 else (len(tensor), 2)
    wide = torch.full(shape, float("nan"), dtype=tensor.dtype, device=DEVICE)
    view = wide[:, :-1] if tensor.dim() > 1 else wide[:, 0]
    return view.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


@pytest.mark.parametrize("rearrange", [unaligned, apart, transposed])
def test_any_strides(rearrange: Callable[[Tensor], Tensor]) -> None:
    inputs = drawn(SMALL, 20)
    expected = run(inputs, SMALL, "triton", strategy="seeded")
    for which in Inputs._fields:
        strided = inputs._replace(**{which: rearrange(getattr(inputs, which))})
        actual = run(strided, SMALL, "triton", strategy="seeded")
        for name, a, b in zip(NAMES, actual, expected, strict=True):
            # The gradients of the weight and of the bias are PyTorch's.
            assert torch.equal(a, b) or name in ("gW", "gb"), f"{name}, {which} {rearrange}"


class Operations(TorchDispatchMode):
    """Records the names of PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_copies_come_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product waits for the launch before it, and that has to be the pass."""
    operations = Operations()

    def between(launcher: Callable[..., None], following: Callable[..., None]) -> None:
        def launch(*arguments: object, **named: object) -> None:
            launcher(*arguments, **named)
            operations.__enter__()

        def follow(*arguments: object, **named: object) -> None:
            operations.__exit__(None, None, None)
            following(*arguments, **named)

        monkeypatch.setattr(shrink, launcher.__name__, launch)
        monkeypatch.setattr(gemm, following.__name__, follow)

    between(shrink.shrink, gemm.linear)
    between(shrink.shrink_backward, gemm.input_gradient)
    run(Inputs(*map(apart, drawn(SMALL, 20))), SMALL, "triton", strategy="seeded")
    assert operations.names <= {"aten::new_empty"}


@pytest.mark.parametrize("which", ["x", "weight", "grad"])
def test_rows_apart_are_not_copied(which: str) -> None:
    inputs = drawn(SMALL, 20)
    rows = getattr(inputs, which)
    wide = torch.full((rows.shape[0] + 1, rows.shape[1] + 24), float("nan"), dtype=DTYPE)
    view = wide.to(DEVICE)[:-1, 8 : rows.shape[1] + 8].copy_(rows)
    assert seeded._aligned(view) is view
    check(inputs._replace(**{which: view}), SMALL, strategy="seeded")


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "elements"])
def test_expanded_gradient(rows: bool) -> None:
    """As the backward passes of `y.sum(0)` and `y.sum()` make it; rows may not overlap in TMA."""
    inputs = drawn(SMALL, 20)
    grad = inputs.grad[:1].expand_as(inputs.grad)
    grad = grad if rows else inputs.grad[:1, :1].expand_as(inputs.grad)
    assert seeded._aligned(grad).is_contiguous()
    check(inputs._replace(grad=grad), SMALL, strategy="seeded")


# What is computed


@pytest.mark.parametrize(
    "wanted", [each for each in itertools.product([False, True], repeat=4) if any(each)], ids=str
)
def test_every_subset_of_gradients(wanted: tuple[bool, ...], launched: list[str]) -> None:
    """What is requested does not change that of `x`; without that, there is no product."""
    inputs = drawn(SMALL, 20)

    def gradients(*flags: bool) -> list[Tensor | None]:
        some = inputs.requiring(flags[0], False, False, *flags[1:])
        dcft_linear(*some.operands, strategy="seeded").backward(inputs.grad)
        return [some.x.grad, some.A.grad, some.B.grad, some.C.grad]

    strategy = "seeded" if wanted[0] else "row_block"
    found = gradients(*wanted)
    assert launched == FORWARD["seeded"] + BACKWARD[strategy]
    assert [grad is not None for grad in found] == list(wanted)
    if strategy == "seeded":
        assert torch.equal(found[0], gradients(True, True, True, True)[0])
    _check_factors(inputs, found[1:])


def test_trained_weight_and_frozen_A() -> None:
    """`x` is saved for the gradient of the weight, and the product does not see it."""
    inputs = drawn(SMALL, 20)
    expected = run(inputs, SMALL, "triton", strategy="seeded", scaling=1.0)
    some = inputs._replace(x=unaligned(inputs.x)).requiring(True, True, True, False, True, True)
    dcft_linear(*some.operands, strategy="seeded").backward(inputs.grad)
    assert some.A.grad is None
    for name, operand, grad in zip(NAMES[1:], some.operands, expected[1:], strict=True):
        if operand.requires_grad:
            torch.testing.assert_close(operand.grad, grad, msg=lambda text, name=name: name + text)


def _check_factors(inputs: Inputs, found: list[Tensor | None]) -> None:
    """Check gradients of the factors against the reference."""
    wide = inputs.to(torch.float64)
    squares = Inputs(*(tensor.square() for tensor in wide))
    peer, truth = (run(each, SMALL, "reference", scaling=1.0)[4:] for each in (inputs, wide))
    sizes = [size.sqrt() for size in run(squares, SMALL, "reference", scaling=1.0)[4:]]
    for name, actual, *values in zip("ABC", found, peer, truth, sizes, strict=True):
        if actual is not None:
            assert_within_budget(actual, *values, DTYPE, f"g{name}")


def test_double_backward() -> None:
    """A gradient's gradient, which is linear in everything, as sums of products are."""

    def second(inputs: Inputs, options: dict[str, str], scaling: float) -> tuple[Tensor, ...]:
        some = inputs.requiring(True, False, False, True, True, True)
        y = dcft_linear(*some.operands, scaling=scaling, **options)
        first = torch.autograd.grad(y, (some.B, some.C), some.grad, create_graph=True)
        like = (inputs.B, inputs.C)
        return tuple(
            grad
            for each, other in zip(first, like, strict=True)
            for grad in torch.autograd.grad(each, (some.x, some.A), other, retain_graph=True)
        )

    inputs = drawn(SMALL, 20)
    wide = inputs.to(torch.float64)
    squares = Inputs(*(tensor.square() for tensor in wide))
    reference = {"backend": "reference"}
    results = (
        second(inputs, {"strategy": "seeded"}, SCALING),
        second(inputs, reference, SCALING),
        second(wide, reference, SCALING),
        tuple(size.sqrt() for size in second(squares, reference, SCALING**2)),
    )
    for name, *values in zip(("Bx", "BA", "Cx", "CA"), *results, strict=True):
        assert_within_budget(*values, DTYPE, f"g{name}")


def test_layer(launched: list[str]) -> None:
    """A module runs what the function does, on any leading dimensions."""
    inputs = drawn(SMALL, 12)
    layer = DCFTLinear(264, 328, rank=2, dtype=DTYPE, strategy="seeded").to(DEVICE)
    names = ("weight", "bias", "dcft_A", "dcft_B", "dcft_C")
    layer.load_state_dict(dict(zip(names, inputs[1:6], strict=True)))
    y = layer(inputs.x.view(3, 4, 264))
    assert launched == FORWARD["seeded"]
    expected = run(inputs, SMALL, "triton", strategy="seeded", scaling=layer.scaling)[0]
    assert torch.equal(y, expected.view(3, 4, 328))


def test_autocast(launched: list[str]) -> None:
    inputs = drawn(SMALL, 12)
    expected = run(inputs, SMALL, "triton", strategy="seeded")
    wide = inputs.to(torch.float32)
    with torch.autocast(DEVICE.type, dtype=DTYPE):
        actual = run(wide._replace(grad=inputs.grad), SMALL, "triton", strategy="seeded")
    assert launched == 2 * (FORWARD["seeded"] + BACKWARD["seeded"])
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(a, b.to(a.dtype)), name


def test_repeats_to_the_bit() -> None:
    repeats, tokens = (100, 3000) if DEVICE.type == "cuda" else (2, 140)
    inputs = drawn(SMALL, tokens)
    before = [tensor.clone() for tensor in inputs]
    first = run(inputs, SMALL, "triton", strategy="seeded")
    for _ in range(repeats - 1):
        again = run(inputs, SMALL, "triton", strategy="seeded")
        assert all(map(torch.equal, again, first))
    assert all(map(torch.equal, inputs, before)), "arguments are not changed"


def test_no_tokens(launched: list[str]) -> None:
    inputs = drawn(SMALL, 0)
    y, *grads = run(inputs, SMALL, "triton", strategy="seeded")
    assert y.shape == (0, 328)
    assert not any(bool(grad.any()) for grad in grads)
    assert launched == []


# When it runs


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (SMALL, torch.float32, "it takes tokens in bfloat16, not float32"),
        (SMALL, torch.float16, "it takes tokens in bfloat16, not float16"),
        (
            AdapterShape(264, 328, 1, (8, 8), (8, 4)),
            DTYPE,
            "it takes windows that tile the features, with stride equal to kernel_size",
        ),
        (shape(264, 328, 1, (12, 8)), DTYPE, "it takes kernel sizes 4, 8, 16, 32, 64, not 12"),
        (shape(264, 328, 1, (8, 2)), DTYPE, "it takes kernel sizes 4, 8, 16, 32, 64, not 2"),
        (shape(260, 328), DTYPE, "features that are multiples of 8 from 256 on, not 260"),
        (shape(264, 248), DTYPE, "features that are multiples of 8 from 256 on, not 248"),
        (shape(264, 328, 5, (8, 8)), DTYPE, r"ranks up to 4 and rank \* .* not 5 \* 8"),
        (shape(264, 328, 3, (8, 32)), DTYPE, r"of 8, 16, .. 64, not 3 \* 32"),
        (shape(264, 328, 1, (8, 4)), DTYPE, r"of 8, 16, .. 64, not 1 \* 4"),
        (shape(32776, 256), DTYPE, r"rows up to 32768 features \(.*\), not 32776"),
        (shape(256, 16392, 2), DTYPE, r"for gB, times the rank\), not 32784"),
    ],
    ids=str,
)
def test_what_it_refuses(
    case: AdapterShape, dtype: torch.dtype, reason: str, launched: list[str]
) -> None:
    inputs = to(random_inputs(case, (2,), dtype, torch.float32), DEVICE)
    message = rf"^strategy='seeded' cannot run: .*{reason}; use strategy='auto' or 'torch'"
    with pytest.raises(RuntimeError, match=message):
        dcft_linear(*inputs.operands, stride=case.stride, strategy="seeded")
    assert launched == []


def test_other_gpus_refuse() -> None:
    inputs = drawn(SMALL, 2)
    message = "^strategy='seeded' cannot run: it needs a GPU of compute capability 9.0; use strat"
    with as_architecture("sm_100"), pytest.raises(RuntimeError, match=message):
        dcft_linear(*inputs.operands, strategy="seeded")


def test_dropout_is_refused_before_any_launch(launched: list[str]) -> None:
    message = "^strategy='seeded' cannot run: it takes no dropout; use strategy='auto' or 'row_bl"
    inputs = drawn(SMALL, 2)
    with pytest.raises(RuntimeError, match=message):
        dcft_linear(*inputs.operands, strategy="seeded", dropout_p=0.1)
    assert launched == []
    layer = DCFTLinear(264, 328, dtype=DTYPE, strategy="seeded", dropout=0.1, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        explain(layer, tokens=2)
    layer.eval()
    assert explain(layer, tokens=2).strategy == "seeded"
    layer(inputs.x)
    assert launched == FORWARD["seeded"]


@st.composite
def any_shape(draw) -> AdapterShape:
    """Shapes of layers, of any size, with windows that tile them."""
    width = st.sampled_from([4, 8, 16, 32, 64])
    n, m = (2 ** draw(st.integers(8, 17)) + 8 * draw(st.integers(-9, 9)) for _ in range(2))
    return shape(n, m, draw(st.integers(1, 4)), (draw(width), draw(width)))


@given(any_shape(), st.integers(1, 10**6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_shape_has_tiles(case: AdapterShape, tokens: int) -> None:
    """What the strategy accepts, its launchers have tiles for."""
    geometry = case.geometry
    if seeded.why_not(geometry, DTYPE, DEVICE) is None:
        columns = geometry.rank * geometry.inputs.width
        assert gemm.slices(tokens, columns, DEVICE) >= 1
        bucket = token_bucket(tokens, DEVICE)
        tensors = signatures((torch.empty(1, case.in_features, dtype=DTYPE),) * 6)
        assert shrink._prepare_forward(geometry, bucket, DEVICE, tensors).rows >= 1
        assert shrink._backward_tile(geometry, bucket, DEVICE).tokens >= 1


def test_work_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 tiles of 128 x 256, the last of them ragged, are enough for 100 multiprocessors."""
    monkeypatch.setattr(seeded, "multiprocessors", lambda device: 100)
    assert seeded.has_work(128 * 23 + 1, 257, DEVICE)
    assert not seeded.has_work(128 * 23, 512, DEVICE)
    assert not seeded.has_work(128 * 47, 256, DEVICE)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("enough", [True, False])
def test_auto(
    enough: bool, dropout: float, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward it runs with enough tiles, backward always; never with dropout. `explain` says so."""
    monkeypatch.setattr(seeded, "multiprocessors", lambda device: 2 if enough else 100)
    layer = DCFTLinear(264, 328, dtype=DTYPE, dropout=dropout, device=DEVICE)
    x = torch.randn(5, 264, dtype=DTYPE, device=DEVICE, requires_grad=True)
    y = layer(x)
    told = explain(layer, tokens=5)
    assert told.strategy == ("seeded" if enough and not dropout else "row_block")
    assert launched == FORWARD[told.strategy]
    launched.clear()
    y.backward(torch.randn_like(y))
    assert launched == BACKWARD["row_block" if dropout else "seeded"]
    mixed = not enough and not dropout
    assert mixed == told.reason.endswith("kernels take this layer; its backward pass runs seeded")
    if mixed:  # forward `x`, `y` twice, `U`; backward `g`, `x`, `U`, `Ub` twice, and `P` twice
        elements = 5 * (264 + 2 * 328 + 8 + 328 + 264 + 3 * 8) + 2 * 8 * 264
        assert told.adapter.bytes == 2 * elements


def test_update_runs_row_block(launched: list[str]) -> None:
    inputs = drawn(SMALL, 300).requiring(True, False, False, True, True, True)
    operands = (inputs.x, inputs.A, inputs.B, inputs.C)
    y = dcft_update(torch.zeros_like(inputs.grad), *operands, backend="triton")
    torch.autograd.grad(y, operands, inputs.grad)
    assert launched == FORWARD["row_block"] + BACKWARD["row_block"]


def test_auto_copies_no_weight(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed weight, such as a Conv1D's, is left to `row_block`, and `explain` says so."""
    monkeypatch.setattr(seeded, "multiprocessors", lambda device: 2)
    layer = DCFTLinear(264, 328, dtype=DTYPE, device=DEVICE)
    layer.weight = torch.nn.Parameter(transposed(layer.weight.data), requires_grad=False)
    x = torch.randn(5, 264, dtype=DTYPE, device=DEVICE, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    assert launched == FORWARD["row_block"] + BACKWARD["row_block"]
    assert explain(layer, tokens=5).strategy == "row_block"


def test_another_gluon_leaves_all_to_row_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeded, "_why_no_gemm", "it needs another Gluon")
    seeded.why_not.cache_clear()
    assert seeded.why_not(SMALL.geometry, DTYPE, DEVICE) == "it needs another Gluon"
    monkeypatch.undo()
    seeded.why_not.cache_clear()
