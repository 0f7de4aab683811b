"""Heads, norms and buffers that `save_adapter` saves with the adapters."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

from dcft_kernels import (
    adapter_folder,
    freeze_base,
    load_adapter,
    merge_model,
    save_adapter,
    swap_linear,
)
from tests.model_snapshot import ModelSnapshot

X = torch.linspace(-1, 1, 64).reshape(4, 16)
LAYERS = ["encoder.0", "encoder.1"]
HEAD = ["head.0.bias", "head.0.weight", "head.1.bias", "head.1.weight"]
STATISTICS = ["num_batches_tracked", "running_mean", "running_var"]
FACTORS = {f"{layer}.dcft_{factor}" for layer in LAYERS for factor in "ABC"}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 16))
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3))
        self.head.register_buffer("kept", torch.zeros(2))
        self.head[1].register_buffer("temperature", torch.ones(()))
        self.head[1].register_buffer("cache", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(x))) / self.head[1].temperature


@pytest.fixture
def base() -> Network:
    return Network().eval()


def _adapted(base: nn.Module) -> nn.Module:
    model = copy.deepcopy(base)
    swap_linear(model, LAYERS)
    freeze_base(model, trainable=["head"])
    return model


@pytest.fixture
def trained(base: Network) -> nn.Module:
    """Everything that training changes has been changed."""
    model = _adapted(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.5)
    model.head[1].temperature.fill_(0.5)
    model.train()(5 * X)  # the statistics of the frozen norm
    return model.eval()


def _saved(folder: Path) -> set[str]:
    config, tensors = adapter_folder.read(folder)
    others = config.get("modules_to_save", [])
    assert tensors.keys() == FACTORS | set(others)
    assert config["format_version"] == (2 if others else 1)
    return set(others)


@contextlib.contextmanager
def _refused(model: nn.Module, error: type[Exception], text: str) -> Iterator[None]:
    snapshot = ModelSnapshot(model)
    with pytest.raises(error, match=text):
        yield
    snapshot.assert_unchanged()


@pytest.mark.parametrize("swapped", [False, True])
def test_a_trained_head_comes_back(base, trained, tmp_path, swapped):
    target = _adapted(base) if swapped else base
    target.head.requires_grad_(False)
    parameters = {name: id(p) for name, p in target.head.named_parameters()}
    with warnings.catch_warnings(action="error"):
        save_adapter(trained, tmp_path)
    load_adapter(target, tmp_path)
    assert torch.equal(target(X), trained(X))
    assert {name: id(p) for name, p in target.head.named_parameters()} == parameters
    assert not any(p.requires_grad for p in target.head.parameters())


DEFAULT = {*HEAD, "head.1.temperature", *(f"norm.{name}" for name in STATISTICS)}
CHOICES = [
    (None, DEFAULT, ""),
    ((), set(), "head.0.weight, head.0.bias, head.1.weight, head.1.bias; add them to modules_to"),
    (r"head\.1", {"head.1.weight", "head.1.bias", "head.1.temperature"}, "head.0.weight, head.0.b"),
    (["head", "norm.weight"], {*HEAD, "head.1.temperature", "head.kept", "norm.weight"}, ""),
    (["encoder.0", "head"],
     {*HEAD, "head.1.temperature", "head.kept", "encoder.0.weight", "encoder.0.bias"}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("modules_to_save", "names", "warning"), CHOICES)
def test_what_is_saved(base, trained, tmp_path, modules_to_save, names, warning):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_adapter(trained, tmp_path, modules_to_save=modules_to_save)
    start = f"save_adapter: trainable but not saved: {warning}"
    assert [str(w.message).startswith(start) for w in caught] == [True] * bool(warning)
    assert all(w.filename == __file__ for w in caught)
    assert _saved(tmp_path) == names
    load_adapter(base, tmp_path)
    state, expected = base.state_dict(), trained.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in names | FACTORS)


def test_buffers_of_a_parametrized_head_come_back(base, tmp_path):
    spectral_norm(base.head[1])
    model = _adapted(base)
    nn.init.normal_(model.head[1].parametrizations.weight.original)
    model.train()(X)  # a step of the power iteration
    save_adapter(model.eval(), tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(X), model(X))


def test_shared_parameters_are_saved_once(base, trained, tmp_path):
    trained.decoder, base.decoder = trained.head[1], base.head[1]
    save_adapter(trained, tmp_path)
    assert _saved(tmp_path) == DEFAULT
    save_adapter(trained, tmp_path, modules_to_save=["decoder", "head.0"])
    assert _saved(tmp_path) >= {"decoder.weight", "decoder.bias"}
    load_adapter(base, tmp_path)
    assert torch.equal(base.head[1].weight, trained.head[1].weight)


def test_two_values_for_one_parameter_are_refused(base, trained, tmp_path):
    """Of a model that was saved with untied weights; the last one would win."""
    base.other, trained.other = base.head, copy.deepcopy(trained.head)
    save_adapter(trained, tmp_path)
    load_adapter(copy.deepcopy(base), tmp_path)
    nn.init.normal_(trained.other[1].weight)
    save_adapter(trained, tmp_path)
    with _refused(base, ValueError, r"other\.1\.weight: tied to head\.1\.weight in the model, not"):
        load_adapter(base, tmp_path)


def test_a_merged_layers_base_is_saved_not_its_sum(base, trained, tmp_path):
    trained.encoder.requires_grad_(True)
    nn.init.normal_(trained.encoder[0].weight)
    save_adapter(trained, tmp_path / "before")
    merge_model(trained)
    save_adapter(trained, tmp_path / "merged")
    before, merged = (adapter_folder.read(tmp_path / f)[1] for f in ("before", "merged"))
    assert before.keys() == merged.keys() >= {"encoder.0.weight"}
    assert all(torch.equal(before[name], merged[name]) for name in before)


@pytest.mark.parametrize(
    ("modules_to_save", "error", "text"),
    [
        (["head", "hed"], ValueError, r"modules_to_save: 'hed' matches no parameter or buffer"),
        ("(", ValueError, "modules_to_save: .*not a regular expression"),
        (3, TypeError, "modules_to_save: expected a .*list"),
    ],
)
def test_bad_choices_are_refused(trained, tmp_path, modules_to_save, error, text):
    with _refused(trained, error, text):
        save_adapter(trained, tmp_path / "new", modules_to_save=modules_to_save)
    assert not (tmp_path / "new").exists()


def test_a_head_that_does_not_fit_is_not_loaded(base, trained, tmp_path):
    trained.head[0].weight.data[0] = 1e6
    save_adapter(trained, tmp_path)
    base.head[0].half()
    base.head[0].bias = nn.Parameter(torch.empty(16, device="meta"))
    base.head[1] = nn.Linear(16, 4)
    base.norm.register_buffer("num_batches_tracked", torch.tensor(0.0))
    text = r"""\(6 differences; nothing was loaded\):
  head\.0\.bias: on the meta device, which holds no values
  head\.0\.weight: values in the file overflow torch\.float16
  head\.1\.bias: shape is \[4\] in the model, \[3\] in the file
  head\.1\.temperature: no parameter or persistent buffer of the model; if .*, undo that
  head\.1\.weight: shape is \[4, 16\] in the model, \[3, 16\] in the file
  norm\.num_batches_tracked: dtype is torch\.float32 in the model, torch\.int64 in the file$"""
    for target in (base, _adapted(base)):
        with _refused(target, ValueError, text):
            load_adapter(target, tmp_path)


def test_a_trainable_parameter_without_values_is_refused(trained, tmp_path):
    trained.head[1].weight = nn.Parameter(torch.empty(3, 16, device="meta"))
    with _refused(trained, ValueError, r"head\.1\.weight is on the meta device; load .*, or leave"):
        save_adapter(trained, tmp_path)
    with pytest.warns(UserWarning, match="trainable but not saved"):
        save_adapter(trained, tmp_path, modules_to_save=())


def test_computed_factors_are_refused(base, trained, tmp_path):
    """A value copied into a computed tensor is lost when it is computed again."""
    save_adapter(trained, tmp_path)
    prune.l1_unstructured(trained.encoder[1], "dcft_B", 0.5)
    text = r"encoder\.1\.dcft_B: no parameter .*; if pruned or parametrised, undo that"
    with _refused(trained, ValueError, text):
        load_adapter(trained, tmp_path)
    with _refused(trained, ValueError, text):
        save_adapter(trained, tmp_path)
    prune.remove(trained.encoder[1], "dcft_B")
    save_adapter(trained, tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(X), trained(X))


def test_shards_of_an_unknown_kind_are_refused(base, trained, tmp_path):
    """DeepSpeed's ZeRO-3 leaves empty parameters, of small ones perhaps whole ones."""
    save_adapter(trained, tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for module, name in ((trained.head[1], "weight"), (trained.encoder[0], "dcft_A")):
        parameter = getattr(module, name)
        whole, parameter.data = parameter.data, torch.empty(0)
        if name == "weight":
            parameter.ds_shape = whole.shape
        text = rf"{name}: expected shape \[.*\], got \[0\]: is it sharded by DeepSpeed ZeRO-3\?"
        with _refused(trained, ValueError, text):
            save_adapter(trained, tmp_path)
        with _refused(trained, ValueError, rf"{name}: shape is \[0\] in the model"):
            load_adapter(trained, tmp_path)
        parameter.data = whole
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_a_parameter_that_only_has_a_factors_name(base, trained, tmp_path):
    """As of a module that calls `dcft_update` with its own factors."""
    trained.dcft_A = nn.Parameter(torch.ones(2))
    save_adapter(trained, tmp_path)
    assert _saved(tmp_path) == {*DEFAULT, "dcft_A"}
    with _refused(base, ValueError, "dcft_A: no parameter or persistent buffer"):
        load_adapter(base, tmp_path)
    base.dcft_A = nn.Parameter(torch.zeros(2))
    load_adapter(base, tmp_path)
    assert base.dcft_A.tolist() == [1, 1]
