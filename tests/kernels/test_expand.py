"""`DW` written into a dense tensor in one pass, its gradients, and stochastic rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dcft_kernels import reference, torch_backend
from dcft_kernels.adapter import Adapter
from tests.adapter_cases import CASES, AdapterShape, adapter_of, random_inputs
from tests.error_budget import assert_within_budget

pytest.importorskip("triton")

from dcft_kernels.triton import expand as expand_module
from dcft_kernels.triton.expand import expand
from dcft_kernels.triton.tiles import Tile

SCALING = 1.5
ALL = (True, True, True)

RAGGED, OVERLAPPING = CASES[3], AdapterShape(25, 21, 2, (5, 7), (2, 3))
HIGH_RANK = AdapterShape(40, 32, 16, (8, 8), (8, 8))
WIDE = AdapterShape(70, 40, 2, (64, 64), (64, 64))
NOT_A_POWER = AdapterShape(60, 36, 2, (12, 12), (12, 12))
NARROW = AdapterShape(20, 24, 40, (2, 2), (2, 2))  # products of factors by tl.dot
MANY_ROWS = AdapterShape(12, 200, 2, (8, 8), (8, 8))  # several blocks of rows per program
EVERY = [*CASES, HIGH_RANK, WIDE, NOT_A_POWER, NARROW]

# NumPy, which the interpreter computes with, warns about inf and NaN, which are intended here.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

every_case = pytest.mark.parametrize("case", EVERY, ids=str)
some_cases = pytest.mark.parametrize("case", [RAGGED, OVERLAPPING, HIGH_RANK], ids=str)
every_mix_of_dtypes = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


def drawn(
    case: AdapterShape,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Adapter]:
    """A weight and an adapter on the device."""
    inputs = random_inputs(case, (1,), dtype, adapter_dtype or dtype)
    adapter = adapter_of(inputs, case, SCALING)
    factors = [factor.to(device) for factor in (adapter.A, adapter.B, adapter.C)]
    return inputs.weight.to(device), adapter._replace(A=factors[0], B=factors[1], C=factors[2])


def in_float64(adapter: Adapter, squared: bool = False) -> Adapter:
    """The same adapter on the CPU, or that of the squares of all its numbers."""
    factors = [factor.cpu().double() for factor in (adapter.A, adapter.B, adapter.C)]
    power = 2 if squared else 1
    A, B, C = (factor**power for factor in factors)
    return adapter._replace(A=A, B=B, C=C, scaling=adapter.scaling**power)


def narrowest(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def filled_with_nan(weight: Tensor) -> Tensor:
    return torch.full_like(weight, float("nan"))


def check_expand(out: Tensor, weight: Tensor | None, adapter: Adapter) -> None:
    """Compare `out` with `weight + scaling * DW` in float64."""
    truth = reference.delta_weight(in_float64(adapter))
    size = reference.delta_weight(in_float64(adapter, squared=True))
    on_cpu = adapter._replace(A=adapter.A.cpu(), B=adapter.B.cpu(), C=adapter.C.cpu())
    peer = torch_backend.delta_weight(on_cpu)
    if weight is not None:
        truth = truth + weight.cpu().double()
        size = size + weight.cpu().double() ** 2
        peer = peer + weight.cpu()
    dtype = narrowest(out.dtype, adapter.A.dtype)
    assert_within_budget(out.cpu(), peer.to(out.dtype), truth, size.sqrt(), dtype, "out")


def dense_gradients(grad: Tensor, adapter: Adapter) -> tuple[Tensor, ...]:
    """Gradients of `A`, `B` and `C` by autograd of the oracle."""
    factors = [factor.detach().requires_grad_() for factor in (adapter.A, adapter.B, adapter.C)]
    leaves = adapter._replace(A=factors[0], B=factors[1], C=factors[2])
    return torch.autograd.grad(reference.delta_weight(leaves), factors, grad)


def check_backward(grad: Tensor, adapter: Adapter, needs: tuple[bool, bool, bool]) -> None:
    """Compare the gradients that are needed with the oracle's in float64."""
    gradients = torch_backend.delta_weight_gradients(grad, adapter, needs)
    on_cpu = grad.cpu().double()
    truths = dense_gradients(on_cpu, in_float64(adapter))
    sizes = dense_gradients(on_cpu**2, in_float64(adapter, squared=True))
    dtype = narrowest(grad.dtype, adapter.A.dtype)
    # The peer rounds its intermediate results to the narrowest dtype, as plain autograd would.
    factors = [factor.to("cpu", dtype) for factor in (adapter.A, adapter.B, adapter.C)]
    rounded = adapter._replace(A=factors[0], B=factors[1], C=factors[2])
    peers = dense_gradients(grad.to("cpu", dtype), rounded)
    for name, needed, gradient, peer, truth, size in zip(
        "ABC", needs, gradients, peers, truths, sizes, strict=True
    ):
        assert (gradient is not None) == needed
        if gradient is not None:
            assert gradient.dtype == getattr(adapter, name).dtype
            peer = peer.to(gradient.dtype)
            assert_within_budget(gradient.cpu(), peer, truth, size.sqrt(), dtype, name)


@every_case
def test_expand_adds_to_a_weight_or_to_nothing(case: AdapterShape, device: torch.device) -> None:
    weight, adapter = drawn(case, device)
    for base in (weight, None):
        out = filled_with_nan(weight)
        expand(adapter, out=out, weight=base)
        check_expand(out, base, adapter)


@some_cases
@every_mix_of_dtypes
def test_expand_of_mixed_dtypes(
    case: AdapterShape, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device
) -> None:
    weight, adapter = drawn(case, device, dtype, adapter_dtype)
    out = filled_with_nan(weight)
    expand(adapter, out=out, weight=weight)
    check_expand(out, weight, adapter)


def test_weight_and_out_of_different_dtypes(device: torch.device) -> None:
    weight, adapter = drawn(RAGGED, device, torch.bfloat16, torch.float32)
    out = torch.full_like(weight, float("nan"), dtype=torch.float32)
    expand(adapter, out=out, weight=weight)
    check_expand(out, weight, adapter)


@some_cases
def test_in_place_is_bitwise_the_same(case: AdapterShape, device: torch.device) -> None:
    weight, adapter = drawn(case, device, torch.bfloat16, torch.float32)
    expected = filled_with_nan(weight)
    expand(adapter, out=expected, weight=weight)
    expand(adapter, out=weight, weight=weight)
    assert torch.equal(weight, expected)


@some_cases
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in_place"])
def test_any_strides(case: AdapterShape, in_place: bool, device: torch.device) -> None:
    weight, adapter = drawn(case, device)
    expected = filled_with_nan(weight)
    expand(adapter, out=expected, weight=weight)
    m, n = weight.shape
    gaps = torch.full((2 * m, 3 * n), 7.0, device=device)
    transposed = weight.t().contiguous().t()
    shifted = gaps.new_zeros(n, m + 5)[:, 2:-3].t()
    for strided in (transposed, shifted, gaps[::2, ::3]):
        strided.copy_(weight)
        expand(adapter, out=strided, weight=strided if in_place else weight.t().clone().t())
        assert torch.equal(strided, expected)
    gaps[::2, ::3] = 7.0
    assert bool((gaps == 7.0).all())  # nothing between the elements was touched


def amid_nan(factor: Tensor) -> Tensor:
    """The same values, transposed in memory and with NaN around them."""
    rows, columns = factor.shape
    wide = factor.new_full((columns + 2, rows + 2), float("nan")).t()
    return wide[1:-1, 1:-1].copy_(factor)


@some_cases
def test_factors_of_any_strides(case: AdapterShape, device: torch.device) -> None:
    weight, adapter = drawn(case, device)
    strided = adapter._replace(A=amid_nan(adapter.A), B=amid_nan(adapter.B), C=amid_nan(adapter.C))
    out = filled_with_nan(weight)
    expand(strided, out=out)
    check_expand(out, None, strided)
    check_backward(weight, strided, ALL)


@pytest.mark.parametrize("case", [*EVERY, MANY_ROWS], ids=str)
def test_backward(case: AdapterShape, device: torch.device) -> None:
    grad, adapter = drawn(case, device)
    check_backward(grad, adapter, ALL)


@some_cases
@every_mix_of_dtypes
def test_backward_of_mixed_dtypes(
    case: AdapterShape, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device
) -> None:
    grad, adapter = drawn(case, device, dtype, adapter_dtype)
    check_backward(grad, adapter, ALL)


@pytest.mark.parametrize("case", [RAGGED, NARROW], ids=str)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_backward_of_what_is_needed(
    case: AdapterShape, needs: tuple[bool, bool, bool], device: torch.device
) -> None:
    grad, adapter = drawn(case, device)
    check_backward(grad, adapter, needs)


def test_backward_of_a_transposed_and_an_expanded_gradient(device: torch.device) -> None:
    grad, adapter = drawn(RAGGED, device)
    check_backward(grad.t().contiguous().t(), adapter, ALL)
    check_backward(grad[:1].expand_as(grad), adapter, ALL)


SIXTEEN_BITS = [torch.bfloat16, torch.float16]
every_short_dtype = pytest.mark.parametrize(
    "dtype", SIXTEEN_BITS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def rounded(values: Tensor, dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    """`values [m, n]` (float32), rounded by `expand` with an increment of zero."""
    m, n = values.shape
    case = AdapterShape(n, m, 1, (8, 8), (8, 8))
    _, adapter = drawn(case, device)
    out = torch.full((m, n), float("nan"), dtype=dtype, device=device)
    nothing = adapter._replace(B=torch.zeros_like(adapter.B))
    expand(nothing, out=out, weight=values.to(device), seed=torch.tensor(seed, device=device))
    return out.cpu()


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the two neighbours in `dtype`, float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.double()).exponent - 1
    least = torch.frexp(torch.tensor(info.smallest_normal)).exponent - 1
    return torch.exp2(exponent.clamp(min=least).double()) * info.eps


@every_short_dtype
def test_representable_values_are_unchanged(dtype: torch.dtype, device: torch.device) -> None:
    """Also subnormal numbers, infinities and NaN."""
    values = torch.arange(-(2**15), 2**15, 16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values.reshape(64, 64)
    assert int(values.isnan().sum()) > 0
    assert int(values.isinf().sum()) == 2
    out = rounded(values.float(), dtype, 3, device)
    assert torch.equal(out.isnan(), values.isnan())
    numbers = ~values.isnan()
    assert torch.equal(out[numbers], values[numbers])


@every_short_dtype
def test_rounds_to_a_neighbour_and_is_unbiased(dtype: torch.dtype, device: torch.device) -> None:
    rows, draws = 96, 128
    generator = torch.Generator().manual_seed(1)
    # From below the least positive number to far above one; float16 is subnormal below 2^-14.
    magnitude = torch.exp2(torch.linspace(-26, 14, rows)) * (
        1 + torch.rand(rows, generator=generator)
    )
    sign = torch.where(torch.rand(rows, generator=generator) < 0.5, -1.0, 1.0)
    values = (magnitude * sign)[:, None].expand(rows, draws).contiguous()
    out = rounded(values, dtype, 5, device).double()

    unit = unit_in_last_place(values, dtype)
    below = torch.floor(values.double().abs() / unit)
    steps = out.abs() / unit
    assert bool(((steps == below) | (steps == below + 1)).all())
    assert bool((out * values.double() >= 0).all())

    up = (steps - below).sum(1)
    probability = (values.double().abs() / unit - below)[:, 0]
    variance = draws * probability * (1 - probability)
    excess = up - draws * probability
    # Six standard deviations for each value, and four for all of them together.
    assert bool((excess.abs() <= 6 * variance.sqrt() + 1).all())
    assert abs(float(excess.sum())) <= 4 * float(variance.sum().sqrt())


@every_short_dtype
def test_small_updates_are_kept_in_the_mean(dtype: torch.dtype, device: torch.device) -> None:
    """Rounded to nearest, an update of a tenth of a unit in the last place is lost."""
    weight = torch.ones(64, 64)
    update = torch.finfo(dtype).eps / 10
    values = weight + update
    assert torch.equal(values.to(dtype), weight.to(dtype))
    mean = float((rounded(values, dtype, 11, device).double() - 1).mean())
    deviation = torch.finfo(dtype).eps * (0.1 * 0.9 / values.numel()) ** 0.5
    assert abs(mean - update) <= 4 * deviation


@every_short_dtype
def test_overflow_is_rounded_to_nearest(dtype: torch.dtype, device: torch.device) -> None:
    largest = torch.finfo(dtype).max
    half = float(unit_in_last_place(torch.tensor(largest), dtype)) / 2
    inf = float("inf")
    values = torch.tensor([largest, largest + half * 0.75, largest + half, 3.4e38, inf])
    expected = torch.tensor([largest, largest, inf, inf, inf])
    out = rounded(torch.stack([values, -values]).repeat(8, 8), dtype, 2, device).float()
    assert torch.equal(out, torch.stack([expected, -expected]).repeat(8, 8))


@every_short_dtype
@pytest.mark.parametrize(
    "case", [AdapterShape(13, 11, 2, (5, 7), (2, 4)), AdapterShape(16, 16, 4, (8, 8), (8, 8))]
)
def test_result_of_a_seed_is_independent_of_the_tile(
    case: AdapterShape, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, adapter = drawn(case, device, dtype, torch.float32)

    def expanded(seed: int) -> Tensor:
        out = filled_with_nan(weight)
        expand(adapter, out=out, weight=weight, seed=torch.tensor(seed, device=device))
        return out

    first = expanded(2**40 + 1)
    assert torch.equal(first, expanded(2**40 + 1))
    assert not torch.equal(first, expanded(1))
    for tokens, outputs in ((16, 8), (4, 16)):
        tile = Tile(tokens, 0, outputs, 0, 4, 1)
        monkeypatch.setattr(expand_module, "lookup", lambda *_, tile=tile: tile)
        assert torch.equal(first, expanded(2**40 + 1))


def test_elements_draw_independently(device: torch.device) -> None:
    """Halfway values: no row, column or seed repeats another."""
    halves = torch.full((64, 64), 1 + torch.finfo(torch.bfloat16).eps / 2)
    draws = torch.stack(
        [rounded(halves, torch.bfloat16, seed, device) == 1 for seed in (0, 1)]
    ).double()
    signs = 2 * draws - 1  # 64 tosses per row: 6 standard deviations are 48
    rows, columns = signs.flatten(0, 1), signs.transpose(1, 2).flatten(0, 1)
    for lines in (rows, columns):
        overlap = lines @ lines.t() - 64 * torch.eye(len(lines), dtype=torch.float64)
        assert float(overlap.abs().max()) <= 48


def test_float32_ignores_the_seed(device: torch.device) -> None:
    weight, adapter = drawn(RAGGED, device)
    out, expected = filled_with_nan(weight), filled_with_nan(weight)
    expand(adapter, out=out, weight=weight, seed=torch.tensor(1, device=device))
    expand(adapter, out=expected, weight=weight)
    assert torch.equal(out, expected)
