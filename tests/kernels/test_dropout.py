"""Dropout inside the kernels uses the mask of `dropout.philox_mask`, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcft_kernels import DCFTLinear, dcft_update, dropout
from dcft_kernels.dropout import draw_seed, philox_mask
from tests.adapter_cases import CASES, AdapterShape, random_inputs
from tests.kernels.parity import check, to

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dcft_kernels.triton.philox import keep  # noqa: E402 - needs Triton

OPS = torch.ops.dcft_kernels
# As many ranks as input windows, so that A can be the identity; output windows as they come.
READABLE = [
    AdapterShape(40, 24, 5, (8, 8), (8, 8)),
    AdapterShape(37, 24, 5, (8, 8), (8, 8)),  # ragged
    AdapterShape(22, 18, 4, (6, 6), (6, 6)),  # windows that are padded
    AdapterShape(45, 25, 4, (12, 12), (12, 12)),
    AdapterShape(34, 24, 34, (1, 1), (1, 1)),
    AdapterShape(70, 20, 2, (5, 64), (5, 64)),  # windows wider than a tile
    AdapterShape(23, 16, 5, (8, 8), (8, 4)),  # overlapping
    AdapterShape(24, 16, 10, (7, 7), (3, 2)),
]
PAPER, RAGGED, OVERLAP = CASES[0], CASES[3], CASES[6]
SEEDS = [0, 1, 2**32 + 7, 2**62 - 1]
P, SEED = 0.4, SEEDS[2]
TOKENS = 21


def mask_in_windows(mask: Tensor, case: AdapterShape) -> Tensor:
    """`[T, n]` as the windows of the input side see it, `[T, I, d_in]`."""
    side = case.geometry.inputs
    padded = torch.nn.functional.pad(mask.float(), (0, side.span - side.size))
    return padded.unfold(1, side.width, side.stride)


def arguments(case: AdapterShape, A: Tensor) -> tuple:
    """An adapter, all of ones except for `A`, as operators take it."""
    geometry = case.geometry
    B, C = (torch.ones(shape, device=A.device) for shape in (geometry.shape_B, geometry.shape_C))
    flat = [geometry.rank, *geometry.outputs, *geometry.inputs, geometry.per_rank]
    return (A, B, C, torch.tensor(SEED, device=A.device), 1.0, flat, P)


def mask_of(tokens: int, case: AdapterShape, device: torch.device) -> Tensor:
    return philox_mask(torch.tensor(SEED), P, (tokens, case.in_features), device)


every_case = pytest.mark.parametrize("case", READABLE, ids=str)


@every_case
def test_mask_of_the_forward(device, case: AdapterShape) -> None:
    """With the identity for `A` and ones for `x`, `U` is the mask in windows."""
    A = torch.eye(case.rank, device=device)
    assert A.shape == case.geometry.shape_A
    x = torch.ones(TOKENS, case.in_features, device=device)
    y = torch.zeros(TOKENS, case.out_features, device=device)
    _, u = OPS.forward(x, None, None, y, *arguments(case, A), "triton")
    mask = mask_in_windows(mask_of(TOKENS, case, device), case)
    assert torch.equal(u, mask.flatten(1))


@every_case
def test_mask_of_the_backward(device, case: AdapterShape) -> None:
    """With ones for all else and no base, `gx` is zero where the mask is, and nowhere else."""
    A = torch.ones(case.geometry.shape_A, device=device)
    g = torch.ones(TOKENS, case.out_features, device=device)
    needs = [True, False, False, False, False, False]
    gx, *_ = OPS.backward(g, None, None, None, *arguments(case, A), needs, "triton")
    assert torch.equal(gx != 0, mask_of(TOKENS, case, device))


@every_case
def test_mask_of_the_gradient_of_A(device, case: AdapterShape) -> None:
    """One token, all ones: the gradient counts kept elements per window, up to a factor."""
    A = torch.ones(case.geometry.shape_A, device=device)
    x = torch.ones(1, case.in_features, device=device)
    g = torch.ones(1, case.out_features, device=device)
    needs = [False, False, False, True, False, False]
    *_, grad_A, _, _ = OPS.backward(g, x, None, None, *arguments(case, A), needs, "triton")
    # Every feature's Ub is the sum of all that the output windows cover.
    outputs = case.geometry.outputs
    covered = sum(
        min(outputs.width, outputs.size - window * outputs.stride)
        for window in range(outputs.windows)
    )
    expected = covered * mask_in_windows(mask_of(1, case, device), case).sum(2)
    assert torch.equal(grad_A, expected.expand_as(grad_A))


@triton.jit
def _keep_kernel(
    out_ptr, seed_ptr, p, first_token, first_feature,
    CONTIGUOUS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """`keep` alone, of tokens from `first_token` on: `out [BLOCK_T, BLOCK_F]`."""
    row = tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_F)
    t = tl.cast(first_token, tl.int64) + row
    kept = keep(tl.load(seed_ptr), p, t, first_feature + column, CONTIGUOUS, BLOCK_T, BLOCK_F)
    tl.store(out_ptr + row[:, None] * BLOCK_F + column[None, :], kept.to(tl.int8))


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("first_token", [0, 2**31 - 9, 2**32 - 8, 2**32 + 5, 2**40 + 3])
def test_tokens_beyond_32_bits(device, first_token: int, contiguous: bool) -> None:
    """The counter's high word counts, so that the mask does not repeat."""
    p = 0.5
    for seed in SEEDS:
        seeds = torch.tensor(seed, device=device)
        for first_feature in (0, 64) if contiguous else (0, 61):
            out = torch.empty(16, 32, dtype=torch.int8, device=device)
            _keep_kernel[(1,)](
                out, seeds, p, first_token, first_feature,
                CONTIGUOUS=contiguous, BLOCK_T=16, BLOCK_F=32,
            )  # fmt: skip
            quads = -(-(first_feature + 32) // 4)
            expected = dropout._philox_rows(seeds, p, first_token, first_token + 16, quads)
            assert torch.equal(out.bool(), expected[:, first_feature : first_feature + 32])
            if first_token >= 2**32:
                low = dropout._philox_rows(
                    seeds, p, first_token % 2**32, first_token % 2**32 + 16, quads
                )
                assert not torch.equal(expected, low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [PAPER, RAGGED, OVERLAP], ids=str)
def test_parity(device, case: AdapterShape, dtype: torch.dtype) -> None:
    """Forward and all gradients drop the elements that the reference drops."""
    inputs = to(random_inputs(case, (TOKENS,), dtype, torch.float32), device)
    check(inputs, case, dropout_p=0.3)


@pytest.mark.parametrize("p", [1e-6, 0.02, 0.97])
def test_small_and_large_probabilities(device, p: float) -> None:
    inputs = to(random_inputs(RAGGED, (TOKENS,), torch.float32), device)
    check(inputs, RAGGED, dropout_p=p)


def test_update_drops_what_the_reference_drops(device) -> None:
    results = []
    for backend in ("triton", "reference"):
        some = to(random_inputs(RAGGED, (TOKENS,), torch.float32), device).requiring()
        y = torch.zeros(TOKENS, RAGGED.out_features, device=device, requires_grad=True)
        torch.manual_seed(6)
        out = dcft_update(y, some.x, some.A, some.B, some.C, dropout_p=0.4, backend=backend)
        operands = (y, some.x, some.A, some.B, some.C)
        results.append([out, *torch.autograd.grad(out, operands, some.grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_mask_does_not_depend_on_strides(device) -> None:
    inputs = to(random_inputs(RAGGED, (TOKENS,), torch.float32), device)
    strided = inputs._replace(x=inputs.x.t().contiguous().t())
    check(strided, RAGGED, dropout_p=0.5)


def test_calls_differ_and_manual_seed_repeats(device) -> None:
    layer = DCFTLinear(48, 64, dropout=0.5, init="paper", backend="triton").to(device)
    for factor in (layer.dcft_A, layer.dcft_B, layer.dcft_C):
        torch.nn.init.normal_(factor)
    x = torch.randn(5, 48, device=device)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), second)
    generator = torch.cuda if device.type == "cuda" else torch
    state = generator.get_rng_state()
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(generator.get_rng_state(), state)


def test_seeds_are_where_kernels_read_them(device) -> None:
    seed = draw_seed(device)
    assert seed.device.type == device.type
    assert (seed.dtype, seed.dim()) == (torch.int64, 0)
