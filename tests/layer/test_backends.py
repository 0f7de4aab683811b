"""What runs a call: the rule of `"auto"`, refusals, the options of a layer, and `explain`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dcft_kernels.triton
from dcft_kernels import DCFTLinear, explain
from dcft_kernels.backends import select, select_for_call, why_kernels_cannot
from tests.adapter_cases import AdapterShape, adapter_of, random_inputs

PAPER = AdapterShape(48, 64, 1, (8, 8), (8, 8))
TOO_WIDE = AdapterShape(64, 64, 17, (8, 8), (8, 8))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels can run on any device."""
    monkeypatch.setattr(dcft_kernels.triton, "why_unavailable", lambda device: None)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device runs kernels."""
    monkeypatch.setattr(dcft_kernels.triton, "why_unavailable", lambda device: "no GPU here")


def selected(
    backend: str = "auto",
    strategy: str = "auto",
    case: AdapterShape = PAPER,
    dtype: torch.dtype = torch.float32,
    *,
    traced: bool = False,
) -> str:
    adapter = adapter_of(random_inputs(case, dtype=dtype), case)
    found = select(backend, adapter, dtype, strategy)
    return select_for_call(found, backend, strategy, traced=traced)


def test_auto_runs_the_kernels_wherever_they_take_the_adapter(gpu) -> None:
    assert selected() == selected("triton") == "triton"
    assert selected(case=TOO_WIDE) == "torch"
    assert selected(dtype=torch.float64) == "torch"
    assert selected(strategy="row_block") == selected("triton", "row_block") == "row_block"
    assert selected("torch") == selected(strategy="torch") == "torch"
    assert selected("reference") == "reference"


def test_kernels_requested_by_name_refuse_transforms(gpu) -> None:
    for asked in ((), ("torch",), ("auto", "torch"), ("reference",)):
        with torch.autograd.forward_ad.dual_level():
            assert selected(*asked) == ("reference" if "reference" in asked else "composite")
    for asked in (("triton",), ("auto", "row_block")):
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(RuntimeError, match=rf"='{asked[-1]}': torch.func, .*backend='auto'"),
        ):
            selected(*asked)


def test_compilers_see_the_operations_of_torch_and_not_of_the_kernels(gpu) -> None:
    assert selected(traced=True) == selected("triton", traced=True) == "triton"
    assert selected(strategy="row_block", traced=True) == "row_block"
    assert selected("torch", traced=True) == selected(case=TOO_WIDE, traced=True) == "composite"
    assert selected("reference", traced=True) == "reference"


def test_auto_runs_torch_without_a_gpu(no_gpu) -> None:
    assert selected() == "torch"
    assert selected("reference") == "reference"
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: no GPU here; use backen"):
        selected("triton")
    with pytest.raises(RuntimeError, match=r"strategy='row_block' cannot run: no GPU here; use st"):
        selected(strategy="row_block")
    with pytest.raises(RuntimeError, match=r"strategy='seeded' cannot run: no GPU here; use strat"):
        selected(strategy="seeded")


@pytest.mark.parametrize(
    ("backend", "strategy", "message"),
    [
        ("cuda", "auto", r"^backend: expected one of 'auto', 'torch', .*got 'cuda'"),
        ("auto", "fused", r"^strategy: expected one of 'auto', 'seeded', .*'torch', got 'fused'"),
        ("torch", "row_block", r"^strategy: 'row_block' is one of .*got backend='torch'"),
        ("torch", "seeded", r"^strategy: 'seeded' is one of .*got backend='torch'"),
        ("reference", "row_block", r"^strategy: 'row_block' is one of .*got backend='reference'"),
        ("triton", "torch", r"^strategy: 'torch' is not one of backend='triton'"),
    ],
)
def test_names_that_do_not_exist_or_go_together(gpu, backend, strategy, message) -> None:
    with pytest.raises(ValueError, match=message):
        selected(backend, strategy)


def test_what_the_kernels_take() -> None:
    geometry = PAPER.geometry
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert why_kernels_cannot(geometry, dtype, torch.float32) is None
    assert "tokens in float32, bfloat16 or float16, not float64" in str(
        why_kernels_cannot(geometry, torch.float64)
    )
    assert "factors" in str(why_kernels_cannot(geometry, torch.float32, torch.float64))
    assert "kernel sizes up to 64, not 65" in str(
        why_kernels_cannot(AdapterShape(99, 99, 1, (8, 65), (8, 65)).geometry, torch.float32)
    )
    assert "not 17 * 8 = 136" in str(why_kernels_cannot(TOO_WIDE.geometry, torch.float32))
    assert (
        why_kernels_cannot(AdapterShape(64, 64, 16, (8, 8), (8, 8)).geometry, torch.float32) is None
    )


def test_options_keep_every_setting() -> None:
    """A layer built from another one's options is the same, its strategy included."""
    layer = DCFTLinear(
        48, 64, rank=2, kernel_size=(4, 8), stride=(2, 8), alpha=3.0, dropout=0.1, init="zero",
        backend="auto", adapter_dtype=torch.float64, strategy="row_block",
    )  # fmt: skip
    assert layer.options.strategy == "row_block"
    twin = DCFTLinear.from_linear(nn.Linear(48, 64), **vars(layer.options))
    assert twin.options == layer.options


def test_explain_names_what_runs_and_why(no_gpu) -> None:
    layer = DCFTLinear(64, 96, device="meta")
    told = explain(layer, tokens=100)
    assert (told.strategy, told.reason) == ("torch", "no GPU here")
    assert "64 -> 96" in str(told)
    assert "runs torch: no GPU here" in str(told)
    T, n, m, r = 100, 64, 96, 8
    assert told.adapter == (4 * T * (4 * (n + m) + 6 * r), 6 * T * r * (n + m))
    layer.backend = "reference"
    assert explain(layer, tokens=1).reason == "requested by backend='reference'"
    layer.backend, layer.strategy = "auto", "row_block"
    with pytest.raises(RuntimeError, match="strategy='row_block' cannot run: no GPU here"):
        explain(layer, tokens=1)
    merged = DCFTLinear(16, 16)
    merged.merge()
    assert explain(merged, tokens=1).strategy == "merged"
    assert explain(merged, tokens=1).adapter == (0, 0)
    assert "adapter        0 B, 0 FLOP" in str(explain(merged, tokens=1))
    assert "frozen layer   2.3 kB, 1.0 kFLOP" in str(explain(merged, tokens=1))


def test_explain_on_a_gpu(gpu) -> None:
    layer = DCFTLinear(64, 96, dtype=torch.bfloat16)
    told = explain(layer, tokens=100)
    assert (told.strategy, told.reason) == ("row_block", "the kernels take this layer")
    T, n, m, U = 100, 64, 96, 8
    assert told.frozen == (2 * 2 * (T * (n + m) + n * m), 4 * T * n * m)
    assert told.adapter.bytes == 2 * T * (4 * n + 3 * m + 2 * U)
    half = explain(layer, tokens=100, dtype=torch.float16)  # U is float32
    assert half.adapter.bytes == 2 * T * (4 * n + 3 * m + 4 * U)
    assert "float64" in explain(layer, tokens=1, dtype=torch.float64).reason


def test_explain_says_that_no_kernel_takes_a_nonlinearity(gpu) -> None:
    layer = DCFTLinear(64, 96, nonlinearity="relu")
    told = explain(layer, tokens=100)
    assert told.strategy == "torch"
    assert "runs torch: nonlinearity='relu' is between the factors, which no kernel" in str(told)
    layer.nonlinearity = None
    assert explain(layer, tokens=100).strategy == "row_block"


def test_explain_refuses_what_is_no_layer() -> None:
    with pytest.raises(TypeError, match="layer: expected a DCFTLinear, got Linear"):
        explain(nn.Linear(2, 2), tokens=1)
    with pytest.raises(ValueError, match="tokens: expected a positive int, got 0"):
        explain(DCFTLinear(2, 2), tokens=0)
