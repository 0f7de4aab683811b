"""`DCFTLinear` as a module: construction, merging, state dicts, modes, hooks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dcft_kernels import DCFTLinear, delta_weight
from tests.model_snapshot import ModelSnapshot

FACTORS = ("dcft_A", "dcft_B", "dcft_C")


def _randomized(layer: DCFTLinear, std: float = 0.5) -> DCFTLinear:
    with torch.no_grad():
        for name in FACTORS:
            getattr(layer, name).normal_(0.0, std)
    return layer


def _kron(layer: DCFTLinear) -> Tensor:
    """`scaling * kron(B A, C)`, cropped: the increment of a layer without overlap."""
    full = torch.kron(layer.dcft_B @ layer.dcft_A, layer.dcft_C)
    return layer.scaling * full[: layer.out_features, : layer.in_features]


@pytest.fixture
def layer() -> DCFTLinear:
    return _randomized(DCFTLinear(20, 13, rank=2, kernel_size=(4, 8), alpha=3.0, init="paper"))


def test_is_a_linear_with_three_factors_beside(layer):
    assert isinstance(layer, nn.Linear)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "weight": (13, 20),
        "bias": (13,),
        "dcft_A": (2, 3),
        "dcft_B": (4, 2),
        "dcft_C": (4, 8),
    }
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == set(FACTORS)


def test_positional_arguments_are_those_of_linear():
    layer = DCFTLinear(8, 4, False)
    assert layer.bias is None
    assert layer.weight.shape == (4, 8)
    with pytest.raises(TypeError, match="positional"):
        DCFTLinear(8, 4, False, 2)


def test_base_is_drawn_as_linear_draws_it():
    torch.manual_seed(3)
    plain = nn.Linear(8, 4)
    torch.manual_seed(3)
    layer = DCFTLinear(8, 4)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize(
    ("init", "alpha", "rank", "scaling"),
    [
        ("paper", None, 1, 1.0),
        ("paper", None, 4, 1.0),
        ("paper", 32, 8, 4.0),
        ("zero", None, 3, 1.0),
        ("zero", 0.5, 2, 0.25),
        ("balanced", 32, 8, 4.0),
    ],
)
def test_scaling(init, alpha, rank, scaling):
    layer = _randomized(DCFTLinear(16, 8, rank=rank, alpha=alpha, init=init))
    assert layer.scaling == scaling
    plain = torch.kron(layer.dcft_B @ layer.dcft_A, layer.dcft_C)
    torch.testing.assert_close(layer.delta_weight(), scaling * plain)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "pairs"),
    [
        (8, None, ((8, 8), (8, 8))),
        ((2, 4), None, ((2, 4), (2, 4))),
        ([2, 4], [1, 3], ((2, 4), (1, 3))),
        (4, 2, ((4, 4), (2, 2))),
    ],
)
def test_kernel_size_and_stride_are_pairs(kernel_size, stride, pairs):
    layer = DCFTLinear(16, 16, kernel_size=kernel_size, stride=stride)
    assert (layer.kernel_size, layer.stride) == pairs
    assert tuple(layer.dcft_C.shape) == pairs[0]


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "expected"),
    [
        (None, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        # 16-bit parameters would lose small optimizer steps.
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("from_linear", [False, True], ids=["init", "from_linear"])
def test_adapter_dtype(from_linear, dtype, adapter_dtype, expected):
    if from_linear:
        base = nn.Linear(16, 8, dtype=dtype)
        layer = DCFTLinear.from_linear(base, adapter_dtype=adapter_dtype)
    else:
        layer = DCFTLinear(16, 8, dtype=dtype, adapter_dtype=adapter_dtype)
    assert {getattr(layer, name).dtype for name in FACTORS} == {expected}
    assert layer.weight.dtype == layer.bias.dtype == (dtype or torch.float32)
    x = torch.randn(2, 16, dtype=dtype)
    assert layer(x).dtype == x.dtype


def test_device_is_used_for_all_parameters():
    layer = DCFTLinear(16, 8, device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert all(
        parameter.is_meta
        for parameter in DCFTLinear.from_linear(nn.Linear(8, 8, device="meta")).parameters()
    )
    assert layer(torch.empty(3, 16, device="meta")).shape == (3, 8)


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_shares_the_base(bias):
    base = nn.Linear(20, 13, bias=bias)
    layer = DCFTLinear.from_linear(base, rank=2, kernel_size=4, init="zero")
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features, layer.rank) == (20, 13, 2)
    assert not base.weight.requires_grad
    assert bias is False or not base.bias.requires_grad
    x = torch.randn(3, 20)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        base.weight.mul_(2.0)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("training", [False, True])
def test_from_linear_keeps_the_mode(training):
    assert DCFTLinear.from_linear(nn.Linear(8, 8).train(training)).training is training


def test_from_linear_passes_every_option_on():
    options = {
        "rank": 3,
        "kernel_size": (2, 4),
        "stride": (1, 2),
        "alpha": 6.0,
        "dropout": 0.25,
        "init": "zero",
        "backend": "reference",
        "adapter_dtype": torch.float64,
    }
    layer = DCFTLinear.from_linear(nn.Linear(8, 8), **options)
    found = {name: getattr(layer, name) for name in options if name != "adapter_dtype"}
    assert found == {name: value for name, value in options.items() if name != "adapter_dtype"}
    assert layer.dcft_A.dtype == torch.float64
    assert (layer.scaling, layer.dcft_B.abs().max()) == (2.0, 0.0)


def test_conv1d():
    """GPT-2 stores its weight [in, out]; it stays so, and the increment is turned for merging."""
    base = Conv1D(13, 20)  # out, in
    nn.init.normal_(base.bias)
    layer = DCFTLinear.from_linear(base, kernel_size=4, init="zero")
    x = torch.randn(2, 5, 20)
    assert layer.weight is base.weight
    assert (layer.in_features, layer.out_features) == (20, 13)
    assert torch.equal(layer(x), base(x))

    _randomized(layer)
    expected = base(x) + x @ _kron(layer).t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer.weight, base.weight + _kron(layer).t())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    plain = layer.to_linear()
    assert type(plain) is Conv1D
    assert (plain.nx, plain.nf) == (20, 13)
    assert torch.equal(plain.weight, layer.weight)
    assert torch.equal(plain(x), layer(x))
    assert repr(plain) == repr(Conv1D(13, 20))


def test_forward_hooks_are_kept():
    base = nn.Linear(8, 8)
    seen = []
    base.register_forward_pre_hook(lambda _, args: seen.append("pre"))
    base.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append("pre with kwargs"), with_kwargs=True
    )
    base.register_forward_hook(lambda *_: seen.append("post"))
    base.register_forward_hook(lambda *_: seen.append("post with kwargs"), with_kwargs=True)
    layer = DCFTLinear.from_linear(base)
    layer(torch.randn(2, 8))
    assert seen == ["pre", "pre with kwargs", "post", "post with kwargs"]


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_are_kept(kind):
    base = nn.Linear(8, 8)
    seen = []
    getattr(base, kind)(lambda *_: seen.append(1))
    layer = DCFTLinear.from_linear(base)
    layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert seen == [1]


def test_a_kept_hook_can_be_removed():
    base = nn.Linear(8, 8)
    seen = []
    handle = base.register_forward_hook(lambda *_: seen.append(1))
    layer = DCFTLinear.from_linear(base)
    handle.remove()
    layer(torch.randn(2, 8))
    assert seen == []


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (0,), (2, 0, 3)])
def test_any_leading_dimensions(layer, leading):
    x = torch.randn(*leading, 20)
    expected = F.linear(x, layer.weight + _kron(layer), layer.bias)
    assert layer(x).shape == (*leading, 13)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_delta_weight_is_scaled_and_differentiable(layer):
    delta = layer.delta_weight()
    torch.testing.assert_close(delta, _kron(layer))
    expected = delta_weight(
        *(getattr(layer, name) for name in FACTORS),
        in_features=20,
        out_features=13,
        scaling=1.5,
    )
    assert torch.equal(delta, expected)
    delta.square().sum().backward()
    assert all(getattr(layer, name).grad.abs().max() > 0 for name in FACTORS)


def test_dropout_acts_in_training_on_the_adapter_alone():
    layer = _randomized(DCFTLinear(64, 16, dropout=0.5, init="paper"))
    x = torch.randn(4, 64)
    base = F.linear(x, layer.weight, layer.bias)
    evaluated = layer.eval()(x)
    torch.testing.assert_close(evaluated, base + x @ _kron(layer).t(), rtol=1e-5, atol=1e-5)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.dcft_B.zero_()
    assert torch.equal(layer(x), base)


def test_merge_and_unmerge(layer):
    base, x = layer.weight, torch.randn(3, 20)
    bits, unmerged = base.detach().clone(), layer(x)
    assert layer.merged is False

    layer.merge()

    assert layer.merged is True
    assert not layer.weight.requires_grad
    torch.testing.assert_close(layer.weight, bits + _kron(layer))
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), unmerged, rtol=1e-5, atol=1e-5)

    layer.unmerge()

    assert layer.merged is False
    assert layer.weight is base
    assert torch.equal(base, bits)
    assert torch.equal(layer(x), unmerged)


def test_unmerge_does_not_subtract():
    """Large increments would swallow the base's low bits: it must come back from a copy."""
    layer = _randomized(DCFTLinear(16, 16, init="paper", dtype=torch.bfloat16), std=30.0)
    bits = layer.weight.detach().clone()
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, bits)


def test_a_16_bit_merge_rounds_once():
    layer = _randomized(DCFTLinear(64, 64, init="paper", dtype=torch.bfloat16))
    exact = layer.weight.double() + torch.kron(
        layer.dcft_B.double() @ layer.dcft_A.double(), layer.dcft_C.double()
    )
    layer.merge()
    error = (layer.weight.double() - exact).abs()
    # Half a unit in the last place of 8 significant bits, and what float32 adds before.
    bound = exact.abs() * (2.0**-8 + 4 * 2.0**-24) + 4 * 2.0**-24
    assert bool((error <= bound).all()), (error - bound).max()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_merge_under_autocast_is_as_exact(layer, backend):
    """Evaluation often runs under autocast; the merged weight is no activation."""
    layer.backend = backend
    layer.merge()
    expected = layer.weight.detach().clone()
    layer.unmerge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.merge()
    assert torch.equal(layer.weight, expected)


def test_merging_is_repeatable(layer):
    layer.merge()
    first = layer.weight.detach().clone()
    layer.unmerge()
    layer.merge()
    assert torch.equal(layer.weight, first)


def test_to_linear(layer):
    layer.eval()
    x = torch.randn(3, 20)
    before = layer.weight.detach().clone()
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert (plain.in_features, plain.out_features, plain.training) == (20, 13, False)
    assert set(dict(plain.named_parameters())) == {"weight", "bias"}
    assert plain.bias is layer.bias
    assert layer.merged is False
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    layer.merge()
    again = layer.to_linear()
    assert torch.equal(again.weight, plain.weight)
    assert torch.equal(again(x), layer(x))
    assert repr(again) == repr(nn.Linear(20, 13))
    with torch.no_grad():
        again.weight.zero_()
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
    with torch.no_grad():
        for name in FACTORS:
            getattr(layer, name).fill_(300.0)
    snapshot = ModelSnapshot(layer)
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        layer.merge()
    snapshot.assert_unchanged()


def test_a_linears_state_dict_loads(layer):
    base = nn.Linear(20, 13)
    result = layer.load_state_dict(base.state_dict(), strict=False)
    assert set(result.missing_keys) == set(FACTORS)
    assert result.unexpected_keys == []
    assert torch.equal(layer.weight, base.weight)
    assert torch.equal(layer.bias, base.bias)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("keep_vars", [False, True])
def test_state_dict_does_not_depend_on_merging(layer, keep_vars):
    model = nn.Sequential(layer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer.merge()
    after = model.state_dict(keep_vars=keep_vars)
    assert list(after) == list(before) == ["0.weight", "0.bias", *(f"0.{f}" for f in FACTORS)]
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert isinstance(after["0.weight"], nn.Parameter) is keep_vars
    layer.unmerge()
    assert (after["0.weight"] is layer.weight) is keep_vars


@pytest.mark.parametrize("strict", [False, True])
def test_loading_into_a_merged_layer_is_an_error(layer, strict):
    model = nn.ModuleDict({"query": layer})
    saved = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    layer.merge()
    snapshot = ModelSnapshot(model)
    with pytest.raises(RuntimeError, match=r"query is merged: call unmerge\(\) before loading"):
        model.load_state_dict(saved, strict=strict)
    snapshot.assert_unchanged()
    with pytest.raises(RuntimeError, match=r"DCFTLinear is merged: call unmerge\(\)"):
        layer.load_state_dict(layer.state_dict())
    layer.unmerge()
    model.load_state_dict(saved)
    assert torch.equal(layer.dcft_A, torch.ones(2, 3))


def test_loading_by_assignment(layer):
    saved = {key: torch.ones_like(value) for key, value in layer.state_dict().items()}
    layer.load_state_dict(saved, assign=True)
    assert layer.weight.data_ptr() == saved["weight"].data_ptr()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(FACTORS)


def test_training_a_merged_layer_warns(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.train() is layer
        layer.merge()
        assert layer.eval() is layer
    with pytest.warns(UserWarning, match=r"merged DCFTLinear is set to train.*until unmerge\(\)"):
        layer.train()
    assert layer.training


@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_moves_between_dtypes_with_its_base(layer, merged):
    base = layer.weight.detach().clone()
    if merged:
        layer.merge()
    layer.to(torch.float64)
    if merged:
        layer.unmerge()
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert torch.equal(layer.weight, base.double())
    assert layer(torch.randn(2, 20, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_moves_to_the_meta_device_with_its_base(layer, merged):
    if merged:
        layer.merge()
    layer.to("meta")
    assert layer.weight.is_meta
    if merged:
        layer.unmerge()
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def test_a_merged_copy_unmerges_on_its_own(layer):
    bits = layer.weight.detach().clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.weight, bits)
    with torch.no_grad():
        twin.weight.zero_()
    layer.unmerge()
    assert torch.equal(layer.weight, bits)


def _paper(layer: DCFTLinear) -> bool:
    return bool(layer.dcft_B.abs().max() > 0)


def _zero(layer: DCFTLinear) -> bool:
    return bool(layer.dcft_B.abs().max() == 0) and bool(layer.dcft_A.abs().max() > 0)


@pytest.mark.parametrize(
    ("init", "as_expected"), [("balanced", _zero), ("paper", _paper), ("zero", _zero)]
)
def test_reset_dcft_parameters(init: str, as_expected: Callable[[DCFTLinear], bool]):
    layer = DCFTLinear(16, 16, init=init)
    base = layer.weight.detach().clone()
    first = {name: getattr(layer, name).detach().clone() for name in FACTORS}
    identities = [id(getattr(layer, name)) for name in FACTORS]
    with torch.no_grad():
        for name in FACTORS:
            getattr(layer, name).fill_(7.0)

    layer.reset_dcft_parameters()

    assert as_expected(layer)
    assert [id(getattr(layer, name)) for name in FACTORS] == identities
    assert not torch.equal(layer.dcft_A, first["dcft_A"])
    assert not torch.equal(layer.dcft_C, first["dcft_C"])
    assert all(getattr(layer, name).abs().max() < 7.0 for name in FACTORS)
    assert torch.equal(layer.weight, base)
    assert all(getattr(layer, name).requires_grad for name in FACTORS)


def test_reset_parameters_draws_base_and_adapter(layer):
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_extra_repr_tells_what_the_adapter_is(layer):
    assert repr(layer) == (
        "DCFTLinear(in_features=20, out_features=13, bias=True, rank=2, kernel_size=(4, 8), "
        "stride=(4, 8), scaling=1.5, dropout=0, init='paper', backend='auto', "
        "adapter_parameters=46, merged=False)"
    )
    layer.merge()
    assert "merged=True" in repr(layer)
    without_bias = DCFTLinear(8, 4, bias=False, stride=2, dropout=0.1, init="zero", backend="torch")
    assert repr(without_bias) == (
        "DCFTLinear(in_features=8, out_features=4, bias=False, rank=1, kernel_size=(8, 8), "
        "stride=(2, 2), scaling=1, dropout=0.1, init='zero', backend='torch', "
        "adapter_parameters=66, merged=False)"
    )
