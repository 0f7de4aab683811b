"""Wrong arguments and models that do not fit: what the error says, and that nothing has changed."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from dcft_kernels.peft import DCFTConfig, export_lora, hotswap_adapter
from tests.peft_method.models import TARGETS, adapted, base


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": 0}, ValueError, r"^r: expected a positive int, got 0"),
        ({"r": 1.5}, TypeError, r"^r: expected a positive int, got 1\.5"),
        ({"kernel_size": -8}, ValueError, r"^kernel_size: expected a positive int, got -8"),
        ({"kernel_size": [8, 8, 8]}, ValueError, r"^kernel_size: expected an int or a pair"),
        ({"stride": 9}, ValueError, r"^stride: expected at most the kernel size, 8"),
        ({"stride": "8"}, TypeError, r"^stride: expected an int or a pair"),
        ({"alpha": float("inf")}, ValueError, r"^alpha: expected a finite number, got inf"),
        ({"dropout": 1.0}, ValueError, r"^dropout: expected a probability in \[0, 1\), got 1\.0"),
        ({"init_weights": "gaussian"}, ValueError, r"^init_weights: expected True, False or"),
        ({"kernels": "each"}, ValueError, r"^kernels: expected one of 'shared', 'per_rank', got"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"^rank_pattern\['q'\]: expected a positive int"),
        ({"alpha_pattern": {"q": "1"}}, TypeError, r"^alpha_pattern\['q'\]: expected a number"),
        ({"kernel_size_pattern": 8}, TypeError, r"^kernel_size_pattern: expected a dict"),
        ({"stride_pattern": {"q": 0}}, ValueError, r"^stride_pattern\['q'\]: expected a positive"),
        ({"layer_sizes": [1, 2]}, TypeError, r"^layer_sizes: expected a dict of pairs, got"),
        ({"layer_sizes": {"q": 3.5}}, TypeError, r"^layer_sizes\['q'\]: expected an int or a pair"),
        ({"task_type": "CHESS"}, ValueError, r"Invalid task type: 'CHESS'"),
        ({"target_modules": "q", "layers_to_transform": 1}, ValueError,
         r"^`layers_to_transform` cannot be used when `target_modules` is a str\."),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, ValueError,
         r"^When `layers_pattern` is specified, `layers_to_transform` must also be specified\."),
    ],
)  # fmt: skip
def test_settings(settings, error, message):
    with pytest.raises(error, match=message):
        DCFTConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_modules": ["query", "embedding"]}, TypeError,
         r"embedding is not supported: Embedding\. .* name it in `modules_to_save`\."),
        ({"target_modules": ["convolution"]}, TypeError,
         r"convolution is not supported: Conv1d\. .* `torch\.nn\.Linear` \(optionally quantized\)"),
        ({"target_modules": ["quary"]}, ValueError, r"Target modules \{'quary'\} not found in"),
        ({"target_modules": None}, ValueError, r"Please specify `target_modules`"),
        ({"stride": 6, "kernel_size_pattern": {"value": 4}}, ValueError,
         r"^stride: expected at most the kernel size, 4 on the out side, got 6"),
    ],
)  # fmt: skip
def test_models(settings, error, message):
    """The model is unchanged, also where some layers had been replaced already."""
    model = base()
    model.convolution = nn.Conv1d(4, 4, 1)
    model.embedding.requires_grad_(False)

    def parameters() -> dict[str, tuple[int, bool]]:
        return {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}

    before = parameters()
    with pytest.raises(error, match=message):
        adapted(model=model, **settings)
    assert parameters() == before
    wrapped = adapted(model=model)
    wrapped.base_model.set_adapter("default", inference_mode=True)
    before = parameters()
    with pytest.raises(error, match=message):
        wrapped.add_adapter("other", DCFTConfig(**{"target_modules": TARGETS} | settings))
    assert parameters() == before
    assert wrapped.active_adapters == ["default"]


def test_a_bias_that_peft_does_not_know():
    model = base()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(NotImplementedError, match="Requested bias: some"):
        adapted(model=model, bias="some")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_another_base_model(tmp_path):
    model = adapted(target_modules=["query"], kernel_size=7)
    model.save_pretrained(tmp_path)
    other = base()
    # Ragged windows have factors of the same shapes.
    other.query = nn.Linear(15, 24)
    before = {name: id(module) for name, module in other.named_modules()}
    message = (
        r"^model: is not the base model .* query is \[24, 15\] in the model, \[24, 16\] in the"
    )
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(other, tmp_path)
    assert {name: id(module) for name, module in other.named_modules()} == before
    fewer = nn.Sequential(base(), base())
    two = adapted(model=fewer, target_modules=["query"])
    two.save_pretrained(tmp_path / "two")
    for one in (nn.Sequential(base()), base()):
        with pytest.raises(ValueError, match=r"^state_dict: .\.query\.dcft_A and . other weights"):
            peft.PeftModel.from_pretrained(one, tmp_path / "two")
    with pytest.raises(ValueError, match="Target modules"):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 3)), tmp_path)
    second = adapted(target_modules=["query"])
    second.base_model.model.query.base_layer.in_features = 15
    with pytest.raises(ValueError, match=r"^model: is not the base model"):
        second.load_adapter(tmp_path, "second")
    assert list(second.peft_config) == ["default"]


def test_weights_of_another_method_or_in_part(tmp_path):
    model = adapted()
    state = peft.get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match=r"^state_dict: has no weights of DCFT; were they saved"):
        peft.set_peft_model_state_dict(
            model, {"base_model.model.query.lora_A.weight": torch.ones(1)}
        )
    del state["base_model.model.query.dcft_B"]
    with pytest.raises(
        ValueError, match=r"^state_dict: has only dcft_A, dcft_C of query; the file"
    ):
        peft.set_peft_model_state_dict(model, state)


def test_weights_of_the_other_kind_of_kernels(tmp_path):
    for kernels, other in (("shared", "per_rank"), ("per_rank", "shared")):
        model = adapted(r=2, kernels=kernels)
        state = peft.get_peft_model_state_dict(adapted(r=2, kernels=other))
        with pytest.raises(RuntimeError, match=r"size mismatch for .*query\.dcft_C\.default"):
            peft.set_peft_model_state_dict(model, state)
        adapted(r=2, kernels=other).save_pretrained(tmp_path / other)
        with pytest.raises(ValueError, match=r"^folder: .* differs from .* in 3 layers.*per_rank"):
            hotswap_adapter(model, tmp_path / other)
        config = tmp_path / other / "adapter_config.json"
        config.write_text(config.read_text().replace(f'"{other}"', f'"{kernels}"'))
        with pytest.raises(ValueError, match=r"\.dcft_C: expected floats \["):
            export_lora(tmp_path / other, tmp_path / "lora")


def test_unknown_adapters():
    model = adapted()
    with pytest.raises(ValueError, match="Adapter absent not found"):
        model.set_adapter("absent")
    with pytest.raises(ValueError, match="Adapter absent does not exist"):
        model.delete_adapter("absent")
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", DCFTConfig(target_modules=TARGETS))
    assert model.active_adapters == ["default"]


def test_truncated_weights(tmp_path):
    adapted().save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(SafetensorError):
        peft.PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "options", "message"),
    [
        (["default", "absent"], [1.0, 1.0], "sum", {}, r"Adapter absent does not exist; there "),
        (["default"], [1.0, 2.0], "sum", {}, r"^weights: expected one .* 1 adapters and 2"),
        ([], [], "sum", {}, r"^weights: expected one for each of at least one adapter"),
        (["default"], [1.0], "other", {}, r"Adapter with name 'other' already exists"),
        (["default"], [1.0], "a/b", {}, r"^adapter_name: expected a name without"),
        (["default", "wide"], [1.0, 1.0], "sum", {}, r"^adapters: their kernel sizes or strides"),
        (["default"], [1.0], "sum", {"combination_type": "svd"}, r"^combination_type: expected"),
        (["heads"], [1.0], "sum", {}, r"^adapters: 'heads' has modules_to_save or biases"),
    ],
)  # fmt: skip
def test_weighted_sums(adapters, weights, name, options, message):
    model = adapted()
    for other, settings in {
        "other": {},
        "wide": {"kernel_size": 4},
        "heads": {"modules_to_save": ["head"]},
    }.items():
        model.add_adapter(other, DCFTConfig(target_modules=TARGETS, **settings))
    before, configs = set(model.state_dict()), list(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name, **options)
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == configs
