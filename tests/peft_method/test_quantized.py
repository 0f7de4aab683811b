"""Quantised base layers: torchao's for real, the others' through stand-ins of their interface."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig

from dcft_kernels.peft import layer as layer_module
from dcft_kernels.peft import model as model_module
from tests.peft_method.models import adapted, layers
from tests.small_models import build_small_model, logits, small_inputs


class Quantized(nn.Module):
    """An int8 layer with a scale for each output; not an `nn.Linear`, and without `weight`."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.W_q = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.W_q * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize(), self.bias)


class HQQLinear(Quantized):
    """PEFT goes by this name where it asks for the sizes."""


class InPlace(QuantizationBackend):
    """As bitsandbytes' backends: the layer stays, its weight is quantised again."""

    supports_merge, backend_name, layer_type = True, "in place", "linear"

    def get_base_weight(self, base_layer: Quantized) -> Tensor:
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer: nn.Module, weight_data: Tensor) -> None:
        base_layer = peft_layer.get_base_layer()
        new = HQQLinear(weight_data, base_layer.bias)
        base_layer.W_q, base_layer.scale = new.W_q, new.scale

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        return x.clone()


class Replacing(InPlace):
    """As HQQ's: the layer is replaced by a new one."""

    def set_base_weight(self, peft_layer: nn.Module, weight_data: Tensor) -> None:
        peft_layer.base_layer = HQQLinear(weight_data, peft_layer.base_layer.bias)


def quantized(backend: QuantizationBackend, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    def resolve(base_layer: nn.Module, **_: object) -> QuantizationBackend | None:
        return backend if isinstance(base_layer, Quantized) else None

    for module in (layer_module, model_module):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)
    torch.manual_seed(0)
    plain = nn.Linear(24, 40)
    return nn.Sequential(HQQLinear(plain.weight.detach(), plain.bias), nn.Tanh(), nn.Linear(40, 3))


@pytest.mark.parametrize("backend", [InPlace(), Replacing()])
def test_merging_into_quantized_layers(backend, monkeypatch):
    model = adapted(model=quantized(backend, monkeypatch), target_modules=["0"])
    x = torch.randn(5, 24)
    layer = layers(model)["0"]
    assert f"quantization_backend='{backend.backend_name}'" in repr(layer)
    expected = model(x)
    expected.sum().backward()
    assert all(
        parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad
    )
    base, delta = layer.get_base_weight().clone(), layer.get_delta_weight("default")
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        merged = layer.get_base_weight()
        step = (base + delta).abs().max().item() / 127
        torch.testing.assert_close(merged, base + delta, rtol=0.0, atol=step)
        torch.testing.assert_close(model(x), expected, rtol=0.0, atol=0.1)
        model.unmerge_adapter()
        torch.testing.assert_close(layer.get_base_weight(), base, rtol=0.0, atol=2 * step)
    unloaded = model.merge_and_unload()
    assert type(unloaded[0]) is HQQLinear
    torch.testing.assert_close(unloaded(x), expected, rtol=0.0, atol=0.1)


def test_layers_that_cannot_be_dequantized_run_and_refuse_to_merge(monkeypatch):
    """As GPTQ's, AWQ's and others."""
    model = quantized(ForwardOnlyQuantizationBackend("gptq"), monkeypatch)
    x = torch.randn(5, 24)
    before = model(x)
    model = adapted(model=model, target_modules=["0"])
    expected = model(x)
    assert not torch.allclose(expected, before)
    expected.sum().backward()
    with pytest.raises(TypeError, match="Dequantization is not supported for gptq layers"):
        model.merge_and_unload()
    assert torch.equal(model(x), expected)


def test_a_layer_that_returns_another_dtype(monkeypatch):
    model = quantized(InPlace(), monkeypatch)
    model[0].register_forward_hook(lambda module, args, y: y.to(torch.bfloat16))
    x = torch.randn(5, 24)
    model = adapted(model=model[:1], target_modules=["0"])
    exact = (
        x
        @ (
            layers(model)["0"].get_base_weight() + layers(model)["0"].get_delta_weight("default")
        ).t()
    )
    y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), exact + model.base_model.model[0].bias, rtol=0.02, atol=0.05
    )


def test_torchao(tmp_path):
    build_small_model("llama").save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = transformers.TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    model = load(tmp_path / "base", quantization_config=config, dtype=torch.float32)
    inputs = small_inputs("llama")
    before = logits(model, inputs)
    model = adapted(model=model, target_modules=["q_proj", "down_proj"])
    quantized_layers = layers(model)
    assert {layer.quantization_backend.backend_name for layer in quantized_layers.values()} == {
        "torchao"
    }
    expected = logits(model, inputs)
    assert (expected - before).abs().max() > 0.1
    expected.sum().backward()
    model.save_pretrained(tmp_path / "adapter")
    twin = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits(twin, inputs), expected, rtol=0.0, atol=0.1 * scale)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0.0, atol=0.1 * scale)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0.0, atol=0.1 * scale)
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(logits(unloaded, inputs), expected, rtol=0.0, atol=0.1 * scale)
    assert type(unloaded.model.layers[0].self_attn.q_proj) is nn.Linear
