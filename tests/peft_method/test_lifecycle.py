"""Saving, loading, and what other libraries do with a PEFT model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from dcft_kernels.peft import DCFTConfig, export_lora, hotswap_adapter, save_pretrained
from tests.peft_method.models import TARGETS, TOKENS, adapted, assert_close, base, factors, layers
from tests.small_models import build_small_model, logits, small_inputs


def causal(seed: int = 2, **settings):
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    return adapted(seed, build_small_model("llama"), **settings)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("safe_serialization", [False, True])
def test_saved_and_loaded(tmp_path, low_cpu_mem_usage, safe_serialization):
    model = adapted(
        r=2, kernel_size=(5, 8), alpha_pattern={"dense": 7.0}, modules_to_save=["head"], bias="all"
    )
    torch.nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    torch.nn.init.normal_(layers(model)["query"].base_layer.bias)
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = peft.PeftModel.from_pretrained(
        base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert factors(loaded).keys() == factors(model).keys()
    assert all("bias" in name for name, p in loaded.named_parameters() if p.requires_grad)


def test_the_same_folder_loaded_twice(tmp_path):
    adapted(modules_to_save=["head"]).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base(), tmp_path)
    result = model.load_adapter(tmp_path, "again", is_trainable=True)
    assert not result.unexpected_keys
    configs = [model.peft_config[name].to_dict() for name in ("default", "again")]
    assert configs[0] | {"inference_mode": False} == configs[1]


def test_config_survives_its_file(tmp_path):
    config = DCFTConfig(
        r=2, kernel_size=(4, 8), stride=(2, 8), kernel_size_pattern={"a": (2, 2)}, alpha=1.5,
        stride_pattern={"a": 1}, init_weights="zero", exclude_modules=["b"], task_type="SEQ_CLS",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(read) is DCFTConfig
    assert read.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DCFT"


def test_a_config_can_be_used_for_another_model_after_saving(tmp_path):
    config = DCFTConfig(target_modules=["0"])
    for size in (16, 24):
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(size, 8)), config)
        model.save_pretrained(tmp_path)
        for _ in range(2):  # a config that was read keeps them
            saved = json.loads((tmp_path / "adapter_config.json").read_text())
            assert saved["layer_sizes"] == {"0": [8, size]}
            peft.PeftConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(40, 8)), config)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layer_sizes"] is None


def test_auto_peft_model(tmp_path):
    folder = str(tmp_path / "base")
    build_small_model("llama").save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = adapted(model=model, target_modules=None, task_type="CAUSAL_LM")  # PEFT's targets
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    inputs = small_inputs("llama")
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))
    assert set(layers(loaded)) == {"q_proj", "v_proj"}


def test_transformers_own_adapters(tmp_path, monkeypatch):
    # transformers asks for a version of peft that may not be out yet; the calls are the same.
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)
    model, inputs = build_small_model("llama"), small_inputs("llama")
    before = logits(model, inputs)
    torch.manual_seed(3)
    model.add_adapter(DCFTConfig(target_modules=["q_proj"], init_weights=False))
    expected = logits(model, inputs)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    other = build_small_model("llama")
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other, inputs), expected)
    other.disable_adapters()
    assert torch.equal(logits(other, inputs), before)
    other.enable_adapters()
    other.delete_adapter("default")
    assert torch.equal(logits(other, inputs), before)


def test_compiles_whole_and_hotswaps_without_recompiling(tmp_path):
    inputs, expected = small_inputs("llama"), {}
    for name, seed, alpha in (("first", 4, 2.0), ("second", 5, 3.0)):
        model = causal(seed, alpha=alpha)
        expected[name] = logits(model, inputs)
        model.save_pretrained(tmp_path / name)
    model = causal(6, alpha=2.0)
    counter = CompileCounter()
    compiled = torch.compile(model.base_model.model, backend=counter, fullgraph=True)
    with torch.no_grad():
        logits(compiled, inputs)
        for name, y in expected.items():
            hotswap_adapter(compiled, tmp_path / name)
            assert_close(logits(compiled, inputs), y)
    assert counter.frame_count == 1
    hotswap_adapter(model, tmp_path / "first")
    assert torch.equal(logits(model, inputs), expected["first"])


def test_hotswap_takes_everything_that_was_trained(tmp_path):
    model = adapted(bias="dcft_only", modules_to_save=["head"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    other = adapted(seed=5, bias="dcft_only", modules_to_save=["head"])
    hotswap_adapter(other, tmp_path)
    assert torch.equal(other(TOKENS), model(TOKENS))
    injected = base()
    config = DCFTConfig(target_modules=TARGETS, bias="dcft_only", modules_to_save=["head"])
    peft.inject_adapter_in_model(config, injected)
    hotswap_adapter(injected, tmp_path)
    assert torch.equal(injected(TOKENS), model(TOKENS))


def test_compiled_blocks_keep_their_names(tmp_path):
    model = causal()
    inputs = small_inputs("llama")
    expected = logits(model, inputs)
    blocks = model.base_model.model.model.layers
    for number, block in enumerate(blocks):
        blocks[number] = torch.compile(block, backend="eager")
    export_lora(model, tmp_path / "lora")
    served = peft.PeftModel.from_pretrained(build_small_model("llama"), tmp_path / "lora").eval()
    assert_close(logits(served, inputs), expected)
    model.save_pretrained(tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(build_small_model("llama"), tmp_path / "peft").eval()
    assert torch.equal(logits(loaded, inputs), expected)
    causal(5).save_pretrained(tmp_path / "other")
    hotswap_adapter(model, tmp_path / "other")
    assert_close(logits(model, inputs), logits(causal(5), inputs))
    model.load_adapter(tmp_path / "peft", "again")
    model.set_adapter("again")
    assert_close(logits(model, inputs), expected)


def test_an_adapted_output_layer(tmp_path):
    """PEFT saves the base weight of such a layer with the adapter."""
    model = causal(target_modules=["q_proj", "lm_head"])
    inputs = small_inputs("llama")
    expected = logits(model, inputs)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "peft")
    assert export_lora(tmp_path / "peft", tmp_path / "lora").refused == {}
    for folder in ("peft", "lora"):
        fresh = build_small_model("llama")
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / folder).eval()
        assert_close(logits(loaded, inputs), expected)


def test_an_adapter_inside_of_another_is_not_exported(tmp_path):
    inner = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["query"]))
    model = adapted(model=inner.base_model.model, target_modules=["query"])
    with pytest.raises(ValueError, match=r"is part of another adapter, inside of this one"):
        export_lora(model, tmp_path)


def test_renamed_modules(tmp_path):
    """PEFT's `key_mapping`, which transformers also uses where an architecture has changed."""
    model = causal(target_modules=["q_proj", "lm_head"])
    expected = logits(model, small_inputs("llama"))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    renamed = build_small_model("llama")
    renamed.vlm, renamed.base_model_prefix = renamed.model, "vlm"
    del renamed.model
    mapping = {r"^model\.": "vlm."}
    loaded = peft.PeftModel.from_pretrained(renamed, tmp_path, key_mapping=mapping)
    inner = loaded.base_model.model
    inner.model = inner.vlm  # so that its forward pass finds it
    assert torch.equal(logits(inner.eval(), small_inputs("llama")), expected)


def test_hotswap_refuses_and_leaves_the_model_as_it_is(tmp_path):
    model = adapted(modules_to_save=["head"])
    before = copy.deepcopy(model.state_dict())
    adapted(target_modules=["query"]).save_pretrained(tmp_path / "fewer")
    adapted(r=2).save_pretrained(tmp_path / "rank")
    adapted().save_pretrained(tmp_path / "same")
    with pytest.raises(
        ValueError, match=r"differs from the adapter 'default' in 2 layers, such as"
    ):
        hotswap_adapter(model, tmp_path / "fewer")
    with pytest.raises(ValueError, match=r"in 3 layers, such as 'dense': Geometry\(rank=2,"):
        hotswap_adapter(model, tmp_path / "rank")
    with pytest.raises(ValueError, match=r"has other modules_to_save"):
        hotswap_adapter(model, tmp_path / "same")
    with pytest.raises(ValueError, match=r"^adapter_name: the model has no DCFT adapter 'other'"):
        hotswap_adapter(model, tmp_path / "same", "other")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.merge_adapter()
    with pytest.raises(
        ValueError, match=r"^adapter_name: 'default' is merged; call unmerge_adapter"
    ):
        hotswap_adapter(model, tmp_path / "same")


def test_save_pretrained_replaces_all_or_nothing(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    other = adapted(seed=5, r=3)
    original = other.save_pretrained

    def fail(folder: str, **options: object) -> None:
        original(folder, **options)
        raise OSError(28, "No space left on device")

    other.save_pretrained = fail
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    link = tmp_path.with_name("link")
    link.hardlink_to(tmp_path / "adapter_model.safetensors")
    save_pretrained(adapted(seed=5, r=3), tmp_path)
    assert link.read_bytes() == files["adapter_model.safetensors"]  # replaced, not written over
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded.eval()(TOKENS), adapted(seed=5, r=3)(TOKENS))
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_pretrained(model, tmp_path / "README.md")
    export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"already holds an adapter of another kind \(LORA\)"):
        save_pretrained(model, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"^safe_serialization: expected True, got False"):
        save_pretrained(model, tmp_path, safe_serialization=False)


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
def test_a_full_disk_leaves_the_old_adapter(tmp_path):
    """A limit on the size of files makes writes fail, as a full disk does."""
    script = """
import resource, signal, sys
from tests.peft_method.models import adapted
from dcft_kernels.peft import save_pretrained
model = adapted(seed=7, r=512)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_pretrained(model, sys.argv[1])
"""
    save_pretrained(adapted(), tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "OSError: folder: " in result.stderr
    assert "nothing was changed" in result.stderr
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded.eval()(TOKENS), adapted()(TOKENS))


@pytest.mark.parametrize(
    "name", ["../up", "/etc", "a/b", "a\\b", "a.b", "", "a\n", "copy", "training"]
)
def test_adapter_names_that_are_no_folders(name):
    with pytest.raises(ValueError, match=r"^adapter_name: "):
        peft.get_peft_model(base(), DCFTConfig(target_modules=TARGETS), adapter_name=name)
    model = adapted()
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"^adapter_name: "):
        model.add_adapter(name, DCFTConfig(target_modules=TARGETS))
    assert model.state_dict().keys() == before
    assert list(model.peft_config) == ["default"]
