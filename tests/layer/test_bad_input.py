"""Errors for wrong arguments of layers and functions.

Every row is a good call with something wrong in it, the error's type, and a pattern of its text,
which names the argument, what was received, what was expected and, where there is one, the fix.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcft_kernels import (
    DCFTLinear,
    add_delta_weight_,
    dcft_linear,
    dcft_update,
    delta_weight,
    explain,
    functional,
)
from tests.model_snapshot import ModelSnapshot

# Sizes of the good calls: n = 24, m = 16, d = 8, k = 1.
N, M = 24, 16
X, Y = torch.linspace(-1, 1, 5 * N).reshape(5, N), torch.ones(5, M)
WEIGHT, BIAS = torch.linspace(-1, 1, M * N).reshape(M, N), torch.ones(M)
A, B, C = torch.ones(1, 3), torch.ones(2, 1), torch.ones(8, 8)
TENSORS = [X, Y, WEIGHT, BIAS, A, B, C]


def linear(**changed: Any) -> Tensor:
    good = {"x": X, "weight": WEIGHT, "bias": BIAS, "dcft_A": A, "dcft_B": B, "dcft_C": C}
    return dcft_linear(**good | changed)


def update(**changed: Any) -> Tensor:
    return dcft_update(**{"y": Y, "x": X, "dcft_A": A, "dcft_B": B, "dcft_C": C} | changed)


def add(**changed: Any) -> Tensor:
    good = {"weight": WEIGHT.clone(), "dcft_A": A, "dcft_B": B, "dcft_C": C}
    return add_delta_weight_(**good | changed)


def delta(**changed: Any) -> Tensor:
    good = {"dcft_A": A, "dcft_B": B, "dcft_C": C, "in_features": N, "out_features": M}
    return delta_weight(**good | changed)


def layer(**changed: Any) -> DCFTLinear:
    return DCFTLinear(**{"in_features": N, "out_features": M} | changed)


def adapt(**changed: Any) -> DCFTLinear:
    return DCFTLinear.from_linear(**{"linear": nn.Linear(N, M)} | changed)


def test_good_calls_are_good():
    """Otherwise the rows below could fail for other reasons than theirs."""
    assert linear().shape == update().shape == (5, M)
    assert torch.equal(linear(stride=[8, 8]), linear())
    assert torch.equal(linear(training=[], dropout_p=0.5), linear())
    assert torch.equal(linear(stride=(np.int64(8), np.int32(8))), linear())
    sizes = vars(layer(in_features=np.int64(N), rank=np.int64(2), kernel_size=np.int32(8)).options)
    assert type(sizes["rank"]) is type(sizes["kernel_size"][0]) is int
    assert linear(nonlinearity="gelu").shape == (5, M)
    assert delta().shape == add().shape == (M, N)
    assert layer()(X).shape == adapt()(X).shape == (5, M)


NO_TRITON = r"^backend='triton' cannot run: .+; use backend='auto' or 'torch'"
TWO_SIDES = r"an int or a pair \(out, in\)"
FLOATS = r"a tensor of float32, bfloat16, float16, float64"
PROBABILITY = r"expected a probability in \[0, 1\)"
POSITIVE = "expected a positive int, got"
SIZES = "expected positive sizes, got shape"

CALLS = [
    # x
    (linear, {"x": None}, TypeError, r"^x: expected a torch\.Tensor, got NoneType"),
    (linear, {"x": [[1.0]]}, TypeError, r"^x: expected a torch\.Tensor, got list \[\[1\.0\]\]"),
    (linear, {"x": X.long()}, TypeError,
     rf"^x: expected {FLOATS}, got torch\.int64; convert .*x\.float\(\)"),
    (linear, {"x": X.to(torch.float8_e4m3fn)}, TypeError, rf"^x: expected {FLOATS}, .*float8"),
    (linear, {"x": X.to_sparse()}, TypeError, r"^x: expected a dense tensor, got .*sparse_coo"),
    (linear, {"x": torch.ones(())}, ValueError, r"^x: expected shape .*features\], got a scalar"),
    (linear, {"x": X.t()}, ValueError, r"^x: expected a last dimension of 24, got shape \[24, 5\]"),
    (linear, {"x": X.double()}, TypeError,
     r"^weight: expected torch\.float64, the dtype of x, got torch\.float32; .*autocast"),
    (linear, {"x": X.to("meta")}, ValueError,
     r"^weight: expected device meta, where x is, got cpu; move one with \.to"),
    (update, {"x": torch.ones(5, 0)}, ValueError,
     r"^x: expected at least one feature, got shape \[5, 0\]"),

    # y, weight, bias
    (update, {"y": torch.ones(5, 0)}, ValueError, r"^y: expected at least one feature"),
    (update, {"y": Y[1:]}, ValueError,
     r"^y: expected leading dimensions \[5\], those of x, got shape \[4, 16\]"),
    (update, {"y": torch.ones(5, M + 1)}, ValueError,
     r"^dcft_B: expected shape \[3, 1\] for out_features=17, .*got \[2, 1\]"),
    (update, {"y": Y.double()}, TypeError,
     r"^y: expected torch\.float32, the dtype of x, got torch\.float64"),
    (linear, {"weight": WEIGHT[0]}, ValueError, r"^weight: expected a 2-D .*got shape \[24\]"),
    (linear, {"weight": WEIGHT[:0]}, ValueError, rf"^weight: {SIZES} \[0, 24\]"),
    (linear, {"weight": WEIGHT.t()}, ValueError, r"^x: expected a last dimension of 16, got"),
    (linear, {"weight": WEIGHT.bfloat16()}, TypeError,
     r"^weight: expected torch\.float32, the dtype of x, got torch\.bfloat16"),
    (linear, {"bias": 0.5}, TypeError, r"^bias: expected a torch\.Tensor, got float 0\.5"),
    (linear, {"bias": torch.ones(N)}, ValueError, r"^bias: expected shape \[16\], got \[24\]"),
    (linear, {"bias": BIAS.half()}, TypeError, r"^bias: expected torch\.float32, the dtype of x"),
    (add, {"weight": torch.ones(2, M, N)}, ValueError, r"^weight: expected a 2-D tensor, got sha"),
    (add, {"weight": torch.ones(M, N + 1)}, ValueError,
     r"^dcft_A: expected shape \[1, 4\] for in_features=25"),

    # factors
    (linear, {"dcft_A": A[:0]}, ValueError, rf"^dcft_A: {SIZES} \[0, 3\]"),
    (linear, {"dcft_A": torch.ones(1, 4)}, ValueError,
     r"^dcft_A: expected shape \[1, 3\] for in_features=24, rank=1, .*stride=\(8, 8\), got \[1, 4"),
    (linear, {"dcft_B": torch.ones(2, 2)}, ValueError,
     r"^dcft_B: expected 1 columns, the rank of dcft_A \[1, 3\], got shape \[2, 2\]"),
    (linear, {"dcft_B": torch.ones(3, 1)}, ValueError,
     r"^dcft_B: expected shape \[2, 1\] for out_features=16, .*got \[3, 1\]"),
    (linear, {"dcft_C": C[None, None]}, ValueError, r"^dcft_C: expected a 2-D or 3-D tensor, got"),
    (linear, {"dcft_C": C.expand(3, 8, 8)}, ValueError,
     r"^dcft_C: expected a kernel for each rank of dcft_A \[1, 3\], shape \[1, 8, 8\], .*\[3, 8"),
    (linear, {"dcft_C": C[:4, :4]}, ValueError,
     r"^dcft_A: expected shape \[1, 6\] .*kernel_size=\(4, 4\).*got \[1, 3\]"),

    # numbers
    (linear, {"stride": 9}, ValueError,
     r"^stride: expected at most the kernel size, 8 on the out side, got 9: .*gaps"),
    (delta, {"stride": (8, 9)}, ValueError, r"^stride: expected at most .*8 on the in side, got 9"),
    (linear, {"stride": 0}, ValueError, rf"^stride: {POSITIVE} 0"),
    (update, {"stride": (-1, 8)}, ValueError, rf"^stride\[0\]: {POSITIVE} -1"),
    (linear, {"stride": 2.0}, TypeError, rf"^stride: expected {TWO_SIDES} of ints, got 2\.0"),
    (linear, {"stride": (np.bool_(True), 8)}, TypeError, rf"^stride\[0\]: {POSITIVE} "),
    (linear, {"stride": (2, 2, 2)}, ValueError, rf"^stride: expected {TWO_SIDES}, got \(2, 2, 2\)"),
    (layer, {"rank": 10**400}, ValueError, r"^rank: expected at most 2\^63 - 1, got 100+\.\.\.0+$"),
    (layer, {"rank": -(10**5000)}, ValueError, rf"^rank: {POSITIVE} int of too many digits$"),
    (layer, {"alpha": 10**400}, ValueError, r"^alpha: expected a finite number, got 10+\.\.\.0+$"),
    (linear, {"scaling": math.nan}, ValueError, r"^scaling: expected a finite number, got nan"),
    (delta, {"scaling": "2"}, TypeError, r"^scaling: expected a number, got str '2'"),
    (linear, {"scaling": torch.ones(2)}, TypeError,
     r"^scaling: expected a number, got a tensor of shape \[2\]"),
    (linear, {"dropout_p": 1.0}, ValueError, rf"^dropout_p: {PROBABILITY}, got 1\.0"),
    (update, {"dropout_p": -0.1}, ValueError, rf"^dropout_p: {PROBABILITY}, got -0\.1"),
    (linear, {"dropout_p": True}, TypeError, r"^dropout_p: expected a number, got bool True"),
    (delta, {"in_features": 0}, ValueError, rf"^in_features: {POSITIVE} 0"),
    (delta, {"out_features": 16.0}, TypeError, rf"^out_features: {POSITIVE} 16\.0"),
    (delta, {"in_features": N + 1}, ValueError, r"^dcft_A: expected shape .* for in_features=25, "),
    (add, {"stochastic_rounding": True}, ValueError,
     r"^stochastic_rounding: expected a float16 or bfloat16 weight.*got torch\.float32"),
    (add, {"stochastic_rounding": "yes"}, TypeError,
     r"^stochastic_rounding: expected True or False, got 'yes'"),

    # names
    (linear, {"dropout": 0.1}, TypeError, r"argument 'dropout'"),
    (linear, {"backend": "cuda"}, ValueError,
     r"^backend: expected one of 'auto', 'torch', 'reference', 'triton', got 'cuda'"),
    (delta, {"backend": None}, ValueError, r"^backend: expected one of 'auto', .*got None"),
    (linear, {"backend": "triton"}, RuntimeError, NO_TRITON),
    (delta, {"backend": "triton"}, RuntimeError, NO_TRITON),
    (add, {"backend": "triton"}, RuntimeError, NO_TRITON),
    (linear, {"strategy": "fast"}, ValueError,
     r"^strategy: expected one of 'auto', 'seeded', .*'torch', got 'fast'"),
    (linear, {"strategy": "row_block"}, RuntimeError,
     r"^strategy='row_block' cannot run: .*'cpu'.* need a GPU; use strategy='auto' or 'torch'"),
    (linear, {"strategy": "seeded"}, RuntimeError,
     r"^strategy='seeded' cannot run: .*'cpu'.* need a GPU; use strategy='auto' or 'torch'"),
    (linear, {"backend": "torch", "strategy": "row_block"}, ValueError,
     r"^strategy: 'row_block' is one of the Triton kernels', got backend='torch'"),
    (linear, {"backend": "triton", "strategy": "torch"}, ValueError,
     r"^strategy: 'torch' is not one of backend='triton'"),
    (linear, {"nonlinearity": "sine"}, ValueError,
     r"^nonlinearity: expected one of 'relu', 'gelu', 'silu', 'tanh', got 'sine'"),
    (linear, {"nonlinearity": "relu", "backend": "triton"}, ValueError,
     r"^backend: 'triton' does not compute nonlinearity='relu'.*use backend='auto'"),
    (update, {"nonlinearity": "relu", "backend": "reference"}, ValueError,
     r"^backend: 'reference' does not compute nonlinearity='relu'"),

    # DCFTLinear
    (layer, {"in_features": 0}, ValueError, rf"^in_features: {POSITIVE} 0"),
    (layer, {"out_features": -M}, ValueError, rf"^out_features: {POSITIVE} -16"),
    (layer, {"bias": 8}, TypeError, r"^bias: expected True or False, got 8"),
    (layer, {"rank": 0}, ValueError, rf"^rank: {POSITIVE} 0"),
    (layer, {"rank": 1.0}, TypeError, rf"^rank: {POSITIVE} 1\.0"),
    (layer, {"kernel_size": 0}, ValueError, rf"^kernel_size: {POSITIVE} 0"),
    (layer, {"kernel_size": (8, 0)}, ValueError, rf"^kernel_size\[1\]: {POSITIVE}"),
    (layer, {"kernel_size": "8"}, TypeError, rf"^kernel_size: expected {TWO_SIDES} of ints, got '"),
    (layer, {"kernel_size": (4, 8), "stride": (5, 8)}, ValueError,
     r"^stride: expected at most the kernel size, 4 on the out side, got 5"),
    (layer, {"alpha": "16"}, TypeError, r"^alpha: expected a number, got str '16'"),
    (layer, {"dropout": 1.5}, ValueError, rf"^dropout: {PROBABILITY}, got 1\.5"),
    (layer, {"dropout": None}, TypeError, r"^dropout: expected a number, got NoneType None"),
    (layer, {"init": "ones"}, ValueError,
     r"^init: expected one of 'balanced', 'zero', 'paper', got 'ones'"),
    (layer, {"backend": "tirton"}, ValueError, r"^backend: expected one of 'auto', .*got 'tirton'"),
    (layer, {"strategy": "best"}, ValueError, r"^strategy: expected one of 'auto', .*got 'best'"),
    (layer, {"dtype": torch.int8}, TypeError,
     r"^dtype: expected one of float32, bfloat16, float16, float64, got torch\.int8"),
    (layer, {"dtype": "float32"}, TypeError, r"^dtype: expected a torch\.dtype, got 'float32'"),
    (layer, {"adapter_dtype": torch.complex64}, TypeError, r"^adapter_dtype: expected one of "),
    (layer, {"kernels": "each"}, ValueError,
     r"^kernels: expected one of 'shared', 'per_rank', got 'each'"),
    (layer, {"nonlinearity": torch.relu}, ValueError, r"^nonlinearity: expected one of 'relu', "),
    (layer, {"nonlinearity": "relu", "strategy": "row_block"}, ValueError,
     r"^strategy: 'row_block' is one of the Triton kernels', .*use strategy='auto'"),

    # from_linear
    (adapt, {"linear": None}, TypeError,
     r"^linear: expected an nn\.Linear or a transformers Conv1D, got NoneType"),
    (adapt, {"linear": nn.LayerNorm(M)}, TypeError,
     r"^linear: expected an nn\.Linear .*got LayerNorm; .*dcft_update"),
    (adapt, {"linear": layer()}, TypeError, r"^linear: this layer is a DCFTLinear already"),
    (adapt, {"linear": nn.Linear(N, M, dtype=torch.complex64)}, TypeError,
     r"^linear: expected a float weight, got torch\.complex64"),
    (adapt, {"r": 8}, TypeError, r"^r: not a DCFT option; the options are rank, .*adapter_dtype"),
    (adapt, {"rank": -1}, ValueError, rf"^rank: {POSITIVE} -1"),
]  # fmt: skip


def _ids(table: list[tuple[Any, ...]]) -> list[str]:
    return [f"{i}-{row[-1].lstrip('^').split(':')[0]}" for i, row in enumerate(table)]


@pytest.mark.parametrize(("call", "changed", "error", "text"), CALLS, ids=_ids(CALLS))
def test_bad_arguments(call, changed, error, text):
    tensors = [tensor.clone() for tensor in TENSORS]
    with pytest.raises(error, match=text) as caught:
        call(**changed)
    # No subclass either: a KeyError or an UnboundLocalError is an accident.
    assert caught.type is error
    assert all(map(torch.equal, tensors, TENSORS))


@pytest.mark.parametrize("argument", ["y", "weight", "bias", "dcft_A", "dcft_B", "dcft_C"])
@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (Tensor.tolist, TypeError, r"expected a torch\.Tensor, got list"),
        (Tensor.long, TypeError, rf"expected {FLOATS}, got torch\.int64"),
        (Tensor.to_sparse, TypeError, r"expected a dense tensor, got layout torch\.sparse_coo"),
        (lambda tensor: tensor.to("meta"), ValueError, "expected device (cpu|meta), where .* is, "),
    ],
    ids=["list", "integers", "sparse", "device"],
)
def test_every_tensor_is_checked(argument, spoil, error, text):
    call = update if argument == "y" else linear
    good = {"y": Y, "weight": WEIGHT, "bias": BIAS, "dcft_A": A, "dcft_B": B, "dcft_C": C}
    # dcft_A is what its own device is compared with.
    named = "dcft_[AB]" if argument == "dcft_A" else argument
    with pytest.raises(error, match=rf"^{named}: {text}"):
        call(**{argument: spoil(good[argument])})


def test_every_number_of_tokens_shares_one_check(monkeypatch):
    monkeypatch.setattr(functional, "_checked_calls", {})
    for tokens in (1, 2, 3):
        x, y = torch.randn(tokens, N), torch.randn(tokens, M)
        linear(x=x)
        update(y=y, x=x)
    assert len(functional._checked_calls) == 2
    with pytest.raises(ValueError, match=r"^y: expected leading dimensions \[3\]"):
        update(y=y[:2], x=x)


def test_the_cache_of_checks_is_bounded(monkeypatch):
    monkeypatch.setattr(functional, "_checked_calls", {})
    monkeypatch.setattr(functional, "_MAX_CHECKED_CALLS", 2)
    for outputs in range(M - 4, M + 1):
        linear(weight=WEIGHT[:outputs], bias=None)
        assert 1 <= len(functional._checked_calls) <= 2


def _patched() -> nn.Module:
    """As offloading and tracing tools do it: another forward on the instance."""
    base = nn.Linear(N, M)
    base.forward = lambda x: x.round()
    return base


def _merged() -> DCFTLinear:
    merged = layer()
    merged.merge()
    return merged


def _nonlinear() -> DCFTLinear:
    return layer(nonlinearity="relu")


USES = [
    (layer, lambda s: s(torch.ones(2, M)), ValueError,
     r"^x: expected a last dimension of 24, got shape \[2, 16\]"),
    (layer, lambda s: s(X.long()), TypeError, rf"^x: expected {FLOATS}, got torch\.int64"),
    (layer, lambda s: s(X.half()), TypeError,
     r"^weight: expected torch\.float16, the dtype of x, got torch\.float32"),
    (layer, lambda s: s(X.to("meta")), ValueError, r"^weight: expected device meta, where x is"),
    (lambda: layer(backend="triton"), lambda s: s(X), RuntimeError, NO_TRITON),
    (layer, lambda s: s.unmerge(), RuntimeError,
     r"^unmerge: this DCFTLinear is not merged; call merge\(\) first"),
    (layer, lambda s: explain(s, tokens=0), ValueError, r"^tokens: expected a positive int, got 0"),
    (lambda: layer(device="meta"), lambda s: s.merge(), ValueError, r"^merge: .*meta"),
    (_merged, lambda s: s(torch.ones(2, 3)), ValueError, r"^x: expected a last dimension of 24, "),
    (_merged, lambda s: s.merge(), RuntimeError,
     r"^merge: this DCFTLinear is merged already; call unmerge\(\) first"),
    (_merged, lambda s: s.reset_dcft_parameters(), RuntimeError,
     r"^reset_dcft_parameters: this DCFTLinear is merged; call unmerge\(\) first"),
    (_merged, lambda s: s.reset_parameters(), RuntimeError,
     r"^reset_parameters: this DCFTLinear is merged; call unmerge\(\) first"),
    (_merged, lambda s: s.load_state_dict(s.state_dict()), RuntimeError,
     r"DCFTLinear is merged: call unmerge\(\) before loading"),
    (_nonlinear, lambda s: s.merge(), RuntimeError,
     r"^merge: this DCFTLinear has nonlinearity='relu' .*remove_nonlinearity"),
    (_nonlinear, lambda s: s.delta_weight(), RuntimeError,
     r"^delta_weight: this DCFTLinear has nonlinearity='relu' .*remove_nonlinearity"),
    (_nonlinear, lambda s: s.to_linear(), RuntimeError,
     r"^to_linear: this DCFTLinear has nonlinearity='relu' .*remove_nonlinearity"),
    (_patched, DCFTLinear.from_linear, TypeError, r"^linear: expected .*forward"),
    (lambda: nn.utils.weight_norm(nn.Linear(N, M)), DCFTLinear.from_linear, TypeError,
     r"^linear: expected .*weight.*(nn\.Parameter|reparametri[sz]ed|computed)"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(("build", "use", "error", "text"), USES, ids=_ids(USES))
def test_bad_use(build, use, error, text):
    module = build()
    snapshot = ModelSnapshot(module)
    with pytest.raises(error, match=text) as caught:
        use(module)
    assert caught.type is error
    snapshot.assert_unchanged()


def test_a_large_wrong_argument_does_not_flood_the_terminal():
    with pytest.raises(TypeError, match=r"^x: expected a torch\.Tensor, got list") as caught:
        linear(x=[0.0] * 100_000)
    assert len(str(caught.value)) < 1000


def test_good_calls_do_not_let_bad_ones_through():
    """Whether operands passed under autocast, or with another stride, must not be remembered."""
    half = WEIGHT.half()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(weight=half).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"^weight: expected torch\.float32, the dtype of x"):
            linear(weight=half)
    linear(stride=(8, 8))
    with pytest.raises(TypeError, match=r"^stride\[0\]: expected a positive int, got 8\.0"):
        linear(stride=(8.0, 8.0))
