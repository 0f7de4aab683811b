"""The parameter counts of the DCFT paper's tables (arXiv 2503.01419), on the real architectures."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from dcft_kernels import DCFTLinear, freeze_base, parameter_counts, swap_linear

_PROJECTIONS = {
    "deberta": {"Q": "query_proj", "K": "key_proj", "V": "value_proj"},
    "roberta": {"Q": "query", "K": "key", "V": "value"},
}
# Table 6's "O" is both the attention's and the feed-forward's output.dense: only so do the printed
# 18.4k of (Q, K, V, O) come out. "ALL" adds the feed-forward's intermediate layer.
_DENSE = {
    "O": ["attention.output.dense", "output.dense"],
    "ALL": ["attention.output.dense", "intermediate.dense", "output.dense"],
}
# Targets as the tables name them: the projections, the dense layers, and how many layers a block
# of the model then has adapted.
_TARGETS = {
    "QK": ("QK", None, 2),
    "QV": ("QV", None, 2),
    "QKV": ("QKV", None, 3),
    "QKVO": ("QKV", "O", 5),
    "ALL": ("QKV", "ALL", 6),
}


def _deberta(layers: int, hidden: int) -> nn.Module:
    config = transformers.DebertaV2Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // 64,
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def _roberta_large() -> nn.Module:
    config = transformers.RobertaConfig(
        num_hidden_layers=24, hidden_size=1024, intermediate_size=4096, num_attention_heads=16
    )
    return transformers.RobertaForSequenceClassification(config)


_MODELS = {
    "deberta-v3-base": ("deberta", 12, lambda: _deberta(12, 768)),
    "deberta-v2-xxlarge": ("deberta", 48, lambda: _deberta(48, 1536)),
    "roberta-large": ("roberta", 24, _roberta_large),
}


def _row(table: int, model: str, targets: str, kernel: int, stride: int, exact: int, printed: str):
    name = f"table{table}-{model}-{targets}-d{kernel}-s{stride}-{printed}"
    return pytest.param(model, targets, kernel, stride, exact, id=name)


# The exact counts behind the printed ones, where M is 2^20 and k is 2^10.
@pytest.mark.parametrize(
    ("model_name", "targets", "kernel_size", "stride", "exact"),
    [
        _row(1, "deberta-v3-base", "ALL", 8, 8, 25_344, "0.024M"),
        _row(1, "deberta-v3-base", "ALL", 2, 2, 83_232, "0.079M"),
        _row(1, "roberta-large", "ALL", 8, 8, 64_512, "0.06M"),
        _row(1, "roberta-large", "ALL", 2, 2, 221_760, "0.21M"),
        _row(2, "deberta-v2-xxlarge", "ALL", 8, 8, 184_320, "0.18M"),
        _row(4, "deberta-v3-base", "ALL", 2, 2, 83_232, "0.079M"),
        _row(4, "deberta-v3-base", "ALL", 4, 4, 42_624, "0.041M"),
        _row(4, "deberta-v3-base", "ALL", 6, 6, 30_240, "0.029M"),
        _row(4, "deberta-v3-base", "ALL", 8, 8, 25_344, "0.024M"),
        _row(4, "deberta-v3-base", "ALL", 12, 12, 24_192, "0.023M"),
        _row(5, "deberta-v3-base", "ALL", 8, 1, 169_488, "165.5K"),
        _row(5, "deberta-v3-base", "ALL", 8, 2, 87_120, "85K"),
        _row(5, "deberta-v3-base", "ALL", 8, 4, 45_936, "44.9k"),
        _row(5, "deberta-v3-base", "ALL", 8, 8, 25_344, "24.6k"),
        _row(6, "deberta-v3-base", "QK", 8, 8, 6_144, "6k"),
        _row(6, "deberta-v3-base", "QV", 8, 8, 6_144, "6k"),
        _row(6, "deberta-v3-base", "QKV", 8, 8, 9_216, "9k"),
        _row(6, "deberta-v3-base", "QKVO", 8, 8, 18_816, "18.4k"),
        _row(6, "deberta-v3-base", "ALL", 8, 8, 25_344, "24k"),
    ],
)
def test_count_is_the_papers(model_name, targets, kernel_size, stride, exact):
    family, blocks, build = _MODELS[model_name]
    with torch.device("meta"):
        model = build()
    before = parameter_counts(model)
    letters, dense, adapted_a_block = _TARGETS[targets]
    endings = [_PROJECTIONS[family][letter] for letter in letters]
    endings += _DENSE[dense] if dense else []

    names = swap_linear(model, endings, kernel_size=kernel_size, stride=stride)

    after = parameter_counts(model)
    assert after.adapter == exact
    assert after.total == before.total + exact
    assert len(names) == blocks * adapted_a_block
    assert not any("pooler" in name or "classifier" in name for name in names)
    freeze_base(model)
    assert parameter_counts(model).trainable == exact


@pytest.mark.parametrize("init", ["balanced", "paper", "zero"])
def test_swap_stays_on_the_meta_device(init):
    with torch.device("meta"):
        model = _deberta(1, 768)
    names = swap_linear(model, init=init)
    layers = [model.get_submodule(name) for name in names]
    assert layers
    assert all(isinstance(layer, DCFTLinear) for layer in layers)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_published_shapes_of_one_layer():
    """Section 3.2: A has n/d entries, B has m/d, C is d x d; Table 5 counts overlapping windows."""
    layer = DCFTLinear(768, 3072, kernel_size=8, device="meta")
    assert (layer.dcft_A.shape, layer.dcft_B.shape, layer.dcft_C.shape) == (
        (1, 96),
        (384, 1),
        (8, 8),
    )
    overlapping = DCFTLinear(768, 3072, kernel_size=8, stride=2, device="meta")
    assert (overlapping.dcft_A.shape, overlapping.dcft_B.shape) == ((1, 381), (1533, 1))
