"""What users get wrong, and what they are told: one table over the whole public API.

Every row: a call, the type of its error, and a pattern of the text, which names the argument, what
came and what was expected. After every row, every model, tensor and file is as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcft_kernels import (
    DCFTLinear,
    add_delta_weight_,
    constraint_loss,
    constraints,
    dcft_linear,
    dcft_linear_group,
    dcft_update,
    delta_weight,
    explain,
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

# Sizes of the good call that each row spoils: n = 24, m = 16, d = 8, k = 1.
N, M = 24, 16


class QuantizedLinear(nn.Linear):
    """As quantisation libraries do it: a Linear by class, but not by what it computes."""

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
    """Good tensors, models and files, which a row of the table may use and must not change."""

    def __init__(self, folder: Path) -> None:
        self.x, self.y = torch.randn(5, N), torch.randn(5, M)
        self.weight, self.bias = torch.randn(M, N), torch.randn(M)
        self.A, self.B, self.C = torch.randn(1, 3), torch.randn(2, 1), torch.randn(8, 8)
        self.base = Model()
        self.swapped = copy.deepcopy(self.base)
        swap_linear(self.swapped, ["query", "value"], init="paper")
        self.merged = copy.deepcopy(self.swapped)
        merge_model(self.merged)
        self.layer = DCFTLinear(N, M, init="paper")
        self.nonlinear = copy.deepcopy(self.base)
        swap_linear(self.nonlinear, ["query", "value"], init="paper", nonlinearity="relu")
        # As offloading and tracing tools do it: another forward on the instance.
        self.patched = nn.Linear(N, M)
        self.patched.forward = lambda x: x.round()
        self.folder = folder / "adapter"
        save_adapter(self.swapped, self.folder)

    def linear(self, **changed: Any) -> Tensor:
        """A good call of `dcft_linear` but for what is changed."""
        return dcft_linear(
            **{
                "x": self.x,
                "weight": self.weight,
                "bias": self.bias,
                "dcft_A": self.A,
                "dcft_B": self.B,
                "dcft_C": self.C,
            }
            | changed
        )

    def update(self, **changed: Any) -> Tensor:
        good = {"y": self.y, "x": self.x, "dcft_A": self.A, "dcft_B": self.B, "dcft_C": self.C}
        return dcft_update(**good | changed)

    def merge(self, **changed: Any) -> Tensor:
        good = {"weight": self.weight, "dcft_A": self.A, "dcft_B": self.B, "dcft_C": self.C}
        return add_delta_weight_(**good | changed)

    def group(self, *members: Any, **changed: Any) -> tuple[Tensor, ...]:
        """A good layer, and then those given."""
        good = (self.weight, self.bias, self.A, self.B, self.C)
        return dcft_linear_group(**{"x": self.x, "members": [good, *members]} | changed)

    def delta(self, **changed: Any) -> Tensor:
        good = {"dcft_A": self.A, "dcft_B": self.B, "dcft_C": self.C}
        return delta_weight(**good | {"in_features": N, "out_features": M} | changed)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def models(self) -> dict[str, nn.Module]:
        return {name: value for name, value in vars(self).items() if isinstance(value, nn.Module)}


@pytest.fixture
def setting(tmp_path) -> Setting:
    """Good calls have been made and are remembered, which must not let bad ones through."""
    found = Setting(tmp_path)
    for stride in (None, 8, (8, 8)):
        found.linear(stride=stride)
    return found


def test_the_good_calls_are_good(setting):
    """Else the rows of the table could fail for other reasons than theirs."""
    assert setting.linear().shape == setting.update().shape == (5, M)
    assert setting.delta().shape == (M, N)
    assert setting.layer(setting.x).shape == (5, M)
    assert load_adapter(setting.base, setting.folder) == ["query", "value"]
    freeze_base(setting.swapped, trainable=["classifier"])
    unmerge_model(setting.merged)
    merge_model(setting.swapped)
    assert orthogonality_loss(setting.swapped, form="published_code").isfinite()
    assert constraint_loss(setting.swapped, "diagonal", "published_code").isfinite()
    assert setting.linear(nonlinearity="gelu").shape == (5, M)
    assert setting.nonlinear.query(setting.x).shape == (5, M)
    constraints.remove_nonlinearity(setting.nonlinear)


def row(name: str, call: Callable[[Setting], Any], error: type[Exception], text: str) -> Any:
    return pytest.param(call, error, text, id=name)


TABLE = [
    # dcft_linear: x
    row("x-none", lambda s: s.linear(x=None), TypeError,
        r"^x: expected a torch\.Tensor, got NoneType"),
    row("x-list", lambda s: s.linear(x=[[1.0, 2.0]]), TypeError,
        r"^x: expected a torch\.Tensor, got list \[\[1\.0, 2\.0\]\]"),
    row("x-numpy", lambda s: s.linear(x=np.ones((2, N))), TypeError,
        r"^x: expected a torch\.Tensor, got ndarray"),
    row("x-integers", lambda s: s.linear(x=torch.ones(2, N, dtype=torch.int64)), TypeError,
        r"^x: expected a tensor of float32, bfloat16, .*got torch\.int64; convert .*x\.float\(\)"),
    row("x-bool", lambda s: s.linear(x=torch.ones(2, N, dtype=torch.bool)), TypeError,
        r"^x: expected a tensor of float32, .*got torch\.bool"),
    row("x-complex", lambda s: s.linear(x=torch.ones(2, N, dtype=torch.complex64)), TypeError,
        r"^x: expected a tensor of float32, .*got torch\.complex64"),
    row("x-float8", lambda s: s.linear(x=s.x.to(torch.float8_e4m3fn)), TypeError,
        r"^x: expected a tensor of float32, .*got torch\.float8_e4m3fn"),
    row("x-sparse", lambda s: s.linear(x=s.x.to_sparse()), TypeError,
        r"^x: expected a dense tensor, got layout torch\.sparse_coo"),
    row("x-no-features", lambda s: s.update(x=torch.ones(5, 0)), ValueError,
        r"^x: expected at least one feature, got shape \[5, 0\]"),
    row("y-no-features", lambda s: s.update(y=torch.ones(5, 0)), ValueError,
        r"^y: expected at least one feature, got shape \[5, 0\]"),
    row("weight-no-rows", lambda s: s.linear(weight=torch.ones(0, N)), ValueError,
        r"^weight: expected positive sizes, got shape \[0, \d+\]"),
    row("layer-bias-number", lambda s: DCFTLinear(N, M, 8), TypeError,
        r"^bias: expected True or False, got 8"),
    row("merged-x-features", lambda s: s.merged.query(torch.ones(2, 3)), ValueError,
        r"^x: expected a last dimension of \d+, got shape \[2, 3\]"),
    row("reset-merged", lambda s: s.merged.query.reset_dcft_parameters(), RuntimeError,
        r"^reset_dcft_parameters: this DCFTLinear is merged; call unmerge\(\) first"),
    row("reset-all-merged", lambda s: s.merged.query.reset_parameters(), RuntimeError,
        r"^reset_parameters: this DCFTLinear is merged; call unmerge\(\) first"),
    row("freeze-merged", lambda s: freeze_base(s.merged), RuntimeError,
        r"^model: 'query' is merged; call unmerge_model\(model\) first"),
    row("x-scalar", lambda s: s.linear(x=torch.ones(())), ValueError,
        r"^x: expected shape \[\.\.\., features\], got a scalar"),
    row("x-other-features", lambda s: s.linear(x=torch.ones(5, N + 1)), ValueError,
        r"^x: expected a last dimension of 24, got shape \[5, 25\]"),
    row("x-transposed", lambda s: s.linear(x=s.x.t()), ValueError,
        r"^x: expected a last dimension of 24, got shape \[24, 5\]"),
    row("x-other-dtype", lambda s: s.linear(x=s.x.double()), TypeError,
        r"^weight: expected torch\.float64, the dtype of x, got torch\.float32; .*autocast"),
    row("x-other-device", lambda s: s.linear(x=s.x.to("meta")), ValueError,
        r"^weight: expected device meta, where x is, got cpu; move one with \.to"),

    # dcft_linear: weight and bias
    row("weight-vector", lambda s: s.linear(weight=s.weight[0]), ValueError,
        r"^weight: expected a 2-D tensor, got shape \[24\]"),
    row("weight-transposed", lambda s: s.linear(weight=s.weight.t()), ValueError,
        r"^x: expected a last dimension of 16, got shape \[5, 24\]"),
    row("weight-int8", lambda s: s.linear(weight=s.weight.to(torch.int8)), TypeError,
        r"^weight: expected a tensor of float32, .*got torch\.int8"),
    row("weight-bfloat16", lambda s: s.linear(weight=s.weight.bfloat16()), TypeError,
        r"^weight: expected torch\.float32, the dtype of x, got torch\.bfloat16"),
    row("weight-other-device", lambda s: s.linear(weight=s.weight.to("meta")), ValueError,
        r"^weight: expected device cpu, where x is, got meta"),
    row("bias-number", lambda s: s.linear(bias=0.5), TypeError,
        r"^bias: expected a torch\.Tensor, got float 0\.5"),
    row("bias-length", lambda s: s.linear(bias=torch.ones(N)), ValueError,
        r"^bias: expected shape \[16\], got \[24\]"),
    row("bias-column", lambda s: s.linear(bias=torch.ones(M, 1)), ValueError,
        r"^bias: expected shape \[16\], got \[16, 1\]"),
    row("bias-other-dtype", lambda s: s.linear(bias=s.bias.half()), TypeError,
        r"^bias: expected torch\.float32, the dtype of x, got torch\.float16"),
    row("bias-other-device", lambda s: s.linear(bias=s.bias.to("meta")), ValueError,
        r"^bias: expected device cpu, where x is, got meta"),

    # the factors
    row("A-none", lambda s: s.linear(dcft_A=None), TypeError,
        r"^dcft_A: expected a torch\.Tensor, got NoneType"),
    row("A-vector", lambda s: s.linear(dcft_A=s.A[0]), ValueError,
        r"^dcft_A: expected a 2-D tensor, got shape \[3\]"),
    row("A-windows", lambda s: s.linear(dcft_A=torch.ones(1, 4)), ValueError,
        r"^dcft_A: expected shape \[1, 3\] for in_features=24, rank=1, kernel_size=\(8, 8\), "
        r"stride=\(8, 8\), got \[1, 4\]"),
    row("A-without-rank", lambda s: s.linear(dcft_A=torch.ones(0, 3)), ValueError,
        r"^dcft_A: expected positive sizes, got shape \[0, 3\]"),
    row("A-integers", lambda s: s.linear(dcft_A=s.A.int()), TypeError,
        r"^dcft_A: expected a tensor of float32, .*got torch\.int32"),
    row("A-other-device", lambda s: s.linear(dcft_A=s.A.to("meta")), ValueError,
        r"^dcft_[AB]: expected device (cpu|meta), where (x|dcft_A) is, got (meta|cpu)"),
    row("B-rank", lambda s: s.linear(dcft_B=torch.ones(2, 2)), ValueError,
        r"^dcft_B: expected 1 columns, the rank of dcft_A \[1, 3\], got shape \[2, 2\]"),
    row("B-windows", lambda s: s.linear(dcft_B=torch.ones(3, 1)), ValueError,
        r"^dcft_B: expected shape \[2, 1\] for out_features=16, .*got \[3, 1\]"),
    row("B-other-device", lambda s: s.linear(dcft_B=s.B.to("meta")), ValueError,
        r"^dcft_B: expected device cpu, where dcft_A is, got meta"),
    row("C-cube", lambda s: s.linear(dcft_C=torch.ones(1, 8, 8)), ValueError,
        r"^dcft_C: expected a 2-D tensor, got shape \[1, 8, 8\]"),
    row("C-empty", lambda s: s.linear(dcft_C=torch.ones(0, 8)), ValueError,
        r"^dcft_C: expected positive sizes, got shape \[0, 8\]"),
    row("C-other-size", lambda s: s.linear(dcft_C=torch.ones(4, 4)), ValueError,
        r"^dcft_A: expected shape \[1, 6\] .*kernel_size=\(4, 4\).*got \[1, 3\]"),
    row("C-other-device", lambda s: s.linear(dcft_C=s.C.to("meta")), ValueError,
        r"^dcft_C: expected device cpu, where dcft_A is, got meta"),

    # numbers and names of the functions
    row("stride-beyond-kernel", lambda s: s.linear(stride=9), ValueError,
        r"^stride: expected at most the kernel size, 8 on the out side, got 9: .*gaps"),
    row("stride-beyond-kernel-in", lambda s: s.delta(stride=(8, 9)), ValueError,
        r"^stride: expected at most the kernel size, 8 on the in side, got 9"),
    row("stride-0", lambda s: s.linear(stride=0), ValueError,
        r"^stride: expected a positive int, got 0"),
    row("stride-negative", lambda s: s.update(stride=(-1, 8)), ValueError,
        r"^stride\[0\]: expected a positive int, got -1"),
    row("stride-float", lambda s: s.linear(stride=2.0), TypeError,
        r"^stride: expected an int or a pair \(out, in\) of ints, got 2\.0"),
    row("stride-floats", lambda s: s.linear(stride=(8.0, 8.0)), TypeError,
        r"^stride\[0\]: expected a positive int, got 8\.0"),
    row("stride-numpy", lambda s: s.linear(stride=(np.int64(8), 8)), TypeError,
        r"^stride\[0\]: expected a positive int, got "),
    row("stride-list-inside", lambda s: s.linear(stride=([8], 8)), TypeError,
        r"^stride\[0\]: expected a positive int, got \[8\]"),
    row("stride-triple", lambda s: s.linear(stride=(2, 2, 2)), ValueError,
        r"^stride: expected an int or a pair \(out, in\), got \(2, 2, 2\)"),
    row("scaling-nan", lambda s: s.linear(scaling=math.nan), ValueError,
        r"^scaling: expected a finite number, got nan"),
    row("scaling-inf", lambda s: s.update(scaling=-math.inf), ValueError,
        r"^scaling: expected a finite number, got -inf"),
    row("scaling-text", lambda s: s.delta(scaling="2"), TypeError,
        r"^scaling: expected a number, got str '2'"),
    row("scaling-tensor", lambda s: s.linear(scaling=torch.ones(2)), TypeError,
        r"^scaling: expected a number, got a tensor of shape \[2\]"),
    row("scaling-complex", lambda s: s.linear(scaling=1j), TypeError,
        r"^scaling: expected a number, got complex 1j"),
    row("dropout-1", lambda s: s.linear(dropout_p=1.0), ValueError,
        r"^dropout_p: expected a probability in \[0, 1\), got 1\.0"),
    row("dropout-negative", lambda s: s.update(dropout_p=-0.1), ValueError,
        r"^dropout_p: expected a probability in \[0, 1\), got -0\.1"),
    row("dropout-nan", lambda s: s.linear(dropout_p=math.nan), ValueError,
        r"^dropout_p: expected a (finite number|probability in \[0, 1\)), got nan"),
    row("dropout-true", lambda s: s.linear(dropout_p=True), TypeError,
        r"^dropout_p: expected a number, got bool True"),
    row("backend-unknown", lambda s: s.linear(backend="cuda"), ValueError,
        r"^backend: expected one of 'auto', 'torch', 'reference', 'triton', got 'cuda'"),
    row("backend-none", lambda s: s.delta(backend=None), ValueError,
        r"^backend: expected one of 'auto', .*got None"),
    row("backend-triton", lambda s: s.linear(backend="triton"), RuntimeError,
        r"^backend='triton' cannot run: .+; use backend='auto' or 'torch'"),
    row("backend-triton-update", lambda s: s.update(backend="triton"), RuntimeError,
        r"^backend='triton' cannot run: .+; use backend='auto' or 'torch'"),
    row("backend-triton-delta", lambda s: s.delta(backend="triton"), RuntimeError,
        r"^backend='triton' cannot run: .+; use backend='auto' or 'torch'"),
    row("backend-triton-merge", lambda s: s.merge(backend="triton"), RuntimeError,
        r"^backend='triton' cannot run: .+; use backend='auto' or 'torch'"),
    row("backend-triton-group", lambda s: s.group(backend="triton"), RuntimeError,
        r"^backend='triton' cannot run: .+; use backend='auto' or 'torch'"),
    row("strategy-unknown", lambda s: s.linear(strategy="fast"), ValueError,
        r"^strategy: expected one of 'auto', 'row_block', 'fused', .*got 'fast'"),
    row("strategy-without-a-gpu", lambda s: s.linear(strategy="fused"), RuntimeError,
        r"^strategy='fused' cannot run: .*'cpu'.* need a GPU; use strategy='auto' or 'torch'"),
    row("strategy-of-another-backend", lambda s: s.linear(backend="torch", strategy="fused"),
        ValueError, r"^strategy: 'fused' is one of the Triton kernels', got backend='torch'"),
    row("strategy-torch-of-triton", lambda s: s.linear(backend="triton", strategy="torch"),
        ValueError, r"^strategy: 'torch' is not one of backend='triton'"),
    row("keyword-unknown", lambda s: s.linear(dropout=0.1), TypeError, r"argument 'dropout'"),

    # dcft_update and delta_weight
    row("y-none", lambda s: s.update(y=None), TypeError,
        r"^y: expected a torch\.Tensor, got NoneType"),
    row("y-other-tokens", lambda s: s.update(y=torch.ones(4, M)), ValueError,
        r"^y: expected leading dimensions \[5\], those of x, got shape \[4, 16\]"),
    row("y-other-features", lambda s: s.update(y=torch.ones(5, M + 1)), ValueError,
        r"^dcft_B: expected shape \[3, 1\] for out_features=17, .*got \[2, 1\]"),
    row("y-other-dtype", lambda s: s.update(y=s.y.double()), TypeError,
        r"^y: expected torch\.float32, the dtype of x, got torch\.float64"),
    row("y-other-device", lambda s: s.update(y=s.y.to("meta")), ValueError,
        r"^y: expected device cpu, where x is, got meta"),
    row("y-integers", lambda s: s.update(y=s.y.long()), TypeError,
        r"^y: expected a tensor of float32, .*got torch\.int64"),
    row("update-x-scalar", lambda s: s.update(x=torch.ones(())), ValueError,
        r"^x: expected shape \[\.\.\., features\], got a scalar"),
    row("delta-in-features-0", lambda s: s.delta(in_features=0), ValueError,
        r"^in_features: expected a positive int, got 0"),
    row("delta-out-features-float", lambda s: s.delta(out_features=16.0), TypeError,
        r"^out_features: expected a positive int, got 16\.0"),
    row("delta-in-features-other", lambda s: s.delta(in_features=N + 1), ValueError,
        r"^dcft_A: expected shape \[1, 4\] for in_features=25, .*got \[1, 3\]"),

    # add_delta_weight_, dcft_linear_group, explain
    row("merge-weight-3d", lambda s: s.merge(weight=torch.ones(2, M, N)), ValueError,
        r"^weight: expected a 2-D tensor, got shape \[2, 16, 24\]"),
    row("merge-other-sizes", lambda s: s.merge(weight=torch.ones(M, N + 1)), ValueError,
        r"^dcft_A: expected shape \[1, 4\] for in_features=25"),
    row("merge-stochastic-float32", lambda s: s.merge(stochastic_rounding=True), ValueError,
        r"^stochastic_rounding: expected a float16 or bfloat16 weight.*got torch\.float32"),
    row("merge-stochastic-text", lambda s: s.merge(stochastic_rounding="yes"), TypeError,
        r"^stochastic_rounding: expected True or False, got 'yes'"),
    row("group-empty", lambda s: dcft_linear_group(s.x, []), ValueError,
        r"^members: expected at least one layer, got none"),
    row("group-short", lambda s: s.group((s.weight, s.bias)), TypeError,
        r"^members\[1\]: expected \(weight, bias, dcft_A.*got tuple of 2"),
    row("group-other-size", lambda s: s.group((s.weight[:, 1:], s.bias, s.A, s.B, s.C)),
        ValueError, r"^members\[1\]: x: expected a last dimension of 23"),
    row("group-layer", lambda s: s.group(s.layer), TypeError,
        r"^members\[1\]: expected \(weight.*got DCFTLinear"),
    row("explain-tokens", lambda s: explain(s.layer, tokens=0), ValueError,
        r"^tokens: expected a positive int, got 0"),

    # DCFTLinear: construction
    row("in-features-0", lambda s: DCFTLinear(0, M), ValueError,
        r"^in_features: expected a positive int, got 0"),
    row("out-features-negative", lambda s: DCFTLinear(N, -M), ValueError,
        r"^out_features: expected a positive int, got -16"),
    row("in-features-text", lambda s: DCFTLinear("24", M), TypeError,
        r"^in_features: expected a positive int, got '24'"),
    row("rank-0", lambda s: DCFTLinear(N, M, rank=0), ValueError,
        r"^rank: expected a positive int, got 0"),
    row("rank-float", lambda s: DCFTLinear(N, M, rank=1.0), TypeError,
        r"^rank: expected a positive int, got 1\.0"),
    row("rank-true", lambda s: DCFTLinear(N, M, rank=True), TypeError,
        r"^rank: expected a positive int, got True"),
    row("kernel-0", lambda s: DCFTLinear(N, M, kernel_size=0), ValueError,
        r"^kernel_size: expected a positive int, got 0"),
    row("kernel-pair-0", lambda s: DCFTLinear(N, M, kernel_size=(8, 0)), ValueError,
        r"^kernel_size\[1\]: expected a positive int, got 0"),
    row("kernel-text", lambda s: DCFTLinear(N, M, kernel_size="8"), TypeError,
        r"^kernel_size: expected an int or a pair \(out, in\) of ints, got '8'"),
    row("kernel-none", lambda s: DCFTLinear(N, M, kernel_size=None), TypeError,
        r"^kernel_size: expected an int or a pair \(out, in\) of ints, got None"),
    row("layer-stride", lambda s: DCFTLinear(N, M, kernel_size=(4, 8), stride=(5, 8)), ValueError,
        r"^stride: expected at most the kernel size, 4 on the out side, got 5"),
    row("alpha-nan", lambda s: DCFTLinear(N, M, alpha=math.nan), ValueError,
        r"^alpha: expected a finite number, got nan"),
    row("alpha-text", lambda s: DCFTLinear(N, M, alpha="16"), TypeError,
        r"^alpha: expected a number, got str '16'"),
    row("layer-dropout", lambda s: DCFTLinear(N, M, dropout=1.5), ValueError,
        r"^dropout: expected a probability in \[0, 1\), got 1\.5"),
    row("layer-dropout-none", lambda s: DCFTLinear(N, M, dropout=None), TypeError,
        r"^dropout: expected a number, got NoneType None"),
    row("init-unknown", lambda s: DCFTLinear(N, M, init="ones"), ValueError,
        r"^init: expected one of 'balanced', 'zero', 'paper', got 'ones'"),
    row("init-true", lambda s: DCFTLinear(N, M, init=True), ValueError,
        r"^init: expected one of 'balanced', 'zero', 'paper', got True"),
    row("layer-backend", lambda s: DCFTLinear(N, M, backend="tirton"), ValueError,
        r"^backend: expected one of 'auto', .*got 'tirton'"),
    row("dtype-integer", lambda s: DCFTLinear(N, M, dtype=torch.int8), TypeError,
        r"^dtype: expected one of float32, bfloat16, float16, float64, got torch\.int8"),
    row("dtype-text", lambda s: DCFTLinear(N, M, dtype="float32"), TypeError,
        r"^dtype: expected a torch\.dtype, got 'float32'"),
    row("adapter-dtype-complex", lambda s: DCFTLinear(N, M, adapter_dtype=torch.complex64),
        TypeError, r"^adapter_dtype: expected one of float32, .*got torch\.complex64"),
    row("layer-option-unknown", lambda s: DCFTLinear(N, M, r=8), TypeError, r"argument 'r'"),

    # DCFTLinear: use
    row("layer-x-features", lambda s: s.layer(torch.ones(2, M)), ValueError,
        r"^x: expected a last dimension of 24, got shape \[2, 16\]"),
    row("layer-x-integers", lambda s: s.layer(torch.ones(2, N).long()), TypeError,
        r"^x: expected a tensor of float32, .*got torch\.int64"),
    row("layer-x-other-dtype", lambda s: s.layer(torch.ones(2, N).half()), TypeError,
        r"^weight: expected torch\.float16, the dtype of x, got torch\.float32"),
    row("layer-x-other-device", lambda s: s.layer(torch.ones(2, N, device="meta")), ValueError,
        r"^weight: expected device meta, where x is, got cpu"),
    row("layer-strategy", lambda s: DCFTLinear(N, M, strategy="best"), ValueError,
        r"^strategy: expected one of 'auto', .*got 'best'"),
    row("layer-triton", lambda s: DCFTLinear(N, M, backend="triton")(s.x), RuntimeError,
        r"^backend='triton' cannot run: .+; use backend='auto' or 'torch'"),
    row("merge-twice", lambda s: s.merged.query.merge(), RuntimeError,
        r"^merge: this DCFTLinear is merged already; call unmerge\(\) first"),
    row("unmerge-unmerged", lambda s: s.layer.unmerge(), RuntimeError,
        r"^unmerge: this DCFTLinear is not merged; call merge\(\) first"),
    row("merge-meta", lambda s: DCFTLinear(N, M, device="meta").merge(), (ValueError, RuntimeError),
        r"^merge: .*meta"),
    row("state-dict-while-merged", lambda s: s.merged.load_state_dict(s.swapped.state_dict()),
        RuntimeError, r"query is merged: call unmerge\(\) before loading"),

    # from_linear
    row("from-none", lambda s: DCFTLinear.from_linear(None), TypeError,
        r"^linear: expected an nn\.Linear or a transformers Conv1D, got NoneType"),
    row("from-class", lambda s: DCFTLinear.from_linear(nn.Linear), TypeError,
        r"^linear: expected an nn\.Linear or a transformers Conv1D, got type"),
    row("from-norm", lambda s: DCFTLinear.from_linear(s.base.norm), TypeError,
        r"^linear: expected an nn\.Linear .*got LayerNorm; .*dcft_update"),
    row("from-quantized", lambda s: DCFTLinear.from_linear(s.base.quantized), TypeError,
        r"^linear: expected an nn\.Linear .*got QuantizedLinear; .*dcft_update"),
    row("from-swapped", lambda s: DCFTLinear.from_linear(s.swapped.query), TypeError,
        r"^linear: this layer is a DCFTLinear already"),
    row("from-lazy", lambda s: DCFTLinear.from_linear(nn.LazyLinear(M)), TypeError,
        r"^linear: expected an nn\.Linear .*got LazyLinear"),
    row("from-weight-norm",
        lambda s: DCFTLinear.from_linear(nn.utils.weight_norm(nn.Linear(N, M))), TypeError,
        r"^linear: expected .*weight.*(nn\.Parameter|reparametri[sz]ed|computed)"),
    row("from-patched-forward", lambda s: DCFTLinear.from_linear(s.patched), TypeError,
        r"^linear: expected .*forward"),
    row("from-complex", lambda s: DCFTLinear.from_linear(nn.Linear(N, M, dtype=torch.complex64)),
        TypeError, r"^linear: expected a float weight, got torch\.complex64"),
    row("from-option-unknown", lambda s: DCFTLinear.from_linear(s.base.query, r=8), TypeError,
        r"^r: not a DCFT option; the options are rank, kernel_size, .*adapter_dtype"),
    row("from-device", lambda s: DCFTLinear.from_linear(s.base.query, device="cpu"), TypeError,
        r"^device: not a DCFT option; the options are rank, "),
    row("from-bad-option", lambda s: DCFTLinear.from_linear(s.base.query, rank=-1), ValueError,
        r"^rank: expected a positive int, got -1"),

    # swap_linear
    row("swap-none", lambda s: swap_linear(None), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),
    row("swap-text", lambda s: swap_linear("bert-base-uncased"), TypeError,
        r"^model: expected .*Module, got (a )?str"),
    row("swap-bare-linear", lambda s: swap_linear(s.base.query), ValueError,
        r"^model: is itself a linear layer.*use DCFTLinear\.from_linear"),
    row("swap-no-linear", lambda s: swap_linear(nn.Sequential(nn.ReLU())), ValueError,
        r"^targets: .*the model has no linear layers"),
    row("targets-none", lambda s: swap_linear(s.base, None), TypeError,
        r"^targets: expected a regular expression or a list of name endings, got None"),
    row("targets-numbers", lambda s: swap_linear(s.base, [1, 2]), TypeError,
        r"^targets: expected a regular expression or a list of name endings, got \[1, 2\]"),
    row("targets-set", lambda s: swap_linear(s.base, {"query"}), TypeError,
        r"^targets: expected a regular expression or a list of name endings, got \{'query'\}"),
    row("targets-bytes", lambda s: swap_linear(s.base, b"query"), TypeError,
        r"^targets: expected a regular expression or a list of name endings, got b'query'"),
    row("targets-empty", lambda s: swap_linear(s.base, []), ValueError,
        r"^targets: expected at least one name, got an empty list"),
    row("targets-broken-regex", lambda s: swap_linear(s.base, "query("), ValueError,
        r"^targets: 'query\(' is no(t a)? regular expression: .*"),
    row("targets-near-miss", lambda s: swap_linear(s.base, ["qeury"]), ValueError,
        r"^targets: 'qeury' matches no layer of the model; did you mean 'query'"),
    row("targets-one-of-two", lambda s: swap_linear(s.base, ["query", "key"]), ValueError,
        r"^targets: 'key' matches no layer of the model"),
    row("targets-regex-near-miss", lambda s: swap_linear(s.base, "valu"), ValueError,
        r"^targets: 'valu' matches no layer of the model; did you mean 'value'"),
    row("targets-far-miss", lambda s: swap_linear(s.base, ["zzz"]), ValueError,
        r"^targets: 'zzz' matches no layer of the model; its linear layers are named 'query', "),
    row("targets-norm", lambda s: swap_linear(s.base, ["query", "norm"]), TypeError,
        r"^targets: 'norm' cannot be adapted: expected an nn\.Linear .*got LayerNorm"),
    row("targets-quantized", lambda s: swap_linear(s.base, ["query", "quantized"]), TypeError,
        r"^targets: 'quantized' cannot be adapted: .*got QuantizedLinear; .*dcft_update"),
    row("targets-embedding", lambda s: swap_linear(s.base, ["embedding"]), TypeError,
        r"^targets: 'embedding' cannot be adapted: .*got Embedding"),
    row("swap-twice", lambda s: swap_linear(s.swapped, ["query"]), ValueError,
        r"^targets: already swapped: 'query'; layers not swapped yet: 'classifier'"),
    row("swap-twice-all", lambda s: swap_linear(s.swapped), ValueError,
        r"^targets: every linear layer of this model is a DCFTLinear already"),
    row("exclude-everything", lambda s: swap_linear(s.base, ["query"], exclude=["query"]),
        ValueError, r"^targets: \['query'\] without exclude=\['query'\] leaves no layer"),
    row("exclude-none", lambda s: swap_linear(s.base, exclude=None), TypeError,
        r"^exclude: expected a regular expression or a list of name endings, got None"),
    row("exclude-broken-regex", lambda s: swap_linear(s.base, exclude="*"), ValueError,
        r"^exclude: '\*' is no(t a)? regular expression"),
    row("exclude-near-miss", lambda s: swap_linear(s.base, exclude=["valeu"]), ValueError,
        r"^exclude: 'valeu' matches no layer of the model; did you mean 'value'"),
    row("swap-option-unknown", lambda s: swap_linear(s.base, lora_alpha=8), TypeError,
        r"^lora_alpha: not a DCFT option; the options are rank, kernel_size, "),
    row("swap-bad-rank", lambda s: swap_linear(s.base, rank=0), ValueError,
        r"^rank: expected a positive int, got 0"),
    row("swap-bad-dropout", lambda s: swap_linear(s.base, dropout=1), ValueError,
        r"^dropout: expected a probability in \[0, 1\), got 1"),

    # operations on models
    row("merge-model-none", lambda s: merge_model(None), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),
    row("merge-model-base", lambda s: merge_model(s.base), ValueError,
        r"^model: has no DCFTLinear layers; call swap_linear\(model\) first"),
    row("merge-model-twice", lambda s: merge_model(s.merged), RuntimeError,
        r"^model: 2 of 2 layers are merged already, 'query' first; call unmerge_model\(model\)"),
    row("unload-bare-layer", lambda s: merge_model(s.layer, unload=True), ValueError,
        r"^model: is itself the layer to replace.*use its to_linear\(\)"),
    row("unmerge-model-base", lambda s: unmerge_model(s.base), ValueError,
        r"^model: has no DCFTLinear layers"),
    row("unmerge-model-unmerged", lambda s: unmerge_model(s.swapped), RuntimeError,
        r"^model: no layer is merged; call merge_model\(model\) first"),
    row("freeze-none", lambda s: freeze_base(None), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),
    row("freeze-base-model", lambda s: freeze_base(s.base), ValueError,
        r"^model: has no DCFTLinear layers"),
    row("freeze-trainable-typo", lambda s: freeze_base(s.swapped, trainable=["clasifier"]),
        ValueError, r"^trainable: .*'clasifier'.* matches no parameter of the model"),
    row("freeze-trainable-none", lambda s: freeze_base(s.swapped, trainable=None), TypeError,
        r"^trainable: expected a regular expression or a list of name endings, got None"),
    row("counts-none", lambda s: parameter_counts(None), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),
    row("counts-state-dict", lambda s: parameter_counts(s.base.state_dict()), TypeError,
        r"^model: expected .*Module, got (an? )?OrderedDict"),
    row("loss-base", lambda s: orthogonality_loss(s.base), ValueError,
        r"^model: has no DCFTLinear layers"),
    row("loss-form", lambda s: orthogonality_loss(s.swapped, form="code"), ValueError,
        r"^form: expected 'paper' or 'published_code', got 'code'"),
    row("loss-form-none", lambda s: orthogonality_loss(s.swapped, form=None), ValueError,
        r"^form: expected 'paper' or 'published_code', got None"),
    row("loss-none", lambda s: orthogonality_loss(None), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),

    # constraints and recipes; what PEFT models can have wrong is in test_constraints
    row("nonlinearity-unknown", lambda s: DCFTLinear(N, M, nonlinearity="swish"), ValueError,
        r"^nonlinearity: expected one of 'relu', 'gelu', 'silu', 'tanh', got 'swish'"),
    row("nonlinearity-function", lambda s: DCFTLinear(N, M, nonlinearity=torch.relu), ValueError,
        r"^nonlinearity: expected one of 'relu', .*, got <"),
    row("nonlinearity-true", lambda s: swap_linear(s.base, nonlinearity=True), ValueError,
        r"^nonlinearity: expected one of 'relu', .*, got True"),
    row("nonlinearity-triton", lambda s: DCFTLinear(N, M, nonlinearity="relu", backend="triton"),
        ValueError, r"^backend: 'triton' does not compute nonlinearity='relu'.*use backend='auto'"),
    row("nonlinearity-reference",
        lambda s: swap_linear(s.base, nonlinearity="relu", backend="reference"), ValueError,
        r"^backend: 'reference' does not compute nonlinearity='relu', .*use backend='auto'"),
    row("nonlinearity-strategy", lambda s: DCFTLinear(N, M, nonlinearity="relu", strategy="fused"),
        ValueError, r"^strategy: 'fused' is one of the Triton kernels', .*use strategy='auto'"),
    row("linear-nonlinearity", lambda s: s.linear(nonlinearity="sine"), ValueError,
        r"^nonlinearity: expected one of 'relu', .*, got 'sine'"),
    row("linear-nonlinearity-triton", lambda s: s.linear(nonlinearity="relu", backend="triton"),
        ValueError, r"^backend: 'triton' does not compute nonlinearity='relu'"),
    row("update-nonlinearity", lambda s: s.update(nonlinearity=1), ValueError,
        r"^nonlinearity: expected one of 'relu', .*, got 1"),
    row("update-nonlinearity-reference",
        lambda s: s.update(nonlinearity="relu", backend="reference"), ValueError,
        r"^backend: 'reference' does not compute nonlinearity='relu'"),
    row("nonlinear-merge", lambda s: s.nonlinear.query.merge(), RuntimeError,
        r"^merge: this DCFTLinear has nonlinearity='relu' .*remove_nonlinearity"),
    row("nonlinear-delta", lambda s: s.nonlinear.query.delta_weight(), RuntimeError,
        r"^delta_weight: this DCFTLinear has nonlinearity='relu' .*remove_nonlinearity"),
    row("nonlinear-to-linear", lambda s: s.nonlinear.query.to_linear(), RuntimeError,
        r"^to_linear: this DCFTLinear has nonlinearity='relu' .*remove_nonlinearity"),
    row("nonlinear-merge-model", lambda s: merge_model(s.nonlinear), RuntimeError,
        r"^model: 'query': this DCFTLinear has nonlinearity='relu' .*remove_nonlinearity"),
    row("nonlinear-unload", lambda s: merge_model(s.nonlinear, unload=True), RuntimeError,
        r"^model: 'query': this DCFTLinear has nonlinearity='relu' .*remove_nonlinearity"),
    row("nonlinear-load", lambda s: load_adapter(s.nonlinear, s.folder), ValueError,
        r"query: nonlinearity is relu in the model, None in the file"),
    row("add-nonlinearity-none", lambda s: constraints.add_nonlinearity(None, "relu"), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),
    row("add-nonlinearity-base", lambda s: constraints.add_nonlinearity(s.base, "relu"), ValueError,
        r"^model: has neither DCFTLinear layers nor active PEFT adapters"),
    row("add-nonlinearity-name", lambda s: constraints.add_nonlinearity(s.swapped, "elu"),
        ValueError, r"^nonlinearity: expected one of 'relu', .*, got 'elu'"),
    row("add-nonlinearity-twice", lambda s: constraints.add_nonlinearity(s.nonlinear, "relu"),
        ValueError, r"^model: 'query' has nonlinearity='relu' already; call remove_nonlinearity"),
    row("add-nonlinearity-merged", lambda s: constraints.add_nonlinearity(s.merged, "relu"),
        RuntimeError, r"^model: 'query' is merged; call unmerge_model\(model\) first"),
    row("remove-nonlinearity", lambda s: constraints.remove_nonlinearity(s.swapped), ValueError,
        r"^model: no adapter has a nonlinearity; add_nonlinearity"),
    row("remove-nonlinearity-none", lambda s: constraints.remove_nonlinearity(None), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),
    row("constraint-base", lambda s: constraint_loss(s.base), ValueError,
        r"^model: has neither DCFTLinear layers nor active PEFT .*call swap_linear\(model\)"),
    row("constraint-none", lambda s: constraint_loss(None), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),
    row("constraint-name", lambda s: constraint_loss(s.swapped, "nonlinear"), ValueError,
        r"^constraint: expected 'orthogonal' or 'diagonal', got 'nonlinear'; .*add_nonlinearity"),
    row("constraint-form", lambda s: constraint_loss(s.swapped, "diagonal", "code"), ValueError,
        r"^form: expected 'paper' or 'published_code', got 'code'"),
    row("recipe-unknown", lambda s: recipes.glue("mnlii"), ValueError,
        r"^task: expected one of 'CoLA', .*, got 'mnlii'; did you mean 'MNLI'\?"),
    row("recipe-penalty", lambda s: recipes.glue("cola").penalty(s.base), ValueError,
        r"^model: has neither DCFTLinear layers"),

    # files; what else can be wrong with them is in test_adapter_files
    row("save-none", lambda s: save_adapter(None, s.folder), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),
    row("save-base", lambda s: save_adapter(s.base, s.folder), ValueError,
        r"^model: has no DCFTLinear layers"),
    row("save-folder-none", lambda s: save_adapter(s.swapped, None), TypeError,
        r"^folder: expected .*path.*, got (a )?None"),
    row("load-none", lambda s: load_adapter(None, s.folder), TypeError,
        r"^model: expected .*Module, got (a )?NoneType"),
    row("load-folder-number", lambda s: load_adapter(s.base, 3), TypeError,
        r"^folder: expected .*path.*, got (an )?(int|3)"),
    row("load-nowhere", lambda s: load_adapter(s.base, s.folder / "nowhere"), FileNotFoundError,
        r"^folder: '.*nowhere' is not a directory"),
    row("load-empty-folder", lambda s: load_adapter(s.base, s.folder.parent), FileNotFoundError,
        r"dcft_config\.json: no such file; save_adapter writes it"),
    row("load-into-merged", lambda s: load_adapter(s.merged, s.folder), RuntimeError,
        r"^model: 'query' is merged; call unmerge_model\(model\) first"),
    row("load-into-other", lambda s: load_adapter(nn.Sequential(nn.Linear(N, M)), s.folder),
        ValueError, r"^model: does not fit the adapter in .*\(2 differences; nothing was loaded\)"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(("call", "error", "text"), TABLE)
def test_bad_input(setting, call, error, text):
    tensors = {name: tensor.clone() for name, tensor in setting.tensors().items()}
    snapshots = [ModelSnapshot(model) for model in setting.models().values()]
    files = {path.name: path.read_bytes() for path in setting.folder.iterdir()}

    with pytest.raises(error, match=text) as caught:
        call(setting)

    # No subclass either: a KeyError or an UnboundLocalError is an accident.
    assert caught.type in (error if isinstance(error, tuple) else (error,))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, getattr(setting, name)), name
    for snapshot in snapshots:
        snapshot.assert_unchanged()
    assert {path.name: path.read_bytes() for path in setting.folder.iterdir()} == files


def test_no_two_rows_have_one_name():
    names = [parameters.id for parameters in TABLE]
    assert len(names) == len(set(names)) > 100


def test_a_large_wrong_argument_does_not_flood_the_terminal(setting):
    with pytest.raises(TypeError, match=r"^x: expected a torch\.Tensor, got list") as caught:
        setting.linear(x=[0.0] * 100_000)
    length = len(str(caught.value))
    assert length < 1000


def test_a_list_of_strides_is_still_a_pair(setting):
    assert torch.equal(setting.linear(stride=[8, 8]), setting.linear())


def test_what_autocast_lets_through_is_not_remembered_without_it(setting):
    half = setting.weight.half()
    with torch.autocast("cpu", torch.bfloat16):
        assert setting.linear(weight=half).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"^weight: expected torch\.float32, the dtype of x"):
        setting.linear(weight=half)
    with torch.autocast("cpu", torch.bfloat16):
        assert setting.linear(weight=half).dtype == torch.bfloat16


def test_training_is_a_truth_value(setting):
    assert torch.equal(setting.linear(training=[], dropout_p=0.5), setting.linear())
