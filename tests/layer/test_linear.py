"""`DCFTLinear` as a module: construction, forward, hooks, modes, copies, its repr."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dcft_kernels import DCFTLinear, delta_weight

FACTORS = ("dcft_A", "dcft_B", "dcft_C")


def _randomized(layer: DCFTLinear, std: float = 0.5) -> DCFTLinear:
    for name in FACTORS:
        nn.init.normal_(getattr(layer, name), 0.0, std)
    return layer


def _kron(layer: DCFTLinear) -> Tensor:
    """`scaling * kron(B A, C)`, cropped: the increment of a layer without overlap."""
    full = torch.kron(layer.dcft_B @ layer.dcft_A, layer.dcft_C)
    return layer.scaling * full[: layer.out_features, : layer.in_features]


@pytest.fixture
def layer() -> DCFTLinear:
    return _randomized(DCFTLinear(20, 13, rank=2, kernel_size=(4, 8), alpha=3.0, init="paper"))


def test_is_a_linear_layer_with_three_trainable_factors(layer):
    assert isinstance(layer, nn.Linear)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "weight": (13, 20),
        "bias": (13,),
        "dcft_A": (2, 3),
        "dcft_B": (4, 2),
        "dcft_C": (4, 8),
    }
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(FACTORS)


def test_base_and_positional_arguments_are_those_of_linear():
    torch.manual_seed(3)
    plain = nn.Linear(8, 4)
    torch.manual_seed(3)
    layer = DCFTLinear(8, 4)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)
    assert DCFTLinear(8, 4, False).bias is None
    with pytest.raises(TypeError, match="positional"):
        DCFTLinear(8, 4, False, 2)


@pytest.mark.parametrize(
    ("init", "alpha", "rank", "scaling"),
    [("paper", None, 4, 1.0), ("zero", 0.5, 2, 0.25), ("balanced", 32, 8, 4.0)],
)
def test_scaling_is_alpha_over_rank(init, alpha, rank, scaling):
    layer = _randomized(DCFTLinear(16, 8, rank=rank, alpha=alpha, init=init))
    assert layer.scaling == scaling
    torch.testing.assert_close(layer.delta_weight(), _kron(layer))


@pytest.mark.parametrize(
    ("kernel_size", "stride", "pairs"),
    [
        (8, None, ((8, 8), (8, 8))),
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
        (torch.float64, None, torch.float64),
        # 16-bit parameters would lose small optimizer steps.
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_adapter_dtype(dtype, adapter_dtype, expected):
    base = nn.Linear(16, 8, dtype=dtype)
    for layer in (
        DCFTLinear(16, 8, dtype=dtype, adapter_dtype=adapter_dtype),
        DCFTLinear.from_linear(base, adapter_dtype=adapter_dtype),
    ):
        assert {getattr(layer, name).dtype for name in FACTORS} == {expected}
        assert layer.weight.dtype == layer.bias.dtype == base.weight.dtype
        assert layer(torch.randn(2, 16, dtype=dtype)).dtype == base.weight.dtype


def test_device_is_used_for_all_parameters():
    layer = DCFTLinear(16, 8, device="meta")
    assert all(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])
    assert layer(torch.empty(3, 16, device="meta")).shape == (3, 8)


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_shares_the_base(bias):
    base = nn.Linear(20, 13, bias=bias).eval()
    layer = DCFTLinear.from_linear(base, rank=2, kernel_size=4, init="zero")
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert layer.training is False
    assert not any(parameter.requires_grad for parameter in base.parameters())
    x = torch.randn(3, 20)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        base.weight.mul_(2.0)
    assert torch.equal(layer(x), base(x))


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
    assert repr(plain) == repr(Conv1D(13, 20))
    assert torch.equal(plain.weight, layer.weight)
    assert torch.equal(plain(x), layer(x))


def test_forward_applies_delta_weight_which_is_differentiable(layer):
    delta, x = layer.delta_weight(), torch.randn(2, 3, 20)
    expected = F.linear(x, layer.weight + _kron(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta, _kron(layer))
    factors = [getattr(layer, name) for name in FACTORS]
    by_function = delta_weight(*factors, in_features=20, out_features=13, scaling=1.5)
    assert torch.equal(delta, by_function)
    delta.square().sum().backward()
    assert all(factor.grad.abs().max() > 0 for factor in factors)


def test_hooks_are_kept_and_can_be_removed():
    base = nn.Linear(8, 8)
    seen: list[str] = []
    base.register_forward_pre_hook(lambda *_: seen.append("pre"))
    base.register_forward_pre_hook(lambda *_: seen.append("pre, kwargs"), with_kwargs=True)
    base.register_forward_hook(lambda *_: seen.append("post"))
    base.register_forward_hook(lambda *_: seen.append("post, kwargs"), with_kwargs=True)
    base.register_full_backward_hook(lambda *_: seen.append("backward"))
    base.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    handle = base.register_forward_hook(lambda *_: seen.append("removed"))
    layer = DCFTLinear.from_linear(base)
    handle.remove()
    layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert seen == ["pre", "pre, kwargs", "post", "post, kwargs", "backward pre", "backward"]


@pytest.mark.parametrize("to", [torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_moves_with_its_base(layer, merged, to):
    base = layer.weight.detach().clone()
    if merged:
        layer.merge()
    layer.to(to)
    if merged:
        layer.unmerge()
    if to == "meta":
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        return
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert torch.equal(layer.weight, base.double())
    assert layer(torch.randn(2, 20, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("init", ["balanced", "paper", "zero"])
def test_reset_redraws_factors(init):
    layer = DCFTLinear(16, 16, init=init)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    identities = [id(parameter) for parameter in layer.parameters()]
    for name in FACTORS:
        nn.init.constant_(getattr(layer, name), 7.0)
    layer.reset_dcft_parameters()
    assert [id(parameter) for parameter in layer.parameters()] == identities
    assert torch.equal(layer.weight, before["weight"])
    for name in FACTORS:
        drawn = getattr(layer, name)
        assert drawn.requires_grad
        assert drawn.abs().max() < 7.0
        is_zero = name == "dcft_B" and init != "paper"
        assert torch.equal(drawn, before[name]) is is_zero is bool((drawn == 0).all())
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer.reset_parameters()
    for name in ("weight", "bias", "dcft_A", "dcft_C"):
        assert not torch.equal(getattr(layer, name), before[name]), name


def test_repr_describes_the_adapter(layer):
    assert repr(layer) == (
        "DCFTLinear(in_features=20, out_features=13, bias=True, rank=2, kernel_size=(4, 8), "
        "stride=(4, 8), scaling=1.5, dropout=0, init='paper', backend='auto', "
        "adapter_parameters=46, merged=False)"
    )
    layer.merge()
    layer.strategy = "torch"
    assert "backend='auto', strategy='torch', " in repr(layer)
    assert "merged=True" in repr(layer)
    assert "kernels='per_rank', stride" in repr(DCFTLinear(20, 13, kernels="per_rank"))
