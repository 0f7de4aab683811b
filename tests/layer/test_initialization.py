"""How fresh adapters are drawn, against what `dcft_kernels.initialization` promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dcft_kernels import DCFTLinear, swap_linear

FACTORS = ("dcft_A", "dcft_B", "dcft_C")
# How many standard errors a sample may be off: by chance once in millions of runs, and seeds are
# fixed.
SIGMAS = 5.0


def _meta_based(in_features: int, out_features: int, **options) -> DCFTLinear:
    """Adapter only: the base, which these tests never read, is drawn on no device."""
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


@pytest.mark.parametrize("kernel_size", [4, (64, 16)])
def test_paper_init_is_the_published_one(kernel_size):
    """A, B, C from N(0, 0.02^2), as the code published with arXiv 2503.01419 draws them."""
    layer = _meta_based(4096, 8192, rank=8, kernel_size=kernel_size, init="paper")
    assert min(layer.dcft_A.numel(), layer.dcft_B.numel()) >= 1024
    _assert_normal(layer.dcft_A, 0.02)
    _assert_normal(layer.dcft_B, 0.02)
    _assert_normal(layer.dcft_C, 0.02)


def _swapped(**options) -> DCFTLinear:
    model = nn.Sequential(nn.Linear(16, 16))
    swap_linear(model, **options)
    return model[0]


@pytest.mark.parametrize("make", [lambda **options: DCFTLinear(16, 16, **options), _swapped])
def test_balanced_is_the_default(make):
    torch.manual_seed(1)
    default = make()
    torch.manual_seed(1)
    balanced = make(init="balanced")
    assert all(torch.equal(getattr(default, name), getattr(balanced, name)) for name in FACTORS)
    assert default.init == "balanced"
    assert default.scaling == balanced.scaling > 1.0


BALANCED = [
    (64, 64, {}),
    (64, 64, {"kernel_size": 2}),
    (256, 48, {}),
    (48, 256, {}),
    (50, 37, {}),
    (64, 64, {"rank": 4}),
    (64, 48, {"kernel_size": (4, 16)}),
    (64, 48, {"kernel_size": (16, 4)}),
    (64, 64, {"stride": 4}),
    (64, 64, {"stride": 1}),
    (64, 64, {"stride": (8, 2)}),
    (64, 64, {"stride": (2, 8), "rank": 2}),
    (75, 61, {"kernel_size": (6, 8), "stride": (3, 4), "rank": 3}),
]


@pytest.mark.parametrize(("n", "m", "options"), BALANCED, ids=str)
def test_balanced_init_draws_the_input_side_as_lora_does(n, m, options):
    """A and C with the variance of LoRA's A, uniform on +-1 / sqrt(n); B zero, and DW with it."""
    layer = _meta_based(n, m, init="balanced", **options)
    lora_std = torch.empty(100_000).uniform_(-(n**-0.5), n**-0.5).std().item()
    draws: dict[str, list[Tensor]] = {"dcft_A": [], "dcft_C": []}
    for _ in range(200):
        layer.reset_dcft_parameters()
        for name, drawn in draws.items():
            drawn.append(getattr(layer, name).detach().flatten().clone())
        assert torch.count_nonzero(layer.dcft_B) == 0
    assert torch.count_nonzero(layer.delta_weight()) == 0
    for drawn in draws.values():
        sample = torch.cat(drawn)
        assert sample.std().item() == pytest.approx(lora_std, rel=0.1)
        _assert_normal(sample, 1 / math.sqrt(3 * n))


class _LoRA(nn.Module):
    """`DW = B A / sqrt(k)` as `peft` starts it, with rsLoRA's scaling."""

    def __init__(self, n: int, m: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, n).uniform_(-(n**-0.5), n**-0.5))
        self.B = nn.Parameter(torch.zeros(m, rank))

    def delta_weight(self) -> Tensor:
        return self.B @ self.A / math.sqrt(self.B.shape[1])


def _first_step(adapter: nn.Module, gradient: Tensor, rate: float = 1e-3) -> tuple[float, float]:
    """How much Adam's first step lowers a loss of which `gradient` is that of the dense weight, and
    the root mean square of an output's move, for inputs of variance one."""
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(2):
        loss = (adapter.delta_weight() * gradient).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = adapter.delta_weight().detach().square().sum(1)
    return losses[0] - losses[1], rows.mean().sqrt().item()


def _first_steps_over_loras(n: int, m: int, draws: int, **options) -> tuple[Tensor, Tensor]:
    """Mean of DCFT's first steps, loss and output, over that of LoRA's; and its standard errors."""
    layer = _meta_based(n, m, **options)
    ours, loras = [], []
    for _ in range(draws):
        layer.reset_dcft_parameters()
        gradient = torch.randn(m, n)
        ours.append(_first_step(layer, gradient))
        loras.append(_first_step(_LoRA(n, m, layer.rank), gradient))
    mine, theirs = torch.tensor(ours).double(), torch.tensor(loras).double()
    return mine.mean(0) / theirs.mean(0), mine.std(0) / theirs.mean(0) / math.sqrt(draws)


@pytest.mark.parametrize(("n", "m", "options"), BALANCED, ids=str)
def test_balanced_first_steps_are_midway_between_loras_loss_and_loras_move(n, m, options):
    """`s_out^(1/4)` less of the loss than LoRA, and `s_out^(1/4)` more of a move of the outputs.

    Not exactly: the scaling is derived for factors of many entries. A gradient's entries are as
    large as the norms of A and C, and the mean norm of N entries is less than the root of their
    mean square, by a part of 1 / (4 N). At the ends there are windows more or fewer than the sizes
    over the strides. Up to 15 % of the loss and a fifth of the move for layers as small as these.
    """
    layer = DCFTLinear(n, m, **options)
    between = layer.geometry.outputs.stride**0.25
    (loss, move), (loss_error, move_error) = _first_steps_over_loras(n, m, 200, **options)
    assert loss_error.item() * between < 0.04
    assert move_error.item() / between < 0.04
    assert 0.85 < loss.item() * between < 1.1
    assert 0.8 < move.item() / between < 1.1


def test_balanced_first_steps_change_with_a_fourth_root_of_the_kernel_size():
    def means(draws: int, *kernel_sizes: int, **options) -> dict[int, float]:
        return {
            d: _first_steps_over_loras(256, 192, draws, kernel_size=d, **options)[0][0].item()
            for d in kernel_sizes
        }

    derived = [mean * d**0.25 for d, mean in means(150, 2, 4, 8, 16).items()]
    constant = means(30, 2, 16, alpha=1.0).values()
    assert max(derived) < 1.15 * min(derived)
    assert max(constant) > 2 * min(constant), "it is the scaling that sees to it"


def test_under_adam_a_rate_for_a_factor_is_another_std_and_scaling():
    """`lambda` times the rate for C is C / lambda at the common rate, with `lambda` times s."""
    factor_rate, rate, inputs = 4.0, 1e-3, torch.randn(16, 32, dtype=torch.float64)
    outputs = []
    for own_rate in (True, False):
        torch.manual_seed(3)
        layer = DCFTLinear(32, 24, dtype=torch.float64)
        if not own_rate:
            layer.dcft_C.data /= factor_rate
            layer.alpha = factor_rate * layer.scaling
        others = [layer.dcft_A, layer.dcft_B]
        groups = [
            {"params": others, "lr": rate},
            {"params": [layer.dcft_C], "lr": rate * (factor_rate if own_rate else 1.0)},
        ]
        optimizer = torch.optim.Adam(groups, eps=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            # An offset: no gradient is zero, whose 0 / sqrt(0) would be NaN without `eps`.
            (layer(inputs) - 1.0).square().sum().backward()
            if optimizer.state == {}:
                for factor in (layer.dcft_A, layer.dcft_C):
                    factor.grad = None  # B is zero: they have no gradient yet
            optimizer.step()
        outputs.append(layer(inputs).detach())
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert (outputs[0] - inputs @ layer.weight.t() - layer.bias).abs().max() > 1e-2


def test_a_given_alpha_takes_the_place_of_the_derived_scaling():
    torch.manual_seed(1)
    derived = DCFTLinear(16, 16, rank=2)
    torch.manual_seed(1)
    given = DCFTLinear(16, 16, rank=2, alpha=4.0)
    assert given.scaling == 2.0
    assert derived.scaling != 2.0
    assert all(torch.equal(getattr(given, name), getattr(derived, name)) for name in FACTORS)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("stride", [None, 3])
def test_zero_init_has_no_increment_at_all(backend, stride):
    layer = DCFTLinear(37, 21, rank=2, stride=stride, alpha=64.0, init="zero", backend=backend)
    assert torch.count_nonzero(layer.delta_weight()) == 0
    assert torch.count_nonzero(layer.dcft_A) == layer.dcft_A.numel()
    assert torch.count_nonzero(layer.dcft_C) == layer.dcft_C.numel()


def test_zero_init_draws_normal_factors():
    layer = _meta_based(16384, 16384, rank=4, kernel_size=64, init="zero")
    _assert_normal(layer.dcft_A, math.sqrt(1 / 256))
    _assert_normal(layer.dcft_C, math.sqrt(1 / 64))


@pytest.mark.parametrize(
    ("n", "m", "options"),
    [
        (64, 64, {}),
        (768, 64, {}),
        (64, 3072, {}),
        (64, 64, {"kernel_size": 2}),
        (96, 96, {"kernel_size": 16}),
        (64, 64, {"rank": 4}),
        (64, 48, {"kernel_size": (4, 16)}),
        (64, 48, {"kernel_size": (16, 4)}),
        (64, 64, {"stride": 4}),
        (64, 64, {"stride": 1}),
        (64, 64, {"stride": (8, 2)}),
        (64, 64, {"stride": (2, 8), "rank": 2}),
        (72, 60, {"kernel_size": (6, 8), "stride": (3, 4)}),
    ],
    ids=str,
)
def test_zero_init_passes_the_input_on_at_its_own_size(n, m, options):
    """Var(V) = Var(x), or its share of an output that overlapping windows add up to."""
    d_out, d_in = _pair(options.get("kernel_size", 8))
    s_out, s_in = _pair(options.get("stride") or (d_out, d_in))
    input_std, tokens = 3.0, 32
    gains = []
    layer = _meta_based(n, m, init="zero", **options)
    for _ in range(300):
        layer.reset_dcft_parameters()
        x = input_std * torch.randn(tokens, n)
        windows = x.unfold(1, d_in, s_in)  # [T, I, d_in]
        U = torch.einsum("tip,ki->tpk", windows, layer.dcft_A.detach())
        V = torch.einsum("qp,tpk->tqk", layer.dcft_C.detach(), U)
        gains.append(V.square().mean().item() / input_std**2)
    found = torch.tensor(gains, dtype=torch.float64)
    expected = s_out / d_out
    standard_error = found.std().item() / math.sqrt(len(gains))
    assert standard_error < 0.1 * expected  # sharp enough to tell a wrong variance
    assert abs(found.mean().item() - expected) < SIGMAS * standard_error


@pytest.mark.parametrize("overlap", [{}, {"stride": 4}, {"stride": 1}, {"kernel_size": 2}], ids=str)
@pytest.mark.parametrize(("n", "m"), [(64, 64), (256, 64), (64, 256)])
def test_a_step_in_B_moves_outputs_alike(n, m, overlap):
    """A step of h in every entry of B changes an output by about h sqrt(v), whatever the shape."""
    layer = _meta_based(n, m, init="zero", **overlap)
    h, changes = 0.01, []
    inner = slice(8, m - 8)  # at the ends fewer windows overlap
    for _ in range(300):
        layer.reset_dcft_parameters()
        with torch.no_grad():
            layer.dcft_B.fill_(h)
        # Each input of variance 1 adds the square of its entry in DW.
        rows = layer.delta_weight().detach().double().square().sum(1)
        changes.append(rows[inner].mean().item() / h**2)
    found = torch.tensor(changes, dtype=torch.float64)
    standard_error = found.std().item() / math.sqrt(len(changes))
    assert standard_error < 0.15
    assert abs(found.mean().item() - 1.0) < SIGMAS * standard_error


def _teacher_loss(init: str, steps: int, lr: float, **options) -> tuple[float, float]:
    """Loss before and after learning a random DCFT increment of the size of the base weight."""
    base = nn.Linear(32, 24)
    teacher = DCFTLinear.from_linear(base, kernel_size=8, init="paper", **options)
    with torch.no_grad():
        for name in FACTORS:
            getattr(teacher, name).normal_(0.0, 0.6)
    student = DCFTLinear.from_linear(base, kernel_size=8, init=init, **options)
    torch.manual_seed(5)  # whatever the student has drawn, the same inputs
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 32)
        loss = (student(x) - teacher(x).detach()).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"stride": 4}], ids=str)
def test_zero_init_learns_a_teacher(options):
    first, last = _teacher_loss("zero", 250, 0.03, **options)
    assert first > 0.01
    assert last < 0.01 * first


# Without overlap: with it, several entries of C share an output, and "paper" can be as quick.
@pytest.mark.parametrize("options", [{}, {"rank": 2}], ids=str)
def test_balanced_init_learns_sooner_at_a_rate_of_loras(options):
    losses = {}
    for init in ("balanced", "zero", "paper"):
        torch.manual_seed(0)
        first, losses[init] = _teacher_loss(init, 250, 2e-3, **options)
        assert first > 0.1
    assert losses["balanced"] < 0.3 * losses["paper"]
    assert losses["balanced"] < 0.3 * losses["zero"]


def test_first_gradients_are_as_large_as_the_input_makes_them():
    """At zero, gB = g^T V with V as large as x; the paper's holds two factors of 0.02 more."""
    sizes = {}
    for init in ("zero", "paper"):
        torch.manual_seed(4)
        layer = _meta_based(256, 256, init=init)
        x = torch.randn(64, 256)
        change = x @ layer.delta_weight().t()
        (change * torch.randn(64, 256)).sum().backward()
        sizes[init] = {name: getattr(layer, name).grad.norm().item() for name in FACTORS}
    assert sizes["zero"]["dcft_A"] == sizes["zero"]["dcft_C"] == 0.0
    assert sizes["zero"]["dcft_B"] > 50 * max(sizes["paper"].values())


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
