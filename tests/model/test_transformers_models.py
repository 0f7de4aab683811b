"""DCFT in place of the linear layers of real transformers architectures, built small."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dcft_kernels import (
    DCFTLinear,
    freeze_base,
    load_adapter,
    merge_model,
    parameter_counts,
    save_adapter,
    swap_linear,
    unmerge_model,
)
from tests.model_snapshot import ModelSnapshot
from tests.small_models import (
    SMALL_MODELS,
    build_small_model,
    logits,
    randomize_adapters,
    small_inputs,
)

TIED = [name for name in SMALL_MODELS if SMALL_MODELS[name].tied]
# The name that every release of transformers so far knows.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")

Pristine = tuple[str, nn.Module, Tensor]


@pytest.fixture(scope="module", params=SMALL_MODELS)
def pristine(request: pytest.FixtureRequest) -> Pristine:
    """Name, base model and its logits; no test changes the model."""
    model = build_small_model(request.param)
    return request.param, model, _logits(model, request.param)


def _adapted(base: nn.Module, **options: Any) -> nn.Module:
    model = copy.deepcopy(base)
    swap_linear(model, init="paper", **options)
    randomize_adapters(model)
    return model


@torch.no_grad()
def _logits(model: nn.Module, name: str) -> Tensor:
    return logits(model, small_inputs(name))


def _gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    logits(model, small_inputs(name)).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _layers(model: nn.Module) -> dict[str, DCFTLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, DCFTLinear)}


def _adapter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".dcft_" in name}


def test_all_linear_takes_the_backbone_and_leaves_out_heads(pristine):
    name, base, _ = pristine
    model = copy.deepcopy(base)
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    expected = linear - SMALL_MODELS[name].heads
    assert len(expected) >= 8
    names = swap_linear(model)
    assert set(names) == expected == set(_layers(model))
    assert len(names) == len(expected)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_fresh_adapter_changes_nothing_and_moves_B_alone(pristine, training):
    name, base, _ = pristine
    base = copy.deepcopy(base).train(training)
    torch.manual_seed(5)
    expected = _logits(base, name)
    swap_linear(base)
    torch.manual_seed(5)  # the model's own dropout must draw the same masks
    assert torch.equal(_logits(base, name), expected)
    freeze_base(base)
    for parameter_name, gradient in _gradients(base, name).items():
        moves = bool(gradient.abs().max() > 0)
        assert moves == parameter_name.endswith("dcft_B"), parameter_name


def test_gradients_reach_every_adapter_and_nothing_else(pristine):
    name, base, expected = pristine
    model = _adapted(base)
    # What gives the other comparisons a meaning.
    assert (_logits(model, name) - expected).std() > 0.3 * expected.std()
    freeze_base(model)
    assert parameter_counts(model).trainable == parameter_counts(model).adapter
    gradients = _gradients(model, name)
    assert gradients.keys() == _adapter_names(model)
    for parameter_name, gradient in gradients.items():
        assert gradient.isfinite().all(), parameter_name
        assert gradient.abs().max() > 0, parameter_name


def test_gradient_checkpointing_gives_the_same_gradients(pristine):
    name, base, _ = pristine
    model = _adapted(base, dropout=0.2).train()
    freeze_base(model)
    calls: list[int] = []
    next(iter(_layers(model).values())).register_forward_hook(lambda *_: calls.append(1))
    expected = _gradients(model, name)
    assert expected.keys() == _adapter_names(model)
    calls_without = len(calls)
    # What PEFT trainings switch on together with checkpointing.
    model.enable_input_require_grads()
    # The reentrant kind sums T5's gradients in another order.
    for reentrant in (False, True) if name != "t5" else (False,):
        calls.clear()
        kind = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        found = _gradients(model, name)
        assert len(calls) == 2 * calls_without, "nothing was recomputed"
        assert found.keys() == expected.keys()
        for parameter_name in expected:
            assert torch.equal(found[parameter_name], expected[parameter_name]), parameter_name


def test_merged_equals_unmerged(pristine):
    name, base, _ = pristine
    model = _adapted(base)
    exact = copy.deepcopy(model).double()
    unmerged, unmerged_exact = _logits(model, name), _logits(exact, name)

    merge_model(model)
    merge_model(exact)

    merged, merged_exact = _logits(model, name), _logits(exact, name)
    # In float64, the two are one function, except for the order of a sum.
    scale = merged_exact.abs().max()
    assert (merged_exact - unmerged_exact).abs().max() <= 1e-12 * scale
    # In float32, the adapter may be off by twice what PyTorch's plain layers are, plus an epsilon:
    # of the mean; at the worst element, one for each layer, whose sum with the adapter is rounded.
    epsilon = torch.finfo(torch.float32).eps * scale
    plain_error, adapter_error = (merged - merged_exact).abs(), (unmerged - merged_exact).abs()
    assert adapter_error.max() <= 2 * plain_error.max() + len(_layers(model)) * epsilon
    assert adapter_error.square().mean().sqrt() <= 2 * plain_error.square().mean().sqrt() + epsilon


def test_unmerge_restores_bit_for_bit(pristine):
    name, base, _ = pristine
    model = _adapted(base)
    expected, snapshot = _logits(model, name), ModelSnapshot(model)
    merge_model(model)
    for path, layer in _layers(model).items():
        assert layer.merged
        assert not torch.equal(layer.weight, base.get_submodule(path).weight)
    unmerge_model(model)
    snapshot.assert_unchanged()
    assert torch.equal(_logits(model, name), expected)


def test_an_unloaded_model_is_an_ordinary_one(pristine, tmp_path):
    name, base, _ = pristine
    model = _adapted(base)
    merged = copy.deepcopy(model)
    merge_model(merged)

    merge_model(model, unload=True)

    kinds = [(n, type(module)) for n, module in model.named_modules()]
    assert kinds == [(n, type(module)) for n, module in base.named_modules()]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(_logits(model, name), _logits(merged, name))
    merge_model(merged, unload=True)
    assert torch.equal(_logits(model, name), _logits(merged, name))
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(reloaded, name), _logits(model, name))


def test_an_adapted_model_saves_a_checkpoint_of_its_base(pristine, tmp_path):
    name, base, expected = pristine
    model = _adapted(base)
    model.save_pretrained(tmp_path)
    reloaded, report = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(_logits(reloaded.eval(), name), expected)
    assert not report["missing_keys"]
    assert all(".dcft_" in key for key in report["unexpected_keys"])
    merge_model(model)
    with pytest.warns(UserWarning, match=r"merge_model\(model, unload=True\) before saving"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_stay_tied(name):
    model = build_small_model(name)
    tied = SMALL_MODELS[name].tied
    shared = model.get_parameter(tied[0])
    for step in (
        lambda: swap_linear(model, init="paper"),
        lambda: merge_model(model),
        lambda: unmerge_model(model),
        model.tie_weights,
    ):
        step()
        assert all(model.get_parameter(path) is shared for path in tied)


@pytest.mark.parametrize("name", TIED)
def test_an_adapted_tied_head_leaves_the_embedding_alone(name):
    model = build_small_model(name)
    head, embedding = (path.removesuffix(".weight") for path in SMALL_MODELS[name].tied[:2])
    shared = model.get_parameter(f"{embedding}.weight")
    before = shared.detach().clone()

    assert swap_linear(model, [head.rsplit(".", 1)[-1]], init="paper") == [head]
    randomize_adapters(model)
    layer = model.get_submodule(head)
    assert layer.weight is shared
    unmerged = _logits(model, name)
    layer.merge()

    assert layer.weight is not shared
    assert model.get_parameter(f"{embedding}.weight") is shared
    assert torch.equal(shared, before)
    torch.testing.assert_close(_logits(model, name), unmerged, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert layer.weight is shared
    assert torch.equal(shared, before)
    assert torch.equal(_logits(model, name), unmerged)


@pytest.mark.parametrize("target", ["base", "swapped"])
def test_adapter_round_trips(pristine, target, tmp_path):
    name, base, _ = pristine
    options = {"rank": 2, "kernel_size": 4, "alpha": 3.0}
    model, fresh = _adapted(base, **options), copy.deepcopy(base)
    save_adapter(model, tmp_path)
    if target == "swapped":
        swap_linear(fresh, **options, init="zero")
    assert load_adapter(fresh, tmp_path) == list(_layers(model))
    assert torch.equal(_logits(fresh, name), _logits(model, name))


def test_state_dicts_load_with_and_without_adapters(pristine):
    name, base, _ = pristine
    model, twin = _adapted(base), copy.deepcopy(base)
    swap_linear(twin, init="paper")
    twin.load_state_dict(model.state_dict())
    assert torch.equal(_logits(twin, name), _logits(model, name))
    result = twin.load_state_dict(base.state_dict(), strict=False)
    assert set(result.missing_keys) == _adapter_names(model)
    assert result.unexpected_keys == []


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_are_equal_and_independent(pristine, duplicate, merged):
    name, base, _ = pristine
    model = _adapted(base)
    unmerged = _logits(model, name)
    if merged:
        merge_model(model)
    expected = _logits(model, name)

    twin = duplicate(model)

    assert torch.equal(_logits(twin, name), expected)
    originals = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in originals for parameter in twin.parameters())
    for path in SMALL_MODELS[name].tied:
        assert twin.get_parameter(path) is twin.get_parameter(SMALL_MODELS[name].tied[0])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.25)
    assert torch.equal(_logits(model, name), expected)
    if merged:
        unmerge_model(model)
        assert torch.equal(_logits(model, name), unmerged)


@pytest.mark.gpu
def test_an_adapter_trained_on_a_gpu_loads_on_the_cpu(pristine, tmp_path):
    name, base, _ = pristine
    model = _adapted(base).to("cuda")
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path)
    assert torch.equal(_logits(fresh, name), _logits(model.to("cpu"), name))
