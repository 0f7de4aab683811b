"""The matrix pattern constraints of arXiv 2407.05417: losses and nonlinearities, DCFT and PEFT."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dcft_kernels import (
    DCFTLinear,
    constraint_loss,
    constraints,
    merge_model,
    orthogonality_loss,
    swap_linear,
)
from dcft_kernels.nonlinearity import NONLINEARITIES, function_of
from tests.model_snapshot import ModelSnapshot

# PEFT sees to it by itself.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")

CONSTRAINTS = ["orthogonal", "diagonal"]
FORMS = ["paper", "published_code"]
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS)
every_form = pytest.mark.parametrize("form", FORMS)


class Base(nn.Module):
    """Layers of every kind that adapters are put on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.query, self.value = nn.Linear(16, 24), nn.Linear(16, 24)
        self.dense = Conv1D(16, 24)  # out, in
        self.convolution = nn.Conv1d(16, 8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.dense((self.query(x) * self.value(x)).tanh())
        return self.convolution(x.transpose(1, 2))


TOKENS = torch.arange(10).reshape(2, 5)


def _randomized(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_" in name or "dcft_" in name:
            nn.init.normal_(parameter)
    return model.to(dtype)


def _lora(targets: Any = ("query", "value", "dense"), **options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"r": 3, "target_modules": list(targets)} | options
    return _randomized(peft.get_peft_model(Base(), peft.LoraConfig(**settings)))


def _adalora() -> nn.Module:
    config = peft.AdaLoraConfig(
        init_r=3, target_r=2, target_modules=["query", "value"], total_step=10
    )
    torch.manual_seed(0)
    return _randomized(peft.get_peft_model(Base(), config))


def _dcft(rank: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = Base()
    swap_linear(model, ["query", "value", "dense"], rank=rank, kernel_size=4, init="paper")
    return _randomized(model)


def _both() -> nn.Module:
    """DCFT on one layer, LoRA on another."""
    torch.manual_seed(0)
    model = Base()
    swap_linear(model, ["query"], rank=2, init="paper")
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["value"]))
    for name, parameter in model.named_parameters():  # PEFT has frozen what it does not know
        parameter.requires_grad_("lora_" in name or "dcft_" in name)
    return _randomized(model)


MODELS = {"dcft": _dcft, "lora": _lora, "adalora": _adalora, "both": _both}
every_model = pytest.mark.parametrize("kind", MODELS)


def papers_factors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """`A [n, r]` and `B [r, m]`, as the paper has them, of every adapter, by parameter names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        for side in "AB":
            for kind in (f"dcft_{side}", f"lora_{side}"):
                if kind in name.split("."):
                    layer = name.replace(kind, "")
                    found.setdefault(layer, {})[side] = parameter.detach().t()
    return [(sides["A"], sides["B"]) for sides in found.values()]


def by_equation(model: nn.Module, constraint: str, form: str) -> Tensor:
    """Equations 20 and 21, with the paper's own transposes."""
    residuals = []
    for A, B in papers_factors(model):
        gram = B @ B.t()
        identity = torch.eye(gram.shape[0], dtype=gram.dtype)
        target = identity if constraint == "orthogonal" else torch.diag(torch.diag(gram))
        residuals += [A.t() @ A - identity, gram - target]
    if form == "paper":
        return sum(residual.norm() ** 2 for residual in residuals)
    return sum(residual.norm() for residual in residuals) / len(residuals)


@every_form
@every_constraint
@every_model
def test_loss_is_that_of_the_equations(kind: str, constraint: str, form: str) -> None:
    model = MODELS[kind]()
    assert len(papers_factors(model)) == {"dcft": 3, "lora": 3, "adalora": 2, "both": 2}[kind]
    found = constraint_loss(model, constraint, form).detach()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, by_equation(model, constraint, form))
    by_keyword = constraint_loss(model, constraint=constraint, form=form)
    assert torch.equal(by_keyword.detach(), found)


def test_the_defaults_are_equation_20() -> None:
    model = _both()
    assert torch.equal(constraint_loss(model), constraint_loss(model, "orthogonal", "paper"))


@every_form
def test_orthogonality_loss_is_a_special_case_for_dcft_alone(form: str) -> None:
    model = _dcft()
    expected = constraint_loss(model, "orthogonal", form)
    assert torch.equal(orthogonality_loss(model, form=form), expected)
    mixed = _both()
    alone = orthogonality_loss(mixed.base_model.model.query, form=form)
    assert torch.equal(orthogonality_loss(mixed, form=form), alone)
    with pytest.raises(ValueError, match=r"^model: has no DCFTLinear layers"):
        orthogonality_loss(_lora(), form=form)


def test_published_form_is_the_published_function() -> None:
    """AdaLoRA's `compute_orth_regu`, which DCFT's code has too, over all parameters by name."""
    model = _lora()
    norms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p = parameter.detach()
            gram = p @ p.t() if "lora_A" in name else p.t() @ p
            norms.append(torch.norm(gram - torch.eye(3), p="fro"))
    found = constraint_loss(model, "orthogonal", "published_code")
    torch.testing.assert_close(found.detach(), sum(norms) / len(norms))


@every_form
@every_constraint
@every_model
def test_gradient_is_that_of_the_equations(kind: str, constraint: str, form: str) -> None:
    model = MODELS[kind]()
    constraint_loss(model, constraint, form).backward()
    step = 1e-6
    for name, parameter in model.named_parameters():
        is_factor = any(part in name for part in ("dcft_A", "dcft_B", "lora_A", "lora_B"))
        if not is_factor:
            assert parameter.grad is None, name
            continue
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[0, 0] += sign * step
                losses.append(by_equation(model, constraint, form))
                parameter[0, 0] -= sign * step
        slope = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(parameter.grad[0, 0], slope, rtol=1e-5, atol=1e-5)


@every_form
def test_diagonal_leaves_the_lengths_of_B_open(form: str) -> None:
    layer = DCFTLinear(32, 32, rank=2, kernel_size=4, dtype=torch.float64)
    with torch.no_grad():
        layer.dcft_A.copy_(torch.eye(2, 8))
        layer.dcft_B.copy_(torch.eye(8, 2) * torch.tensor([3.0, 0.5]))
    loss = constraint_loss(layer, "diagonal", form)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(layer.dcft_B.grad, torch.zeros_like(layer.dcft_B))
    assert constraint_loss(layer, "orthogonal", form) > 0
    with torch.no_grad():
        layer.dcft_A.mul_(2.0)  # but not of A
    assert constraint_loss(layer, "diagonal", form) > 0


@every_form
def test_with_rank_one_only_A_is_constrained(form: str) -> None:
    layer = DCFTLinear(32, 32)
    nn.init.normal_(layer.dcft_B)
    constraint_loss(layer, "diagonal", form).backward()
    assert layer.dcft_A.grad.abs().max() > 0
    assert torch.equal(layer.dcft_B.grad, torch.zeros_like(layer.dcft_B))


@every_form
def test_descent_makes_B_diagonal(form: str) -> None:
    model = _lora(["query"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(1500):
        optimizer.zero_grad()
        constraint_loss(model, "diagonal", form).backward()
        optimizer.step()
    ((A, B),) = papers_factors(model)
    gram = B @ B.t()
    assert (A.t() @ A - torch.eye(3)).abs().max() < 0.05
    assert (gram - torch.diag(torch.diag(gram))).abs().max() < 0.05
    assert (torch.diag(gram) - 1).abs().max() > 0.5


@every_constraint
def test_active_adapters_count_and_others_do_not(constraint: str) -> None:
    model = _lora(["query"])
    alone = constraint_loss(model, constraint).detach()
    model.add_adapter("second", peft.LoraConfig(r=5, target_modules=["query", "value"]))
    _randomized(model)
    with_first = constraint_loss(model, constraint).detach()
    assert not torch.equal(with_first, alone)  # the first was drawn anew
    model.set_adapter("second")
    with_second = constraint_loss(model, constraint).detach()
    model.base_model.set_adapter(["default", "second"])
    total = constraint_loss(model, constraint).detach()
    torch.testing.assert_close(total, with_first + with_second)
    torch.testing.assert_close(total, by_equation(model, constraint, "paper"))


def test_embeddings_convolutions_and_bare_parameters_are_left_out() -> None:
    model = _lora(["embedding", "convolution", "query"])
    assert torch.equal(constraint_loss(model), constraint_loss(model.base_model.model.query))
    bare = peft.get_peft_model(
        Base(), peft.LoraConfig(r=2, target_modules=[], target_parameters=["query.weight"])
    )
    for others in (bare, _lora(["embedding", "convolution"])):
        with pytest.raises(ValueError, match=r"^model: has neither DCFTLinear layers nor active"):
            constraint_loss(others)


@every_form
@every_constraint
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_factors_are_widened(dtype: torch.dtype, constraint: str, form: str) -> None:
    model = _lora().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(100.0)  # the Gram matrix is beyond what float16 holds
    loss = constraint_loss(model, constraint, form)
    assert loss.dtype == torch.float32
    expected = constraint_loss(copy.deepcopy(model).double(), constraint, form)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert model.base_model.model.query.lora_A["default"].weight.grad.dtype == dtype


@every_constraint
def test_autocast_makes_no_difference(constraint: str) -> None:
    model = _both().float()
    expected = constraint_loss(model, constraint)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(constraint_loss(model, constraint), expected)


def test_factors_of_several_dtypes_go_together() -> None:
    dtypes = (torch.bfloat16, torch.float64)
    layers = [DCFTLinear(16, 16, init="paper", dtype=dtype) for dtype in dtypes]
    model = nn.ModuleList(layers)
    total = sum(constraint_loss(layer).double() for layer in layers)
    torch.testing.assert_close(constraint_loss(model), total)


@pytest.mark.gpu
def test_factors_on_several_devices_go_together() -> None:
    layers = [DCFTLinear(16, 16, init="paper", device=device) for device in ("cpu", "cuda")]
    loss = constraint_loss(nn.ModuleList(layers))
    assert loss.device.type == "cpu"
    torch.testing.assert_close(loss, sum(constraint_loss(layer).cpu() for layer in layers))
    loss.backward()
    assert layers[1].dcft_A.grad.is_cuda


def test_wrappers_and_merging_make_no_difference() -> None:
    model = _lora(["query", "value"])
    expected = constraint_loss(model)
    assert torch.equal(constraint_loss(nn.Sequential(model)), expected)
    model.merge_adapter()
    assert torch.equal(constraint_loss(model), expected)


def test_peft_need_not_be_there() -> None:
    script = """
import sys
sys.modules["peft"] = None
import dcft_kernels, torch
from dcft_kernels import constraints
model = torch.nn.Sequential(torch.nn.Linear(16, 16))
dcft_kernels.swap_linear(model)
handle = constraints.add_nonlinearity(model, "relu")
(model(torch.ones(2, 16)).sum() + constraints.constraint_loss(model, "diagonal")).backward()
handle.remove()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------------------
# MPC_n


def _increments(model: nn.Module, names: list[str], h: Callable[[Tensor], Tensor]) -> Any:
    """The forward pass of `Base` with `B h(A x)` added where adapters are."""
    base = model.base_model.model

    def layer(name: str, x: Tensor) -> Tensor:
        tuner = getattr(base, name)
        if name not in names:
            return tuner(x)
        y = tuner.base_layer(x)
        for adapter in tuner.active_adapters:
            A, B = tuner.lora_A[adapter].weight, tuner.lora_B[adapter].weight
            y = y + tuner.scaling[adapter] * (h(x @ A.t()) @ B.t())
        return y

    x = base.embedding(TOKENS)
    x = layer("dense", (layer("query", x) * layer("value", x)).tanh())
    return base.convolution(x.transpose(1, 2))


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_lora_with_a_nonlinearity(nonlinearity: str) -> None:
    model, names = _lora(lora_alpha=5), ["query", "value", "dense"]
    before, keys = model(TOKENS), list(model.state_dict())
    torch.testing.assert_close(before, _increments(model, names, lambda u: u))
    constraints.add_nonlinearity(model, nonlinearity)
    torch.testing.assert_close(model(TOKENS), _increments(model, names, function_of(nonlinearity)))
    assert not torch.allclose(model(TOKENS), before)
    assert list(model.state_dict()) == keys
    model(TOKENS).square().sum().backward()
    factor = model.base_model.model.query.lora_A["default"].weight
    assert factor.grad.abs().max() > 0


def test_dropout_is_ahead_of_it() -> None:
    model = _lora(["query"], lora_dropout=0.5)
    constraints.add_nonlinearity(model, "tanh")
    layer, x = model.base_model.model.query, torch.randn(3, 16, dtype=torch.float64)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + layer.scaling["default"] * (dropped @ A.t()).tanh() @ B.t()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by", ["handle", "function"])
@pytest.mark.parametrize("kind", ["dcft", "lora", "both"])
def test_it_comes_out_again(kind: str, by: str) -> None:
    model = MODELS[kind]()
    before = model(TOKENS)
    handle = constraints.add_nonlinearity(model, "relu")
    during = model(TOKENS)
    assert not torch.allclose(during, before)
    handle.remove() if by == "handle" else constraints.remove_nonlinearity(model)
    assert torch.equal(model(TOKENS), before)
    handle.remove()  # nothing more to do, and no complaint
    with pytest.raises(ValueError, match=r"^model: no adapter has a nonlinearity"):
        constraints.remove_nonlinearity(model)
    constraints.add_nonlinearity(model, "relu")
    assert torch.equal(model(TOKENS), during)
    constraints.remove_nonlinearity(model)
    merge_model(model) if kind == "dcft" else model.merge_adapter()
    torch.testing.assert_close(model(TOKENS), before)


def test_in_a_model_of_both_kinds_both_get_it() -> None:
    model = _both()
    constraints.add_nonlinearity(model, "silu")
    base = model.base_model.model
    x = torch.randn(3, 16, dtype=torch.float64)
    plain = copy.deepcopy(base.query)
    plain.nonlinearity = None
    assert base.query.nonlinearity == "silu"
    assert not torch.allclose(base.query(x), plain(x))
    A, B = base.value.lora_A["default"].weight, base.value.lora_B["default"].weight
    scaled = base.value.scaling["default"] * F.silu(x @ A.t()) @ B.t()
    torch.testing.assert_close(base.value(x), base.value.base_layer(x) + scaled)


def test_what_swap_linear_put_comes_out_too() -> None:
    model = Base()
    swap_linear(model, ["query"], nonlinearity="relu")
    constraints.remove_nonlinearity(model)
    merge_model(model)


def _merge_safely(model: nn.Module) -> None:
    model.merge_and_unload(safe_merge=True)


MERGES = {
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter-by-name": lambda model: model.merge_adapter(["default"]),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload-safe": _merge_safely,
    "delta": lambda model: model.base_model.model.query.get_delta_weight("default"),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("targets", [["query", "dense"], ["embedding", "convolution", "query"]])
def test_merging_is_refused_before_anything_happens(targets: list[str], merge: Any) -> None:
    """Also where a layer that has nothing between its factors, an embedding, is merged first."""
    model = _lora(targets)
    constraints.add_nonlinearity(model, "relu")
    expected, snapshot = model(TOKENS), ModelSnapshot(model)
    text = r"adapter 'default' has nonlinearity='relu'.*dcft_kernels\.constraints\.remove_nonlinear"
    with pytest.raises(RuntimeError, match=text):
        merge(model)
    snapshot.assert_unchanged()
    assert torch.equal(model(TOKENS), expected)


def test_adapters_that_are_not_active_stay_as_they_are() -> None:
    model = _lora(["query"])
    model.add_adapter("second", peft.LoraConfig(r=5, target_modules=["query"]))
    _randomized(model)
    first = model(TOKENS)
    model.set_adapter("second")
    second = model(TOKENS)
    constraints.add_nonlinearity(model, "relu")
    assert not torch.allclose(model(TOKENS), second)
    model.set_adapter("default")
    assert torch.equal(model(TOKENS), first)
    with pytest.raises(RuntimeError, match=r"adapter 'second' has nonlinearity='relu'"):
        model.merge_adapter(["second"])
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(TOKENS), first)


def test_a_copy_and_a_pickle_have_it_and_are_on_their_own() -> None:
    model = _lora(["embedding", "query", "dense"])
    before = model(TOKENS)
    constraints.add_nonlinearity(model, "gelu")
    expected = model(TOKENS)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(TOKENS), expected)
        with pytest.raises(RuntimeError, match="nonlinearity='gelu'"):
            twin.merge_adapter()
        constraints.remove_nonlinearity(twin)
        assert torch.equal(twin(TOKENS), before)
        twin.merge_adapter()
        assert not model.base_model.model.query.merged
    assert torch.equal(model(TOKENS), expected)


def test_saving_by_peft_is_without_it(tmp_path) -> None:
    model = _lora(["query"])
    before = model(TOKENS)
    constraints.add_nonlinearity(model, "relu")
    expected = model(TOKENS)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Base(), tmp_path).double()
    torch.testing.assert_close(loaded(TOKENS), before)
    constraints.add_nonlinearity(loaded, "relu")
    torch.testing.assert_close(loaded(TOKENS), expected)


def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    model = _both()
    constraints.add_nonlinearity(model, "gelu")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    torch._dynamo.reset()


def _merged(model: nn.Module) -> nn.Module:
    model.merge_adapter()
    return model


def _bare() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["query.weight"])
    return peft.get_peft_model(Base(), config)


def _with(**attributes: Any) -> nn.Module:
    """A good model but for one layer."""
    model = _dcft()
    for name, value in attributes.items():
        setattr(model.value, name, value)
    return model


def _half_merged() -> nn.Module:
    model = _dcft()
    model.value.merge()
    return model


REFUSED = {
    "adalora": (_adalora, ValueError, r"query' is a SVDLinear.*without calling them"),
    "dora": (lambda: _lora(["query"], use_dora=True), ValueError,
             r"query' has the adapter 'default' of the kind Do[Rr][Aa].*plain LoRA on linear"),
    "bare-parameters": (_bare, ValueError, r"query' is a ParamWrapper.*without calling them"),
    "embedding-alone": (lambda: _lora(["embedding"]), ValueError,
                        r"^model: has neither DCFTLinear layers nor active PEFT"),
    "no-adapters": (Base, ValueError, r"^model: has neither DCFTLinear layers nor active PEFT"),
    "merged-lora": (lambda: _merged(_lora()), RuntimeError,
                    r"query' is merged; call unmerge_adapter\(\) first"),
    "merged-dcft": (_half_merged, RuntimeError,
                    r"^model: 'value' is merged; call unmerge_model\(model\) first"),
    "twice": (lambda: _with(nonlinearity="tanh"), ValueError,
              r"^model: 'value' has nonlinearity='tanh' already; call remove_nonlinearity"),
    "reference": (lambda: _with(backend="reference"), ValueError,
                  r"^model: 'value': backend: 'reference' does not compute nonlinearity='relu'"),
    "strategy": (lambda: _with(strategy="fused"), ValueError,
                 r"^model: 'value': strategy: 'fused' is one of the Triton kernels'"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_have_one_is_refused_whole(build: Any, error: Any, text: str) -> None:
    model = build()
    snapshot = ModelSnapshot(model)
    with pytest.raises(error, match=text):
        constraints.add_nonlinearity(model, "relu")
    snapshot.assert_unchanged()


def test_attention_in_one_piece_is_refused() -> None:
    """Its adapters are multiplied out in every forward pass."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attention"]))
    text = r"attention' is a MultiheadAttention, which multiplies its factors without calling them"
    with pytest.raises(ValueError, match=text):
        constraints.add_nonlinearity(model, "relu")


def test_a_second_one_on_lora_is_refused() -> None:
    model = _lora()
    constraints.add_nonlinearity(model, "tanh")
    expected = model(TOKENS)
    with pytest.raises(ValueError, match=r"query' has nonlinearity='tanh' already"):
        constraints.add_nonlinearity(model, "relu")
    assert torch.equal(model(TOKENS), expected)
