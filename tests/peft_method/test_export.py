"""Exports to plain LoRA: exact, in the layout that servers take."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import dcft_kernels as dcft
from dcft_kernels.peft import DCFTConfig, export_lora
from tests.peft_method.models import TARGETS, TOKENS, adapted, assert_close, base, layers
from tests.small_models import build_small_model, logits, randomize_adapters, small_inputs

PREFIX = "base_model.model."


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 3, "kernel_size": (3, 5), "stride": (2, 4)},
        {"r": 3, "kernel_size": (3, 5), "kernels": "per_rank"},
        {"r": 2, "kernel_size": (16, 4), "rank_pattern": {r".*\.0\..*": 1}},
    ],
)
def test_stock_peft_gives_the_same_logits(tmp_path, name, settings):
    targets = {
        "llama": ["q_proj", "down_proj"],
        "gpt2": ["c_attn", "c_proj"],
        "bert": ["query", "dense"],
        "t5": ["q", "wo"],
    }[name]
    model = adapted(model=build_small_model(name), target_modules=targets, **settings)
    report = export_lora(model, tmp_path / "lora")
    assert report.refused == {}
    served = peft.PeftModel.from_pretrained(build_small_model(name), tmp_path / "lora").eval()
    assert type(served.peft_config["default"]) is peft.LoraConfig
    inputs = small_inputs(name)
    assert_close(logits(served, inputs), logits(model, inputs))
    for layer in layers(model).values():
        twin = served.get_submodule(next(n for n, m in model.named_modules() if m is layer))
        delta = layer.get_delta_weight("default")
        assert_close(twin.get_delta_weight("default"), delta)


def test_factors_are_the_closed_form(tmp_path):
    model = adapted(target_modules=["query"], r=2, alpha=3.0)
    export_lora(model, tmp_path)
    adapter = layers(model)["query"].adapter("default")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"{PREFIX}query.lora_{side}.weight"] for side in "AB")
    assert torch.equal(A, torch.kron(adapter.A, torch.eye(8)))
    torch.testing.assert_close(B, 1.5 * torch.kron(adapter.B, adapter.C), rtol=1e-6, atol=0.0)


def test_layout(tmp_path):
    model = adapted(rank_pattern={"query": 3}, kernel_size=4, target_modules="all-linear")
    report = export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA", "r": 16, "lora_alpha": 16, "use_rslora": False, "use_dora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "init_lora_weights": True,
        "target_modules": sorted([*TARGETS, "head"]), "modules_to_save": None, "lora_bias": False,
        "layers_to_transform": None, "exclude_modules": None, "inference_mode": True,
    }  # fmt: skip
    found = {name: config[name] for name in expected}
    found["target_modules"] = sorted(found["target_modules"])
    assert found == expected
    assert report.ranks == {"query": 12, "value": 4, "dense": 4, "head": 4}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {
        f"{PREFIX}{name}.lora_{side}.weight" for name in report.ranks for side in "AB"
    }
    for name, rank in report.ranks.items():
        A, B = (tensors[f"{PREFIX}{name}.lora_{side}.weight"] for side in "AB")
        assert A.shape[0] == B.shape[1] == report.rank == 16
        assert not A[rank:].any()
        assert not B[:, rank:].any()
        assert A.dtype == B.dtype == torch.float32


@pytest.mark.parametrize(("r", "rank"), [(1, 8), (2, 16), (3, 32), (40, 320), (64, 512), (65, 520)])
def test_ranks_that_vllm_can_be_set_to(tmp_path, r, rank):
    report = export_lora(adapted(r=r), tmp_path)
    assert report.rank == rank
    assert ("vLLM" in report.refused) == (rank > 512)
    assert (f"--max-lora-rank {rank} " in str(report)) == (16 < rank <= 512)


def test_all_sources_give_the_same_files(tmp_path):
    model = adapted(r=2)
    model.save_pretrained(tmp_path / "peft")
    plain = base()
    dcft.swap_linear(plain, TARGETS, rank=2)
    for name, layer in layers(model).items():
        for factor in ("dcft_A", "dcft_B", "dcft_C"):
            twin = getattr(plain.get_submodule(name), factor)
            twin.data.copy_(getattr(layer, factor)["default"])
    dcft.freeze_base(plain)
    dcft.save_adapter(plain, tmp_path / "dcft")
    injected = base()
    peft.inject_adapter_in_model(
        DCFTConfig(target_modules=TARGETS, r=2, init_weights=False), injected, "other"
    )
    peft.set_peft_model_state_dict(injected, peft.get_peft_model_state_dict(model), "other")
    written = []
    compiled = torch.compile(model, backend="eager")
    for source in (model, compiled, tmp_path / "peft", plain, tmp_path / "dcft", injected):
        out = tmp_path / f"out{len(written)}"
        export_lora(source, out, adapter_name="other" if source is injected else "default")
        written.append((out / "adapter_model.safetensors").read_bytes())
    assert len(set(written)) == 1


def test_a_trained_head_goes_along_and_is_reported(tmp_path):
    model = adapted(modules_to_save=["head"])
    torch.nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    report = export_lora(model, tmp_path / "whole")
    assert report.modules_to_save == ["head"]
    assert report.refused.keys() == {"vLLM", "llama.cpp's converter"}
    assert "vLLM refuses it: weights of ['head']; it takes only layers named ('cl" in str(report)
    served = peft.PeftModel.from_pretrained(base(), tmp_path / "whole").eval()
    assert_close(served(TOKENS), model(TOKENS))
    report = export_lora(model, tmp_path / "adapter", modules_to_save=False)
    assert report.refused == {}
    served = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert served.modules_to_save is None


def test_what_no_lora_expresses(tmp_path):
    plain = base()
    dcft.swap_linear(plain, ["query"], nonlinearity="relu")
    with pytest.raises(RuntimeError, match=r"^export_lora: the layer 'query'"):
        export_lora(plain, tmp_path)
    model = adapted(bias="dcft_only")
    with pytest.raises(ValueError, match=r"^export_lora: 'query\.bias' was trained"):
        export_lora(model, tmp_path)
    with pytest.raises(ValueError, match=r"has no DCFT adapter 'other' and no DCFTLinear layers"):
        export_lora(model, tmp_path, adapter_name="other")
    with pytest.raises(TypeError, match=r"^model_or_dir: expected a model or a path"):
        export_lora(3, tmp_path)
    assert not list(tmp_path.iterdir())


def test_modules_that_were_trained_in_part(tmp_path):
    """PEFT saves and loads modules whole."""
    plain = base()
    dcft.swap_linear(plain, ["query"])
    dcft.freeze_base(plain, trainable=["head.bias"])
    with pytest.raises(
        ValueError, match=r"^head\.weight: not in the adapter, which has head\.bias"
    ):
        export_lora(plain, tmp_path)
    assert export_lora(plain, tmp_path, modules_to_save=False).modules_to_save == []


def test_merged_models_export_the_adapter(tmp_path):
    model = build_small_model("bert")
    dcft.swap_linear(model)
    dcft.freeze_base(model)
    randomize_adapters(model)
    expected = logits(model, small_inputs("bert"))
    dcft.merge_model(model)
    export_lora(model, tmp_path)
    served = peft.PeftModel.from_pretrained(build_small_model("bert"), tmp_path).eval()
    assert_close(logits(served, small_inputs("bert")), expected)


def test_lora_exports_add_up_where_kernel_sizes_differ(tmp_path):
    """What `add_weighted_adapter` advises."""
    first, second = adapted(seed=2), adapted(seed=3, kernel_size=4)
    model = adapted(seed=2)
    config = DCFTConfig(target_modules=TARGETS, init_weights=False, kernel_size=4)
    model.add_adapter("other", config)
    with pytest.raises(ValueError, match=r"kernel sizes or strides differ in 'query', .* export_l"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["default", "other"]
    for name, source in (("first", first), ("second", second)):
        export_lora(source, tmp_path / name)
    served = peft.PeftModel.from_pretrained(base(), tmp_path / "first")
    served.load_adapter(tmp_path / "second", "second")
    served.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", combination_type="cat")
    for name, layer in layers(first).items():
        expected = 0.5 * layer.get_delta_weight("default")
        expected = expected + 2.0 * layers(second)[name].get_delta_weight("default")
        twin = served.base_model.model.get_submodule(name)
        assert_close(twin.get_delta_weight("sum"), expected)
