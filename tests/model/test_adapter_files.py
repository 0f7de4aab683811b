"""Saved adapters: contents, failing saves, and errors for damaged files and other models."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from dcft_kernels import (
    DCFTLinear,
    load_adapter,
    save_adapter,
    swap_linear,
)
from tests.model_snapshot import ModelSnapshot

DATA = Path(__file__).parent / "data"
CONFIG = "dcft_config.json"
OPTIONS = {
    "rank": 2,
    "kernel_size": (4, 8),
    "stride": (2, 8),
    "alpha": 3.0,
    "dropout": 0.1,
    "init": "paper",
}
LAYERS = ["block.query", "block.dense"]
X = torch.linspace(-1, 1, 40).reshape(2, 20)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"query": nn.Linear(20, 16), "dense": nn.Linear(16, 20)})
        self.classifier = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.block["dense"](self.block["query"](x).tanh()))


def _randomize(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "dcft_" in name:
            nn.init.normal_(parameter, 0.0, 0.5)
    return model


@pytest.fixture
def base() -> Network:
    return Network().eval()


@pytest.fixture
def adapted(base: Network) -> Network:
    model = copy.deepcopy(base)
    assert swap_linear(model, **OPTIONS) == LAYERS
    return _randomize(model)


@pytest.fixture
def folder(adapted: Network, tmp_path: Path) -> Path:
    """A folder with a saved adapter."""
    save_adapter(adapted, tmp_path / "adapter")
    return tmp_path / "adapter"


def _weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def _listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def _records(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())["layers"]


def _load_fails(model: nn.Module, folder: Path, error: type[Exception], text: str) -> list[str]:
    """Load, check error and text, and that neither model nor files changed; the text's lines."""
    snapshot = ModelSnapshot(model)
    listing = _listing(folder) if folder.is_dir() else {}
    with pytest.raises(error, match=text) as caught:
        load_adapter(model, folder)
    snapshot.assert_unchanged()
    assert (_listing(folder) if folder.is_dir() else {}) == listing
    return str(caught.value).splitlines()


def test_files_of_an_earlier_version_load():
    """Exact values and settings; data/README.md says how the files were made."""
    model = nn.ModuleDict({"query": nn.Linear(6, 4), "dense": nn.Linear(4, 6)})
    assert load_adapter(model, DATA / "adapter_5f5390c") == ["query", "dense"]
    query, dense = model["query"], model["dense"]
    for layer, dtype in ((query, torch.float32), (dense, torch.bfloat16)):
        for factor in (layer.dcft_A, layer.dcft_B, layer.dcft_C):
            expected = torch.arange(1, factor.numel() + 1).view_as(factor) / 8
            assert factor.dtype == dtype
            assert torch.equal(factor, expected.to(dtype))
    assert (query.rank, query.kernel_size, query.stride) == (2, (2, 3), (1, 3))
    assert (query.scaling, query.dropout, query.init) == (0.75, 0.25, "paper")
    assert query.nonlinearity == "gelu"
    assert (dense.rank, dense.kernel_size, dense.stride) == (1, (2, 2), (2, 2))
    assert (dense.scaling, dense.dropout, dense.init) == (4.119534287814235, 0.0, "balanced")
    assert dense.nonlinearity is None


def test_files_are_those_of_an_earlier_version(tmp_path):
    """So that an earlier version loads them."""
    model = nn.ModuleDict({"query": nn.Linear(6, 4), "dense": nn.Linear(4, 6)})
    load_adapter(model, DATA / "adapter_5f5390c")
    save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(_weights_file(tmp_path))
    assert tensors.keys() == {f"{name}.dcft_{f}" for name in ("query", "dense") for f in "ABC"}
    written, former = ((f / CONFIG).read_text() for f in (tmp_path, DATA / "adapter_5f5390c"))
    # The digest depends on how safetensors orders and pads what it writes.
    weights, former_weights = (json.loads(text)["weights"] for text in (written, former))
    for entry in ("file", "sha256"):
        written = written.replace(weights[entry], former_weights[entry])
    checksum = json.loads(written)["sha256"]
    assert written == former.removesuffix("\n}\n") + f',\n "sha256": "{checksum}"\n}}\n'


def test_round_trip_into_a_base_and_into_a_swapped_model(base, adapted, tmp_path):
    folder, other = str(tmp_path / "some" / "new folder"), copy.deepcopy(base)
    assert save_adapter(adapted, folder) is None
    assert load_adapter(base, folder) == LAYERS
    assert torch.equal(base(X), adapted(X))
    for name in LAYERS:
        assert base.get_submodule(name).options == adapted.get_submodule(name).options
    swap_linear(other, **OPTIONS | {"dropout": 0.5, "init": "zero"})
    parameters = {name: id(parameter) for name, parameter in other.named_parameters()}
    assert load_adapter(other, folder) == LAYERS
    assert torch.equal(other(X), adapted(X))
    assert {name: id(parameter) for name, parameter in other.named_parameters()} == parameters
    # Settings of training, not of what the adapter computes, stay the model's.
    assert other.block["query"].dropout == 0.5
    trainable = [name for name, p in base.block.named_parameters() if p.requires_grad]
    assert trainable == [f"{n}.dcft_{f}" for n in ("query", "dense") for f in "ABC"]


def test_round_trip_of_kernels_per_rank(base, adapted, tmp_path):
    """Earlier versions refuse such files; an adapter of the other kind does not fit."""
    model = copy.deepcopy(base)
    swap_linear(model, **OPTIONS, kernels="per_rank")
    _randomize(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["format_version"] == 3
    lines = _load_fails(adapted, tmp_path, ValueError, r"\(2 differences; nothing was loaded\)")
    assert lines[2] == "  block.query: kernels is shared in the model, per_rank in the file"
    with pytest.raises(RuntimeError, match=r"size mismatch for block\.query\.dcft_C"):
        adapted.load_state_dict(model.state_dict())
    assert load_adapter(base, tmp_path) == LAYERS
    assert base.block["query"].dcft_C.shape == (2, 4, 8)
    assert torch.equal(base(X), model(X))


def test_each_factor_keeps_its_dtype_in_a_base_model(base, adapted, tmp_path):
    """Also where those of one layer differ. A model that is swapped already keeps its own."""
    wide, layer = copy.deepcopy(base), adapted.block["query"]
    layer.dcft_A = nn.Parameter(layer.dcft_A.detach().half())
    layer.dcft_B = nn.Parameter(layer.dcft_B.detach().bfloat16())
    nn.init.constant_(layer.dcft_C, 1e6)
    save_adapter(adapted, tmp_path)
    load_adapter(base, tmp_path)
    swap_linear(wide, **OPTIONS, adapter_dtype=torch.float64)
    load_adapter(wide, tmp_path)
    for name, parameter in adapted.named_parameters():
        if ".dcft_" in name:
            loaded, widened = base.get_parameter(name), wide.get_parameter(name)
            assert (loaded.dtype, widened.dtype) == (parameter.dtype, torch.float64)
            assert torch.equal(loaded, parameter)
            assert torch.equal(widened, parameter.double())
            assert loaded.requires_grad


def test_a_derived_scaling_is_a_number_in_the_file(base, tmp_path):
    """What a saved adapter computes does not depend on how a later version derives it."""
    model, swapped = copy.deepcopy(base), copy.deepcopy(base)
    swap_linear(model, rank=3, stride=(3, 5))
    swap_linear(swapped, rank=3, stride=(3, 5))
    save_adapter(_randomize(model), tmp_path)
    record, query = _records(tmp_path)["block.query"], model.block["query"]
    assert record["alpha"] / query.rank == query.scaling
    for target, again in ((base, "again"), (swapped, "once more")):
        load_adapter(target, tmp_path)
        assert torch.equal(target(X), model(X))
        save_adapter(target, tmp_path / again)
        assert _records(tmp_path / again) == _records(tmp_path)
    # Nor on `init`, which is for the next draw.
    query.init = "zero"
    save_adapter(model, tmp_path)
    assert _records(tmp_path)["block.query"] == record | {"init": "zero"}


def test_shared_layers_and_shared_factors_round_trip(tmp_path):
    layer, x = nn.Linear(16, 16), torch.randn(2, 16)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(16, 16)})
    fresh = copy.deepcopy(model)
    swap_linear(model)
    _randomize(model)
    model["c"].dcft_C = model["a"].dcft_C
    save_adapter(model, tmp_path)
    assert load_adapter(fresh, tmp_path) == ["a", "c"]
    assert fresh["a"] is fresh["b"]
    assert torch.equal(fresh["b"](x), model["b"](x))
    assert torch.equal(fresh["c"](x), model["c"](x))


def test_a_bare_layer(tmp_path):
    layer, other = (DCFTLinear(16, 16, init="paper") for _ in range(2))
    save_adapter(layer, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(other.dcft_A, layer.dcft_A)
    # No module holds a model that is the layer itself, so nothing can replace it.
    _load_fails(nn.Linear(16, 16), tmp_path, ValueError, r"DCFTLinear\.from_linear")


def test_saving_again_replaces_and_leaves_other_files_alone(base, adapted, folder):
    former = _weights_file(folder)
    others = ["README.md", "model.safetensors", "dcft_adapter-best.safetensors", ".hidden.tmp"]
    for name in others:
        (folder / name).write_text(name)
    (folder / "checkpoint").mkdir()
    save_adapter(_randomize(adapted), folder)
    assert not former.exists()
    assert (folder / "checkpoint").is_dir()
    listing = _listing(folder)
    assert {name: listing[name].decode() for name in others} == {name: name for name in others}
    assert len(listing) == len(others) + 2
    load_adapter(base, folder)
    assert torch.equal(base(X), adapted(X))


def _fail_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> None:
    """Make the given call of an `os` function raise, as a full disk would."""
    original, calls = getattr(os, function), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize("killed", [False, True], ids=["failed", "killed"])
@pytest.mark.parametrize(
    ("function", "call", "file"),
    [
        ("fsync", 1, "weights"),
        ("fsync", 3, "config"),  # the second call flushes the directory
        ("replace", 1, "weights"),
        ("replace", 2, "config"),
    ],
)
def test_a_failing_save_leaves_the_former_adapter(
    base, adapted, folder, monkeypatch, function, call, file, killed
):
    """A killed process cannot even remove its temporary file."""
    expected, listing = adapted(X), _listing(folder)
    _randomize(adapted)
    assert not torch.equal(adapted(X), expected)
    snapshot = ModelSnapshot(adapted)
    with monkeypatch.context() as patch:
        _fail_at(patch, function, call)
        if killed:
            patch.setattr(os, "unlink", lambda path: None)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(adapted, folder)
    snapshot.assert_unchanged()
    after = _listing(folder)
    assert {name: after[name] for name in listing} == listing
    temporary = [name for name in after if name.endswith(".tmp")]
    assert bool(temporary) is killed
    # A killed save can also leave new weights that no config names.
    assert len(after) - len(temporary) - len(listing) == (killed and file == "config")
    fresh = copy.deepcopy(base)
    load_adapter(fresh, folder)
    assert torch.equal(fresh(X), expected)
    save_adapter(adapted, folder)  # the next save succeeds and tidies up
    assert len(_listing(folder)) == 2
    load_adapter(base, folder)
    assert torch.equal(base(X), adapted(X))


def test_a_folder_that_is_a_file(base, adapted, tmp_path):
    path = tmp_path / "adapter"
    path.write_text("mine")
    with pytest.raises(OSError, match="adapter"):
        save_adapter(adapted, path)
    assert path.read_text() == "mine"
    _load_fails(base, path, FileNotFoundError, r"^folder: .*adapter' is not a directory")


def test_a_config_that_cannot_be_read_or_replaced(adapted, tmp_path):
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(OSError, match=CONFIG):
        save_adapter(adapted, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        # With a checksum that fits, as of a file that was saved so.
        unsigned = {name: value for name, value in config.items() if name != "sha256"}
        canonical = json.dumps(unsigned, sort_keys=True, separators=(",", ":"))
        config["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def _query(**entries: Any) -> Callable[[Path], None]:
    return _config(lambda config: config["layers"]["block.query"].update(entries))


def _weights_entry(**entries: Any) -> Callable[[Path], None]:
    return _config(lambda config: config["weights"].update(entries))


def _config_bytes(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / CONFIG).write_bytes(content)


def _weights_bytes(change: Callable[[bytes], bytes], digest_fits: bool) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = change(_weights_file(folder).read_bytes())
        _weights_file(folder).write_bytes(content)
        if digest_fits:
            _weights_entry(sha256=hashlib.sha256(content).hexdigest())(folder)

    return damage


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def changed(content: bytes) -> bytes:
        tensors = safetensors.torch.load(content)
        change(tensors)
        return safetensors.torch.save(tensors)

    return _weights_bytes(changed, digest_fits=True)


def _outside(folder: Path) -> None:
    """The right weights, but in the parent folder."""
    _weights_file(folder).rename(folder.parent / "weights.safetensors")
    _weights_entry(file="../weights.safetensors")(folder)


NOT_JSON = rf"{CONFIG}: truncated or not JSON"
CHANGED = r"safetensors: truncated or changed .*SHA-256.*copy the folder again"
FOREIGN = r'not a DCFT adapter: expected "format": "dcft_adapter".*written by another library'
VERSION = "expected format_version 1, 2 or 3, got"
PLAIN = r"expected a weights file dcft_adapter-<12 hex.*>\.safetensors, got"
LAYER = r"layer 'block\.query'"
SIZE = "expected a positive int, got"

DAMAGES = {
    "no-config": (lambda f: (f / CONFIG).unlink(),
                  rf"{CONFIG}: no such file; save_adapter writes it"),
    "no-weights": (lambda f: _weights_file(f).unlink(),
                   rf"safetensors: no such file; {CONFIG} names it"),
    "truncated-config": (_config_bytes(b'{"format": "dcft_ad'), NOT_JSON),
    "binary-config": (_config_bytes(b"\xff\xfe\x00"), NOT_JSON),
    "json-list": (_config_bytes(b"[1, 2]"), FOREIGN),
    "foreign-json": (_config_bytes(b'{"peft_type": "LORA", "r": 8}'), FOREIGN),
    "truncated-weights": (_weights_bytes(lambda c: c[: len(c) // 2], False), CHANGED),
    "flipped-bit": (_weights_bytes(lambda c: c[:-1] + bytes([c[-1] ^ 1]), False), CHANGED),
    "no-tensors": (_weights_bytes(lambda c: b"nothing", True), "safetensors: not a safetensors"),
    "newer-version": (_config(lambda c: c.update(format_version=4)),
                      rf"{VERSION} 4; it needs another version of dcft_kernels"),
    "no-version": (_config(lambda c: c.pop("format_version")), rf"{VERSION} None"),
    "no-weights-entry": (_config(lambda c: c.pop("weights")), r'expected "weights" with "file"'),
    "no-digest": (_config(lambda c: c["weights"].pop("sha256")), r'"file" and "sha256"'),
    "number-as-file": (_weights_entry(file=7), r'"weights" with "file"'),
    "no-layers": (_config(lambda c: c.update(layers={})), r'and "layers"'),
    "layers-as-list": (_config(lambda c: c.update(layers=["block.query"])), r'and "layers"'),
    "outside": (_outside, rf"{PLAIN} '\.\./weights\.safetensors'"),
    "layer-null": (_config(lambda c: c["layers"].update({"block.query": None})),
                   rf"{LAYER}: expected .*got None"),
    "no-alpha": (_config(lambda c: c["layers"]["block.query"].pop("alpha")),
                 rf"{LAYER}: has no 'alpha'"),
    "unknown-setting": (_query(backend="auto"), rf"{LAYER}: has an unknown setting 'backend'"),
    "text-as-size": (_query(in_features="20"), rf"{LAYER}: in_features: {SIZE} '20'"),
    "negative-size": (_query(out_features=-4), rf"{LAYER}: out_features: {SIZE} -4"),
    "rank-0": (_query(rank=0), rf"{LAYER}: rank: {SIZE} 0"),
    "other-rank": (_query(rank=3), r"query\.dcft_A: expected shape \[3, 3\], got \[2, 3\]"),
    "small-kernel": (_query(kernel_size=[4, 6]), rf"{LAYER}: stride: expected at most the kernel"),
    "other-stride": (_query(stride=[4, 8]), r"query\.dcft_B: expected shape \[4, 2\], got \[7, 2"),
    "alpha-nan": (_query(alpha=float("nan")), rf"{LAYER}: alpha: expected a finite number, got na"),
    "other-init": (_query(init="ones"), rf"{LAYER}: init: expected one of 'balanced', .*'ones'"),
    "other-nonlinearity": (_query(nonlinearity="swish"),
                           rf"{LAYER}: nonlinearity: expected one of .*'swish'"),
    "other-kernels": (_query(kernels="each"),
                      rf"{LAYER}: kernels: expected one of 'shared', 'per_rank', got 'each'"),
    "kernels-per-rank": (_query(kernels="per_rank"),
                         r"query\.dcft_C: expected shape \[2, 4, 8\], got \[4, 8\]"),
    "missing-tensor": (_tensors(lambda t: t.pop("block.query.dcft_C")),
                       rf"has no tensor block\.query\.dcft_C, which {CONFIG} names"),
    "surplus-tensor": (_tensors(lambda t: t.update(head=torch.ones(1))),
                       rf"holds tensors that {CONFIG} does not name: head"),
    "other-shape": (_tensors(lambda t: t.update({"block.query.dcft_C": torch.ones(8, 4)})),
                    r"query\.dcft_C: expected shape \[4, 8\], got \[8, 4\]"),
    "integers": (_tensors(lambda t: t.update({"block.query.dcft_B": torch.ones(7, 2).int()})),
                 r"dcft_B: expected a float.*torch\.int32"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "text"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_refused(base, folder, damage, text):
    damage(folder)
    error = FileNotFoundError if "no such file" in text else ValueError
    lines = _load_fails(base, folder, error, text)
    assert str(folder) in lines[0]  # it says which file


@pytest.mark.parametrize("swapped", [False, True])
def test_a_model_without_values_is_not_loaded_into(tmp_path, swapped):
    """Copying to the meta device would do nothing and say nothing."""
    model = nn.Sequential(nn.Linear(16, 16))
    swap_linear(model)
    save_adapter(model, tmp_path)
    target = nn.Sequential(nn.Linear(16, 16, device="meta"))
    if swapped:
        swap_linear(target)
        target.to("meta")
    _load_fails(target, tmp_path, ValueError, r"0(\.dcft_A)?: on the meta device")


def test_differences_from_a_base_model_are_listed(folder, monkeypatch):
    layers = {"query": nn.Linear(24, 16), "other": nn.Linear(16, 20)}
    model = nn.ModuleDict({"block": nn.ModuleDict(layers)})
    monkeypatch.chdir(folder.parent)
    lines = _load_fails(model, Path(folder.name), ValueError, r"^model: does not fit the adapter")
    assert "in 'adapter'; build it like the saved model" in lines[0]
    assert lines[0].endswith("(2 differences; nothing was loaded):")
    assert sorted(lines[1:]) == [
        "  block.dense: not in the model",
        "  block.query: (in_features, out_features) is (24, 16) in the model, (20, 16) in the file",
    ]
    model["block"]["query"], model["block"]["dense"] = nn.Linear(20, 16), nn.LayerNorm(16)
    lines = _load_fails(model, folder, ValueError, r"\(1 differences?; nothing was loaded\)")
    reason = "expected an nn.Linear or a transformers Conv1D, got LayerNorm"
    assert lines[1].startswith(f"  block.dense: {reason}")


def test_differences_from_a_swapped_model_are_listed(base, folder):
    other = copy.deepcopy(base)
    swap_linear(base, ["query"], rank=1, kernel_size=4, alpha=1.0, nonlinearity="gelu")
    swap_linear(base, ["classifier"])
    lines = _load_fails(base, folder, ValueError, r"\(7 differences; nothing was loaded\)")
    assert lines[1:] == [
        "  block.dense: adapted in the file, not in the model",
        "  block.query: alpha is 1.0 in the model, 3.0 in the file",
        "  block.query: kernel_size is (4, 4) in the model, (4, 8) in the file",
        "  block.query: nonlinearity is gelu in the model, None in the file",
        "  block.query: rank is 1 in the model, 2 in the file",
        "  block.query: stride is (4, 4) in the model, (2, 8) in the file",
        "  classifier: adapted in the model, not in the file",
    ]
    other.block["query"] = nn.Linear(24, 12)
    swap_linear(other, **OPTIONS)
    lines = _load_fails(other, folder, ValueError, r"\(2 differences; nothing was loaded\)")
    assert lines[1:] == [
        "  block.query: in_features is 24 in the model, 20 in the file",
        "  block.query: out_features is 12 in the model, 16 in the file",
    ]


def test_a_long_list_of_differences_is_cut(tmp_path):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(30)))
    swap_linear(model)
    save_adapter(model, tmp_path)
    lines = _load_fails(nn.Sequential(), tmp_path, ValueError, r"\(30 differences; nothing was")
    assert len(lines) == 22
    assert lines[-1] == "  and 10 more"
