"""`explain` says what the model predicts, in a text that lines up; errors say what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from dcft_kernels import DCFTLinear
from dcft_kernels.explanation import Explanation, explain
from dcft_kernels.strategy import ENVIRONMENT_VARIABLE

SIZES: dict[str, Any] = {"in_features": 4096, "out_features": 4096, "tokens": 8192}


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def line_of(explanation: Explanation, start: str) -> str:
    return next(line for line in str(explanation).splitlines() if line.startswith(start))


def test_the_text_has_the_figures_of_the_estimate() -> None:
    told = explain(**SIZES, gpu="H100")
    assert told.choice is not None
    assert told.choice.frozen is not None
    assert told.strategy == told.choice.strategy == "row_block"
    for candidate in told.choice.candidates:
        predicted = candidate.estimate
        assert predicted is not None
        cells = line_of(told, candidate.strategy).replace(" *", "").split()
        assert cells[1:9] == [
            f"{predicted.forward.bytes / 1e6:,.1f}",
            str(predicted.forward.launches),
            f"{predicted.forward.seconds * 1e6:,.0f}",
            f"{predicted.backward.bytes / 1e6:,.1f}",
            str(predicted.backward.launches),
            f"{predicted.backward.seconds * 1e6:,.0f}",
            f"{predicted.seconds * 1e6:,.0f}",
            f"{predicted.seconds / told.choice.frozen.seconds:.2f}",
        ]
    assert "frozen layer" in str(told)
    assert "8192 tokens, 4096 -> 4096, rank 1, kernel 8x8, stride 8x8, bfloat16" in str(told)
    assert "on H100 (sm_90)" in str(told)
    assert "runs row_block: the quickest by prediction" in str(told)
    assert "rates of H100: measured elsewhere" in str(told)
    assert "3.00 TB/s, 800 TFLOP/s bfloat16" in str(told)


def test_the_chosen_one_is_marked_and_the_inexact_one_is_named() -> None:
    told = explain(**SIZES, gpu="H100")
    assert re.findall(r"^(\w+) \*", str(told), flags=re.MULTILINE) == ["row_block"]
    assert "only if asked for" in line_of(told, "scratch")
    assert "not exact" in line_of(explain(**SIZES, gpu="H100", strategy="scratch"), "scratch")


def test_the_columns_line_up() -> None:
    lines = str(explain(**SIZES, gpu="H100")).splitlines()
    header = next(i for i, line in enumerate(lines) if "launches" in line)
    titles = re.finditer(r"us in all|x frozen|MB|launches|us", lines[header])
    ends = [title.end() for title in titles]
    for line in lines[header + 1 : header + 6]:
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for end in ends), line
    assert lines[header - 1].index("backward") > lines[header - 1].index("forward")
    assert not any(line != line.rstrip() for line in lines)


def test_repr_is_the_text() -> None:
    told = explain(**SIZES, gpu="B200")
    assert repr(told) == str(told)


def test_a_layer_answers_for_itself() -> None:
    layer = DCFTLinear(96, 64, rank=2, kernel_size=4, stride=2, dropout=0.1, dtype=torch.bfloat16)
    told = explain(layer, tokens=1000, gpu="A100")
    assert told.call.geometry == layer.geometry
    assert (told.call.dtype, told.call.adapter_dtype) == (torch.bfloat16, torch.float32)
    assert (told.tokens, told.call.tokens) == (1000, 1024)
    assert told.call.dropout
    assert not told.call.weight_trained
    assert "1000 tokens (as 1024), 96 -> 64, rank 2, kernel 4x4, stride 2x2" in str(told)
    assert not explain(layer.eval(), tokens=1000, gpu="A100").call.dropout
    layer.weight.requires_grad_(True)
    assert "trained weight" in str(explain(layer, tokens=1000, gpu="A100"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_torch_runs_and_says_why() -> None:
    for told in (explain(**SIZES), explain(DCFTLinear(16, 16), tokens=3)):
        assert told.strategy == "torch"
        assert "runs torch: the tokens are not on a GPU; gpu='H100' asks" in str(told)
        assert "launches" not in str(told)


def test_a_device_that_is_no_gpu() -> None:
    assert explain(**SIZES, device="cpu").strategy == "torch"
    with pytest.raises(ValueError, match=r"strategy: 'fused' cannot run here: .* not on a GPU"):
        explain(**SIZES, device="cpu", strategy="fused")


def test_what_a_layer_has_settled() -> None:
    layer = DCFTLinear(64, 64, backend="torch")
    assert explain(layer, tokens=8, gpu="H100").strategy == "torch"
    layer.backend = "reference"
    assert "the reference" in str(explain(layer, tokens=8, gpu="H100"))
    layer.backend = "auto"
    layer.merge()
    assert "runs one plain product: the layer is merged" in str(explain(layer, tokens=8))


def test_why_kernels_cannot() -> None:
    told = explain(**SIZES, rank=100, gpu="H100")
    assert told.strategy == "torch"
    reason = "the kernels take rank * kernel_size up to 128, not 100 * 8 = 800"
    assert f"runs torch: {reason}" in str(told)
    assert line_of(told, "row_block").endswith(reason)
    assert line_of(told, "fused").endswith("likewise")


def test_float64_runs_without_a_prediction() -> None:
    told = explain(**SIZES, dtype=torch.float64, gpu="H100")
    assert told.strategy == "torch"
    assert "not float64" in str(told)


def test_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fused")
    assert "runs fused: asked for by DCFT_STRATEGY='fused'" in str(explain(**SIZES, gpu="H100"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": 0}, ValueError, "tokens: expected a positive int, got 0"),
        ({"tokens": 1.5}, TypeError, "tokens: expected a positive int"),
        ({"in_features": None}, TypeError, "in_features: missing; pass a layer, or"),
        ({"kernel_size": (2, 2, 2)}, ValueError, "kernel_size: expected an int or a pair"),
        ({"stride": 9}, ValueError, "stride: expected at most the kernel size"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected one of float32"),
        ({"dropout": 1.0}, ValueError, "dropout: expected a probability"),
        ({"strategy": "best"}, ValueError, "strategy: expected one of 'auto'"),
        ({"gpu": "GTX 970"}, ValueError, "gpu: expected one of A100"),
        ({"gpu": 90}, TypeError, "gpu: expected a name such as 'H100', got 90"),
        ({"gpu": "H100", "device": "cpu"}, TypeError, "gpu: stands in place of device"),
        ({"layer": nn.Linear(2, 2)}, TypeError, "layer: expected a DCFTLinear, got Linear"),
        ({"layer": DCFTLinear(2, 2)}, TypeError, "in_features: the layer has its own"),
    ],
)
def test_bad_input_is_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = SIZES | {"gpu": "H100"} | arguments
    if type(given.get("layer")) is nn.Linear:
        del given["in_features"], given["out_features"]
    with pytest.raises(error, match=message):
        explain(given.pop("layer", None), **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here() -> None:
    with pytest.raises(ValueError, match=r"device: .* finds no GPU; gpu='H100' asks about one"):
        explain(**SIZES, device="cuda")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    layer = DCFTLinear(4096, 4096, dtype=torch.bfloat16, device="cuda")
    told = explain(layer, tokens=8192)
    assert told.gpu is not None
    assert told.call.device_name == torch.cuda.get_device_name()
    assert told.choice is not None
