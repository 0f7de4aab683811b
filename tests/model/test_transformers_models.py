"""DCFT in place of the linear layers of real transformers architectures, built small."""

from __future__ import annotations

import copy
import io
import pickle

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
from tests.small_models import (
    SMALL_MODELS,
    build_small_model,
    logits,
    randomize_adapters,
    small_inputs,
)

NAMES = sorted(SMALL_MODELS)
TIED = [name for name in NAMES if SMALL_MODELS[name].tied]
GENERATIVE = ["gpt2", "llama"]
# The name that every release of transformers so far knows.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")


@pytest.fixture(scope="module", params=NAMES)
def pristine(request) -> tuple[str, nn.Module, Tensor]:
    """Name, base model and its logits; nobody changes the model."""
    model = build_small_model(request.param)
    return request.param, model, _logits(model, request.param)


def _adapted(base: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(base)
    swap_linear(model, init="paper", **options)
    randomize_adapters(model)
    return model


@torch.no_grad()
def _logits(model: nn.Module, name: str) -> Tensor:
    return logits(model, small_inputs(name))


def _linear_names(model: nn.Module) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }


def _layers(model: nn.Module) -> dict[str, DCFTLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, DCFTLinear)}


def _adapter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".dcft_" in name}


def test_all_linear_takes_the_backbone_and_leaves_out_heads(pristine):
    name, base, _ = pristine
    model = copy.deepcopy(base)
    expected = _linear_names(model) - SMALL_MODELS[name].heads
    assert len(expected) >= 8

    names = swap_linear(model)

    assert set(names) == expected
    assert len(names) == len(expected)
    for head in SMALL_MODELS[name].heads:
        assert type(model.get_submodule(head)) is type(base.get_submodule(head))
    assert not any(isinstance(m, nn.Embedding) and hasattr(m, "dcft_A") for m in model.modules())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("init", ["balanced", "zero"])
def test_a_zero_start_gives_identical_logits(pristine, init, training):
    name, base, _ = pristine
    base = copy.deepcopy(base).train(training)
    torch.manual_seed(5)
    expected = _logits(base, name)
    model = copy.deepcopy(base)
    swap_linear(model, init=init)
    torch.manual_seed(5)  # the model's own dropout must draw the same masks
    assert torch.equal(_logits(model, name), expected)


def test_adapters_change_the_output(pristine):
    """What makes the comparisons below mean something."""
    name, base, expected = pristine
    change = _logits(_adapted(base), name) - expected
    assert change.std() > 0.3 * expected.std()


def test_gradients_reach_every_adapter_and_nothing_else(pristine):
    name, base, _ = pristine
    model = _adapted(base)
    freeze_base(model)
    trainable = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == _adapter_names(model)
    assert parameter_counts(model).trainable == parameter_counts(model).adapter

    logits(model, small_inputs(name)).square().mean().backward()

    for parameter_name, parameter in model.named_parameters():
        if parameter_name in trainable:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.abs().max() > 0, parameter_name
        else:
            assert parameter.grad is None, parameter_name


@pytest.mark.parametrize("init", ["balanced", "zero"])
def test_a_zero_start_moves_B_alone_at_first(pristine, init):
    name, base, _ = pristine
    model = copy.deepcopy(base)
    swap_linear(model, init=init)
    freeze_base(model)
    logits(model, small_inputs(name)).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        if ".dcft_" in parameter_name:
            moves = bool(parameter.grad.abs().max() > 0)
            assert moves == parameter_name.endswith("dcft_B"), parameter_name


def test_merged_equals_unmerged(pristine):
    name, base, _ = pristine
    model = _adapted(base)
    unmerged = _logits(model, name)
    exact = copy.deepcopy(model).double()
    unmerged_exact = _logits(exact, name)

    merge_model(model)
    merge_model(exact)

    merged, merged_exact = _logits(model, name), _logits(exact, name)
    # In float64, the two are one function but for the order of a sum.
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
    before = {key: value.clone() for key, value in model.state_dict().items()}
    identities = {key: id(parameter) for key, parameter in model.named_parameters()}
    expected = _logits(model, name)

    merge_model(model)
    for path in _layers(model):
        assert not torch.equal(model.get_submodule(path).weight, base.get_submodule(path).weight)
    unmerge_model(model)

    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == identities
    assert torch.equal(_logits(model, name), expected)


def test_unloaded_model_is_an_ordinary_one(pristine):
    name, base, _ = pristine
    model = _adapted(base)
    merged = copy.deepcopy(model)
    merge_model(merged)

    merge_model(model, unload=True)

    kinds = [(n, type(module)) for n, module in model.named_modules()]
    assert kinds == [(n, type(module)) for n, module in base.named_modules()]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(_logits(model, name), _logits(merged, name))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_unloaded_model_survives_save_pretrained(name, tmp_path):
    model = _adapted(build_small_model(name))
    merge_model(model, unload=True)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(reloaded, name), _logits(model, name))


@pytest.mark.parametrize("target", ["base", "swapped"])
def test_adapter_round_trips(pristine, target, tmp_path):
    name, base, expected_of_base = pristine
    model = _adapted(base, rank=2, kernel_size=4, alpha=3.0)
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    if target == "swapped":
        swap_linear(fresh, rank=2, kernel_size=4, alpha=3.0, init="zero")
    assert torch.equal(_logits(fresh, name), expected_of_base)

    names = load_adapter(fresh, tmp_path)

    assert names == list(_layers(model))
    assert torch.equal(_logits(fresh, name), _logits(model, name))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 64 * 1024


def test_state_dict_of_the_base_loads(pristine):
    name, base, expected = pristine
    model = _adapted(base)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".dcft_" not in parameter_name:
                parameter.mul_(0.5)
            if parameter_name.endswith("dcft_B"):
                parameter.zero_()
    assert not torch.equal(_logits(model, name), expected)

    result = model.load_state_dict(base.state_dict(), strict=False)

    assert set(result.missing_keys) == _adapter_names(model)
    assert result.unexpected_keys == []
    assert torch.equal(_logits(model, name), expected)


def test_state_dict_without_adapters_is_the_bases(pristine):
    name, base, expected = pristine
    model = _adapted(base)
    plain = {key: value for key, value in model.state_dict().items() if ".dcft_" not in key}
    fresh = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(plain)  # strictly: the very same keys
    assert torch.equal(_logits(fresh, name), expected)


def test_swapped_state_dict_loads_into_a_swapped_model(pristine):
    name, base, _ = pristine
    model = _adapted(base)
    other = copy.deepcopy(base)
    swap_linear(other, init="paper")
    other.load_state_dict(model.state_dict())
    assert torch.equal(_logits(other, name), _logits(model, name))


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_stay_tied(name):
    model = build_small_model(name)
    tied = SMALL_MODELS[name].tied

    def all_one(expected: nn.Parameter) -> bool:
        return all(model.get_parameter(path) is expected for path in tied)

    shared = model.get_parameter(tied[0])
    assert all_one(shared)
    swap_linear(model, init="paper")
    assert all_one(shared)
    randomize_adapters(model)
    merge_model(model)
    assert all_one(shared)
    unmerge_model(model)
    assert all_one(shared)
    model.tie_weights()
    assert all_one(shared)


@pytest.mark.parametrize("name", TIED)
def test_an_adapted_tied_head_leaves_the_embedding_alone(name):
    model = build_small_model(name)
    head, embedding = (path.removesuffix(".weight") for path in SMALL_MODELS[name].tied[:2])
    shared = model.get_parameter(f"{embedding}.weight")
    before = shared.detach().clone()
    ids = torch.arange(5)
    expected = model.get_submodule(embedding)(ids).detach().clone()

    assert swap_linear(model, [head.rsplit(".", 1)[-1]], init="paper") == [head]
    randomize_adapters(model)
    layer = model.get_submodule(head)
    assert layer.weight is shared
    unmerged = _logits(model, name)
    layer.merge()

    assert layer.weight is not shared
    assert model.get_parameter(f"{embedding}.weight") is shared
    assert torch.equal(model.get_submodule(embedding)(ids), expected)
    torch.testing.assert_close(_logits(model, name), unmerged, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert layer.weight is shared
    assert torch.equal(shared, before)
    assert torch.equal(_logits(model, name), unmerged)


def _gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    logits(model, small_inputs(name)).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
def test_gradient_checkpointing_gives_the_same_gradients(pristine, dropout):
    name, base, _ = pristine
    model = _adapted(base, dropout=dropout).train()
    freeze_base(model)
    calls = []
    layer = next(iter(_layers(model).values()))
    layer.register_forward_hook(lambda *_: calls.append(1))
    expected = _gradients(model, name)
    assert expected.keys() == _adapter_names(model)
    calls_without = len(calls)

    model.gradient_checkpointing_enable()
    # Inputs that require a gradient are what PEFT trainings switch on beside checkpointing.
    model.enable_input_require_grads()
    found = _gradients(model, name)

    assert len(calls) - calls_without == 2 * calls_without, "nothing was recomputed"
    assert found.keys() == expected.keys()
    for parameter_name in expected:
        assert torch.equal(found[parameter_name], expected[parameter_name]), parameter_name


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_of_either_kind(reentrant):
    model = _adapted(build_small_model("llama"), dropout=0.1).train()
    freeze_base(model)
    expected = _gradients(model, "llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = _gradients(model, "llama")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", GENERATIVE)
def test_generate_works_merged_and_unmerged(name):
    # In float64, so that rounding cannot turn the choice of a token.
    base = build_small_model(name).double()
    model = _adapted(base)
    prompt = small_inputs(name)["input_ids"][:1]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings["attention_mask"] = torch.ones_like(prompt)

    unmerged = model.generate(prompt, **settings)
    merge_model(model)
    merged = model.generate(prompt, **settings)
    unmerge_model(model)

    assert unmerged.shape == (1, prompt.shape[1] + 12)
    assert torch.equal(merged, unmerged)
    assert torch.equal(model.generate(prompt, **settings, use_cache=False), unmerged)
    assert not torch.equal(base.generate(prompt, **settings), unmerged)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_dtype_changes_while_merged(pristine, dtype):
    name, base, _ = pristine
    model = _adapted(base)
    merge_model(model)
    layers = _layers(model)
    merged_weights = {path: layer.weight.detach().clone() for path, layer in layers.items()}

    model.to(dtype)

    assert all(parameter.dtype == dtype for parameter in model.parameters())
    for path, layer in layers.items():
        assert torch.equal(layer.weight, merged_weights[path].to(dtype)), path
    assert _logits(model, name).dtype == dtype
    unmerge_model(model)
    for path, layer in layers.items():
        assert layer.weight.dtype == dtype, path
        assert torch.equal(layer.weight, base.get_submodule(path).weight.to(dtype)), path
    assert _logits(model, name).dtype == dtype


@pytest.mark.gpu
def test_device_changes_while_merged(pristine):
    _, base, _ = pristine
    model = _adapted(base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merge_model(model)
    model.to("cuda")
    assert all(value.is_cuda for value in model.state_dict().values())
    unmerge_model(model)
    model.to("cpu")
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.gpu
def test_adapter_trained_on_a_gpu_loads_on_the_cpu(pristine, tmp_path):
    name, base, _ = pristine
    model = _adapted(base).to("cuda")
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path)
    assert torch.equal(_logits(fresh, name), _logits(model.to("cpu"), name))
