"""How fresh adapters are drawn and scaled, against what `dcft_kernels.initialization` promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcft_kernels import DCFTLinear, swap_linear

FACTORS = ("dcft_A", "dcft_B", "dcft_C")
# How many standard errors a sample may be off: by chance once in millions of runs.
SIGMAS = 5.0


def _adapter(in_features: int, out_features: int, **options: Any) -> DCFTLinear:
    """The adapter alone: its base, which these tests never read, has no values."""
    layer = DCFTLinear(in_features, out_features, bias=False, device="meta", **options)
    for name in FACTORS:
        setattr(layer, name, nn.Parameter(torch.empty(getattr(layer, name).shape)))
    layer.reset_dcft_parameters()
    return layer


def _assert_normal(sample: Tensor, std: float) -> None:
    """Mean, variance and fourth moment of N(0, std^2), each within its standard error."""
    z = sample.detach().double().flatten() / std
    count = z.numel()
    assert abs(z.mean().item()) < SIGMAS * math.sqrt(1 / count)
    assert abs(z.square().mean().item() - 1) < SIGMAS * math.sqrt(2 / count)
    assert abs(z.pow(4).mean().item() - 3) < SIGMAS * math.sqrt(96 / count)


@pytest.mark.parametrize("stride", [(64, 64), (16, 32)], ids=["tiling", "overlapping"])
@pytest.mark.parametrize("kernels", ["shared", "per_rank"])
@pytest.mark.parametrize("init", ["paper", "zero", "balanced"])
def test_factors_are_normal_with_the_derived_variances(init, kernels, stride):
    """`"paper"`: N(0, 0.02^2), as the code published with arXiv 2503.01419 draws them.

    `"zero"` passes the input on at its own size: Var(U) = I Var(A) and Var(V) = d_in Var(C) Var(U),
    of which an output adds d_out / s_out. `"balanced"`: the variance of LoRA's A, which is uniform
    on +-1 / sqrt(n).
    """
    n = 16384
    layer = _adapter(n, 8192, rank=4, kernel_size=64, stride=stride, init=init, kernels=kernels)
    std_A, std_C = {
        "paper": (0.02, 0.02),
        "zero": (layer.dcft_A.shape[1] ** -0.5, (stride[0] / (64 * 64)) ** 0.5),
        "balanced": ((3 * n) ** -0.5, (3 * n) ** -0.5),
    }[init]
    _assert_normal(layer.dcft_A, std_A)
    _assert_normal(layer.dcft_C, std_C)
    if init == "paper":
        _assert_normal(layer.dcft_B, 0.02)


@pytest.mark.parametrize("stride", [None, 3])
@pytest.mark.parametrize("init", ["balanced", "zero"])
def test_a_zero_start_has_no_increment_at_all(init, stride):
    layer = _adapter(37, 21, rank=2, stride=stride, alpha=64.0, init=init)
    assert torch.count_nonzero(layer.delta_weight()) == 0
    assert torch.count_nonzero(layer.dcft_A) == layer.dcft_A.numel()
    assert torch.count_nonzero(layer.dcft_C) == layer.dcft_C.numel()


def _swapped(**options: Any) -> DCFTLinear:
    model = nn.Sequential(nn.Linear(16, 16))
    swap_linear(model, **options)
    return model[0]


@pytest.mark.parametrize("make", [lambda **options: DCFTLinear(16, 16, **options), _swapped])
def test_balanced_is_the_default_and_alpha_replaces_its_scaling(make):
    def drawn(**options: Any) -> DCFTLinear:
        torch.manual_seed(1)
        return make(rank=2, **options)

    default, balanced, given = drawn(), drawn(init="balanced"), drawn(alpha=4.0)
    for name in FACTORS:
        assert torch.equal(getattr(default, name), getattr(balanced, name))
        assert torch.equal(getattr(default, name), getattr(given, name))
    assert default.init == "balanced"
    assert default.scaling == balanced.scaling > 2.0
    assert given.scaling == 2.0


@pytest.mark.parametrize(
    ("n", "m", "options"),
    [
        (64, 64, {}),
        (256, 48, {}),
        (48, 256, {"kernel_size": 2}),
        (64, 48, {"kernel_size": (4, 16)}),
        (64, 64, {"rank": 4}),
        (64, 64, {"rank": 4, "kernels": "per_rank"}),
        (64, 64, {"stride": (8, 2)}),
        (75, 61, {"kernel_size": (6, 8), "stride": (3, 4), "rank": 3}),  # ragged and overlapping
    ],
    ids=str,
)
def test_balanced_scaling_is_the_derived_one(n, m, options):
    """`n s_out sqrt(3 / (k I d_in d_out)) / s_out^(1/4)`; `sqrt(3 n / k) d_out^(1/4)` if tiling."""
    layer = _adapter(n, m, **options)
    (d_out, d_in), (s_out, _) = layer.kernel_size, layer.stride
    k, I = layer.dcft_A.shape  # noqa: E741
    expected = n * s_out * math.sqrt(3 / (k * I * d_in * d_out)) / s_out**0.25
    assert layer.scaling == pytest.approx(expected, rel=1e-12)
    if layer.stride == layer.kernel_size and n % d_in == 0:
        assert layer.scaling == pytest.approx(math.sqrt(3 * n / k) * d_out**0.25, rel=1e-12)
