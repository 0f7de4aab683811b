"""Merging a layer, and `add_delta_weight_`: exact, reversible, rounded once or stochastically."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from dcft_kernels import DCFTLinear, add_delta_weight_, delta_weight
from dcft_kernels.rounding import store
from tests.adapter_cases import any_case, random_inputs
from tests.model_snapshot import ModelSnapshot

FACTORS = ("dcft_A", "dcft_B", "dcft_C")
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
backends = pytest.mark.parametrize("backend", ["torch", "reference"])
sixteen_bits = pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bf16", "fp16"])


def _randomized(layer: DCFTLinear, std: float = 0.5) -> DCFTLinear:
    for name in FACTORS:
        nn.init.normal_(getattr(layer, name), 0.0, std)
    return layer


@pytest.fixture
def layer() -> DCFTLinear:
    return _randomized(DCFTLinear(20, 13, rank=2, kernel_size=(4, 8), alpha=3.0, init="paper"))


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Half a unit in the last place; before that, an entry of DW sums up to 5 * 144 products of
    standard normals in float32 or wider."""
    slack = 1e-12 if found.dtype == torch.float64 else 2e-4
    tolerance = exact.abs() * torch.finfo(found.dtype).eps / 2 + slack
    error = (found.double() - exact).abs()
    assert bool((error <= tolerance).all()), (error - tolerance).max()


@given(
    case=any_case(),
    dtype=st.sampled_from([torch.float64, torch.float32, *SIXTEEN_BITS]),
    seed=st.integers(0, 2**31),
)
def test_merge_adds_the_increment_and_unmerge_restores_the_bits(case, dtype, seed):
    torch.manual_seed(seed)
    options = {"rank": case.rank, "kernel_size": case.kernel_size, "stride": case.stride}
    sizes = {"in_features": case.in_features, "out_features": case.out_features}
    layer = _randomized(DCFTLinear(**sizes, **options, alpha=3.0, dropout=0.1, dtype=dtype), 1.0)
    x = torch.randn(3, case.in_features, dtype=dtype)
    base, bits = layer.weight, layer.weight.detach().clone()
    unmerged = layer.eval()(x)
    wide = [getattr(layer, name).detach().double() for name in FACTORS]
    DW = delta_weight(*wide, **sizes, stride=case.stride, scaling=3.0 / case.rank)

    layer.merge()

    assert layer.merged
    assert not layer.weight.requires_grad
    assert_rounded_once(layer.weight, bits.double() + DW)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    if dtype == torch.float64:
        torch.testing.assert_close(layer(x), unmerged, rtol=1e-10, atol=1e-10)
    layer.unmerge()
    assert not layer.merged
    assert layer.weight is base
    assert torch.equal(base, bits)
    assert torch.equal(layer(x), unmerged)


@backends
def test_merging_repeats_and_autocast_makes_no_difference(layer, backend):
    """Evaluation often runs under autocast; the merged weight is not an activation."""
    layer.backend = backend
    layer.merge()
    expected = layer.weight.detach().clone()
    layer.unmerge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.merge()
    assert torch.equal(layer.weight, expected)


def test_to_linear(layer):
    layer.eval()
    x = torch.randn(3, 20)
    before = layer.weight.detach().clone()
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert repr(plain) == repr(nn.Linear(20, 13))
    assert plain.training is False
    assert set(dict(plain.named_parameters())) == {"weight", "bias"}
    assert plain.bias is layer.bias
    assert not layer.merged
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    layer.merge()
    again = layer.to_linear()
    assert torch.equal(again.weight, plain.weight)
    assert torch.equal(again(x), layer(x))
    nn.init.zeros_(again.weight)
    assert layer.weight.abs().max() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("operation", ["merge", "to_linear"])
def test_a_diverged_adapter_does_not_reach_the_base(layer, operation, bad):
    with torch.no_grad():
        layer.dcft_C[0, 0] = bad
    snapshot = ModelSnapshot(layer)
    with pytest.raises(ValueError, match=r"^merge: base plus increment is not finite.*nothing was"):
        getattr(layer, operation)()
    snapshot.assert_unchanged()


def test_a_merge_that_overflows_the_base_dtype_is_refused():
    layer = DCFTLinear(8, 8, init="paper", dtype=torch.float16, adapter_dtype=torch.float32)
    for name in FACTORS:
        nn.init.constant_(getattr(layer, name), 300.0)
    snapshot = ModelSnapshot(layer)
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        layer.merge()
    snapshot.assert_unchanged()


def _shard(layer: nn.Module) -> None:
    """As FSDP with flat parameters and DeepSpeed's ZeRO-3 leave a weight between passes."""
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


COMPUTED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "weight_norm": nn.utils.weight_norm,
    "parametrized": nn.utils.parametrizations.weight_norm,
    "sharded": _shard,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("action", ["merge", "to_linear"])
@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
def test_a_computed_or_sharded_weight_is_not_merged(layer, change, action):
    """Merging replaced a weight that hooks then could not set: the layer was broken for good."""
    change(layer)
    snapshot = ModelSnapshot(layer)
    text = rf"^{action}: expected weight to be an nn\.Parameter of shape \[13, 20\].*prune\.remove"
    with pytest.raises(ValueError, match=text):
        getattr(layer, action)()
    snapshot.assert_unchanged()


def test_a_pruned_bias_is_refused_by_to_linear_only(layer):
    prune.l1_unstructured(layer, "bias", 0.3)
    with pytest.raises(ValueError, match=r"^to_linear: expected bias to be .* of shape \[13\]"):
        layer.to_linear()
    layer.merge()


def test_a_layer_pruned_while_merged_unmerges_after_remove(layer):
    base = layer.weight
    layer.merge()
    prune.l1_unstructured(layer, "weight", 0.3)
    with pytest.raises(ValueError, match=r"^unmerge: expected weight to be an nn\.Parameter"):
        layer.unmerge()
    prune.remove(layer, "weight")
    layer.unmerge()
    assert layer.weight is base


def _around_accesses(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Run `action` around reads of `weight` and after assignments, as another thread might."""
    busy = False

    def run() -> None:
        nonlocal busy
        if not busy:
            busy = True
            action()
            busy = False

    def read(self: DCFTLinear, name: str) -> object:
        if name != "weight":
            return nn.Module.__getattr__(self, name)
        run()
        value = nn.Module.__getattr__(self, name)
        run()
        return value

    def assign(self: DCFTLinear, name: str, value: object) -> None:
        nn.Module.__setattr__(self, name, value)
        run()

    monkeypatch.setattr(DCFTLinear, "__getattr__", read, raising=False)
    monkeypatch.setattr(DCFTLinear, "__setattr__", assign, raising=False)


def _results(layer: DCFTLinear) -> tuple[Tensor, Tensor]:
    """An output, which merging changes by rounding only, and the base weight."""
    return layer(torch.ones(2, 20)), layer.state_dict()["weight"].clone()


@pytest.mark.filterwarnings("ignore:the state dict of a merged DCFTLinear")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("moment", range(6))
def test_a_layer_may_be_merged_while_it_is_used(layer, monkeypatch, merged, moment):
    expected, moments = _results(layer), itertools.count()
    if merged:
        layer.merge()
    switch = layer.unmerge if merged else layer.merge
    _around_accesses(monkeypatch, lambda: switch() if next(moments) == moment else None)
    torch.testing.assert_close(_results(layer), expected)
    assert layer.merged is not merged


@pytest.mark.filterwarnings("ignore:the state dict of a merged DCFTLinear")
def test_a_layer_may_be_used_while_it_is_merged(layer, monkeypatch):
    expected, found = _results(layer), []
    _around_accesses(monkeypatch, lambda: found.append(_results(layer)))
    layer.merge()
    layer.unmerge()
    assert len(found) > 4
    for results in found:
        torch.testing.assert_close(results, expected)


def test_training_a_merged_layer_warns(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.train() is layer
        layer.merge()
        assert layer.eval() is layer
    with pytest.warns(UserWarning, match=r"merged DCFTLinear is set to train.*until unmerge\(\)"):
        layer.train()
    assert layer.training


@given(
    case=any_case(),
    dtype=st.sampled_from([torch.float64, torch.float32, *SIXTEEN_BITS]),
    backend=st.sampled_from(["torch", "reference"]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_adds_in_place_and_rounds_once(case, dtype, backend, transposed, seed):
    inputs = random_inputs(case, (1,), dtype, seed=seed)
    before, factors = inputs.weight, (inputs.A, inputs.B, inputs.C)
    sizes = {"in_features": case.in_features, "out_features": case.out_features}
    options = {"stride": case.stride, "scaling": 0.7, "backend": backend}
    DW = delta_weight(*(factor.double() for factor in factors), **sizes, **options)
    stored = nn.Parameter((before.t().contiguous().t() if transposed else before).clone())
    assert add_delta_weight_(stored, *factors, **options) is stored
    assert_rounded_once(stored, before.double() + DW)
    assert stored.grad_fn is None


@backends
@sixteen_bits
def test_small_increments_arrive_in_the_mean(dtype, backend):
    """A tenth of a unit in the last place, a hundred times: nearest drops all of it."""
    weight = torch.ones(64, 64, dtype=dtype)
    tenth = torch.finfo(dtype).eps / 10
    factors = (torch.ones(1, 8), torch.full((8, 1), tenth), torch.ones(8, 8))
    nearest, stochastic = weight.clone(), weight.clone()
    for _ in range(100):
        add_delta_weight_(nearest, *factors, backend=backend)
        add_delta_weight_(stochastic, *factors, stochastic_rounding=True, backend=backend)
    assert torch.equal(nearest, weight)
    arrived = float((stochastic.double() - 1).mean()) / (100 * tenth)
    # Each step is a coin that lands on a unit one time in ten; five standard deviations.
    assert abs(arrived - 1) < 5 * (0.1 * 0.9 * 100 / weight.numel()) ** 0.5 / 10


@sixteen_bits
def test_stochastic_rounding_is_to_a_neighbour(dtype):
    scales = torch.tensor([1e-7, 1e-5, 1e-3, 1.0, 100.0]).repeat_interleave(200)
    values, seed = torch.randn(1000) * scales, torch.tensor(5)

    def stored() -> Tensor:
        out = torch.empty(1000, dtype=dtype)
        store(values, out, seed)
        return out

    out, nearest = stored(), values.to(dtype)
    inf = torch.tensor(float("inf"), dtype=dtype)
    below = torch.where(nearest.float() > values, torch.nextafter(nearest, -inf), nearest)
    above = torch.where(nearest.float() < values, torch.nextafter(nearest, inf), nearest)
    assert bool(((out == below) | (out == above)).all())
    assert not torch.equal(out, nearest)
    assert torch.equal(stored(), out)


@sixteen_bits
def test_stochastic_rounding_leaves_exact_and_non_finite_values(dtype):
    least = torch.finfo(dtype).smallest_normal
    beyond = 1e38 if dtype is torch.float16 else 3.4e38
    exact = [0.0, 1.0, -1.5, 2.0**-14, least, -least, torch.finfo(dtype).max]
    values = torch.tensor([*exact, math.inf, -math.inf, math.nan, beyond])
    for seed in range(20):
        out = torch.empty(len(values), dtype=dtype)
        store(values, out, torch.tensor(seed))
        torch.testing.assert_close(out, values.to(dtype), equal_nan=True, rtol=0, atol=0)
