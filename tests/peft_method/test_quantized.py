"""Quantised base layers, through PEFT's own backends.

torchao for real; bitsandbytes, HQQ and GPTQModel as stand-ins with the interface that those
backends call.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils import quantization_utils
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig

from tests.peft_method.models import adapted, layers
from tests.small_models import build_small_model, logits, small_inputs


def scales_of(weight: Tensor) -> Tensor:
    return weight.abs().amax(1, keepdim=True) / 127


class Int8Params(nn.Parameter):
    """A weight and, as `SCB`, the largest magnitude of each row."""

    def __new__(cls, data: Tensor, requires_grad: bool, has_fp16_weights: bool) -> Int8Params:
        scales = scales_of(data)
        self = super().__new__(cls, (data / scales).round().to(torch.int8), requires_grad)
        self.SCB, self.has_fp16_weights = scales[:, 0] * 127, has_fp16_weights
        return self


class Params4bit(nn.Parameter):
    """PEFT passes on the attributes of the weight that it replaces."""

    def __new__(cls, data: Tensor, requires_grad: bool, quant_state: Any = None) -> Params4bit:
        scales = scales_of(data)
        self = super().__new__(cls, (data / scales).round().to(torch.int8), requires_grad)
        self.quant_state = scales
        return self


class Linear8bitLt(nn.Linear):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.bias = plain.bias
        self.weight = Int8Params(plain.weight.data, False, False)
        self.state = types.SimpleNamespace(SCB=None, reset_grads=self.forget)

    def forget(self) -> None:
        self.state.SCB = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.weight.SCB[:, None] / 127
        return nn.functional.linear(x, weight, self.bias)


class Linear4bit(nn.Linear):
    compute_dtype = torch.float32

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.bias = plain.bias
        self.weight = Params4bit(plain.weight.data, False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.weight.quant_state, self.bias)


class HQQLinear(nn.Module):
    """No `nn.Linear`, and without `weight`; PEFT replaces it by a new one."""

    offload_meta = False

    def __init__(
        self, plain: nn.Linear | None, quant_config: dict[str, Any], compute_dtype: Any, device: Any
    ) -> None:
        super().__init__()
        self.quant_config, self.compute_dtype, self.device = quant_config, compute_dtype, device
        self.bias = None
        if plain is not None:
            self.quantize(plain.weight.data, **quant_config)

    def quantize(self, weight: Tensor, nbits: int) -> None:
        self.out_features, self.in_features = weight.shape
        self.scales = scales_of(weight)
        self.W_q = nn.Parameter((weight / self.scales).round().to(torch.int8), requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.W_q * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize(), self.bias)


class BaseQuantLinear(nn.Module):
    """As GPTQModel's: a forward pass, and no way back to a dense weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = plain.in_features, plain.out_features
        self.scales = scales_of(plain.weight.data)
        weight = (plain.weight.data / self.scales).round().to(torch.int8)
        self.qweight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scales).t()


def install(monkeypatch: pytest.MonkeyPatch, package: str, modules: dict[str, Any]) -> None:
    """Put stand-ins in the place of a package that PEFT asks for."""
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(quantization_utils, f"is_{package}_available", lambda: True)


@pytest.fixture
def bitsandbytes_and_hqq(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {c.__name__: c for c in (Linear8bitLt, Linear4bit, Int8Params, Params4bit)}
    functions = {
        "int8_vectorwise_dequant": lambda data, SCB: data * SCB[:, None] / 127,
        "dequantize_4bit": lambda data, scales: data * scales,
    }
    module = {
        "nn": types.SimpleNamespace(**classes),
        "functional": types.SimpleNamespace(**functions),
    }
    install(monkeypatch, "bnb", {"bitsandbytes": module})
    install(monkeypatch, "bnb_4bit", {})
    hqq = {"hqq": {}, "hqq.core": {}, "hqq.core.quantize": {"HQQLinear": HQQLinear}}
    install(monkeypatch, "hqq", hqq)


MERGING = {
    "bnb 8bit": Linear8bitLt,
    "bnb 4bit": Linear4bit,
    "hqq": lambda plain: HQQLinear(plain, {"nbits": 8}, torch.float32, "cpu"),
}


def quantized(quantize: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(quantize(nn.Linear(24, 40)), nn.Tanh(), nn.Linear(40, 3))


@pytest.mark.usefixtures("bitsandbytes_and_hqq")
@pytest.mark.parametrize("name", MERGING)
def test_merging_into_quantized_layers(name):
    model = adapted(model=quantized(MERGING[name]), target_modules=["0"])
    x = torch.randn(5, 24)
    layer = layers(model)["0"]
    assert f"quantization_backend='{name}'" in repr(layer)
    expected = model(x)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    base, delta = layer.get_base_weight().clone(), layer.get_delta_weight("default")
    # Half a step of quantisation in each weight, for each time that it is quantised.
    step = scales_of(base + delta).max().item()
    off = (
        0.5
        * step
        * x.abs().sum(1).max().item()
        * model.base_model.model[2].weight.abs().sum(1).max()
    )
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        merged = layer.get_base_weight()
        torch.testing.assert_close(merged, base + delta, rtol=0.0, atol=1.01 * step)
        assert (model(x) - expected).abs().max() < 2 * off
        model.unmerge_adapter()
        torch.testing.assert_close(layer.get_base_weight(), base, rtol=0.0, atol=2.02 * step)
    kind = type(layer.base_layer)
    unloaded = model.merge_and_unload()
    assert type(unloaded[0]) is kind
    assert (unloaded(x) - expected).abs().max() < 5 * off


def test_layers_that_cannot_be_dequantized_run_and_refuse_to_merge(monkeypatch):
    name = "gptqmodel.nn_modules.qlinear"
    parts = {
        "gptqmodel": {},
        "gptqmodel.nn_modules": {},
        name: {"BaseQuantLinear": BaseQuantLinear},
    }
    install(monkeypatch, "gptqmodel", parts)
    model = quantized(BaseQuantLinear)
    x = torch.randn(5, 24)
    before = model(x)
    model = adapted(model=model, target_modules=["0"])
    expected = model(x)
    assert not torch.allclose(expected, before)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(TypeError, match="Dequantization is not supported for gptq layers"):
        model.merge_and_unload()
    assert torch.equal(model(x), expected)


@pytest.mark.usefixtures("bitsandbytes_and_hqq")
def test_a_layer_that_returns_another_dtype():
    model = quantized(Linear8bitLt)[:1]
    model[0].register_forward_hook(lambda module, args, y: y.to(torch.bfloat16))
    x = torch.randn(5, 24)
    model = adapted(model=model, target_modules=["0"])
    layer = layers(model)["0"]
    exact = x @ (layer.get_base_weight() + layer.get_delta_weight("default")).t() + layer.bias
    y = model(x)
    assert y.dtype == torch.bfloat16
    # Four roundings: of the input, the base's output, the increment and the sum.
    assert (y - exact).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        layer.base_layer.register_forward_hook(lambda module, args, y: y.float())
        assert model(x).dtype == torch.float32


def test_torchao(tmp_path):
    build_small_model("llama").save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = transformers.TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    model = load(tmp_path / "base", quantization_config=config, dtype=torch.float32)
    inputs = small_inputs("llama")
    before = logits(model, inputs)
    model = adapted(model=model, target_modules=["q_proj", "down_proj"])
    backends = {layer.quantization_backend.backend_name for layer in layers(model).values()}
    assert backends == {"torchao"}
    expected = logits(model, inputs)
    expected.sum().backward()
    model.save_pretrained(tmp_path / "adapter")
    # The quantization error is small compared with the effect of the adapter.
    close = 0.2 * (expected - before).abs().max()
    twin = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert (logits(twin, inputs) - expected).abs().max() < close
    model.merge_adapter(safe_merge=True)
    assert (logits(model, inputs) - expected).abs().max() < close
    model.unmerge_adapter()
    assert (logits(model, inputs) - expected).abs().max() < close
    unloaded = model.merge_and_unload()
    assert (logits(unloaded, inputs) - expected).abs().max() < close
    assert type(unloaded.model.layers[0].self_attn.q_proj) is nn.Linear
