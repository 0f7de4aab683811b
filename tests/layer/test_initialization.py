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


def test_paper_init_is_the_published_one():
    """A, B, C from N(0, 0.02^2), as the code published with arXiv 2503.01419 draws them."""
    layer = _adapter(4096, 8192, rank=8, kernel_size=(64, 16), init="paper")
    for name in FACTORS:
        _assert_normal(getattr(layer, name), 0.02)


@pytest.mark.parametrize("stride", [(64, 64), (16, 32)], ids=["tiling", "overlapping"])
def test_zero_init_passes_the_input_on_at_its_own_size(stride):
    """Var(U) = I Var(A) and Var(V) = d_in Var(C) Var(U), of which an output adds d_out / s_out."""
    layer = _adapter(16384, 8192, rank=4, kernel_size=64, stride=stride, init="zero")
    _assert_normal(layer.dcft_A, math.sqrt(1 / layer.dcft_A.shape[1]))
    _assert_normal(layer.dcft_C, math.sqrt(stride[0] / (64 * 64)))


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


BALANCED = [
    (64, 64, {}),
    (256, 48, {}),
    (48, 256, {"kernel_size": 2}),
    (64, 48, {"kernel_size": (4, 16)}),
    (64, 64, {"rank": 4}),
    (64, 64, {"stride": (8, 2)}),
    (75, 61, {"kernel_size": (6, 8), "stride": (3, 4), "rank": 3}),  # ragged and overlapping
]
every_geometry = pytest.mark.parametrize(("n", "m", "options"), BALANCED, ids=str)


@every_geometry
def test_balanced_scaling_is_the_derived_one(n, m, options):
    """`n s_out sqrt(3 / (k I d_in d_out)) / s_out^(1/4)`; `sqrt(3 n / k) d_out^(1/4)` if tiling."""
    layer = _adapter(n, m, **options)
    (d_out, d_in), (s_out, _) = layer.kernel_size, layer.stride
    k, I = layer.dcft_A.shape  # noqa: E741
    expected = n * s_out * math.sqrt(3 / (k * I * d_in * d_out)) / s_out**0.25
    assert layer.scaling == pytest.approx(expected, rel=1e-12)
    if layer.stride == layer.kernel_size and n % d_in == 0:
        assert layer.scaling == pytest.approx(math.sqrt(3 * n / k) * d_out**0.25, rel=1e-12)


@every_geometry
def test_balanced_draws_the_input_side_as_lora_does(n, m, options):
    """A and C with the variance of LoRA's A, which is uniform on +-1 / sqrt(n)."""
    layer = _adapter(n, m, **options)
    draws: dict[str, list[Tensor]] = {"dcft_A": [], "dcft_C": []}
    for _ in range(200):
        layer.reset_dcft_parameters()
        for name, drawn in draws.items():
            drawn.append(getattr(layer, name).detach().flatten().clone())
    for drawn in draws.values():
        _assert_normal(torch.cat(drawn), 1 / math.sqrt(3 * n))


class _LoRA(nn.Module):
    """`DW = B A / sqrt(k)` as `peft` starts it, with rsLoRA's scaling."""

    def __init__(self, n: int, m: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, n).uniform_(-(n**-0.5), n**-0.5))
        self.B = nn.Parameter(torch.zeros(m, rank))

    def delta_weight(self) -> Tensor:
        return self.B @ self.A / math.sqrt(self.B.shape[1])


def _first_step(adapter: nn.Module, gradient: Tensor, rate: float = 1e-3) -> tuple[float, float]:
    """What Adam's first step does: how far it lowers the loss with this dense `gradient`, and the
    root mean square of an output's move, for inputs of variance one."""
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], rate)
    optimizer.zero_grad()
    loss = (adapter.delta_weight() * gradient).sum()
    loss.backward()
    optimizer.step()
    DW = adapter.delta_weight().detach()
    return loss.item() - (DW * gradient).sum().item(), DW.square().sum(1).mean().sqrt().item()


@every_geometry
def test_balanced_first_steps_are_midway_between_loras(n, m, options):
    """`s_out^(1/4)` less of the loss than LoRA, and `s_out^(1/4)` more of a move of the outputs.

    Not exactly: the scaling is derived for factors of many entries. A gradient's entries are as
    large as the norms of A and C, and the mean norm of N entries is less than the root of their
    mean square by a part of 1 / (4 N); at the ends, windows are more or fewer than size / stride.
    For layers this small, that is up to 15 % of the loss and a fifth of the move.
    """
    layer = _adapter(n, m, **options)
    draws, ours, loras = 200, [], []
    for _ in range(draws):
        layer.reset_dcft_parameters()
        gradient = torch.randn(m, n)
        ours.append(_first_step(layer, gradient))
        loras.append(_first_step(_LoRA(n, m, layer.rank), gradient))
    mine, theirs = torch.tensor(ours).double(), torch.tensor(loras).double()
    loss, move = (mine.mean(0) / theirs.mean(0)).tolist()
    loss_error, move_error = (mine.std(0) / theirs.mean(0) / math.sqrt(draws)).tolist()
    between = layer.stride[0] ** 0.25
    assert max(loss_error * between, move_error / between) < 0.04
    assert 0.85 < loss * between < 1.1
    assert 0.8 < move / between < 1.1
