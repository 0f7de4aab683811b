"""Errors for wrong arguments of functions on whole models.

Every row is a call, the error's type, and a pattern of its text, which names the argument, what was
received, what was expected and, where there is one, the fix. Files with something wrong in them are
in test_adapter_files, PEFT models in test_peft_layers.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from torch import Tensor, nn

from dcft_kernels import (
    DCFTLinear,
    constraint_loss,
    constraints,
    freeze_base,
    load_adapter,
    merge_model,
    orthogonality_loss,
    parameter_counts,
    recipes,
    save_adapter,
    swap_linear,
    unmerge_model,
)
from tests.model_snapshot import ModelSnapshot

N, M = 24, 16


class QuantizedLinear(nn.Linear):
    """As in quantisation libraries: a subclass of Linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, N)
        self.query, self.value = nn.Linear(N, M), nn.Linear(N, M)
        self.norm = nn.LayerNorm(M)
        self.quantized = QuantizedLinear(M, M)
        self.classifier = nn.Linear(M, 3)


class Setting:
    """Models and a saved adapter, which a row may use and must not change."""

    def __init__(self, folder: Path) -> None:
        self.base = Model()
        self.swapped = copy.deepcopy(self.base)
        swap_linear(self.swapped, ["query", "value"], init="paper")
        self.merged = copy.deepcopy(self.swapped)
        merge_model(self.merged)
        self.nonlinear = copy.deepcopy(self.base)
        swap_linear(self.nonlinear, ["query", "value"], init="paper", nonlinearity="relu")
        self.layer = DCFTLinear(N, M, init="paper")
        self.folder = folder / "adapter"
        save_adapter(self.swapped, self.folder)

    def snapshots(self) -> list[ModelSnapshot]:
        return [ModelSnapshot(m) for m in vars(self).values() if isinstance(m, nn.Module)]

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def test_good_calls_are_good(setting):
    """Otherwise the rows below could fail for other reasons than theirs."""
    assert load_adapter(setting.base, setting.folder) == ["query", "value"]
    freeze_base(setting.swapped, trainable=["classifier"])
    unmerge_model(setting.merged)
    merge_model(setting.swapped)
    assert orthogonality_loss(setting.swapped, form="published_code").isfinite()
    assert constraint_loss(setting.swapped, "diagonal", "published_code").isfinite()
    constraints.remove_nonlinearity(setting.nonlinear)


NO_LAYERS = r"^model: has no DCFTLinear layers; call swap_linear\(model\) first"
NO_ADAPTERS = r"^model: has neither DCFTLinear layers nor active PEFT adapters"
PATTERN = "expected a name, a regular expression or a list of names"
NOT_MODULES = {
    swap_linear: (),
    merge_model: (),
    unmerge_model: (),
    freeze_base: (),
    parameter_counts: (),
    orthogonality_loss: (),
    constraint_loss: (),
    constraints.add_nonlinearity: ("relu",),
    constraints.remove_nonlinearity: (),
    save_adapter: ("folder",),
    load_adapter: ("folder",),
}


@pytest.mark.parametrize("given", [None, "bert-base-uncased"])
@pytest.mark.parametrize(("function", "arguments"), NOT_MODULES.items())
def test_a_model_is_a_module(function, arguments, given):
    kind = type(given).__name__
    with pytest.raises(TypeError, match=rf"^model: expected a torch\.nn\.Module, got {kind}$"):
        function(given, *arguments)


TABLE = [
    # swap_linear
    (lambda s: swap_linear(s.base.query), ValueError,
     r"^model: is itself a linear layer.*use DCFTLinear\.from_linear"),
    (lambda s: swap_linear(nn.Sequential(nn.ReLU())), ValueError,
     r"^targets: .*the model has no linear layers"),
    (lambda s: swap_linear(s.base, None), TypeError, rf"^targets: {PATTERN}, got None"),
    (lambda s: swap_linear(s.base, [1, 2]), TypeError, rf"^targets: {PATTERN}, got \[1, 2\]"),
    (lambda s: swap_linear(s.base, {"query"}), TypeError, rf"^targets: {PATTERN}, got .'query'"),
    (lambda s: swap_linear(s.base, b"query"), TypeError, rf"^targets: {PATTERN}, got b'query'"),
    (lambda s: swap_linear(s.base, []), ValueError,
     r"^targets: expected at least one name, got an empty list"),
    (lambda s: swap_linear(s.base, "query("), ValueError,
     r"^targets: 'query\(' is not a regular expression: .*"),
    (lambda s: swap_linear(s.base, ["query", "qeury"]), ValueError,
     r"^targets: 'qeury' matches no layer of the model; did you mean 'query'"),
    (lambda s: swap_linear(s.base, "valu"), ValueError,
     r"^targets: 'valu' matches no layer of the model; did you mean 'value'"),
    (lambda s: swap_linear(s.base, ["zzz"]), ValueError,
     r"^targets: 'zzz' matches no layer .*linear layers are named 'query', 'value', 'classifier'"),
    (lambda s: swap_linear(s.base, ["query", "norm"]), TypeError,
     r"^targets: 'norm' cannot be adapted: expected an nn\.Linear .*got LayerNorm"),
    (lambda s: swap_linear(s.base, ["query", "quantized"]), TypeError,
     r"^targets: 'quantized' cannot be adapted: .*got QuantizedLinear; .*dcft_update"),
    (lambda s: swap_linear(s.swapped, ["query"]), ValueError,
     r"^targets: already swapped: 'query'; layers not swapped yet: 'classifier'"),
    (lambda s: swap_linear(nn.Sequential(s.layer), ["0"]), ValueError,
     r"^targets: already swapped: '0'; layers not swapped yet: none$"),
    (lambda s: swap_linear(s.swapped), ValueError,
     r"^targets: every linear layer of this model is a DCFTLinear already"),
    (lambda s: swap_linear(s.base, ["query"], exclude=["query"]), ValueError,
     r"^targets: \['query'\] without exclude=\['query'\] leaves no layer"),
    (lambda s: swap_linear(s.base, exclude=None), TypeError, rf"^exclude: {PATTERN}, got None"),
    (lambda s: swap_linear(s.base, exclude="*"), ValueError,
     r"^exclude: '\*' is not a regular expression"),
    (lambda s: swap_linear(s.base, exclude=["valeu"]), ValueError,
     r"^exclude: 'valeu' matches no layer of the model; did you mean 'value'"),
    (lambda s: swap_linear(s.base, lora_alpha=8), TypeError,
     r"^lora_alpha: not a DCFT option; the options are rank, kernel_size, "),
    (lambda s: swap_linear(s.base, dropout=1), ValueError,
     r"^dropout: expected a probability in \[0, 1\), got 1"),

    # merging, freezing
    (lambda s: merge_model(s.base), ValueError, NO_LAYERS),
    (lambda s: merge_model(s.merged), RuntimeError,
     r"^model: 2 of 2 layers are merged already, 'query' first; call unmerge_model\(model\)"),
    (lambda s: merge_model(s.layer, unload=True), ValueError,
     r"^model: is itself the layer to replace.*use its to_linear\(\)"),
    (lambda s: unmerge_model(s.base), ValueError, NO_LAYERS),
    (lambda s: unmerge_model(s.swapped), RuntimeError,
     r"^model: no layer is merged; call merge_model\(model\) first"),
    (lambda s: freeze_base(s.base), ValueError, NO_LAYERS),
    (lambda s: freeze_base(s.merged), RuntimeError,
     r"^model: 'query' is merged; call unmerge_model\(model\) first"),
    (lambda s: freeze_base(s.swapped, trainable=["classifier", "clasifier"]), ValueError,
     r"^trainable: .*'clasifier'.* matches no parameter of the model"),
    (lambda s: freeze_base(s.swapped, trainable=None), TypeError, rf"^trainable: {PATTERN}, got N"),

    # constraints and recipes
    (lambda s: orthogonality_loss(s.base), ValueError,
     r"^model: has no DCFTLinear layers and no active DCFT adapter of PEFT"),
    (lambda s: orthogonality_loss(s.swapped, form="code"), ValueError,
     r"^form: expected 'paper' or 'published_code', got 'code'"),
    (lambda s: constraint_loss(s.base), ValueError, NO_ADAPTERS + r".*call swap_linear\(model\)"),
    (lambda s: constraint_loss(s.swapped, "nonlinear"), ValueError,
     r"^constraint: expected 'orthogonal' or 'diagonal', got 'nonlinear'; .*add_nonlinearity"),
    (lambda s: constraint_loss(s.swapped, "diagonal", "code"), ValueError,
     r"^form: expected 'paper' or 'published_code', got 'code'"),
    (lambda s: constraints.add_nonlinearity(s.base, "relu"), ValueError, NO_ADAPTERS),
    (lambda s: constraints.add_nonlinearity(s.swapped, "elu"), ValueError,
     r"^nonlinearity: expected one of 'relu', .*, got 'elu'"),
    (lambda s: constraints.add_nonlinearity(s.nonlinear, "relu"), ValueError,
     r"^model: 'query' has nonlinearity='relu' already; call remove_nonlinearity"),
    (lambda s: constraints.add_nonlinearity(s.merged, "relu"), RuntimeError,
     r"^model: 'query' is merged; call unmerge_model\(model\) first"),
    (lambda s: constraints.remove_nonlinearity(s.swapped), ValueError,
     r"^model: no adapter has a nonlinearity; add_nonlinearity"),
    (lambda s: recipes.glue("colla"), ValueError,
     r"^task: expected one of 'CoLA', 'SST-2', .*'RTE', got 'colla'; did you mean 'CoLA'\?"),
    (lambda s: recipes.glue("wnli"), ValueError, r"got 'wnli'; did you mean '[MQ]NLI'\?"),
    (lambda s: recipes.glue(None), TypeError, r"^task: expected a name, got None"),
    (lambda s: recipes.squad("v3"), ValueError,
     r"^version: expected one of 'v1\.1', 'v2\.0', got 'v3'"),
    (lambda s: recipes.squad(1.1), TypeError, r"^version: expected a name, got 1\.1"),
    (lambda s: recipes.glue("cola").penalty(s.base), ValueError, NO_ADAPTERS),

    # files
    (lambda s: save_adapter(s.base, s.folder), ValueError, NO_LAYERS),
    (lambda s: save_adapter(s.swapped, None), TypeError, r"^folder: expected a path, got None"),
    (lambda s: load_adapter(s.base, 3), TypeError, r"^folder: expected a path, got 3"),
    (lambda s: load_adapter(s.base, s.folder / "nowhere"), FileNotFoundError,
     r"^folder: '.*nowhere' is not a directory"),
    (lambda s: load_adapter(s.base, s.folder.parent), FileNotFoundError,
     r"dcft_config\.json: no such file; save_adapter writes it"),
    (lambda s: load_adapter(s.merged, s.folder), RuntimeError,
     r"^model: 'query' is merged; call unmerge_model\(model\) first"),
    (lambda s: load_adapter(s.nonlinear, s.folder), ValueError,
     r"query: nonlinearity is relu in the model, None in the file"),
    (lambda s: load_adapter(nn.Sequential(nn.Linear(N, M)), s.folder), ValueError,
     r"^model: does not fit the adapter in .*\(2 differences; nothing was loaded\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), TABLE)
def test_bad_input(setting, call, error, text):
    snapshots, files = setting.snapshots(), setting.files()
    with pytest.raises(error, match=text) as caught:
        call(setting)
    # No subclass either: a KeyError or an UnboundLocalError is an accident.
    assert caught.type is error
    for snapshot in snapshots:
        snapshot.assert_unchanged()
    assert setting.files() == files
