"""`save_adapter`'s files, PEFT's, and those of the published code."""

from __future__ import annotations

import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dcft_kernels as dcft
from dcft_kernels.adapter_folder import CONFIG_FILE
from dcft_kernels.peft import convert_adapter, export_lora, import_published
from tests.peft_method.models import TOKENS, adapted, base

WEIGHTS = "adapter_model.safetensors"


def swapped(kernels: str = "shared") -> nn.Module:
    """Layers of different settings, one in another dtype, and a trained head."""
    model, common = base(), {"kernels": kernels}
    dcft.swap_linear(model, ["query"], rank=2, kernel_size=(4, 5), stride=(2, 5), **common)
    dcft.swap_linear(model, ["value"], alpha=0.25, adapter_dtype=torch.float64, **common)
    dcft.swap_linear(model, ["dense"], **common)
    dcft.freeze_base(model, trainable=["head", "query.bias"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model.eval()


def saved_tensors(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("kernels", ["shared", "per_rank"])
def test_from_save_adapter_to_peft_and_back(tmp_path, kernels):
    model = swapped(kernels)
    dcft.save_adapter(model, tmp_path / "dcft")
    convert_adapter(tmp_path / "dcft", tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "peft").eval()
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    convert_adapter(tmp_path / "peft", tmp_path / "back")
    before, after = (
        json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in ("dcft", "back")
    )
    for name in ("format_version", "layers", "modules_to_save"):
        assert after[name] == before[name]
    tensors = [saved_tensors(tmp_path / name) for name in ("dcft", "back")]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert tensor.dtype == tensors[1][name].dtype
        assert torch.equal(tensor, tensors[1][name])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_weights": "zero", "r": 3, "kernel_size_pattern": {"dense": (2, 3)}},
        {"stride": 4, "alpha_pattern": {"query": 5.0}, "modules_to_save": ["head"]},
        {"bias": "all"},
        {"r": 2, "kernels": "per_rank"},
    ],
)
def test_from_peft_to_save_adapter(tmp_path, settings):
    model = adapted(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "dcft")
    plain = base()
    dcft.load_adapter(plain, tmp_path / "dcft")
    assert torch.equal(plain.eval()(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.query.__setattr__("nonlinearity", "relu"), "query: PEFT's DCFT has no nonlin"),
        (lambda m: m.query.__setattr__("dropout", 0.5), "^dropout: PEFT has one for all layers"),
        (lambda m: dcft.swap_linear(m, ["head"], kernels="per_rank"), "^kernels: PEFT has one for"),
        (lambda m: m.head.weight.requires_grad_(False), r"^head\.weight: not in the adapter"),
    ],
)
def test_what_peft_has_no_place_for(tmp_path, change, message):
    model = swapped()
    change(model)
    dcft.save_adapter(model, tmp_path / "dcft")
    (tmp_path / "peft").mkdir()
    with pytest.raises(ValueError, match=message):
        convert_adapter(tmp_path / "dcft", tmp_path / "peft")
    assert not list((tmp_path / "peft").iterdir())


def published(d: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {"encoder.0.weight": torch.randn(24, 16), "head.weight": torch.randn(3, 24)}
    tensors |= {
        "encoder.0.lora_A": torch.randn(1, 16 // d),
        "encoder.0.lora_B": torch.randn(24 // d, 1),
    }
    return tensors | {"encoder.0.lora_C": torch.randn(1, 1, d, d), "head.bias": torch.randn(3)}


class Published(nn.Module):
    """A model whose layer is the published one: base weight plus the transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(16, 24, bias=False)), nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_published_checkpoints(tmp_path, suffix):
    tensors, path = published(), tmp_path / f"model{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.warns(UserWarning, match=r"left out 1 other tensors .* such as encoder\.0\.weight"):
        import_published(path, tmp_path / "peft", alpha=32, r=8, modules_to_save=["head"])
    assert peft.PeftConfig.from_pretrained(tmp_path / "peft").alpha == 32 / (8 + 1e-5)
    plain = Published()
    plain.encoder[0].weight.data.copy_(tensors["encoder.0.weight"])
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    # `DW [in, out]` of the published code: A on the input side, the kernel not transposed.
    F = tensors["encoder.0.lora_A"].t() @ tensors["encoder.0.lora_B"].t()
    update = torch.nn.functional.conv_transpose2d(
        F[None, None], tensors["encoder.0.lora_C"], stride=8
    )
    weight = tensors["encoder.0.weight"] + 32 / (8 + 1e-5) * update[0, 0].t()
    x = torch.randn(5, 16)
    expected = x @ weight.t() @ tensors["head.weight"].t() + tensors["head.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-3)
    convert_adapter(tmp_path / "peft", tmp_path / "dcft")
    other = Published()
    other.encoder[0].weight.data.copy_(tensors["encoder.0.weight"])
    dcft.load_adapter(other, tmp_path / "dcft")
    assert torch.equal(other.eval()(x), model(x))


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("the checkpoint was unpickled",))


def test_bad_checkpoints(tmp_path):
    path = tmp_path / "model.bin"

    def refused(match: str, content: object = None, **arguments: object) -> None:
        if content is not None:
            torch.save(content, path)
        with pytest.raises(ValueError, match=match):
            import_published(path, tmp_path / "out", **({"alpha": 32, "r": 8} | arguments))
        assert not (tmp_path / "out").exists()

    refused("expected tensors <layer>.lora_A", {"weight": torch.zeros(2)})
    refused("expected a dict of tensors by name", [torch.zeros(2)])
    refused(r"has no encoder\.0\.lora_B; the file", {
        k: v for k, v in published().items() if k != "encoder.0.lora_B"
    })  # fmt: skip
    refused(
        r"expected lora_A \[k, I\], lora_B", published() | {"encoder.0.lora_C": torch.zeros(8, 8)}
    )
    refused("has no tensors of 'pooler'", published(), modules_to_save=["pooler"])
    refused(r"^alpha: expected a finite number", published(), alpha=float("nan"))
    refused(r"^r: expected a positive number, got 0", published(), r=0)
    integers = {"encoder.0.lora_A": torch.ones(1, 2, dtype=torch.int64)}
    refused(r"encoder\.0\.lora_A: expected floats, got torch\.int64", published() | integers)
    path.write_bytes(path.read_bytes()[:-100])
    refused(r"model\.bin: truncated, or not a file of tensors")
    path.write_bytes(pickle.dumps(Payload()))
    refused("truncated, or not a file of tensors alone")
    with pytest.raises(FileNotFoundError, match=r"absent\.bin: no such file"):
        import_published(tmp_path / "absent.bin", tmp_path / "out", alpha=32, r=8)


def damage(folder, kind: str) -> None:
    config, weights = folder / "adapter_config.json", folder / WEIGHTS
    settings = json.loads(config.read_text())
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif kind == "truncated config":
        config.write_text(config.read_text()[:-40])
    elif kind in ("no weights", "no config"):
        (weights if kind == "no weights" else config).unlink()
    elif kind == "missing tensor":
        tensors = load_file(weights)
        del tensors["base_model.model.dense.dcft_C"]
        save_file(tensors, weights)
    elif kind == "another tensor":
        save_file(load_file(weights) | {"x.dcft_A": torch.zeros(1, 2)}, weights)
    elif kind == "bad setting":
        config.write_text(json.dumps(settings | {"kernel_size": 0}))
    elif kind == "another method":
        config.write_text(json.dumps(settings | {"peft_type": "LORA"}))
    elif kind == "no sizes":
        config.write_text(json.dumps(settings | {"layer_sizes": None}))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("truncated weights", ValueError, "truncated, or not a file of tensors alone"),
        ("truncated config", ValueError, "truncated or no config of PEFT"),
        ("no weights", FileNotFoundError, r"adapter_model\.safetensors: no such file"),
        ("no config", FileNotFoundError, r"adapter_config\.json: no such file; PeftModel"),
        ("missing tensor", ValueError, r"dense\.dcft_C: expected floats \[8, 8\], got none"),
        ("another tensor", ValueError, r"layer_sizes does not name the layer of x\.dcft_A"),
        ("bad setting", ValueError, "kernel_size: expected a positive int"),
        ("another method", ValueError, "expected an adapter of peft_type 'DCFT', got 'LORA'"),
        ("no sizes", ValueError, "has no layer_sizes; load the adapter into its base model"),
    ],
)
@pytest.mark.parametrize("action", [convert_adapter, export_lora])
def test_damaged_and_foreign_folders(tmp_path, action, kind, error, message):
    adapted().save_pretrained(tmp_path / "source")
    export_lora(adapted(seed=9), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    damage(tmp_path / "source", kind)
    with pytest.raises(error, match=message):
        action(tmp_path / "source", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_one_adapter_does_not_hide_or_replace_another(tmp_path):
    dcft.save_adapter(swapped(), tmp_path / "dcft")
    adapted().save_pretrained(tmp_path / "peft")
    export_lora(tmp_path / "peft", tmp_path / "lora")
    for action, source, target in (
        (export_lora, "peft", "peft"),
        (export_lora, "peft", "dcft"),
        (convert_adapter, "peft", "lora"),
        (convert_adapter, "peft", "peft"),
        (convert_adapter, "dcft", "dcft"),
        (convert_adapter, "dcft", "lora"),
    ):
        before = {path.name: path.read_bytes() for path in (tmp_path / target).iterdir()}
        with pytest.raises(ValueError, match=r"already holds an adapter of another kind"):
            action(tmp_path / source, tmp_path / target)
        assert {path.name: path.read_bytes() for path in (tmp_path / target).iterdir()} == before
    adapted().save_pretrained(tmp_path / "dcft")
    for action in (export_lora, convert_adapter):
        with pytest.raises(
            ValueError, match=r"has both dcft_config\.json and adapter_config\.json"
        ):
            action(tmp_path / "dcft", tmp_path / "new")


class Nested(nn.Module):
    """`proj` is a suffix of `tower.proj`, and the head has a submodule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(16, 16)
        self.tower = nn.ModuleDict({"proj": nn.Linear(16, 16)})
        self.head = nn.Linear(16, 3)
        self.head.scale = nn.Linear(3, 3)

    def forward(self, x):
        return self.head.scale(self.head(self.tower["proj"](self.proj(x))))


def test_names_that_are_endings_of_others(tmp_path):
    model = Nested()
    dcft.swap_linear(model, ["proj"], exclude=["tower.proj"], init="paper")
    dcft.freeze_base(model, trainable=["head"])
    dcft.save_adapter(model, tmp_path / "dcft")
    convert_adapter(tmp_path / "dcft", tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(Nested(), tmp_path / "peft").eval()
    x = torch.randn(5, 16)
    assert torch.equal(loaded(x), model.eval()(x))
    assert loaded.targeted_module_names == ["proj"]
    assert loaded.peft_config["default"].modules_to_save == ["head"]
    both = Nested()
    dcft.swap_linear(both, ["tower.proj"], init="paper")
    dcft.swap_linear(both, ["proj"], exclude=["tower.proj"], init="paper", rank=2)
    dcft.freeze_base(both)
    dcft.save_adapter(both, tmp_path / "dcft")
    convert_adapter(tmp_path / "dcft", tmp_path / "both")
    loaded = peft.PeftModel.from_pretrained(Nested(), tmp_path / "both").eval()
    assert torch.equal(loaded(x), both.eval()(x))


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^folder: '.*absent' is not a directory"):
        convert_adapter(tmp_path / "absent", tmp_path / "out")
