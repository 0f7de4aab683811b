"""State dicts: base and adapter whatever is merged, with the settings that go with the factors."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
def test_it_does_not_depend_on_merging(layer, keep_vars):
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


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        # The shapes are the same in each pair.
        ({"alpha": 4.0}, r"scaling is 1\.5 in the model, 2\.0 in the state dict;"),
        ({"stride": (3, 6)}, r"stride is \[4, 8\] in the model, \[3, 6\] in the state dict;"),
        ({"nonlinearity": "relu"}, "nonlinearity is None in the model, relu in the state dict;"),
    ],
    ids=["scaling", "stride", "nonlinearity"],
)
def test_other_settings_are_an_error(layer, changes, text, strict):
    """They loaded with "All keys matched", and the layer computed something else."""
    model = nn.ModuleDict({"query": layer})
    saved = nn.ModuleDict({"query": _layer(**changes)}).state_dict()
    snapshot = ModelSnapshot(model)
    with pytest.raises(RuntimeError, match=rf"query: {text} .*delete 'query\.dcft_settings'"):
        model.load_state_dict(saved, strict=strict)
    snapshot.assert_unchanged()
    del saved["query.dcft_settings"]
    model.load_state_dict(saved)
    assert torch.equal(layer.dcft_C, saved["query.dcft_C"])


def test_settings_are_those_of_the_moment(layer):
    layer.alpha, layer.nonlinearity = 8, "tanh"
    twin = _layer(alpha=8, nonlinearity="tanh")
    assert str(twin.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    assert _equal(twin, layer)


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_or_an_earlier_version_has_no_settings(layer, assign):
    earlier = _layer().state_dict()
    del earlier["dcft_settings"]
    assert str(layer.load_state_dict(earlier, assign=assign)) == "<All keys matched successfully>"
    result = layer.load_state_dict(nn.Linear(20, 13).state_dict(), strict=False, assign=assign)
    assert result.missing_keys == list(FACTORS)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(FACTORS)


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.bfloat16,
        torch.Tensor.half,
        torch.Tensor.double,
        lambda tensor: tensor.double() - 1e-3,  # averages of several state dicts
        lambda tensor: tensor.to("meta"),  # without values there is nothing to compare
    ],
    ids=["bf16", "fp16", "fp64", "averaged", "meta"],
)
@pytest.mark.filterwarnings("ignore:for dcft_settings.*no-op")
def test_settings_survive_what_is_done_to_tensors(layer, change):
    saved = layer.state_dict()
    saved["dcft_settings"] = change(saved["dcft_settings"])
    twin = _layer()
    twin.load_state_dict(saved)
    assert twin.dcft_settings.dtype == torch.uint8
    assert _equal(twin, layer)


@pytest.mark.parametrize(
    "spoil",
    [
        torch.ones_like,
        lambda tensor: tensor[:20],
        lambda tensor: tensor[None],
        lambda tensor: tensor.double() * torch.nan,
        lambda tensor: tensor.double() + 1000,
        lambda tensor: torch.tensor(list(b"[" * 10000), dtype=torch.uint8),
        lambda tensor: torch.tensor(list(b"[]")),
        lambda tensor: "settings",
    ],
    ids=["ones", "cut", "2-D", "nan", "large", "deep", "no-object", "no-tensor"],
)
def test_unreadable_settings_are_an_error(layer, spoil):
    saved = _layer().state_dict()
    saved["dcft_settings"] = spoil(saved["dcft_settings"])
    snapshot = ModelSnapshot(layer)
    with pytest.raises(RuntimeError, match="DCFTLinear: dcft_settings in the state dict are unr"):
        layer.load_state_dict(saved)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_by_assignment(layer, device):
    saved, twin = layer.state_dict(), _layer().to(device)
    twin.load_state_dict(saved, assign=True)
    assert twin.weight.data_ptr() == saved["weight"].data_ptr()
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == set(FACTORS)
    assert _equal(twin, layer)
    assert torch.equal(twin.state_dict()["dcft_settings"], saved["dcft_settings"])


def test_safetensors_round_trip(layer, tmp_path):
    save_file(nn.Sequential(layer, copy.deepcopy(layer)).state_dict(), tmp_path / "model")
    twin = nn.Sequential(_layer(), _layer())
    twin.load_state_dict(load_file(tmp_path / "model"))
    assert _equal(twin[1], layer)


@pytest.mark.parametrize(
    "change",
    [
        nn.Module.half,
        nn.Module.double,
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.to_empty(device="cpu"),
    ],
    ids=["half", "double", "deepcopy", "pickle", "to_empty"],
)
def test_settings_survive_what_is_done_to_modules(layer, change):
    expected = layer.state_dict()["dcft_settings"]
    found = change(layer).state_dict()["dcft_settings"]
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected)
