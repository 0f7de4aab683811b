"""Models created without values, swapped, then loaded and dispatched by accelerate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import save_file
from torch import Tensor, nn

from dcft_kernels import (
    DCFTLinear,
    freeze_base,
    load_adapter,
    merge_model,
    save_adapter,
    swap_linear,
)
from tests.small_models import build_small_model, logits, randomize_adapters, small_inputs

NAME = "roberta"
DISK = {
    "roberta.embeddings": "cpu",
    "roberta.encoder.layer.0": "disk",
    "roberta.encoder.layer.1": "cpu",
    "classifier": "cpu",
}


@pytest.fixture
def plain() -> nn.Module:
    return build_small_model(NAME)


@pytest.fixture
def trained(plain: nn.Module) -> nn.Module:
    model = copy.deepcopy(plain)
    swap_linear(model, alpha=5.0)
    freeze_base(model)
    randomize_adapters(model)
    return model


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return logits(model, small_inputs(NAME))


def _swapped_without_values(*, inside: bool = True) -> nn.Module:
    with init_empty_weights():
        model = build_small_model(NAME)
        if inside:
            swap_linear(model, alpha=5.0)
    if not inside:
        swap_linear(model, alpha=5.0)
    return model


def _load(model: nn.Module, source: nn.Module, device_map: Any, folder: Path) -> nn.Module:
    file = str(folder / "model.safetensors")
    save_file(source.state_dict(), file, metadata={"format": "pt"})
    places = {"device_map": device_map, "max_memory": {"cpu": "1GB"}}
    return load_checkpoint_and_dispatch(model, file, **places, offload_folder=folder / "offload")


@pytest.mark.parametrize("inside", [False, True], ids=["swapped outside", "swapped inside"])
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_a_base_checkpoint(plain, device_map, inside, tmp_path):
    model = _load(_swapped_without_values(inside=inside), plain, device_map, tmp_path)
    assert torch.equal(_logits(model), _logits(plain))


@pytest.mark.parametrize("device_map", [None, "auto", DISK], ids=["none", "auto", "disk"])
def test_a_checkpoint_with_adapters(trained, device_map, tmp_path):
    model = _load(_swapped_without_values(), trained, device_map, tmp_path)
    assert torch.equal(_logits(model), _logits(trained))


@pytest.mark.parametrize("first", ["adapter", "base"])
def test_an_adapter_loads_before_the_base_or_after(plain, trained, first, tmp_path):
    save_adapter(trained, tmp_path)
    model = _swapped_without_values()
    if first == "adapter":
        load_adapter(model, tmp_path)
    model = _load(model, plain, {"": "cpu"}, tmp_path)
    if first == "base":
        load_adapter(model, tmp_path)
    assert torch.equal(_logits(model), _logits(trained))


@pytest.mark.parametrize("context", [init_empty_weights, lambda: torch.device("meta")])
def test_layers_that_a_model_constructs_itself(context, tmp_path):
    with context():
        model = nn.Sequential(DCFTLinear(20, 13))
    base, x = nn.Sequential(nn.Linear(20, 13)), torch.randn(3, 20)
    assert torch.equal(_load(model, base, {"": "cpu"}, tmp_path)(x), base(x))


def test_an_offloaded_model_is_neither_swapped_nor_merged():
    model, adapted = nn.Sequential(nn.Linear(20, 13)), nn.Sequential(DCFTLinear(20, 13))
    for offloaded in (model, adapted):
        cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"^targets: '0' cannot be adapted: .*; swap it first"):
        swap_linear(model)
    with pytest.raises(
        ValueError, match=r"^0: merge: the weight is on the meta .*remove_hook_from"
    ):
        merge_model(adapted)
