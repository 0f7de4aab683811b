"""Which layers `swap_linear` takes: name endings, regular expressions, "all-linear", exclude."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dcft_kernels import DCFTLinear, swap_linear
from tests.model.peft_models import TOKENS, Base, randomized
from tests.model_snapshot import ModelSnapshot
from tests.small_models import build_small_model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.output = nn.ModuleDict({"dense": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.dense = nn.Linear(8, 16)
        self.my_query = Conv1D(8, 16)


class Classifier(nn.Module):
    """Two blocks with the usual names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(8, 3)


@pytest.fixture
def model() -> nn.Module:
    return Classifier()


def _in_both(*endings: str) -> list[str]:
    return [f"layers.{i}.{ending}" for i in (0, 1) for ending in endings]


ATTENTION = [f"attention.{name}" for name in ("query", "key", "value", "output.dense")]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        # An ending begins at a dot: "query" does not mean "my_query".
        pytest.param(["query"], _in_both("attention.query"), id="ending"),
        pytest.param(("value", "key"), _in_both("attention.key", "attention.value"), id="tuple"),
        pytest.param(["dense"], _in_both("attention.output.dense", "dense"), id="two-depths"),
        pytest.param(["output.dense"], _in_both("attention.output.dense"), id="dotted-ending"),
        pytest.param(["layers.1.dense"], ["layers.1.dense"], id="whole-name"),
        pytest.param(["my_query"], _in_both("my_query"), id="conv1d"),
        pytest.param(["classifier"], ["classifier"], id="a-head-when-named"),
        pytest.param(r"layers\.1\..*(query|dense)", [
            "layers.1.attention.query", "layers.1.attention.output.dense",
            "layers.1.dense", "layers.1.my_query"], id="regex"),
        pytest.param("query", _in_both("attention.query"), id="string-ending"),
        pytest.param("output.dense", _in_both("attention.output.dense"), id="string-dotted"),
        # `attention.output` is a block: only what is linear can be adapted.
        pytest.param(r".*output(\.dense)?", _in_both("attention.output.dense"), id="container"),
        pytest.param("all-linear", _in_both(*ATTENTION, "dense", "my_query"), id="all-linear"),
    ],
)  # fmt: skip
def test_targets_select(model, targets, expected):
    assert swap_linear(model, targets) == expected
    swapped = [name for name, m in model.named_modules() if isinstance(m, DCFTLinear)]
    assert swapped == expected


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        pytest.param((), [], id="nothing"),
        pytest.param(["query"], _in_both("attention.query"), id="ending"),
        pytest.param("query", _in_both("attention.query"), id="string"),
        pytest.param(["layers.0.dense"], ["layers.0.dense"], id="whole-name"),
        pytest.param(r"layers\.0\.attention\..*", [f"layers.0.{e}" for e in ATTENTION], id="regex"),
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", r"layers\..*(query|key|value|dense)"])
def test_exclude(model, targets, exclude, left_out):
    everything = swap_linear(copy.deepcopy(model), targets)
    assert set(left_out) <= set(everything)
    assert swap_linear(model, targets, exclude=exclude) == [
        name for name in everything if name not in left_out
    ]
    assert not any(isinstance(model.get_submodule(name), DCFTLinear) for name in left_out)


@pytest.mark.parametrize("exclude", [["attention"], ["qeury"], r"layers\.2\..*", ["key", "zzz"]])
def test_an_exclude_that_excludes_nothing_is_an_error(model, exclude):
    """Otherwise layers it should leave out are adapted silently. A block is not a layer."""
    wrong = exclude if isinstance(exclude, str) else exclude[-1]
    with pytest.raises(ValueError, match=rf"^exclude: {re.escape(repr(wrong))} matches no layer"):
        swap_linear(model, exclude=exclude)
    assert not any(isinstance(module, DCFTLinear) for module in model.modules())


@pytest.mark.parametrize("head", ["lm_head", "head", "heads", "classifier", "score", "qa_outputs"])
def test_all_linear_knows_heads_by_name_at_the_top_only(head):
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = nn.ModuleDict({"body": nn.ModuleDict({head: nn.Linear(8, 8)}), head: layers})
    assert swap_linear(model) == [f"body.{head}"]


def test_all_linear_leaves_out_weights_tied_to_an_embedding():
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(10, 8), "body": nn.Linear(8, 8), "decode": nn.Linear(8, 10)}
    )
    model["decode"].weight = model["embedding"].weight
    assert swap_linear(model) == ["body"]
    assert model["decode"].weight is model["embedding"].weight


class DeclaresOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.vocabulary = nn.Linear(8, 8), nn.Linear(8, 10)

    def get_output_embeddings(self) -> nn.Module:
        return self.vocabulary


class DeclaresBackbone(nn.Module):
    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"dense": nn.Linear(8, 8), "score": nn.Linear(8, 8)})
        self.anything = nn.Sequential(nn.Linear(8, 2))


def test_all_linear_leaves_out_what_a_model_declares_as_its_head():
    assert swap_linear(DeclaresOutput()) == ["body"]
    assert swap_linear(DeclaresBackbone()) == ["backbone.dense", "backbone.score"]


@pytest.mark.parametrize("name", ["llama", "roberta", "bert"])
def test_all_linear_knows_the_head_of_a_model_inside_another(name):
    model = build_small_model(name)
    expected = [f"inner.{path}" for path in swap_linear(copy.deepcopy(model))]
    assert swap_linear(nn.ModuleDict({"inner": model})) == expected


def test_all_linear_takes_what_is_not_swapped_yet(model):
    first = swap_linear(model, ["query"])
    rest = swap_linear(model)
    assert sorted(first + rest) == sorted(_in_both(*ATTENTION, "dense", "my_query"))


def test_all_linear_passes_over_other_kinds_of_linear_layers():
    """A subclass need not compute x W^T + b: attention's out_proj is read past its forward."""
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"attention": attention, "dense": nn.Linear(8, 8)})
    assert swap_linear(model) == ["dense"]
    assert not isinstance(attention.out_proj, DCFTLinear)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("bert", ["query", "value"]),
        ("bert", r".*layer\.1\.attention\.self\.(query|key)"),
        ("gpt2", ["c_attn", "mlp.c_proj"]),
        ("llama", "all-linear"),
        ("gpt2", "all-linear"),
        ("t5", ["q", "v", "wo"]),
    ],
)
def test_targets_match_peft(name, targets):
    model = build_small_model(name)
    config = peft.LoraConfig(target_modules=targets, r=1)
    reference = peft.get_peft_model(copy.deepcopy(model), config).base_model.model
    expected = [n for n, m in reference.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert expected
    assert swap_linear(model, targets) == expected


QUERY = {"target_modules": ["query"]}
PEFT = {
    "lora": lambda: peft.LoraConfig(modules_to_save=["value"], **QUERY),
    "dora": lambda: peft.LoraConfig(use_dora=True, **QUERY),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **QUERY),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **QUERY),
    "vera": lambda: peft.VeraConfig(r=4, **QUERY),
}


def _with_peft(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(Base(), PEFT[kind]()).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, 0.1, 0.5)
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("kind", PEFT)
def test_all_linear_leaves_other_adapters_alone(kind):
    """PEFT merges by weights: adapters on its factors would be lost, and those on its base layers
    would not be scaled or rotated as IA3, DoRA and OFT do with the base weight."""
    model = _with_peft(kind)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    names = swap_linear(model, init="paper")
    value = [] if kind == "lora" else ["base_model.model.value"]
    assert names == [*value, "base_model.model.dense"]
    after = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in after if ".dcft_" not in name} == before
    randomized(model)
    expected = model(TOKENS)
    torch.testing.assert_close(model.merge_and_unload()(TOKENS), expected)


@pytest.mark.parametrize(
    "targets", ["query", "query.lora_A.default", "query.base_layer", "modules_to_save.default"]
)
def test_a_target_that_belongs_to_another_adapter_is_refused(targets):
    model = _with_peft("lora")
    snapshot = ModelSnapshot(model)
    text = r"^targets: '.*(query|value).*' belongs to another adapter: '.*' is a peft\..* exclude="
    with pytest.raises(TypeError, match=text):
        swap_linear(model, targets)
    snapshot.assert_unchanged()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("masked", [False, True], ids=["", "padding-mask"])
def test_adapters_count_in_pytorchs_fused_encoder(masked):
    """In evaluation mode, nn.TransformerEncoderLayer reads its linear layers' weights past their
    forward: an adapter in one of them would silently not count."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(False)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    before = model(x, src_key_padding_mask=mask)[:, :3]
    assert len(swap_linear(model, ["linear1", "linear2"], init="zero")) == 4
    for name, parameter in model.named_parameters():
        if ".dcft_" in name:
            parameter.normal_()
    found = model(x, src_key_padding_mask=mask)[:, :3]
    with torch.enable_grad():  # never fused
        model.requires_grad_(True)
        expected = model(x, src_key_padding_mask=mask)[:, :3]
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected)
