"""Adapters on disk: what is written, what survives a crash, what is refused and in what words."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import stat
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
    merge_model,
    save_adapter,
    swap_linear,
    unmerge_model,
)
from tests.model_snapshot import ModelSnapshot

CONFIG = "dcft_config.json"
OPTIONS = {
    "rank": 2,
    "kernel_size": (4, 8),
    "stride": (2, 8),
    "alpha": 3.0,
    "dropout": 0.1,
    "init": "paper",
}
X = torch.linspace(-1, 1, 40).reshape(2, 20)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"query": nn.Linear(20, 16), "dense": nn.Linear(16, 20)})
        self.classifier = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.block["dense"](self.block["query"](x).tanh()))


def _randomize(model: nn.Module, std: float = 0.5) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dcft_" in name:
                parameter.normal_(0.0, std)


@pytest.fixture
def base() -> Network:
    return Network().eval()


@pytest.fixture
def adapted(base) -> Network:
    model = copy.deepcopy(base)
    assert swap_linear(model, **OPTIONS) == ["block.query", "block.dense"]
    _randomize(model)
    return model


@pytest.fixture
def folder(adapted, tmp_path) -> Path:
    """A folder with a saved adapter."""
    save_adapter(adapted, tmp_path / "adapter")
    return tmp_path / "adapter"


def _weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def _listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def _replace_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Other tensors, with a digest that fits: only what they hold is wrong."""
    content = safetensors.torch.save(tensors)
    _weights_file(folder).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    _edit_config(folder, lambda config: config["weights"].update(sha256=digest))


def _load_fails(model: nn.Module, folder: Path, error: type[Exception], text: str) -> str:
    """Load, check error and text, and that neither model nor files were touched."""
    snapshot = ModelSnapshot(model)
    listing = _listing(folder) if folder.is_dir() else {}
    with pytest.raises(error, match=text) as caught:
        load_adapter(model, folder)
    snapshot.assert_unchanged()
    assert (_listing(folder) if folder.is_dir() else {}) == listing
    return str(caught.value)


@pytest.mark.parametrize("kind", [str, Path], ids=["str", "Path"])
def test_round_trip_into_a_base_model(base, adapted, tmp_path, kind):
    folder = kind(tmp_path / "some" / "new folder")
    assert save_adapter(adapted, folder) is None
    assert load_adapter(base, folder) == ["block.query", "block.dense"]
    assert torch.equal(base(X), adapted(X))
    for name in ("block.query", "block.dense"):
        assert base.get_submodule(name).options == adapted.get_submodule(name).options
    trainable = [name for name, p in base.block.named_parameters() if p.requires_grad]
    assert trainable == [f"{n}.dcft_{f}" for n in ("query", "dense") for f in "ABC"]


def test_round_trip_into_a_swapped_model(base, adapted, folder):
    swap_linear(base, **OPTIONS | {"dropout": 0.5, "init": "zero"})
    parameters = {name: id(parameter) for name, parameter in base.named_parameters()}
    assert load_adapter(base, folder) == ["block.query", "block.dense"]
    assert torch.equal(base(X), adapted(X))
    assert {name: id(parameter) for name, parameter in base.named_parameters()} == parameters
    # Settings of training, not of the adapter, stay the model's.
    assert base.block["query"].dropout == 0.5


def test_layers_keep_their_own_settings(base, tmp_path):
    model = copy.deepcopy(base)
    swap_linear(model, ["query"], kernel_size=4, alpha=0.1)
    swap_linear(model, ["dense"], rank=3, stride=(3, 5), init="paper")
    _randomize(model)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert base.block["query"].options == model.block["query"].options
    assert base.block["dense"].options == model.block["dense"].options
    assert torch.equal(base(X), model(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(base, tmp_path, dtype):
    model = copy.deepcopy(base)
    swap_linear(model, init="paper", adapter_dtype=dtype)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    for name, parameter in base.named_parameters():
        if ".dcft_" in name:
            assert parameter.dtype == dtype
            assert torch.equal(parameter, model.get_parameter(name))


def _trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """A few steps of an optimizer from where the default `init` starts."""
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "dcft_" in n], 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("options", [{}, {"rank": 3, "stride": (3, 5)}], ids=["default", "overlap"])
def test_a_derived_scaling_round_trips(base, tmp_path, options):
    """Into a base model, and into one that derives the same scaling for itself."""
    model = copy.deepcopy(base)
    swap_linear(model, **options)
    assert torch.equal(model(X), base(X))
    _trained(model)
    assert (model(X) - base(X)).abs().max() > 0.01
    save_adapter(model, tmp_path)
    swapped = copy.deepcopy(base)
    swap_linear(swapped, **options)
    for target in (base, swapped):
        load_adapter(target, tmp_path)
        assert torch.equal(target(X), model(X))
        for name in ("block.query", "block.dense"):
            assert target.get_submodule(name).scaling == model.get_submodule(name).scaling
    # What is loaded saves as what it was loaded from.
    save_adapter(base, tmp_path / "again")
    save_adapter(swapped, tmp_path / "once more")
    listing = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert _listing(tmp_path / "again") == _listing(tmp_path / "once more") == listing


def test_a_derived_scaling_is_a_number_in_the_file(base, tmp_path):
    """What a saved adapter computes does not hang on how a later version derives it."""
    swap_linear(base, ["query"], rank=3)
    swap_linear(base, ["dense"], init="zero")
    query = base.block["query"]
    save_adapter(base, tmp_path)
    records = json.loads((tmp_path / CONFIG).read_text())["layers"]
    assert isinstance(records["block.query"]["alpha"], float)
    assert records["block.query"]["alpha"] / 3 == query.scaling
    assert records["block.dense"]["alpha"] is None
    # Nor on what `init` says by then: it is for the next draw.
    query.init = "zero"
    save_adapter(base, tmp_path)
    record = json.loads((tmp_path / CONFIG).read_text())["layers"]["block.query"]
    assert (record["alpha"] / 3, record["init"]) == (query.scaling, "zero")


@pytest.mark.parametrize(
    ("options", "here"), [({"init": "paper"}, "None"), ({"alpha": 2}, "2.0")], ids=str
)
def test_a_derived_scaling_does_not_load_over_another(base, tmp_path, options, here):
    model = copy.deepcopy(base)
    swap_linear(model, ["query"])
    save_adapter(model, tmp_path)
    swap_linear(base, ["query"], **options)
    alpha = model.block["query"].scaling
    message = _load_fails(base, tmp_path, ValueError, r"\(1 differences?; nothing was loaded\)")
    assert message.splitlines()[1:] == [
        f"  block.query: alpha is {here} in the model, {alpha} in the file"
    ]
    # Nor the other way round.
    save_adapter(base, tmp_path)
    message = _load_fails(model, tmp_path, ValueError, r"\(1 differences?; nothing was loaded\)")
    assert message.splitlines()[1:] == [
        f"  block.query: alpha is {alpha} in the model, {here} in the file"
    ]


def test_loading_converts_to_the_dtype_of_a_swapped_model(base, adapted, folder):
    swap_linear(base, **OPTIONS, adapter_dtype=torch.float64)
    load_adapter(base, folder)
    found, saved = base.block["query"].dcft_A, adapted.block["query"].dcft_A
    assert found.dtype == torch.float64
    assert torch.equal(found, saved.double())


def test_a_merged_model_saves_the_same_files(adapted, folder, tmp_path):
    merge_model(adapted)
    save_adapter(adapted, tmp_path / "merged")
    assert _listing(tmp_path / "merged") == _listing(folder)


def test_a_shared_layer_round_trips(tmp_path):
    layer = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": layer, "b": layer})
    fresh = copy.deepcopy(model)
    swap_linear(model)
    _randomize(model)
    save_adapter(model, tmp_path)
    assert load_adapter(fresh, tmp_path) == ["a"]
    assert fresh["a"] is fresh["b"]
    x = torch.randn(2, 16)
    assert torch.equal(fresh["b"](x), model["b"](x))


def test_factors_shared_between_layers_round_trip(tmp_path):
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    fresh = copy.deepcopy(model)
    swap_linear(model)
    _randomize(model)
    model[1].dcft_C = model[0].dcft_C
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh[0].dcft_C, model[0].dcft_C)
    assert torch.equal(fresh[1].dcft_C, model[0].dcft_C)


def test_a_bare_layer_round_trips(tmp_path):
    layer, other = (DCFTLinear(16, 16, init="paper") for _ in range(2))
    save_adapter(layer, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(other.dcft_A, layer.dcft_A)


def test_a_bare_layers_adapter_does_not_go_into_a_bare_linear(tmp_path):
    """Nothing holds a model that is the layer itself, so nothing can put another in its place."""
    save_adapter(DCFTLinear(16, 16), tmp_path)
    _load_fails(nn.Linear(16, 16), tmp_path, ValueError, r"DCFTLinear\.from_linear")


def test_files_are_kilobytes(tmp_path):
    """The numbers themselves and a few kilobytes around them, whatever the base weighs."""
    model = nn.Sequential(*(nn.Linear(768, 768) for _ in range(12)))
    swap_linear(model)
    save_adapter(model, tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    numbers = 12 * (96 + 96 + 64) * 4
    assert numbers <= size < numbers + 12 * 1024


def test_the_config_says_what_it_is(adapted, folder):
    config = json.loads((folder / CONFIG).read_text())
    assert (config["format"], config["format_version"]) == ("dcft_adapter", 1)
    assert config["weights"]["file"] == _weights_file(folder).name
    assert list(config["layers"]) == ["block.query", "block.dense"]
    assert config["layers"]["block.query"] == {
        "in_features": 20,
        "out_features": 16,
        "rank": 2,
        "kernel_size": [4, 8],
        "stride": [2, 8],
        "alpha": 3.0,
        "dropout": 0.1,
        "init": "paper",
    }
    tensors = safetensors.torch.load_file(_weights_file(folder))
    assert tensors.keys() == {f"block.{n}.dcft_{f}" for n in ("query", "dense") for f in "ABC"}
    assert torch.equal(tensors["block.query.dcft_A"], adapted.block["query"].dcft_A)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX file modes")
def test_files_get_the_usual_mode(adapted, tmp_path):
    before = os.umask(0o027)
    try:
        save_adapter(adapted, tmp_path)
    finally:
        assert os.umask(before) == 0o027
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o640}


def test_saving_again_replaces(base, adapted, folder):
    former = _weights_file(folder).name
    _randomize(adapted)
    save_adapter(adapted, folder)
    assert _weights_file(folder).name != former  # and the stale one is gone: there is but one
    assert len(list(folder.iterdir())) == 2
    load_adapter(base, folder)
    assert torch.equal(base(X), adapted(X))
    listing = _listing(folder)
    save_adapter(adapted, folder)
    assert _listing(folder) == listing


def test_other_files_are_left_alone(adapted, folder):
    others = ["README.md", "model.safetensors", "dcft_adapter-best.safetensors", ".hidden.tmp"]
    for name in others:
        (folder / name).write_text(name)
    (folder / "checkpoint").mkdir()
    _randomize(adapted)
    save_adapter(adapted, folder)
    assert (folder / "checkpoint").is_dir()
    assert {n: (folder / n).read_text() for n in others if (folder / n).exists()} == {
        name: name for name in others
    }


def _fail_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> None:
    """Make the given call of an `os` function raise, as a full disk would."""
    original, calls = getattr(os, function), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize(
    ("function", "call", "file"),
    [
        ("fsync", 1, "weights"),
        ("fsync", 3, "config"),  # the second one flushes the directory
        ("replace", 1, "weights"),
        ("replace", 2, "config"),
    ],
)
def test_a_failing_save_leaves_the_former_adapter(
    base, adapted, folder, monkeypatch, function, call, file
):
    expected, listing = adapted(X), _listing(folder)
    _randomize(adapted)
    assert not torch.equal(adapted(X), expected)
    snapshot = ModelSnapshot(adapted)

    with monkeypatch.context() as patch:
        _fail_at(patch, function, call)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(adapted, folder)

    snapshot.assert_unchanged()
    after = _listing(folder)
    assert not [name for name in after if name.endswith(".tmp")]
    assert {name: after[name] for name in listing} == listing
    assert len(after) - len(listing) == (file == "config")  # new weights that no config names yet
    fresh = copy.deepcopy(base)
    load_adapter(fresh, folder)
    assert torch.equal(fresh(X), expected)
    # The next save goes through and tidies up.
    save_adapter(adapted, folder)
    assert len(_listing(folder)) == 2
    load_adapter(base, folder)
    assert torch.equal(base(X), adapted(X))


@pytest.mark.parametrize("call", [1, 2], ids=["weights", "config"])
def test_a_save_killed_on_the_way_leaves_the_former_adapter(
    base, adapted, folder, monkeypatch, call
):
    """Killed, it cannot even remove its temporary file."""
    expected = adapted(X)
    _randomize(adapted)
    with monkeypatch.context() as patch:
        _fail_at(patch, "replace", call)
        patch.setattr(os, "unlink", lambda path: None)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(adapted, folder)
    assert [file for file in folder.iterdir() if file.name.endswith(".tmp")]
    load_adapter(base, folder)
    assert torch.equal(base(X), expected)


@pytest.mark.parametrize("call", [1, 2], ids=["weights", "config"])
def test_a_failing_first_save_leaves_nothing_that_loads(base, adapted, tmp_path, monkeypatch, call):
    with monkeypatch.context() as patch:
        _fail_at(patch, "replace", call)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(adapted, tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]
    _load_fails(base, tmp_path, FileNotFoundError, rf"{CONFIG}: no such file; save_adapter writes")


def test_nothing_is_written_for_a_model_without_adapters(base, tmp_path):
    with pytest.raises(ValueError, match=r"^model: has no DCFTLinear layers; call swap_linear"):
        save_adapter(base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_nothing_is_written_for_a_model_without_data(tmp_path):
    layer = DCFTLinear(16, 16, device="meta")
    with pytest.raises(ValueError, match=r"dcft_A.*meta"):
        save_adapter(layer, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_folder_that_is_a_file(base, adapted, tmp_path):
    path = tmp_path / "adapter"
    path.write_text("mine")
    with pytest.raises(OSError, match="adapter"):
        save_adapter(adapted, path)
    assert path.read_text() == "mine"
    with pytest.raises(FileNotFoundError, match=r"^folder: .*adapter' is not a directory"):
        load_adapter(base, path)


def test_a_missing_folder(base, tmp_path):
    _load_fails(
        base, tmp_path / "nowhere", FileNotFoundError, r"^folder: .*nowhere' is not a directory"
    )


def _truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _damaged(damage: Callable[[Path], Any], error: type[Exception], text: str, name: str):
    return pytest.param(damage, error, text, id=name)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_model_without_data_is_not_loaded_into(tmp_path, swapped):
    """Copying to the meta device would do nothing and say nothing."""
    model = nn.Sequential(nn.Linear(16, 16))
    names = swap_linear(model)
    save_adapter(model, tmp_path)
    target = nn.Sequential(nn.Linear(16, 16, device="meta"))
    if swapped:
        assert swap_linear(target) == names
    _load_fails(target, tmp_path, ValueError, r"0(\.dcft_A)?: on the meta device")


def test_values_that_the_model_cannot_hold_are_not_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16))
    swap_linear(model)
    with torch.no_grad():
        model[0].dcft_C.fill_(1e6)
    save_adapter(model, tmp_path)
    target = nn.Sequential(nn.Linear(16, 16))
    swap_linear(target, adapter_dtype=torch.float16)
    _load_fails(target, tmp_path, ValueError, r"0\.dcft_C: .* overflow torch\.float16")


def _set(*keys: str, value: Any) -> Callable[[Path], None]:
    """Set one entry of the config."""

    def edit(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return lambda folder: _edit_config(folder, edit)


def _drop(*keys: str) -> Callable[[Path], None]:
    def edit(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return lambda folder: _edit_config(folder, edit)


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors, with a digest that fits them."""

    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load_file(_weights_file(folder))
        change(tensors)
        _replace_weights(folder, tensors)

    return damage


def _flip_a_bit(folder: Path) -> None:
    path = _weights_file(folder)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _not_safetensors(folder: Path) -> None:
    content = b"no tensors here"
    _weights_file(folder).write_bytes(content)
    _set("weights", "sha256", value=hashlib.sha256(content).hexdigest())(folder)


def _outside(folder: Path) -> None:
    """The very weights, but in the parent folder."""
    moved = folder.parent / "weights.safetensors"
    _weights_file(folder).rename(moved)
    _set("weights", "file", value="../weights.safetensors")(folder)


QUERY = ("layers", "block.query")

DAMAGES = [
    _damaged(lambda f: (f / CONFIG).unlink(), FileNotFoundError,
             rf"{CONFIG}: no such file; save_adapter writes it", "no-config"),
    _damaged(lambda f: _weights_file(f).unlink(), FileNotFoundError,
             rf"safetensors: no such file; {CONFIG} names it", "no-weights"),
    _damaged(lambda f: (f / CONFIG).write_bytes(b""), ValueError,
             rf"{CONFIG}: truncated or not JSON", "empty-config"),
    _damaged(lambda f: _truncate(f / CONFIG, 0.7), ValueError,
             rf"{CONFIG}: truncated or not JSON", "truncated-config"),
    _damaged(lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), ValueError,
             rf"{CONFIG}: truncated or not JSON", "binary-config"),
    _damaged(lambda f: _weights_file(f).write_bytes(b""), ValueError,
             r"safetensors: truncated or changed .*SHA-256", "empty-weights"),
    _damaged(lambda f: _truncate(_weights_file(f), 0.7), ValueError,
             r"safetensors: truncated or changed .*SHA-256", "truncated-weights"),
    _damaged(_flip_a_bit, ValueError, r"safetensors: truncated or changed .*copy the folder again",
             "flipped-bit"),
    _damaged(_not_safetensors, ValueError, r"safetensors: not a safetensors file", "no-tensors"),
    _damaged(lambda f: (f / CONFIG).write_text("[1, 2]"), ValueError,
             r'not a DCFT adapter: expected "format": "dcft_adapter"', "json-list"),
    _damaged(lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "r": 8}'), ValueError,
             r"not a DCFT adapter.*written by another library", "foreign-json"),
    _damaged(_set("format", value="lora"), ValueError, "not a DCFT adapter", "other-format"),
    _damaged(_set("format_version", value=2), ValueError,
             r"expected format_version 1, got 2; it needs another version of dcft_kernels",
             "newer-version"),
    _damaged(_set("format_version", value="1"), ValueError,
             r"expected format_version 1, got '1'", "version-as-text"),
    _damaged(_drop("format_version"), ValueError,
             r"expected format_version 1, got None", "no-version"),
    _damaged(_drop("weights"), ValueError, r'expected "weights" with "file"', "no-weights-entry"),
    _damaged(_drop("weights", "sha256"), ValueError, r'"file" and "sha256"', "no-digest"),
    _damaged(_set("layers", value={}), ValueError, r'and "layers"', "no-layers"),
    _damaged(_set("layers", value=["block.query"]), ValueError, r'and "layers"', "layers-as-list"),
    _damaged(_outside, ValueError,
             r"expected a plain file name, got '\.\./weights\.safetensors'", "parent-folder"),
    _damaged(_set("weights", "file", value="/etc/passwd"), ValueError,
             r"expected a plain file name, got '/etc/passwd'", "absolute-path"),
    _damaged(_set("weights", "file", value="sub/weights.safetensors"), ValueError,
             r"expected a plain file name, got 'sub/weights\.safetensors'", "sub-folder"),
    _damaged(_set("weights", "file", value=".."), ValueError,
             r"expected a plain file name, got '\.\.'", "parent-itself"),
    _damaged(_set("weights", "file", value=""), ValueError,
             r"expected a plain file name, got ''", "empty-file-name"),
    _damaged(_set("weights", "file", value=7), ValueError, r'"weights" with "file"', "file-7"),
    _damaged(_set(*QUERY, value=None), ValueError,
             r"layer 'block\.query': expected .*got None", "layer-null"),
    _damaged(_set(*QUERY, value=[1]), ValueError,
             r"layer 'block\.query': expected .*got \[1\]", "layer-list"),
    _damaged(_drop(*QUERY, "in_features"), ValueError,
             r"layer 'block\.query'.*(has no|missing).*in_features", "no-in-features"),
    _damaged(_drop(*QUERY, "alpha"), ValueError,
             r"layer 'block\.query': has no 'alpha'", "no-alpha"),
    _damaged(_set(*QUERY, "backend", value="auto"), ValueError,
             r"layer 'block\.query': has an unknown setting 'backend'", "unknown-setting"),
    _damaged(_set(*QUERY, "in_features", value="20"), ValueError,
             r"layer 'block\.query': in_features: expected a positive int, got '20'",
             "in-features-as-text"),
    _damaged(_set(*QUERY, "in_features", value=-4), ValueError,
             r"layer 'block\.query': in_features: expected a positive int, got -4",
             "negative-in-features"),
    _damaged(_set(*QUERY, "rank", value=0), ValueError,
             r"layer 'block\.query': rank: expected a positive int, got 0", "rank-0"),
    _damaged(_set(*QUERY, "rank", value=3), ValueError,
             r"block\.query\.dcft_A: expected shape \[3, 3\], got \[2, 3\]", "other-rank"),
    _damaged(_set(*QUERY, "kernel_size", value=[4, 8, 2]), ValueError,
             r"layer 'block\.query': kernel_size: expected an int or a pair", "kernel-triple"),
    _damaged(_set(*QUERY, "kernel_size", value=[4, 6]), ValueError,
             r"layer 'block\.query': stride: expected at most the kernel size", "small-kernel"),
    _damaged(_set(*QUERY, "stride", value=[4, 8]), ValueError,
             r"block\.query\.dcft_B: expected shape \[4, 2\], got \[7, 2\]", "other-stride"),
    _damaged(_set(*QUERY, "alpha", value=float("nan")), ValueError,
             r"layer 'block\.query': alpha: expected a finite number, got nan", "alpha-nan"),
    _damaged(_set(*QUERY, "init", value="ones"), ValueError,
             r"layer 'block\.query': init: expected one of 'balanced', 'zero', 'paper', got 'ones'",
             "other-init"),
    _damaged(_set(*QUERY, "temperature", value=1), ValueError,
             r"layer 'block\.query': has an unknown setting 'temperature'", "unknown-option"),
    _damaged(_tensors(lambda t: t.pop("block.query.dcft_C")), ValueError,
             r"layer 'block\.query' has no tensor block\.query\.dcft_C", "missing-tensor"),
    _damaged(_tensors(lambda t: t.update(head=torch.ones(1))), ValueError,
             rf"holds tensors that {CONFIG} does not: .*head", "surplus-tensor"),
    _damaged(_tensors(lambda t: t.update({"block.query.dcft_C": torch.ones(8, 4)})), ValueError,
             r"block\.query\.dcft_C: expected shape \[4, 8\], got \[8, 4\]", "other-shape"),
    _damaged(_tensors(lambda t: t.update({"block.query.dcft_A": torch.ones(2, 3).int()})),
             ValueError, r"block\.query.*(dcft_A|dtype): expected .*got torch\.int32", "int-A"),
    _damaged(_tensors(lambda t: t.update({"block.query.dcft_B": torch.ones(7, 2).int()})),
             ValueError, r"block\.query.*(dcft_B|dtype): expected .*got torch\.int32", "int-B"),
]  # fmt: skip


@pytest.mark.parametrize("target", ["base", "swapped"])
@pytest.mark.parametrize(("damage", "error", "text"), DAMAGES)
def test_damaged_files_are_refused(base, folder, damage, error, text, target):
    if target == "swapped":
        swap_linear(base, **OPTIONS)
    damage(folder)
    message = _load_fails(base, folder, error, text)
    assert str(folder) in message  # it says which file


def test_differences_from_a_base_model_are_listed(folder):
    model = nn.ModuleDict(
        {"block": nn.ModuleDict({"query": nn.Linear(24, 16), "other": nn.Linear(16, 20)})}
    )
    message = _load_fails(model, folder, ValueError, r"^model: does not fit the adapter in")
    assert message.splitlines()[0].endswith("(2 differences; nothing was loaded):")
    assert sorted(message.splitlines()[1:]) == [
        "  block.dense: not in the model",
        "  block.query: (in_features, out_features) is (24, 16) in the model, (20, 16) in the file",
    ]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LayerNorm(16), "expected an nn.Linear or a transformers Conv1D, got LayerNorm"),
        (nn.ReLU(), "expected an nn.Linear or a transformers Conv1D, got ReLU"),
    ],
    ids=["LayerNorm", "ReLU"],
)
def test_a_layer_of_another_kind_is_listed(base, folder, layer, reason):
    base.block["dense"] = layer
    message = _load_fails(base, folder, ValueError, r"\(1 differences?; nothing was loaded\)")
    assert message.splitlines()[1].startswith(f"  block.dense: {reason}")


def test_differences_from_a_swapped_model_are_listed(base, folder):
    swap_linear(base, ["query"], rank=1, kernel_size=4, alpha=1.0)
    swap_linear(base, ["classifier"])
    message = _load_fails(base, folder, ValueError, r"^model: does not fit the adapter in")
    assert message.splitlines()[0].endswith("(6 differences; nothing was loaded):")
    assert message.splitlines()[1:] == [
        "  block.dense: adapted in the file, not in the model",
        "  block.query: alpha is 1.0 in the model, 3.0 in the file",
        "  block.query: kernel_size is (4, 4) in the model, (4, 8) in the file",
        "  block.query: rank is 1 in the model, 2 in the file",
        "  block.query: stride is (4, 4) in the model, (2, 8) in the file",
        "  classifier: adapted in the model, not in the file",
    ]


def test_other_sizes_of_a_swapped_model_are_listed(base, folder):
    base.block["query"] = nn.Linear(24, 12)
    swap_linear(base, **OPTIONS)
    message = _load_fails(base, folder, ValueError, r"\(2 differences; nothing was loaded\)")
    assert message.splitlines()[1:] == [
        "  block.query: in_features is 24 in the model, 20 in the file",
        "  block.query: out_features is 12 in the model, 16 in the file",
    ]


def test_a_long_list_of_differences_is_cut(tmp_path):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(30)))
    swap_linear(model)
    save_adapter(model, tmp_path)
    message = _load_fails(nn.Sequential(), tmp_path, ValueError, r"\(30 differences; nothing was")
    assert len(message.splitlines()) == 22
    assert message.splitlines()[-1] == "  and 10 more"


def test_loading_into_a_merged_model_is_refused(base, adapted, folder):
    model = copy.deepcopy(adapted)
    model.block["dense"].merge()
    _load_fails(
        model, folder, RuntimeError, r"model: 'block\.dense' is merged; call unmerge_model\(model\)"
    )
    unmerge_model(model)
    load_adapter(model, folder)


def test_errors_name_the_folder_as_given(base, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    base.block["dense"] = nn.Linear(16, 21)
    with pytest.raises(ValueError, match=r"adapter in 'adapter' \(1 difference"):
        load_adapter(base, "adapter")
