"""A nonlinearity between the factors of a DCFT layer, against its equation in float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from dcft_kernels import (
    DCFTLinear,
    dcft_linear,
    dcft_update,
    explain,
    load_adapter,
    merge_model,
    save_adapter,
    swap_linear,
    torch_backend,
)
from dcft_kernels.dropout import draw_seed, drop
from dcft_kernels.geometry import Side
from dcft_kernels.nonlinearity import NONLINEARITIES, function_of
from dcft_kernels.torch_backend import windows
from tests.adapter_cases import CASES, Case, Inputs, adapter_of, every_case, random_inputs
from tests.model_snapshot import ModelSnapshot

CPU = torch.device("cpu")
FACTORS = ("dcft_A", "dcft_B", "dcft_C")
every_nonlinearity = pytest.mark.parametrize("nonlinearity", NONLINEARITIES)


def read_in_windows(x: Tensor, side: Side) -> Tensor:
    """`[T, size]` as `[T, windows, width]`."""
    return F.pad(x, (0, side.span - side.size)).unfold(1, side.width, side.stride)


def by_equation(
    x: Tensor, adapter_x: Tensor, inputs: Inputs, case: Case, scaling: float, h: Any
) -> Tensor:
    """`x W^T + b + s expand(C h(shrink(x)))`, window by window, the adapter on its own input."""
    sides = case.geometry
    U = torch.einsum("tip,ki->tkp", read_in_windows(adapter_x, sides.inputs), inputs.A)
    V = scaling * torch.einsum("qp,tkp->tkq", inputs.C, h(U))
    increment = x.new_zeros(x.shape[0], sides.outputs.span)
    for j in range(sides.outputs.windows):
        first = j * sides.outputs.stride
        row = torch.einsum("tkq,k->tq", V, inputs.B[j])
        increment = increment + F.pad(
            row, (first, sides.outputs.span - first - sides.outputs.width)
        )
    return F.linear(x, inputs.weight, inputs.bias) + increment[:, : case.out_features]


@every_nonlinearity
@every_case
def test_output_and_gradients_are_those_of_the_equation(case: Case, nonlinearity: str) -> None:
    results = []
    for ours in (True, False):
        inputs = random_inputs(case, (5,)).requiring()
        if ours:
            y = dcft_linear(
                *inputs.operands, stride=case.stride, scaling=0.7, nonlinearity=nonlinearity
            )
        else:
            y = by_equation(inputs.x, inputs.x, inputs, case, 0.7, function_of(nonlinearity))
        y.backward(inputs.grad)
        results.append([y.detach(), *(t.grad for t in inputs.operands)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@every_case
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_identity_gives_the_ordinary_layer(case: Case, p: float) -> None:
    inputs = random_inputs(case, (5,))
    adapter = adapter_of(inputs, case, 0.7)
    if p:
        adapter = adapter._replace(dropout_p=p, seed=draw_seed(CPU))
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    found = torch_backend.add_nonlinear_adapter_(
        base.clone(), drop(inputs.x, p, adapter.seed), adapter, lambda U: U
    )
    expected = base.clone()
    torch_backend.add_adapter_(expected, inputs.x, adapter._replace(scaling=0.7 / (1 - p)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_nonlinearity
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    "case", [Case(8, 12, 1, (4, 4), (4, 4)), Case(10, 7, 2, (3, 4), (2, 1))], ids=str
)
def test_gradcheck(case: Case, p: float, nonlinearity: str) -> None:
    inputs = random_inputs(case, (3,)).requiring()

    def layer(*operands: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dcft_linear(
            *operands, stride=case.stride, scaling=0.7, dropout_p=p, nonlinearity=nonlinearity
        )

    assert gradcheck(layer, inputs.operands)
    assert gradgradcheck(layer, inputs.operands)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 3)])
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    case = CASES[6]
    inputs = random_inputs(case, leading).requiring()
    y = dcft_linear(*inputs.operands, stride=case.stride, nonlinearity="gelu")
    assert y.shape == (*leading, case.out_features)
    x = inputs.x.reshape(-1, case.in_features)
    expected = by_equation(x, x, inputs, case, 1.0, F.gelu)
    torch.testing.assert_close(y.reshape(-1, case.out_features), expected)
    y.sum().backward()
    assert inputs.A.grad.shape == inputs.A.shape


def test_a_transposed_input() -> None:
    inputs = random_inputs(CASES[3], (5,))
    arguments = {"nonlinearity": "tanh", "dropout_p": 0.3}
    torch.manual_seed(1)
    expected = dcft_linear(*inputs.operands, **arguments)
    torch.manual_seed(1)
    found = dcft_linear(inputs.x.t().contiguous().t(), *inputs.operands[1:], **arguments)
    torch.testing.assert_close(found, expected)


def test_update_is_the_increment_alone() -> None:
    case = CASES[1]
    inputs = random_inputs(case, (5,))
    y = torch.randn(5, case.out_features, dtype=torch.float64)
    before = y.clone()
    arguments = {"scaling": 0.7, "dropout_p": 0.3, "nonlinearity": "silu"}
    torch.manual_seed(2)
    whole = dcft_linear(*inputs.operands, **arguments)
    torch.manual_seed(2)
    updated = dcft_update(y, inputs.x, *inputs.operands[3:], **arguments)
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    torch.testing.assert_close(updated - y, whole - base, rtol=1e-11, atol=1e-11)
    assert torch.equal(y, before)


@pytest.mark.parametrize("block_elements", [None, 100], ids=["one-block", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6]], ids=str)
def test_16_bits(
    case: Case, dtype: torch.dtype, block_elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU in float32 throughout: the base is rounded once, and its sum with the increment."""
    if block_elements is not None:
        monkeypatch.setattr(windows, "_BLOCK_ELEMENTS", block_elements)
    inputs = random_inputs(case, (9,), dtype, torch.float32).requiring()
    y = dcft_linear(*inputs.operands, stride=case.stride, nonlinearity="gelu")
    assert y.dtype == dtype
    y.backward(inputs.grad)
    wide = inputs.to(torch.float64).requiring()
    truth = by_equation(wide.x, wide.x, wide, case, 1.0, F.gelu)
    truth.backward(wide.grad)
    base = F.linear(wide.x, wide.weight, wide.bias)
    eps = torch.finfo(dtype).eps
    # Twice the two roundings of half a unit each; float32's own are far below.
    assert bool(((y.double() - truth).abs() <= eps * (base.abs() + truth.abs()) + 1e-4).all())
    for name in ("A", "B", "C"):
        found, expected = getattr(inputs, name).grad, getattr(wide, name).grad
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def _layer(**options: Any) -> DCFTLinear:
    torch.manual_seed(0)
    layer = DCFTLinear(45, 61, rank=2, **{"nonlinearity": "silu", "init": "paper"} | options)
    for name in FACTORS:
        nn.init.normal_(getattr(layer, name))
    return layer


def _step(run: Any, layer: nn.Module, seed: int = 4) -> list[Tensor]:
    """Output and gradients of a step, from the same seed every time."""
    torch.manual_seed(seed)
    x = torch.randn(2, 5, 45).to(next(layer.parameters()).dtype).requires_grad_()
    layer.zero_grad()
    y = run(x)
    y.float().square().mean().backward()
    factors = [p for n, p in layer.named_parameters() if "dcft_" in n]
    return [y.detach(), x.grad, *(p.grad.clone() for p in factors)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_is_the_cast_layer(dtype: torch.dtype, p: float) -> None:
    layer = _layer(dropout=p)
    half = copy.deepcopy(layer)
    half.weight.data, half.bias.data = layer.weight.to(dtype), layer.bias.to(dtype)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return layer(x)

    found = _step(under_autocast, layer)
    assert [found[0].dtype, found[1].dtype] == [dtype, torch.float32]
    for actual, expected in zip(found, _step(lambda x: half(x.to(dtype)), half), strict=True):
        assert torch.equal(actual, expected.to(actual.dtype))


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.3}, {"stride": 4}, {"dtype": torch.bfloat16}], ids=str
)
def test_compiled_equals_eager(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = _layer(**options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(_step(compiled, layer), _step(layer, layer), strict=True):
        torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(use_reentrant: bool) -> None:
    layer = _layer(dropout=0.4)
    checkpointed = _step(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer)
    for actual, expected in zip(checkpointed, _step(layer, layer), strict=True):
        assert torch.equal(actual, expected)


def test_dropout_acts_on_the_adapters_input_before_the_nonlinearity() -> None:
    case = CASES[1]
    inputs = random_inputs(case, (9,))
    torch.manual_seed(5)
    y = dcft_linear(*inputs.operands, scaling=0.7, dropout_p=0.5, nonlinearity="tanh")
    torch.manual_seed(5)
    dropped = drop(inputs.x, 0.5, draw_seed(CPU)) / (1 - 0.5)
    expected = by_equation(inputs.x, dropped, inputs, case, 0.7, torch.tanh)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)


def test_a_seed_repeats_training_and_evaluation_draws_nothing() -> None:
    layer, x = _layer(dropout=0.5), torch.randn(5, 45)
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck_of_dropout(dtype: torch.dtype) -> None:
    x = torch.randn(6, 10, dtype=dtype, requires_grad=True)
    for operand in (x, x.detach().t().requires_grad_()):
        torch.library.opcheck(torch.ops.dcft_kernels.drop.default, (operand, draw_seed(CPU), 0.3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6]], ids=str)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    inputs = Inputs(*(t.cuda() for t in random_inputs(case, (9,), dtype))).requiring()
    torch.manual_seed(5)
    y = dcft_linear(*inputs.operands, stride=case.stride, dropout_p=0.3, nonlinearity="gelu")
    y.backward(inputs.grad)
    wide = inputs.to(torch.float64).requiring()
    torch.manual_seed(5)
    dropped = drop(wide.x, 0.3, draw_seed(wide.x.device)) / (1 - 0.3)
    truth = by_equation(wide.x, dropped, wide, case, 1.0, F.gelu)
    truth.backward(wide.grad)
    tolerance = 16 * torch.finfo(dtype).eps
    pairs = [(y, truth), (inputs.x.grad, wide.x.grad)]
    pairs += [(getattr(inputs, n).grad, getattr(wide, n).grad) for n in "ABC"]
    for found, expected in pairs:
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol)


def test_never_as_large_as_the_weight() -> None:
    """Forward and backward of few tokens allocate nothing of `m * n` elements."""
    case = Case(256, 320, 1, (8, 8), (8, 8))
    inputs = random_inputs(case, (2,), torch.float32).requiring(
        True, False, False, True, True, True
    )
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            base = inputs.weight.untyped_storage().data_ptr()
            sizes.extend(
                tensor.untyped_storage().nbytes() // 4
                for tensor in torch.utils._pytree.tree_leaves(result)
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != base
            )
            return result

    with Watch():
        y = dcft_linear(*inputs.operands, nonlinearity="relu")
        y.backward(inputs.grad)
    # The spread factors, k * d * max(n, m) elements, are the largest tensors there are.
    assert max(sizes) == 8 * 320


@every_nonlinearity
@pytest.mark.parametrize("init", ["balanced", "zero"])
def test_a_zero_start_is_the_base_to_the_bit(init: str, nonlinearity: str) -> None:
    base = nn.Linear(45, 61)
    layer = DCFTLinear.from_linear(base, init=init, nonlinearity=nonlinearity)
    x = torch.randn(4, 45)
    assert torch.equal(layer(x), base(x))


@every_nonlinearity
def test_a_layer_learns(nonlinearity: str) -> None:
    """From close by, it comes closer to a teacher."""
    teacher = DCFTLinear(24, 16, init="paper", nonlinearity=nonlinearity)
    for name in FACTORS:
        nn.init.normal_(getattr(teacher, name), std=0.5)
    student = copy.deepcopy(teacher)
    for name in FACTORS:
        getattr(student, name).data.add_(0.1 * torch.randn_like(getattr(student, name)))
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(200):
        x = torch.randn(64, 24)
        loss = F.mse_loss(student(x), teacher(x).detach())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


# ------------------------------------------------------------------------------------------------
# The option, and what it rules out


def _model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))
    if options:
        swap_linear(model, init="paper", **options)
        for name, parameter in model.named_parameters():
            if "dcft_" in name:
                nn.init.normal_(parameter)
    return model


X = torch.linspace(-1, 1, 72).reshape(3, 24)


def test_it_changes_the_layer_and_no_parameter() -> None:
    plain, curved = _model(kernel_size=4), _model(kernel_size=4, nonlinearity="gelu")
    assert curved.state_dict().keys() == plain.state_dict().keys()
    curved.load_state_dict(plain.state_dict())
    assert not torch.allclose(curved(X), plain(X))
    curved[0].nonlinearity = curved[2].nonlinearity = None
    assert torch.equal(curved(X), plain(X))


def test_it_is_an_option_like_others() -> None:
    layer = DCFTLinear(16, 8, nonlinearity="tanh")
    assert layer.options.nonlinearity == "tanh"
    assert DCFTLinear(16, 8).options.nonlinearity is None
    assert "backend='auto', nonlinearity='tanh', adapter_parameters=" in repr(layer)
    assert "nonlinearity" not in repr(DCFTLinear(16, 8))
    assert copy.deepcopy(layer).nonlinearity == "tanh"


def test_a_layer_from_before_there_was_one() -> None:
    """Whole models are pickled too: attributes that an older one lacks have defaults."""
    layer = DCFTLinear(16, 8, init="paper")
    del layer.__dict__["nonlinearity"], layer.__dict__["_default_alpha"]
    assert layer.scaling == 1.0
    layer(torch.randn(2, 16)).sum().backward()
    layer.merge()


def test_explain_says_who_computes_it() -> None:
    explanation = explain(DCFTLinear(16, 8, nonlinearity="relu"), tokens=64, gpu="H100")
    assert explanation.strategy == "torch"
    assert "nonlinearity='relu'" in str(explanation)


@pytest.mark.parametrize("unload", [False, True])
def test_merging_a_model_is_refused_before_anything_happens(unload: bool) -> None:
    model = _model(kernel_size=4)
    model[2].nonlinearity = "relu"
    snapshot = ModelSnapshot(model)
    with pytest.raises(
        RuntimeError, match=r"^model: '2': .*nonlinearity='relu'.*remove_nonlinearity"
    ):
        merge_model(model, unload=unload)
    snapshot.assert_unchanged()
    model[2].nonlinearity = None
    merge_model(model, unload=unload)


# ------------------------------------------------------------------------------------------------
# Files


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dcft_config.json").read_text())


def test_a_file_keeps_it(tmp_path: Path) -> None:
    model = _model(nonlinearity="gelu", rank=2, stride=4, dropout=0.1)
    model[2].nonlinearity = None
    save_adapter(model, tmp_path)
    records = _config(tmp_path)["layers"]
    assert records["0"]["nonlinearity"] == "gelu"
    assert "nonlinearity" not in records["2"]
    for target in (_model(), _model(nonlinearity="gelu", rank=2, stride=4)):
        if isinstance(target[2], DCFTLinear):
            target[2].nonlinearity = None
        load_adapter(target, tmp_path)
        assert [target[0].nonlinearity, target[2].nonlinearity] == ["gelu", None]
        assert torch.equal(target.eval()(X), model.eval()(X))
        assert not target[0].weight.requires_grad


# What a version without nonlinearities wrote, to the byte, for the model in the test.
FORMER_CONFIG = """{
 "format": "dcft_adapter",
 "format_version": 1,
 "weights": {
  "file": "dcft_adapter-5e0a11ab4d6c.safetensors",
  "sha256": "SHA"
 },
 "layers": {
  "": {
   "in_features": 4,
   "out_features": 2,
   "rank": 1,
   "kernel_size": [
    2,
    2
   ],
   "stride": [
    2,
    2
   ],
   "alpha": 0.5,
   "dropout": 0.0,
   "init": "paper"
  }
 }
}
"""


def _ones() -> DCFTLinear:
    layer = DCFTLinear(4, 2, kernel_size=2, alpha=0.5, init="paper")
    for name in FACTORS:
        nn.init.ones_(getattr(layer, name))
    return layer


def test_files_without_it_are_those_of_the_former_version(tmp_path: Path) -> None:
    layer = _ones()
    save_adapter(layer, tmp_path)
    weights = _config(tmp_path)["weights"]
    former = FORMER_CONFIG.replace("5e0a11ab4d6c", weights["sha256"][:12])
    former = former.replace("SHA", weights["sha256"])
    assert (tmp_path / "dcft_config.json").read_text() == former
    # And one that the former version wrote loads.
    (tmp_path / "dcft_config.json").write_text(former)
    target = DCFTLinear(4, 2, kernel_size=2, alpha=0.5)
    load_adapter(target, tmp_path)
    assert torch.equal(target.dcft_A, layer.dcft_A)
    assert target.nonlinearity is None


def test_a_model_that_differs_in_it_is_not_loaded_into(tmp_path: Path) -> None:
    model, other = _model(nonlinearity="relu"), _model(nonlinearity="gelu")
    save_adapter(model, tmp_path)
    other[2].nonlinearity = None
    snapshot = ModelSnapshot(other)
    with pytest.raises(ValueError, match=r"\(2 differences; nothing was loaded\)") as caught:
        load_adapter(other, tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        "  0: nonlinearity is gelu in the model, relu in the file",
        "  2: nonlinearity is None in the model, relu in the file",
    ]
    snapshot.assert_unchanged()
    plain = _model(rank=1)
    save_adapter(plain, tmp_path)
    with pytest.raises(ValueError, match=r"0: nonlinearity is gelu in the model, None in the file"):
        load_adapter(other, tmp_path)


def test_a_file_with_an_unknown_one_is_refused(tmp_path: Path) -> None:
    save_adapter(_model(nonlinearity="relu"), tmp_path)
    config = _config(tmp_path)
    config["layers"]["0"]["nonlinearity"] = "swish"
    (tmp_path / "dcft_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layer '0': nonlinearity: expected one of .*'swish'"):
        load_adapter(_model(), tmp_path)
