"""A nonlinearity between the factors of PEFT's LoRA layers: MPC_n of arXiv 2407.05417."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcft_kernels import constraints, merge_model
from tests.model import peft_models
from tests.model.peft_models import MODELS, TOKENS, lora
from tests.model_snapshot import ModelSnapshot

# PEFT corrects it without help.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def by_equation(model: nn.Module, h: Callable[[Tensor], Tensor]) -> Tensor:
    """The forward pass of `Base`, every LoRA layer as `x W^T + b + s B h(A x)`."""
    base = model.base_model.model

    def layer(tuner: Any, x: Tensor) -> Tensor:
        y = tuner.base_layer(x)
        for adapter in tuner.active_adapters:
            A, B = tuner.lora_A[adapter].weight, tuner.lora_B[adapter].weight
            y = y + tuner.scaling[adapter] * (h(x @ A.t()) @ B.t())
        return y

    x = base.embedding(TOKENS)
    x = layer(base.dense, (layer(base.query, x) * layer(base.value, x)).tanh())
    return base.convolution(x.transpose(1, 2))


@pytest.mark.parametrize("nonlinearity", FUNCTIONS)
def test_lora_with_a_nonlinearity(nonlinearity):
    model = lora(lora_alpha=5)
    before, keys = model(TOKENS), list(model.state_dict())
    torch.testing.assert_close(before, by_equation(model, lambda u: u))
    constraints.add_nonlinearity(model, nonlinearity)
    found = model(TOKENS)
    torch.testing.assert_close(found, by_equation(model, FUNCTIONS[nonlinearity]))
    assert not torch.allclose(found, before)
    assert list(model.state_dict()) == keys
    found.square().sum().backward()
    assert model.base_model.model.query.lora_A["default"].weight.grad.abs().max() > 0


def test_dropout_comes_first():
    model = lora(["query"], lora_dropout=0.5)
    constraints.add_nonlinearity(model, "tanh")
    layer, x = model.base_model.model.query, torch.randn(3, 16, dtype=torch.float64)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + layer.scaling["default"] * (dropped @ A.t()).tanh() @ B.t()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by", ["handle", "function"])
@pytest.mark.parametrize("kind", ["dcft", "lora", "both"])
def test_it_can_be_removed(kind, by):
    model = MODELS[kind]()
    before = model(TOKENS)
    handle = constraints.add_nonlinearity(model, "relu")
    during = model(TOKENS)
    assert not torch.allclose(during, before)
    handle.remove() if by == "handle" else constraints.remove_nonlinearity(model)
    assert torch.equal(model(TOKENS), before)
    handle.remove()  # a second time, nothing happens
    with pytest.raises(ValueError, match=r"^model: no adapter has a nonlinearity"):
        constraints.remove_nonlinearity(model)
    constraints.add_nonlinearity(model, "relu")
    assert torch.equal(model(TOKENS), during)
    constraints.remove_nonlinearity(model)
    merge_model(model) if kind == "dcft" else model.merge_adapter()
    torch.testing.assert_close(model(TOKENS), before)


def test_a_model_of_both_kinds_gets_it_in_both():
    model = peft_models.both()
    constraints.add_nonlinearity(model, "silu")
    base = model.base_model.model
    x = torch.randn(3, 16, dtype=torch.float64)
    plain = copy.deepcopy(base.query)
    plain.nonlinearity = None
    assert base.query.nonlinearity == "silu"
    assert not torch.allclose(base.query(x), plain(x))
    A, B = base.value.lora_A["default"].weight, base.value.lora_B["default"].weight
    increment = base.value.scaling["default"] * F.silu(x @ A.t()) @ B.t()
    torch.testing.assert_close(base.value(x), base.value.base_layer(x) + increment)


MERGES = {
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter-by-name": lambda model: model.merge_adapter(["default"]),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload-safe": lambda model: model.merge_and_unload(safe_merge=True),
    "delta": lambda model: model.base_model.model.query.get_delta_weight("default"),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("targets", [["query", "dense"], ["embedding", "convolution", "query"]])
def test_merging_is_refused_before_anything_happens(targets, merge):
    """Also where a layer without a nonlinearity, an embedding, would be merged first."""
    model = lora(targets)
    constraints.add_nonlinearity(model, "relu")
    expected, snapshot = model(TOKENS), ModelSnapshot(model)
    text = r"adapter 'default' has nonlinearity='relu'.*dcft_kernels\.constraints\.remove_nonlinear"
    with pytest.raises(RuntimeError, match=text):
        merge(model)
    snapshot.assert_unchanged()
    assert torch.equal(model(TOKENS), expected)


def test_inactive_adapters_stay_as_they_are():
    model = lora(["query"])
    peft_models.add_second(model, ["query"])
    first = model(TOKENS)
    model.set_adapter("second")
    second = model(TOKENS)
    constraints.add_nonlinearity(model, "relu")
    assert not torch.allclose(model(TOKENS), second)
    model.set_adapter("default")
    assert torch.equal(model(TOKENS), first)
    with pytest.raises(RuntimeError, match=r"adapter 'second' has nonlinearity='relu'"):
        model.merge_adapter(["second"])
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(TOKENS), first)


def test_copies_and_pickles_have_it_and_are_independent():
    model = lora(["embedding", "query", "dense"])
    before = model(TOKENS)
    constraints.add_nonlinearity(model, "gelu")
    expected = model(TOKENS)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(TOKENS), expected)
        with pytest.raises(RuntimeError, match="nonlinearity='gelu'"):
            twin.merge_adapter()
        constraints.remove_nonlinearity(twin)
        assert torch.equal(twin(TOKENS), before)
        twin.merge_adapter()
        assert not model.base_model.model.query.merged
    assert torch.equal(model(TOKENS), expected)


def test_compiled_equals_eager():
    torch._dynamo.reset()
    model = peft_models.both()
    constraints.add_nonlinearity(model, "gelu")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    torch._dynamo.reset()


def _dcft_with(**attributes: Any) -> nn.Module:
    """A model of which one layer differs."""
    model = peft_models.dcft()
    for name, value in attributes.items():
        setattr(model.value, name, value)
    return model


def _merged_lora() -> nn.Module:
    model = lora()
    model.merge_adapter()
    return model


def _lora_with_tanh() -> nn.Module:
    model = lora()
    constraints.add_nonlinearity(model, "tanh")
    return model


NO_ADAPTERS = r"^model: has neither DCFTLinear layers nor active PEFT"
REFUSED = {
    "adalora": (peft_models.adalora, ValueError,
                r"query' is a SVDLinear.*without calling them"),
    "dora": (lambda: lora(["query"], use_dora=True), ValueError,
             r"query' has the adapter 'default' of the kind Do[Rr][Aa].*plain LoRA on linear"),
    "bare-parameter": (peft_models.bare_parameter, ValueError,
                       r"query' is a ParamWrapper.*without calling them"),
    "embedding-alone": (lambda: lora(["embedding"]), ValueError, NO_ADAPTERS),
    "merged-lora": (_merged_lora, RuntimeError,
                    r"query' is merged; call unmerge_adapter\(\) first"),
    "twice-lora": (_lora_with_tanh, ValueError, r"query' has nonlinearity='tanh' already"),
    "backend": (lambda: _dcft_with(backend="reference"), ValueError,
                r"^model: 'value': backend: 'reference' does not compute nonlinearity='relu'"),
    "strategy": (lambda: _dcft_with(strategy="row_block"), ValueError,
                 r"^model: 'value': strategy: 'row_block' is one of the Triton kernels'"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_have_one_is_refused(build, error, text):
    model = build()
    snapshot = ModelSnapshot(model)
    with pytest.raises(error, match=text):
        constraints.add_nonlinearity(model, "relu")
    snapshot.assert_unchanged()


def test_attention_in_one_piece_is_refused():
    """Its adapters are multiplied out in every forward pass."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attention"]))
    text = r"attention' is a MultiheadAttention, which multiplies its factors without calling them"
    with pytest.raises(ValueError, match=text):
        constraints.add_nonlinearity(model, "relu")


def test_constraints_work_without_peft():
    script = """
import sys
sys.modules["peft"] = None
import dcft_kernels, torch
from dcft_kernels import constraints
model = torch.nn.Sequential(torch.nn.Linear(16, 16))
dcft_kernels.swap_linear(model)
handle = constraints.add_nonlinearity(model, "relu")
(model(torch.ones(2, 16)).sum() + constraints.constraint_loss(model, "diagonal")).backward()
handle.remove()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
