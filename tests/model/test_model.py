"""Operations on whole models: swap, freeze, count, merge; each one all or nothing."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from dcft_kernels import (
    DCFTLinear,
    freeze_base,
    merge_model,
    parameter_counts,
    save_adapter,
    swap_linear,
    unmerge_model,
)
from tests.model_snapshot import ModelSnapshot

IDS = torch.arange(11)[None]


class Network(nn.Module):
    """Two layers of unequal sizes between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 20)
        self.first = nn.Linear(20, 16)
        self.second = nn.Linear(16, 20, bias=False)
        self.classifier = nn.Linear(20, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(self.second(self.first(self.embedding(ids)).tanh()))


class Shared(nn.Module):
    """One layer registered under three names, in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), self.encoder])
        self.alias = self.encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.blocks[0](self.encoder(x))) + self.blocks[1](x)


def _randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".dcft_" in name:
            nn.init.normal_(parameter, 0.0, 0.5)


def _adapter_names(*layers: str) -> list[str]:
    return [f"{layer}.dcft_{factor}" for layer in layers for factor in "ABC"]


@pytest.fixture
def base() -> Network:
    return Network()


@pytest.fixture
def adapted(base: Network) -> Network:
    model = copy.deepcopy(base)
    assert swap_linear(model, kernel_size=4, init="paper") == ["first", "second"]
    _randomize(model)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_swap_shares_the_base_and_returns_names(base, training):
    base.train(training)
    first, second, others = base.first, base.second, (base.embedding, base.classifier)
    names = swap_linear(base, rank=2, kernel_size=(4, 2), alpha=4.0, init="zero")
    assert names == ["first", "second"]
    assert base.first.weight is first.weight
    assert base.first.bias is first.bias
    assert base.second.weight is second.weight
    assert base.second.bias is None
    assert (base.embedding, base.classifier) == others
    assert (base.first.rank, base.first.kernel_size, base.first.scaling) == (2, (4, 2), 2.0)
    assert not torch.equal(base.first.dcft_C, base.second.dcft_C)  # drawn one by one
    assert all(module.training is training for module in base.modules())
    assert list(dict(base.named_children())) == ["embedding", "first", "second", "classifier"]
    # Freezing what is not swapped is left to freeze_base.
    assert not base.first.weight.requires_grad
    assert base.classifier.weight.requires_grad


def test_a_layer_registered_twice_stays_one_layer():
    model, x = Shared(), torch.randn(2, 16)
    expected = model(x)
    assert swap_linear(model, init="zero") == ["encoder", "blocks.0", "blocks.1", "alias"]
    assert isinstance(model.encoder, DCFTLinear)
    assert model.alias is model.blocks[1] is model.encoder
    assert model.blocks[0] is not model.encoder
    assert torch.equal(model(x), expected)
    counts = parameter_counts(model)
    assert counts.adapter == 2 * (2 + 2 + 64)
    assert counts.total == 2 * (16 * 16 + 16) + counts.adapter
    _randomize(model)
    unmerged = model(x)
    merge_model(model)
    torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-5)
    unmerge_model(model)
    assert torch.equal(model(x), unmerged)
    merge_model(model, unload=True)
    assert type(model.encoder) is nn.Linear
    assert model.alias is model.blocks[1] is model.encoder


def test_one_name_of_a_shared_layer_swaps_it_everywhere():
    model = Shared()
    assert swap_linear(model, ["alias"]) == ["alias"]
    assert isinstance(model.encoder, DCFTLinear)
    assert model.alias is model.blocks[1] is model.encoder


def test_two_layers_with_one_weight_keep_sharing_it():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    swap_linear(model)
    assert model["a"].weight is model["b"].weight
    assert model["a"].dcft_A is not model["b"].dcft_A
    assert parameter_counts(model).total == 16 * 16 + 2 * 16 + 2 * (2 + 2 + 64)


def _sharded() -> nn.Linear:
    """As sharded training leaves a layer whose weight lies elsewhere."""
    linear = nn.Linear(16, 16)
    linear.weight = nn.Parameter(torch.empty(0))
    return linear


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(16),
        lambda: nn.Linear(16, 16, dtype=torch.complex64),
        lambda: prune.random_unstructured(nn.Linear(16, 16), "weight", 0.5),
        lambda: prune.random_unstructured(nn.Linear(16, 16), "bias", 0.5),
        _sharded,
    ],
    ids=["norm", "complex", "pruned", "pruned-bias", "sharded"],
)
def test_a_swap_that_meets_an_unfit_layer_changes_nothing(make):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), make())
    snapshot = ModelSnapshot(model)
    with pytest.raises(TypeError, match=r"^targets: '2' cannot be adapted: expected"):
        swap_linear(model, ["0", "1", "2"])
    snapshot.assert_unchanged()


def test_a_swap_that_runs_out_of_memory_changes_nothing(base, monkeypatch):
    """The second layer's adapter fails when the first one's exists already."""
    made = []
    draw = DCFTLinear.reset_dcft_parameters

    def exhausted(layer: DCFTLinear) -> None:
        if made:
            raise torch.OutOfMemoryError("no memory left")
        made.append(layer)
        draw(layer)

    monkeypatch.setattr(DCFTLinear, "reset_dcft_parameters", exhausted)
    snapshot = ModelSnapshot(base)
    with pytest.raises(torch.OutOfMemoryError):
        swap_linear(base)
    assert made
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        pytest.param((), set(), id="nothing"),
        pytest.param(["classifier"], {"classifier.weight", "classifier.bias"}, id="module"),
        pytest.param("bias", {"first.bias", "classifier.bias"}, id="string"),
        pytest.param(["classifier.bias"], {"classifier.bias"}, id="parameter"),
        pytest.param(["bias"], {"first.bias", "classifier.bias"}, id="ending"),
        pytest.param(r"(classifier|embedding)", {
            "classifier.weight", "classifier.bias", "embedding.weight"}, id="regex"),
        pytest.param(("embedding", "classifier.weight"), {
            "embedding.weight", "classifier.weight"}, id="several"),
    ],
)  # fmt: skip
def test_freeze_base_leaves_adapters_and_what_is_named(adapted, trainable, expected):
    adapted.first.requires_grad_(False)  # a frozen adapter is thawed
    freeze_base(adapted, trainable=trainable)
    found = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert found == expected | set(_adapter_names("first", "second"))


@pytest.mark.parametrize("name", ["lm_head", "embedding"])
def test_freeze_base_knows_a_tied_parameter_by_every_name(name):
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(11, 16),
            "body": nn.Linear(16, 16),
            "lm_head": nn.Linear(16, 11, bias=False),
        }
    )
    model["lm_head"].weight = model["embedding"].weight
    swap_linear(model)
    freeze_base(model, trainable=[name])
    assert model["embedding"].weight.requires_grad
    assert not model["body"].weight.requires_grad


def test_parameter_counts(base):
    total = 11 * 20 + (20 * 16 + 16) + 16 * 20 + (20 * 3 + 3)
    assert parameter_counts(base).__dict__ == {"adapter": 0, "trainable": total, "total": total}
    assert str(parameter_counts(base)) == "adapter 0 (0.000%), trainable 939, total 939"
    assert str(parameter_counts(nn.ReLU())) == "adapter 0 (0.000%), trainable 0, total 0"
    swap_linear(base, kernel_size=4, rank=2)
    adapter = (2 * 5 + 4 * 2 + 16) + (2 * 4 + 5 * 2 + 16)
    counts = parameter_counts(base)
    frozen = (20 * 16 + 16) + 16 * 20
    assert counts.adapter == adapter
    assert counts.trainable == total - frozen + adapter
    assert counts.total == total + adapter
    freeze_base(base)
    assert str(parameter_counts(base)) == "adapter 68 (6.753%), trainable 68, total 1,007"
    merge_model(base)
    assert parameter_counts(base).total == total + adapter


def _diverge(layer: DCFTLinear) -> None:
    with torch.no_grad():
        layer.dcft_B[0, 0] = math.nan


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (_diverge, ValueError, r"^second: merge: base plus increment is not finite"),
        (lambda layer: setattr(layer, "backend", "triton"), RuntimeError,
         r"backend='triton' cannot run: .*need a GPU"),
        (lambda layer: setattr(layer, "nonlinearity", "relu"), RuntimeError,
         r"^model: 'second': .*nonlinearity='relu'.*remove_nonlinearity"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), ValueError,
         r"^second: (merge|to_linear): expected weight to be an nn\.Parameter .*prune\.remove"),
    ],
    ids=["diverged", "no-kernels", "nonlinear", "pruned"],
)  # fmt: skip
def test_merge_model_is_all_or_nothing(adapted, spoil, error, text, unload):
    spoil(adapted.second)
    snapshot = ModelSnapshot(adapted)
    with pytest.raises(error, match=text):
        merge_model(adapted, unload=unload)
    snapshot.assert_unchanged()


def test_unmerge_model_is_all_or_nothing(adapted):
    merge_model(adapted)
    prune.l1_unstructured(adapted.second, "weight", 0.3)
    snapshot = ModelSnapshot(adapted)
    with pytest.raises(ValueError, match=r"^second: unmerge: expected weight to be an nn\.Param"):
        unmerge_model(adapted)
    snapshot.assert_unchanged()


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_model_under_fsdp_is_not_merged(adapted):
    """After a forward pass its weights look like any others, until FSDP puts its own back."""
    fully_shard(adapted, mesh=init_device_mesh("cpu", (1,)))
    expected = adapted(IDS)
    with pytest.raises(
        ValueError, match=r"^model: is sharded .*; load the saved adapter into a pl"
    ):
        merge_model(adapted)
    assert torch.equal(adapted(IDS), expected)
    adapted.reshard()
    with pytest.raises(ValueError, match=r"^merge: expected weight .*got a DTensor of shape \[16"):
        adapted.first.merge()


@pytest.mark.usefixtures("process_group")
def test_ddp_does_not_broadcast_settings(base):
    """It would in every forward pass, and an evaluation on rank 0 alone would hang."""
    swap_linear(base, ["first"])
    swap_linear(base, ["second"])
    model = nn.parallel.DistributedDataParallel(base)
    assert model.modules_buffers == []
    assert "module.second.dcft_settings" in model.state_dict()


def test_saving_the_adapter_of_a_merged_model_does_not_warn(adapted, tmp_path):
    merge_model(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(adapted, tmp_path)


def test_a_model_merged_in_part(adapted):
    before = ModelSnapshot(adapted)
    adapted.second.merge()
    snapshot = ModelSnapshot(adapted)
    with pytest.raises(RuntimeError, match=r"1 of 2 layers are merged already, 'second' first"):
        merge_model(adapted)
    snapshot.assert_unchanged()
    unmerge_model(adapted)
    before.assert_unchanged()
