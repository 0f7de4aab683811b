"""State dicts: base and adapter whatever is merged, with the settings that go with the factors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dcft_kernels import DCFTLinear
from tests.model_snapshot import ModelSnapshot

FACTORS = ("dcft_A", "dcft_B", "dcft_C")
KEYS = ["0.weight", "0.bias", *(f"0.{factor}" for factor in FACTORS), "0.dcft_settings"]
OPTIONS = {"rank": 2, "kernel_size": (4, 8), "alpha": 3.0, "init": "paper"}
MERGED = r"state dict of a merged DCFTLinear .*merge_model\(model, unload=True\)"


def _layer(**changes: Any) -> DCFTLinear:
    return DCFTLinear(20, 13, **(OPTIONS | changes))


@pytest.fixture
def layer() -> DCFTLinear:
    return _layer()


def _equal(model: nn.Module, twin: nn.Module) -> bool:
    x = torch.randn(3, 20)
    return torch.equal(model(x), twin(x))


@pytest.mark.parametrize("keep_vars", [False, True])
def test_state_dict_does_not_depend_on_merging(layer, keep_vars):
    model = nn.Sequential(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = {key: value.clone() for key, value in model.state_dict().items()}
    layer.merge()
    with pytest.warns(UserWarning, match=MERGED):
        after = model.state_dict(keep_vars=keep_vars)
    assert list(after) == list(before) == KEYS
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert isinstance(after["0.weight"], nn.Parameter) is keep_vars
    layer.unmerge()
    assert (after["0.weight"] is layer.weight) is keep_vars


@pytest.mark.parametrize("strict", [False, True])
def test_loading_into_a_merged_layer_is_an_error(layer, strict):
    model = nn.ModuleDict({"query": layer})
    saved = nn.ModuleDict({"query": _layer()}).state_dict()
    layer.merge()
    snapshot = ModelSnapshot(model)
    with pytest.raises(RuntimeError, match=r"query is merged: call unmerge\(\) before loading"):
        model.load_state_dict(saved, strict=strict)
    snapshot.assert_unchanged()
    layer.unmerge()
    model.load_state_dict(saved)
    assert torch.equal(layer.dcft_A, saved["query.dcft_A"])


HERE = r"scaling=1\.5, stride=\(4, 8\), nonlinearity=None"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("changes", "there"),
    [
        # The shapes are the same in each pair.
        ({"alpha": 4.0}, r"scaling=2, stride=\(4, 8\), nonlinearity=None"),
        ({"alpha": 3.01}, r"scaling=1\.505, stride=\(4, 8\), nonlinearity=None"),
        ({"stride": (3, 6)}, r"scaling=1\.5, stride=\(3, 6\), nonlinearity=None"),
        ({"nonlinearity": "relu"}, r"scaling=1\.5, stride=\(4, 8\), nonlinearity=relu"),
    ],
    ids=["scaling", "slightly other scaling", "stride", "nonlinearity"],
)
def test_other_settings_are_an_error(layer, changes, there, strict):
    """They loaded with "All keys matched", and the layer computed something else."""
    model = nn.ModuleDict({"query": layer})
    saved = nn.ModuleDict({"query": _layer(**changes)}).state_dict()
    snapshot = ModelSnapshot(model)
    text = rf"query: {HERE} in the model, but {there} in .* delete 'query\.dcft_settings'"
    with pytest.raises(RuntimeError, match=text):
        model.load_state_dict(saved, strict=strict)
    snapshot.assert_unchanged()
    del saved["query.dcft_settings"]
    model.load_state_dict(saved)
    assert torch.equal(layer.dcft_C, saved["query.dcft_C"])


def test_format_of_settings():
    for position, nonlinearity in enumerate([None, "relu", "gelu", "silu", "tanh"]):
        saved = _layer(nonlinearity=nonlinearity).state_dict()["dcft_settings"]
        assert saved.tolist() == [1.5, 4, 8, position]


def test_settings_are_current(layer):
    layer.alpha, layer.nonlinearity = 8, "tanh"
    twin = _layer(alpha=8, nonlinearity="tanh")
    assert str(twin.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    assert _equal(twin, layer)


@pytest.mark.parametrize("assign", [False, True])
def test_settings_are_optional(layer, assign):
    """State dicts of a base and of earlier versions have none."""
    earlier = _layer().state_dict()
    del earlier["dcft_settings"]
    assert str(layer.load_state_dict(earlier, assign=assign)) == "<All keys matched successfully>"
    result = layer.load_state_dict(nn.Linear(20, 13).state_dict(), strict=False, assign=assign)
    assert result.missing_keys == list(FACTORS)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(FACTORS)


def _running_average(tensor: torch.Tensor) -> torch.Tensor:
    average = tensor.clone()
    for _ in range(10000):
        average = 0.999 * average + 0.001 * tensor
    return average


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        lambda tensor: (tensor + tensor + tensor) / 3,
        lambda tensor: torch.lerp(tensor, tensor, 0.3),
        _running_average,
        lambda tensor: tensor.to("meta"),  # without values there is nothing to compare
    ],
    ids=["bf16", "fp64", "mean", "lerp", "ema", "meta"],
)
@pytest.mark.filterwarnings("ignore:for dcft_settings.*no-op")
def test_settings_may_be_cast_or_averaged(layer, change):
    layer.alpha = 3.1  # which 16 bits round
    saved = layer.state_dict()
    saved["dcft_settings"] = change(saved["dcft_settings"])
    twin = _layer(alpha=3.1)
    twin.load_state_dict(saved)
    assert torch.equal(twin.state_dict()["dcft_settings"], layer.state_dict()["dcft_settings"])
    assert _equal(twin, layer)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_by_assignment(layer, device):
    saved, twin = layer.state_dict(), _layer().to(device)
    twin.load_state_dict(saved, assign=True)
    assert twin.weight.data_ptr() == saved["weight"].data_ptr()
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == set(FACTORS)
    assert _equal(twin, layer)
    assert torch.equal(twin.state_dict()["dcft_settings"], saved["dcft_settings"])


@pytest.mark.parametrize(
    "change", [nn.Module.half, copy.deepcopy, lambda layer: layer.to_empty(device="cpu")]
)
def test_settings_do_not_depend_on_the_buffer(layer, change):
    expected = layer.state_dict()["dcft_settings"]
    found = change(layer).state_dict()["dcft_settings"]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
