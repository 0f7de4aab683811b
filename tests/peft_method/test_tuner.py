"""The tuner against `DCFTLinear`, and what PEFT asks of a method."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from torch import nn

import dcft_kernels as dcft
import dcft_kernels.peft as dcft_peft
from dcft_kernels.peft import DCFTConfig, DCFTLinearLayer
from tests.peft_method.models import (
    TARGETS,
    TOKENS,
    adapted,
    assert_close,
    base,
    factors,
    layers,
)

SETTINGS = [
    {},
    {"r": 3, "kernel_size": 5, "alpha": 2.0},
    {"kernel_size": (4, 6), "stride": (2, 3), "init_weights": "paper"},
    {"r": 2, "rank_pattern": {"query": 1}, "kernel_size_pattern": {"dense": [3, 16]}},
    {"r": 3, "kernels": "per_rank"},
]


def swapped_like(model: nn.Module) -> nn.Module:
    """The same adapters as `DCFTLinear` layers."""
    plain = base()
    for name, layer in layers(model).items():
        adapter = layer.adapter("default")
        geometry = adapter.geometry
        dcft.swap_linear(
            plain, [name], rank=geometry.rank, kernel_size=geometry.kernel_size,
            stride=geometry.stride, alpha=adapter.scaling * geometry.rank,
            kernels="per_rank" if geometry.per_rank else "shared",
        )  # fmt: skip
        with torch.no_grad():
            for factor in ("dcft_A", "dcft_B", "dcft_C"):
                getattr(plain.get_submodule(name), factor).copy_(getattr(layer, factor)["default"])
    return plain.eval()


@pytest.mark.parametrize("settings", SETTINGS)
def test_outputs_and_gradients_are_those_of_dcft_linear(settings):
    model = adapted(**settings)
    plain = swapped_like(model)
    y, expected = model(TOKENS), plain(TOKENS)
    assert torch.equal(y, expected)
    assert not torch.equal(y, base()(TOKENS))
    for each in (y, expected):
        each.square().sum().backward()
    for name, layer in layers(model).items():
        for factor in ("dcft_A", "dcft_B", "dcft_C"):
            parameter = getattr(layer, factor)["default"]
            assert torch.equal(parameter.grad, getattr(plain.get_submodule(name), factor).grad)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == factors(model).keys()


@pytest.mark.parametrize("hook", ["forward", "pre", "override"])
def test_a_base_layer_that_does_more_is_called(hook):
    """Hooks, and a forward that accelerate replaces, are not bypassed; the result is the same."""
    model, calls = adapted(), []
    expected = model(TOKENS)
    query = layers(model)["query"].base_layer
    if hook == "forward":
        query.register_forward_hook(lambda *_: calls.append(1))
    elif hook == "pre":
        query.register_forward_pre_hook(lambda *_: calls.append(1))
    else:
        original = query.forward
        query.forward = lambda x: calls.append(1) or original(x)
    assert_close(model(TOKENS), expected)
    assert calls


@pytest.mark.parametrize("init_weights", [True, "balanced", "zero"])
def test_starts_at_the_base_model(init_weights):
    model = adapted(init_weights=init_weights)
    assert torch.equal(model(TOKENS), base()(TOKENS))
    # So that an adapter learns at all, A and C are not zero.
    assert all(v.abs().max() > 0 for n, v in factors(model).items() if "dcft_B" not in n)


def test_scalings_of_saved_adapters_stay_what_they_are():
    """`"alpha": null` in a file means these: another rule needs another name in `init_weights`."""
    for init_weights, r, expected in (
        (True, 1, 80.72605586435661),  # sqrt(3 * 768) * 8^(1/4)
        (False, 1, 80.72605586435661),
        ("balanced", 4, 40.36302793217830),
        ("zero", 4, 1.0),
        ("paper", 1, 1.0),
    ):
        config = DCFTConfig(r=r, target_modules=["0"], init_weights=init_weights)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(768, 3072)), config)
        (layer,) = layers(model).values()
        assert layer.scaling["default"] == pytest.approx(expected, rel=1e-8)


def kept_for_backward(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        layer(x)
    return kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_float32_over_a_16_bit_base(dtype):
    model = adapted(model=base().to(dtype), target_modules=["query"])
    assert {value.dtype for value in factors(model).values()} == {torch.float32}
    (layer,) = layers(model).values()
    x = torch.randn(100, 16).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    adapter = layer.adapter("default")
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    expected = x.double() @ exact.t() + layer.base_layer.bias.double()
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error < 4 * torch.finfo(dtype).eps
    assert adapter.A.dtype == torch.float32
    kept = peft.get_peft_model(
        base().to(dtype), DCFTConfig(target_modules=TARGETS), autocast_adapter_dtype=False
    )
    assert {value.dtype for value in factors(kept).values()} == {dtype}


def test_the_backward_pass_keeps_the_input_as_it_is():
    """PEFT's LoRA keeps a float32 copy of a 16-bit input; this method keeps the input itself."""
    x = torch.randn(100, 16).bfloat16()
    for config, copies in ((DCFTConfig, 0), (peft.LoraConfig, 1)):
        model = peft.get_peft_model(base().bfloat16(), config(target_modules=["query"]))
        kept = kept_for_backward(model.base_model.model.query, x)
        wide = [t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()]
        assert len(wide) == copies
        assert (copies == 0) == any(t.data_ptr() == x.data_ptr() for t in kept)


def test_autocast():
    model = adapted()
    expected = model(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(TOKENS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.0, atol=0.05)


def test_dropout_acts_in_training_alone():
    model = adapted(dropout=0.5)
    expected = adapted(dropout=0.0)(TOKENS)
    assert torch.equal(model(TOKENS), expected)
    model.train()
    assert not torch.equal(model(TOKENS), expected)


def test_several_active_adapters_add_up():
    model = adapted(target_modules=["query"])
    model.add_adapter("other", DCFTConfig(target_modules=["query"], r=2, init_weights=False))
    layer = layers(model)["query"]
    x = torch.randn(7, 16)
    increments = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        increments[name] = layer(x) - layer.base_layer(x)
    model.base_model.set_adapter(["default", "other"])
    assert_close(layer(x), layer.base_layer(x) + increments["default"] + increments["other"])
    model.base_model.set_adapter("default")
    model.delete_adapter("other")
    assert_close(layer(x), layer.base_layer(x) + increments["default"])
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))


def test_each_row_with_its_adapter():
    model = adapted()
    model.add_adapter("other", DCFTConfig(target_modules=["query"], init_weights=False))
    rows = TOKENS.repeat(2, 1)
    expected = []
    for row, name in zip(rows, ("default", "__base__", "other", "default"), strict=True):
        model.set_adapter("default" if name == "__base__" else name)
        context = model.disable_adapter() if name == "__base__" else torch.no_grad()
        with context:
            expected.append(model(row[None]))
    model.set_adapter("default")
    kept = []
    layers(model)["query"].base_layer.register_forward_hook(lambda _, args, y: kept.append(y))
    names = ["default", "__base__", "other", "default"]
    assert_close(model(rows, adapter_names=names), torch.cat(expected))
    x = base().embedding(rows)
    assert torch.equal(kept[0], layers(model)["query"].base_layer(x))  # not changed in place
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same as"):
        model(rows, adapter_names=names[:3])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): another"):
        model(rows, adapter_names=["another"] * 4)
    assert not any(m._forward_pre_hooks for m in model.modules())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot pass `adapter_names` when there are merged"):
        model(rows, adapter_names=names)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match=r"when the model is in training mode"):
        model.train()(rows, adapter_names=names)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype, safe):
    model = adapted(model=base().to(dtype))
    before = copy.deepcopy(model.state_dict())
    expected = model(TOKENS)
    model.merge_adapter(safe_merge=safe)
    merged = model(TOKENS)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(merged, expected, rtol=0.0, atol=tolerance)
    assert not torch.equal(
        layers(model)["query"].weight, before["base_model.model.query.base_layer.weight"]
    )
    model.double().to(dtype)  # moves the weight that is restored, too
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    unloaded = model.merge_and_unload(safe_merge=safe)
    assert torch.equal(unloaded(TOKENS), merged)
    assert type(unloaded.query) is nn.Linear
    assert not hasattr(unloaded, "peft_config")


def test_merging_several_and_unloading_none():
    model = adapted()
    model.add_adapter("other", DCFTConfig(target_modules=TARGETS, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = model(TOKENS)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["other"])
    assert_close(model(TOKENS), expected)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(model.unload()(TOKENS), base()(TOKENS))


def test_unmerging_a_weight_that_was_changed_meanwhile():
    """By another layer that shares it, or by the user: then increments are subtracted."""
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tied[1].weight = tied[0].weight
    before = tied[0].weight.detach().clone()
    model = adapted(model=tied, target_modules=["0", "1"])
    model.merge_adapter()
    assert (tied[0].base_layer.weight - before).abs().max() > 0.01
    model.unmerge_adapter()
    assert_close(tied[0].base_layer.weight, before)
    model = adapted(target_modules=["query"])
    model.add_adapter("other", DCFTConfig(target_modules=["query"], init_weights=False))
    layer = layers(model)["query"]
    for second in ([], ["other"]):  # the change may lie between two merges
        layer.merge()
        with torch.no_grad():
            layer.base_layer.weight.mul_(2.0)
        expected = layer.base_layer.weight - layer.get_delta_weight("default")
        layer.merge(adapter_names=second)
        layer.unmerge()
        assert_close(layer.base_layer.weight, expected)


@pytest.mark.parametrize("dtypes", [("bfloat16",), ("bfloat16", "float32"), ("float64",)])
def test_unmerging_after_a_conversion(dtypes):
    model = adapted()
    before = layers(model)["query"].weight.detach().clone()
    model.merge_adapter()
    for name in dtypes:
        dtype = getattr(torch, name)
        model, before = model.to(dtype), before.to(dtype)
    model.unmerge_adapter()
    assert torch.equal(layers(model)["query"].weight, before)


def test_unmerging_after_other_factors_were_loaded():
    model = adapted()
    before = layers(model)["query"].weight.detach().clone()
    model.merge_adapter()
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(adapted(seed=5)))
    model.unmerge_adapter()
    assert torch.equal(layers(model)["query"].weight, before)
    model.merge_adapter()
    assert_close(model(TOKENS), adapted(seed=5)(TOKENS))


def test_unmerging_a_diverged_adapter_restores_the_base():
    layer = layers(adapted())["query"]
    before = layer.weight.clone()
    layer.dcft_A["default"].data[0, 0] = torch.nan
    layer.merge()
    assert layer.weight.isnan().any()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_safe_merge_refuses_what_is_not_finite():
    model = adapted()
    layers(model)["dense"].dcft_A["default"].data[0, 0] = torch.nan
    weight = layers(model)["dense"].weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected .* The adapter default"):
        layers(model)["dense"].merge(safe_merge=True)
    assert torch.equal(layers(model)["dense"].weight, weight)
    assert not layers(model)["dense"].merged


def test_merge_refuses_a_computed_weight():
    plain = base()
    torch.nn.utils.parametrizations.weight_norm(plain.query)
    model = adapted(model=plain, target_modules=["query"])
    expected = model(TOKENS)
    with pytest.raises(ValueError, match="computes its weight from other parameters"):
        model.merge_adapter()
    assert torch.equal(model(TOKENS), expected)


def test_get_delta_weight_is_what_merging_adds():
    model = adapted()
    for name, layer in layers(model).items():
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.weight.shape
        expected = layer.weight + delta
        layer.merge()
        assert_close(layer.weight, expected)
        layer.unmerge()
        with pytest.raises(ValueError, match="Adapter absent not found"):
            layer.get_delta_weight("absent")
        assert layer.supports_lora_conversion(), name


@pytest.mark.parametrize("kernels", ["equal", "shared", "per_rank"])
def test_a_weighted_sum_is_exact(kernels):
    """With one kernel where all adapters have the same, else with a kernel per rank."""
    options = {} if kernels == "equal" else {"kernels": kernels}
    model = adapted(r=2, alpha=3.0, **options)
    config = DCFTConfig(target_modules=["query", "dense"], init_weights=False)
    model.add_adapter("other", config)
    for layer in layers(model).values():
        if kernels == "equal" and "other" in layer.dcft_C:
            layer.dcft_C["other"].data.copy_(layer.dcft_C["default"])
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    assert model.active_adapters == ["default"]
    for name, layer in layers(model).items():
        expected = 0.5 * layer.get_delta_weight("default")
        if name != "value":
            expected = expected - 2.0 * layer.get_delta_weight("other")
        assert_close(layer.get_delta_weight("sum"), expected)
        assert layer.geometry["sum"].rank == (2 if name == "value" else 3)
        assert layer.scaling["sum"] == 1.0
        assert layer.geometry["sum"].per_rank == (kernels != "equal")
    model.set_adapter("sum")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        name for name in factors(model) if name.endswith(".sum")
    }
    model.add_weighted_adapter(["default"], [1.0], "alone")
    assert layers(model)["query"].geometry["alone"].per_rank == (kernels == "per_rank")
    assert_close(layers(model)["value"].get_delta_weight("alone"),
                 layers(model)["value"].get_delta_weight("default"))  # fmt: skip


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(x)


def test_pytorchs_fused_encoder_does_not_bypass_the_adapters():
    torch.manual_seed(0)
    model = adapted(model=Encoder(), target_modules=["linear1", "linear2"])
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        fused = model(x)
    assert_close(fused, model(x))
    with model.disable_adapter():
        assert (model(x) - fused).abs().max() > 0.01
    with pytest.raises(TypeError, match=r"nn\.MultiheadAttention reads its weight without calling"):
        adapted(model=Encoder(), target_modules=["out_proj"])


def test_targets():
    assert layers(adapted(target_modules="all-linear")).keys() == {*TARGETS, "head"}
    assert layers(adapted(target_modules=r"(query|head)")).keys() == {"query", "head"}
    assert layers(adapted(exclude_modules=["value"])).keys() == {"query", "dense"}
    model = adapted(bias="dcft_only", modules_to_save=["head"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad} - factors(model).keys()
    assert {name.removeprefix("base_model.model.") for name in trained} == {
        "query.base_layer.bias", "dense.base_layer.bias",
        "head.modules_to_save.default.weight", "head.modules_to_save.default.bias",
    }  # fmt: skip
    with pytest.warns(
        RuntimeWarning, match=r"kernel_size_pattern keys did not match .* \['quary'\]"
    ):
        adapted(kernel_size_pattern={"quary": 4})


def test_injected_without_a_wrapper():
    model = base()
    config = DCFTConfig(target_modules=TARGETS, init_weights=False)
    injected = peft.inject_adapter_in_model(config, model)
    assert injected is model
    assert layers(model).keys() == {*TARGETS}
    empty = peft.inject_adapter_in_model(config, base(), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in empty.named_parameters() if "dcft_" in n} == {"meta"}
    peft.set_peft_model_state_dict(
        empty, peft.get_peft_model_state_dict(model), low_cpu_mem_usage=True
    )
    assert torch.equal(empty(TOKENS), model(TOKENS))


def test_constraints_cover_the_active_adapters():
    model = adapted(r=2)
    model.add_adapter("other", DCFTConfig(r=2, target_modules=TARGETS, init_weights=False))
    assert torch.equal(dcft.orthogonality_loss(model), dcft.orthogonality_loss(swapped_like(model)))
    assert torch.equal(dcft.constraint_loss(model), dcft.orthogonality_loss(model))
    model.set_adapter("other")
    assert not torch.equal(
        dcft.orthogonality_loss(model), dcft.orthogonality_loss(swapped_like(model))
    )


def test_registered_once_and_by_import_alone(monkeypatch):
    importlib.reload(dcft_peft)
    status = adapted().get_model_status()
    assert status.peft_types == {"default": "DCFT"}
    assert status.adapter_model_type == "DCFTModel"
    script = "import peft; peft.PeftConfig.from_peft_type(peft_type='DCFT')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "KeyError: 'DCFT'" in result.stderr  # as docs/peft.md says
    upstream = type("DCFTConfig", (), {"__module__": "peft.tuners.dcft.config"})
    monkeypatch.setitem(dcft_peft.PEFT_TYPE_TO_CONFIG_MAPPING, "DCFT", upstream)
    with pytest.raises(ImportError, match=r"peft has a method named DCFT itself"):
        importlib.reload(dcft_peft)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted()
        model(TOKENS)
        model.merge_and_unload()


def test_all_linear_covers_a_second_adapter():
    """PEFT recognises an adapted linear layer by its class's name."""
    model = adapted()
    model.add_adapter("other", DCFTConfig(target_modules="all-linear"))
    assert {n for n, layer in layers(model).items() if "other" in layer.dcft_A} == {
        *TARGETS,
        "head",
    }
    assert all(isinstance(layer, DCFTLinearLayer) for layer in layers(model).values())
