"""Operations on whole models: swap, freeze, count, merge; each one all or nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dcft_kernels import (
    DCFTLinear,
    freeze_base,
    merge_model,
    parameter_counts,
    swap_linear,
    unmerge_model,
)
from tests.model_snapshot import ModelSnapshot


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
    """One layer registered under two names, in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), self.encoder])
        self.alias = self.encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.blocks[0](self.encoder(x))) + self.blocks[1](x)


IDS = torch.arange(11)[None]


def _randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dcft_" in name:
                parameter.normal_(0.0, 0.5)


@pytest.fixture
def base() -> Network:
    return Network()


@pytest.fixture
def adapted(base) -> Network:
    model = copy.deepcopy(base)
    assert swap_linear(model, kernel_size=4, init="paper") == ["first", "second"]
    _randomize(model)
    return model


def test_swap_shares_the_base_and_returns_names(base):
    first, second, others = base.first, base.second, (base.embedding, base.classifier)
    names = swap_linear(base, rank=2, kernel_size=(4, 2), alpha=4.0, init="zero")
    assert names == ["first", "second"]
    assert base.first.weight is first.weight
    assert base.first.bias is first.bias
    assert base.second.weight is second.weight
    assert base.second.bias is None
    assert (base.embedding, base.classifier) == others
    assert (base.first.rank, base.first.kernel_size, base.first.scaling) == (2, (4, 2), 2.0)
    assert not base.first.weight.requires_grad
    # What is not swapped is not frozen either: that is freeze_base's part.
    assert base.classifier.weight.requires_grad
    assert list(dict(base.named_children())) == ["embedding", "first", "second", "classifier"]


def test_swap_in_evaluation_mode_stays_in_it(base):
    base.eval()
    swap_linear(base)
    assert not any(module.training for module in base.modules())


def test_adapters_are_drawn_one_by_one(base):
    swap_linear(base)
    assert not torch.equal(base.first.dcft_C, base.second.dcft_C)


def test_swap_can_give_layers_different_settings(base):
    swap_linear(base, ["first"], kernel_size=4)
    swap_linear(base, ["second"], kernel_size=2)
    assert (base.first.kernel_size, base.second.kernel_size) == ((4, 4), (2, 2))


def test_a_layer_registered_twice_stays_one_layer():
    model = Shared()
    x = torch.randn(2, 16)
    expected = model(x)
    names = swap_linear(model, init="zero")
    assert names == ["encoder", "blocks.0", "blocks.1", "alias"]
    assert isinstance(model.encoder, DCFTLinear)
    assert model.alias is model.encoder
    assert model.blocks[1] is model.encoder
    assert model.blocks[0] is not model.encoder
    assert torch.equal(model(x), expected)
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
    assert isinstance(model.alias, DCFTLinear)
    assert model.alias is model.blocks[1] is model.encoder


def test_two_layers_with_one_weight_keep_sharing_it():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    swap_linear(model)
    assert model["a"].weight is model["b"].weight
    assert model["a"].dcft_A is not model["b"].dcft_A
    assert parameter_counts(model).total == 16 * 16 + 2 * 16 + 2 * (2 + 2 + 64)


def _partitioned() -> nn.Linear:
    """As sharded training leaves a layer whose weight lies elsewhere."""
    linear = nn.Linear(16, 16)
    linear.weight = nn.Parameter(torch.empty(0))
    return linear


def _complex() -> nn.Linear:
    return nn.Linear(16, 16, dtype=torch.complex64)


def _reparametrized() -> nn.Linear:
    return nn.utils.weight_norm(nn.Linear(16, 16))


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(16)


@pytest.mark.parametrize("make", [_norm, _complex, _reparametrized, _partitioned])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_swap_that_meets_an_unfit_layer_changes_nothing(make):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), make())
    snapshot = ModelSnapshot(model)
    with pytest.raises(TypeError, match=r"^targets: '2' cannot be adapted: expected"):
        swap_linear(model, ["0", "1", "2"])
    snapshot.assert_unchanged()


def test_a_swap_with_one_wrong_name_changes_nothing(base):
    snapshot = ModelSnapshot(base)
    with pytest.raises(ValueError, match=r"^targets: 'third' matches no layer"):
        swap_linear(base, ["first", "second", "third"])
    snapshot.assert_unchanged()


def test_a_swap_that_runs_out_of_memory_changes_nothing(base, monkeypatch):
    """The last layer's adapter fails when the first one's is there already."""
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


def test_freeze_base_leaves_only_adapters(adapted):
    freeze_base(adapted)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trainable == [f"{n}.dcft_{f}" for n in ("first", "second") for f in "ABC"]


def test_freeze_base_thaws_frozen_adapters(adapted):
    adapted.requires_grad_(False)
    freeze_base(adapted)
    assert adapted.first.dcft_A.requires_grad
    assert not adapted.classifier.weight.requires_grad


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        pytest.param(["classifier"], {"classifier.weight", "classifier.bias"}, id="module"),
        pytest.param(["classifier.bias"], {"classifier.bias"}, id="parameter"),
        pytest.param(["bias"], {"first.bias", "classifier.bias"}, id="ending"),
        pytest.param(r"(classifier|embedding)", {
            "classifier.weight", "classifier.bias", "embedding.weight"}, id="regex"),
        pytest.param(("embedding", "classifier.weight"), {
            "embedding.weight", "classifier.weight"}, id="several"),
        pytest.param((), set(), id="nothing"),
    ],
)  # fmt: skip
def test_freeze_base_with_trainable(adapted, trainable, expected):
    freeze_base(adapted, trainable=trainable)
    found = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert found == expected | {f"{n}.dcft_{f}" for n in ("first", "second") for f in "ABC"}


def test_freeze_base_knows_a_tied_parameter_by_every_name():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 16)
            self.body = nn.Linear(16, 16)
            self.lm_head = nn.Linear(16, 11, bias=False)
            self.lm_head.weight = self.embedding.weight

    for name in ("lm_head", "embedding"):
        model = Tied()
        swap_linear(model)
        freeze_base(model, trainable=[name])
        assert model.embedding.weight.requires_grad, name
        assert not model.body.weight.requires_grad, name


def test_freeze_base_that_fails_changes_nothing(adapted):
    snapshot = ModelSnapshot(adapted)
    with pytest.raises(ValueError, match=r"^trainable: .*'clasifier'.* matches no parameter"):
        freeze_base(adapted, trainable=["classifier", "clasifier"])
    snapshot.assert_unchanged()


def test_parameter_counts(base):
    total = 11 * 20 + (20 * 16 + 16) + 16 * 20 + (20 * 3 + 3)
    assert parameter_counts(base).__dict__ == {"adapter": 0, "trainable": total, "total": total}
    swap_linear(base, kernel_size=4, rank=2)
    adapter = (2 * 5 + 4 * 2 + 16) + (2 * 4 + 5 * 2 + 16)
    counts = parameter_counts(base)
    frozen = (20 * 16 + 16) + 16 * 20
    assert counts.adapter == adapter
    assert counts.trainable == total - frozen + adapter
    assert counts.total == total + adapter
    freeze_base(base)
    assert parameter_counts(base).trainable == adapter
    merge_model(base)
    assert parameter_counts(base).total == total + adapter


def test_shared_layers_count_once():
    model = Shared()
    swap_linear(model)
    counts = parameter_counts(model)
    assert counts.adapter == 2 * (2 + 2 + 64)
    assert counts.total == 2 * (16 * 16 + 16) + counts.adapter


def test_parameter_counts_print_as_a_sentence(base):
    assert str(parameter_counts(base)) == "adapter 0 (0.000%), trainable 939, total 939"
    swap_linear(base, kernel_size=4)
    freeze_base(base)
    assert str(parameter_counts(base)) == "adapter 50 (5.056%), trainable 50, total 989"
    assert str(parameter_counts(nn.ReLU())) == "adapter 0 (0.000%), trainable 0, total 0"


def test_merge_model_and_unmerge_model(adapted):
    expected = adapted(IDS)
    bits = {name: value.clone() for name, value in adapted.state_dict().items()}
    snapshot = ModelSnapshot(adapted)
    merge_model(adapted)
    assert adapted.first.merged
    assert adapted.second.merged
    assert not torch.equal(adapted.first.weight, bits["first.weight"])
    torch.testing.assert_close(adapted(IDS), expected, rtol=1e-4, atol=1e-5)
    unmerge_model(adapted)
    snapshot.assert_unchanged()
    assert torch.equal(adapted(IDS), expected)


def test_unmerge_model_unmerges_what_is_merged(adapted):
    snapshot = ModelSnapshot(adapted)
    adapted.second.merge()
    unmerge_model(adapted)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("merged_first", [False, True])
def test_unload(base, adapted, merged_first):
    expected = adapted(IDS)
    first = adapted.first
    if merged_first:
        merge_model(adapted)
    merge_model(adapted, unload=True)
    assert [type(module) for module in adapted.modules()] == [type(m) for m in base.modules()]
    assert adapted.state_dict().keys() == base.state_dict().keys()
    assert adapted.first.bias is first.bias
    torch.testing.assert_close(adapted(IDS), expected, rtol=1e-4, atol=1e-5)


def _diverge(layer: DCFTLinear) -> None:
    with torch.no_grad():
        layer.dcft_B[0, 0] = math.nan


def _ask_for_missing_kernels(layer: DCFTLinear) -> None:
    layer.backend = "triton"


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (_diverge, ValueError, r"^second: merge: base plus increment is not finite"),
        (_ask_for_missing_kernels, RuntimeError, r"backend='triton' cannot run: .*need a GPU"),
    ],
)
def test_merge_model_is_all_or_nothing(adapted, spoil, error, text, unload):
    spoil(adapted.second)
    snapshot = ModelSnapshot(adapted)
    with pytest.raises(error, match=text):
        merge_model(adapted, unload=unload)
    snapshot.assert_unchanged()


def test_merge_model_refuses_a_model_merged_in_part(adapted):
    adapted.second.merge()
    snapshot = ModelSnapshot(adapted)
    with pytest.raises(RuntimeError, match=r"1 of 2 layers are merged already, 'second' first"):
        merge_model(adapted)
    snapshot.assert_unchanged()


def test_a_bare_layer_is_a_model_too():
    layer = DCFTLinear(16, 16)
    assert parameter_counts(layer).adapter == 2 + 2 + 64
    freeze_base(layer)
    assert parameter_counts(layer).trainable == 68
    merge_model(layer)
    assert layer.merged
    unmerge_model(layer)
    assert not layer.merged
    with pytest.raises(ValueError, match=r"model: is itself the layer.*use its to_linear\(\)"):
        merge_model(layer, unload=True)
