"""Layers that share one input: as one group on the kernels they give what each gives alone."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dcft_kernels import GroupMember, dcft_linear, dcft_linear_group, ops
from dcft_kernels.dropout import draw_seed, drop
from dcft_kernels.ops import group as group_ops
from tests.adapter_cases import Case, random_inputs
from tests.error_budget import assert_within_budget

OPS = torch.ops.dcft_kernels
SCALINGS = (0.7, 1.0, 2.5)
FIELDS = ("weight", "bias", "A", "B", "C")

# q, k, v with grouped queries, and ranks of their own; the last without a bias.
QKV = [Case(48, m, k, (8, 8), (8, 8)) for m, k in ((64, 2), (16, 1), (24, 3))]
RAGGED = [Case(21, m, k, (8, 8), (8, 8)) for m, k in ((19, 1), (30, 2))]
OVERLAP = [Case(20, m, k, (8, 8), (2, 4)) for m, k in ((17, 1), (26, 2))]
NOT_POWERS = [Case(30, m, k, (6, 12), (6, 12)) for m, k in ((20, 1), (24, 2))]
GROUPS = {"qkv": QKV, "ragged": RAGGED, "overlap": OVERLAP, "d=6x12": NOT_POWERS}
every_group = pytest.mark.parametrize("name", GROUPS)

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}


class Layers(NamedTuple):
    """A group's input, its members, the gradients of their outputs, and the stride of all."""

    x: Tensor
    members: list[GroupMember]
    grads: list[Tensor]
    stride: tuple[int, int] | None

    @property
    def operands(self) -> list[Tensor]:
        """Everything that can have a gradient."""
        tensors = [tensor for member in self.members for tensor in member[:5]]
        return [self.x, *(tensor for tensor in tensors if tensor is not None)]

    def map(self, change: Callable[[Tensor], Tensor], scalings: float = 1.0) -> Layers:
        """A copy with every tensor changed; `scalings` is a power of theirs."""
        return Layers(
            change(self.x),
            [
                GroupMember(
                    *(None if tensor is None else change(tensor) for tensor in member[:5]),
                    scaling=member.scaling**scalings,
                )
                for member in self.members
            ],
            [change(grad) for grad in self.grads],
            self.stride,
        )

    def requiring(self, x: bool = True, *flags: Sequence[bool]) -> Layers:
        """Detached copies of which those flagged need gradients: weight, bias, A, B, C of each."""
        wanted = flags or [(True,) * 5] * len(self.members)
        copy = self.map(lambda tensor: tensor.detach().clone())
        copy.x.requires_grad_(x)
        for member, member_flags in zip(copy.members, wanted, strict=True):
            for tensor, flag in zip(member[:5], member_flags, strict=True):
                if tensor is not None:
                    tensor.requires_grad_(flag)
        return copy


def layers_of(
    cases: list[Case],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    tokens: int = 19,
) -> Layers:
    """Random layers of these cases; the last one has no bias."""
    inputs = [
        random_inputs(case, (tokens,), dtype, adapter_dtype, seed=seed)
        for seed, case in enumerate(cases)
    ]
    members = [
        GroupMember(
            each.weight,
            None if index == len(cases) - 1 else each.bias,
            each.A,
            each.B,
            each.C,
            SCALINGS[index],
        )
        for index, each in enumerate(inputs)
    ]
    strides = {case.stride for case in cases}
    layers = Layers(
        inputs[0].x,
        members,
        [each.grad for each in inputs],
        strides.pop() if len(strides) == 1 else None,
    )
    return layers.map(lambda tensor: tensor.to(device))


def grouped(layers: Layers, dropout_p: float = 0.0, backend: str = "triton") -> Sequence[Tensor]:
    torch.manual_seed(11)
    return dcft_linear_group(
        layers.x, layers.members, stride=layers.stride, dropout_p=dropout_p, backend=backend
    )


def separately(layers: Layers, dropout_p: float = 0.0, backend: str = "triton") -> Sequence[Tensor]:
    """Every layer by `dcft_linear`, with the same seed for all."""
    outputs = []
    for member in layers.members:
        torch.manual_seed(11)
        outputs.append(
            dcft_linear(
                layers.x,
                *member[:5],
                scaling=member.scaling,
                stride=layers.stride,
                dropout_p=dropout_p,
                backend=backend,
            )
        )
    return outputs


def differentiate(layers: Layers, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, then the gradient of every operand."""
    gradients = torch.autograd.grad(outputs, layers.operands, layers.grads)
    return [*(y.detach() for y in outputs), *gradients]


def names_of(layers: Layers) -> list[str]:
    there = [
        f"{field} of {index}"
        for index, member in enumerate(layers.members)
        for field, tensor in zip(FIELDS, member[:5], strict=True)
        if tensor is not None
    ]
    return [*(f"y of {index}" for index in range(len(layers.members))), "x", *there]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the names of what computes: the group as one, or layer by layer."""
    seen: list[str] = []

    def spy(name: str, original: Callable[..., Any], *arguments: Any) -> Any:
        seen.append(name)
        return original(*arguments)

    for name in ("linear_group", "linear"):
        monkeypatch.setattr(ops, name, partial(spy, name, getattr(ops, name)))
    return seen


def check(layers: Layers, dropout_p: float = 0.0) -> None:
    """The group on the kernels against float64, with the reference in its dtypes as the measure."""
    measured = []
    kept = 1 / (1 - dropout_p)
    for some, run in (
        (layers, grouped),
        (layers, separately),
        (layers.map(Tensor.double), separately),
        (layers.map(lambda t: t.double().square(), scalings=2), separately),
    ):
        some = some.requiring()
        if len(measured) == 3:
            # What is kept counts `kept` times, and has to count the square of that.
            members = [m._replace(scaling=m.scaling * kept) for m in some.members]
            some = some._replace(members=members)
        backend = "triton" if run is grouped else "reference"
        measured.append(differentiate(some, run(some, dropout_p, backend)))
    measured[3] = [square.sqrt() for square in measured[3]]
    for name, *values in zip(names_of(layers), *measured, strict=True):
        assert_within_budget(*values, dtype=layers.x.dtype, what=name)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_parity(device, calls: list[str], dtypes: str) -> None:
    check(layers_of(QKV, device, *DTYPES[dtypes]))
    assert calls[0] == "linear_group"


@pytest.mark.parametrize("name", ["ragged", "overlap", "d=6x12"])
def test_parity_of_other_windows(device, calls: list[str], name: str) -> None:
    check(layers_of(GROUPS[name], device, torch.bfloat16, torch.float32))
    assert calls[0] == "linear_group"


@every_group
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_values_of_single_layers(device, name: str, dropout_p: float) -> None:
    """And with dropout, every layer drops the same elements of `x`."""
    layers = layers_of(GROUPS[name], device, tokens=9)
    results = []
    for run in (grouped, separately):
        some = layers.requiring()
        results.append(differentiate(some, run(some, dropout_p)))
    for what, actual, expected in zip(names_of(layers), *results, strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-5, atol=5e-5, msg=lambda text, what=what: f"{what}: {text}"
        )


def test_parity_with_dropout(device) -> None:
    check(layers_of(RAGGED, device), dropout_p=0.3)


def test_dropout_of_one_seed(device) -> None:
    """The group draws one seed; all its members see the same dropped `x`."""
    layers, p = layers_of(QKV, device), 0.4
    outputs = grouped(layers, p)
    torch.manual_seed(11)
    dropped = drop(layers.x, p, draw_seed(device))
    for y, member in zip(outputs, layers.members, strict=True):
        dense = torch.kron(member.dcft_B @ member.dcft_A, member.dcft_C)
        base = torch.nn.functional.linear(layers.x, member.weight, member.bias)
        expected = base + member.scaling / (1 - p) * (dropped @ dense.t())
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_no_dropout_in_evaluation(device) -> None:
    layers = layers_of(RAGGED, device)
    generator = torch.cuda if device.type == "cuda" else torch
    state = generator.get_rng_state()
    outputs = dcft_linear_group(
        layers.x, layers.members, dropout_p=0.5, training=False, backend="triton"
    )
    assert torch.equal(generator.get_rng_state(), state)
    for y, expected in zip(outputs, grouped(layers), strict=True):
        assert torch.equal(y, expected)


TINY = [Case(16, 24, 1, (8, 8), (8, 8)), Case(16, 8, 2, (8, 8), (8, 8))]


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("second", [(False,) * 3, (True,) * 3, (False, True, False)], ids=str)
def test_every_subset_of_gradients(device, second: tuple[bool, ...], need_x: bool) -> None:
    """Of the first layer's factors, beside a second that is frozen, trained, or partly so."""
    layers = layers_of(TINY, device, tokens=9)
    full = layers.requiring(True, *[(False, False, True, True, True)] * 2)
    expected = torch.autograd.grad(
        grouped(full), [full.x, *full.members[0][2:5], *full.members[1][2:5]], full.grads
    )
    for first in itertools.product([False, True], repeat=3):
        flags = (need_x, *first, *second)
        if not any(flags):
            continue
        some = layers.requiring(need_x, (False, False, *first), (False, False, *second))
        torch.autograd.backward(*_with_gradients(grouped(some), some.grads))
        operands = (some.x, *some.members[0][2:5], *some.members[1][2:5])
        for flag, operand, gradient in zip(flags, operands, expected, strict=True):
            assert (operand.grad is not None) == flag
            if flag:
                torch.testing.assert_close(operand.grad, gradient)
        assert all(member.weight.grad is None for member in some.members)


def _with_gradients(
    outputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that depend on what is trained, and their gradients."""
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    return [y for y, _ in pairs], [g for _, g in pairs]


@pytest.mark.parametrize("ignored", range(3))
def test_an_output_that_the_loss_ignores(device, ignored: int) -> None:
    """Its layer has no gradients at all, and the others have theirs."""
    results = []
    for run in (grouped, separately):
        some = layers_of(QKV, device, tokens=9).requiring()
        pairs = [
            pair
            for index, pair in enumerate(zip(run(some), some.grads, strict=True))
            if index != ignored
        ]
        results.append(
            torch.autograd.grad(
                [y for y, _ in pairs], some.operands, [g for _, g in pairs], allow_unused=True
            )
        )
    for name, actual, expected in zip(names_of(some)[3:], *results, strict=True):
        assert (actual is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-5)
    assert any(gradient is None for gradient in results[0])


def test_any_strides_of_the_input_and_of_gradients(device) -> None:
    layers = layers_of(RAGGED, device).requiring()
    expected = differentiate(layers, grouped(layers))
    strided = Layers(
        layers.x.detach().t().contiguous().t().requires_grad_(),
        layers.members,
        [grad.t().contiguous().t() for grad in layers.grads],
        None,
    )
    for actual, value in zip(differentiate(strided, grouped(strided)), expected, strict=True):
        torch.testing.assert_close(actual, value)
    # A sum's gradient is one value with strides of zero.
    sums = torch.autograd.grad(sum(y.sum() for y in grouped(layers)), layers.operands)
    ones = layers._replace(grads=[torch.ones_like(grad) for grad in layers.grads])
    for actual, value in zip(sums, differentiate(ones, grouped(ones))[2:], strict=True):
        torch.testing.assert_close(actual, value)


def test_leading_dimensions(device) -> None:
    layers = layers_of(RAGGED, device, tokens=12)
    shaped = layers._replace(x=layers.x.reshape(3, 4, -1))
    for y, expected in zip(grouped(shaped), grouped(layers), strict=True):
        assert torch.equal(y, expected.reshape(3, 4, -1))


def test_saves_the_input_itself_and_one_U(device) -> None:
    layers = layers_of(QKV, device)

    def saved(layers: Layers) -> list[Tensor]:
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        own = {tensor.data_ptr() for tensor in layers.operands[1:]}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            grouped(layers)
        return [tensor for tensor in kept if tensor.data_ptr() not in own]

    factors = (False, False, True, True, True)
    trained = layers.requiring(True, *[factors] * 3)
    x, u = saved(trained)
    assert x.data_ptr() == trained.x.data_ptr()
    assert u.shape == (19, 2 + 1 + 3, 8)
    assert u.untyped_storage().nbytes() == u.numel() * u.itemsize
    frozen_A = layers.requiring(True, *[(False, False, False, True, True)] * 3)
    (u,) = saved(frozen_A)
    assert u.shape == (19, 2 + 1 + 3, 8)
    assert saved(layers.requiring(True, *[(False,) * 5] * 3)) == []


@pytest.mark.parametrize("name", ["qkv", "overlap"])
def test_double_backward(device, name: str) -> None:
    """A gradient penalty, with dropout, differentiates as that of the reference."""
    results = []
    for run, backend in ((grouped, "triton"), (separately, "reference")):
        some = layers_of(GROUPS[name], device, tokens=7).requiring()
        loss = sum(y.square().sum() for y in run(some, 0.3, backend))
        first = torch.autograd.grad(loss, some.operands, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, some.operands)])
    for actual, expected in zip(*results, strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)


FALLBACKS = {
    # The joint rank is one more than the kernels take.
    "too many ranks": [Case(16, 16, k, (8, 8), (8, 8)) for k in (8, 9)],
    "other input windows": [Case(16, 16, 1, (8, d), (8, d)) for d in (8, 4)],
    "a single layer": [QKV[0]],
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_falls_back_to_single_layers(device, calls: list[str], reason: str) -> None:
    layers = layers_of(FALLBACKS[reason], device, tokens=6)
    check(layers)
    assert "linear_group" not in calls
    for dropout_p in (0.0, 0.4):
        for y, expected in zip(
            grouped(layers, dropout_p), separately(layers, dropout_p), strict=True
        ):
            assert torch.equal(y, expected)


def test_takes_the_most_ranks_that_the_kernels_take(device, calls: list[str]) -> None:
    check(layers_of([Case(16, 16, 8, (8, 8), (8, 8))] * 2, device, tokens=6))
    assert calls[0] == "linear_group"


def test_members_with_other_output_windows(device, calls: list[str]) -> None:
    """Kernel sizes may differ on the output side, and then so do strides left open."""
    check(layers_of([Case(16, 24, 1, (d, 8), (d, 8)) for d in (8, 4, 6)], device, tokens=6))
    assert calls[0] == "linear_group"


def test_no_tokens(device, calls: list[str]) -> None:
    layers = layers_of(QKV, device, tokens=0).requiring()
    results = differentiate(layers, grouped(layers))
    assert [y.shape for y in results[:3]] == [(0, 64), (0, 16), (0, 24)]
    assert all(float(gradient.abs().sum()) == 0.0 for gradient in results[3:])
    assert "linear_group" not in calls


@pytest.mark.parametrize(("value", "called"), [("row_block", "linear_group"), ("fused", "linear")])
def test_the_environment_decides(
    device, calls: list[str], monkeypatch: pytest.MonkeyPatch, value: str, called: str
) -> None:
    layers = layers_of(TINY, device, tokens=5)
    expected = separately(layers)
    monkeypatch.setenv("DCFT_STRATEGY", value)
    calls.clear()
    for y, other in zip(grouped(layers), expected, strict=True):
        torch.testing.assert_close(y, other)
    assert set(calls) == {called}


def test_errors_name_the_member(device) -> None:
    layers = layers_of(TINY, device)
    x, (first, second) = layers.x, layers.members
    with pytest.raises(ValueError, match=r"^members: expected at least one layer"):
        dcft_linear_group(x, [], backend="triton")
    for wrong in (second[:4], (*second, 1), list(second), None):
        with pytest.raises(TypeError, match=r"^members\[1\]: expected \(weight, bias, dcft_A"):
            dcft_linear_group(x, [first, wrong], backend="triton")
    for wrong, text in (
        (second._replace(dcft_A=first.dcft_A), r"dcft_B: expected 1 columns"),
        (second._replace(dcft_B=first.dcft_B.repeat(1, 2)), r"dcft_B: expected shape \[1, 2\]"),
        (second._replace(bias=first.bias), r"bias: expected shape \[8\], got \[24\]"),
        (second._replace(weight=second.weight[:, :8]), r"x: expected a last dimension of 8"),
        (second._replace(weight=second.weight[0]), r"weight: expected a 2-D tensor"),
        (second._replace(scaling=float("nan")), r"scaling: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=rf"^members\[1\]: {text}"):
            dcft_linear_group(x, [first, wrong], backend="triton")
    with pytest.raises(TypeError, match=r"^members\[1\]: weight: expected torch.float32"):
        dcft_linear_group(x, [first, second._replace(weight=second.weight.half())])
    with pytest.raises(ValueError, match=r"^backend: expected one of"):
        dcft_linear_group(x, [first, second], backend="cuda")


def test_a_plain_tuple_is_a_member(device) -> None:
    layers = layers_of(TINY, device)
    plain = [tuple(member[:5]) for member in layers.members]
    unscaled = [member._replace(scaling=1.0) for member in layers.members]
    for y, expected in zip(
        dcft_linear_group(layers.x, plain, backend="triton"),
        grouped(layers._replace(members=unscaled)),
        strict=True,
    ):
        assert torch.equal(y, expected)


def op_arguments(layers: Layers, seed: Tensor | None) -> tuple[Any, ...]:
    """What the operator takes, captured from a call of the public function."""
    captured: list[tuple[Any, ...]] = []

    class Capture(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is OPS.linear_group:
                captured.append(args)
            return func(*args, **(kwargs or {}))

    with as_operators(), Capture():
        grouped(layers, 0.0 if seed is None else 0.3)
    (arguments,) = captured
    return arguments


@contextlib.contextmanager
def as_operators() -> Iterator[None]:
    """Calls go by the operators, as they do for a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_ops, "needs_dispatcher", lambda x: True)
        yield


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["ragged", "overlap"])
def test_operators_and_eager_calls_are_the_same_to_the_bit(
    device, name: str, dropout_p: float
) -> None:
    layers = layers_of(GROUPS[name], device, torch.bfloat16, torch.float32)
    some = layers.requiring()
    eager = differentiate(some, grouped(some, dropout_p))
    with as_operators():
        some = layers.requiring()
        operators = differentiate(some, grouped(some, dropout_p))
    assert len(eager) == len(operators)
    assert all(map(torch.equal, eager, operators))


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("name", ["ragged", "overlap"])
def test_opcheck(device, name: str, dropout: bool) -> None:
    layers = layers_of(GROUPS[name], device, torch.bfloat16, torch.float32, tokens=3)
    seed = draw_seed(device) if dropout else None
    arguments = op_arguments(layers.requiring(), seed)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if name == "ragged" and dropout:
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.linear_group.default, arguments, test_utils=tests)

    captured = op_arguments(layers, seed)
    x, weights, _, _, *adapters = captured
    _, u = OPS.linear_group(*captured)
    for gs, needs in (
        (layers.grads, [True] * 12),
        (layers.grads, [True, False, True, False, True, False] + [True, True] + [False] * 4),
        ([None, layers.grads[1]], [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3),
    ):
        torch.library.opcheck(
            OPS.linear_group_backward.default,
            (gs, x, u, weights, *adapters, x.shape[1], needs),
            test_utils=("test_schema", "test_faketensor"),
        )


class Projections(nn.Module):
    """A group as the layers of a model hold it."""

    def __init__(self, layers: Layers, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.scalings = [member.scaling for member in layers.members]
        for index, member in enumerate(layers.members):
            for field, tensor in zip(FIELDS, member[:5], strict=True):
                parameter = None if tensor is None else nn.Parameter(tensor)
                self.register_parameter(f"{field}{index}", parameter)

    def forward(self, x: Tensor) -> list[Tensor]:
        members = [
            (*(getattr(self, f"{field}{index}") for field in FIELDS), scaling)
            for index, scaling in enumerate(self.scalings)
        ]
        outputs = dcft_linear_group(x, members, dropout_p=self.dropout_p, backend="triton")
        return [y.tanh() for y in outputs]


def test_compiled(device) -> None:
    """One graph for every number of tokens, gradients included, and with dropout."""
    torch._dynamo.reset()
    layer = Projections(layers_of(TINY, device), dropout_p=0.3)
    operands = list(layer.parameters())
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for tokens in (3, 17, 40):
        x = torch.randn(tokens, 16, device=device, requires_grad=True)
        results = []
        for run in (compiled, layer):
            torch.manual_seed(tokens)
            outputs = run(x)
            loss = sum(y.square().sum() for y in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, [x, *operands])])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
        counts.append(graphs.frame_count)
    assert counts == counts[:1] * 3
    torch._dynamo.reset()


def test_autocast(device) -> None:
    """The base in autocast's dtype, the factors as they are."""
    layers = layers_of(TINY, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs = grouped(layers)
    halves = [
        member._replace(
            weight=member.weight.bfloat16(),
            bias=None if member.bias is None else member.bias.bfloat16(),
        )
        for member in layers.members
    ]
    expected = grouped(layers._replace(x=layers.x.bfloat16(), members=halves))
    for y, by_hand in zip(outputs, expected, strict=True):
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, by_hand)


def test_repeats_to_the_bit(device) -> None:
    layers = layers_of(QKV, device, torch.bfloat16, torch.float32).requiring()
    first = differentiate(layers, grouped(layers, 0.3))
    for _ in range(100 if device.type == "cuda" else 2):
        assert all(map(torch.equal, differentiate(layers, grouped(layers, 0.3)), first))


def test_gradients_have_memory_of_their_own(device) -> None:
    layers = layers_of(GROUPS["qkv"], device).requiring()
    gradients = differentiate(layers, grouped(layers))[len(layers.members) :]
    storages = [gradient.untyped_storage().data_ptr() for gradient in gradients]
    assert len(set(storages)) == len(storages)
