"""The parameter counts of the DCFT paper's tables (arXiv 2503.01419), on the real architectures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from dcft_kernels import DCFTLinear, freeze_base, parameter_counts, swap_linear


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


MODELS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "deberta-v3-base": (12, lambda: _deberta(12, 768)),
    "deberta-v2-xxlarge": (48, lambda: _deberta(48, 1536)),
    "roberta-large": (24, _roberta_large),
}
ENDINGS = {
    "Q": ["query_proj", "query"],
    "K": ["key_proj", "key"],
    "V": ["value_proj", "value"],
    # Both the attention's and the feed-forward's: only so do Table 6's 18.4k come out.
    "O": ["attention.output.dense", "output.dense"],
    "I": ["intermediate.dense"],
}


# Targets, where "I" is the feed-forward's first layer ("ALL" in the tables), kernel size, stride,
# the exact count behind the printed one, and how many layers of a block are adapted.
@pytest.mark.parametrize(
    ("model_name", "targets", "kernel_size", "stride", "exact", "adapted"),
    [
        ("deberta-v3-base", "QKVOI", 8, 8, 25_344, 6),  # Tables 1, 4, 6: 0.024M
        ("deberta-v3-base", "QKVOI", 2, 2, 83_232, 6),  # Tables 1, 4: 0.079M
        ("deberta-v3-base", "QKVOI", 4, 4, 42_624, 6),  # Table 4: 0.041M
        ("deberta-v3-base", "QKVOI", 6, 6, 30_240, 6),  # 0.029M
        ("deberta-v3-base", "QKVOI", 12, 12, 24_192, 6),  # 0.023M
        ("deberta-v3-base", "QKVOI", 8, 1, 169_488, 6),  # Table 5: 165.5K
        ("deberta-v3-base", "QKVOI", 8, 2, 87_120, 6),  # 85K
        ("deberta-v3-base", "QKVOI", 8, 4, 45_936, 6),  # 44.9k
        ("deberta-v3-base", "QK", 8, 8, 6_144, 2),  # Table 6: 6k
        ("deberta-v3-base", "QV", 8, 8, 6_144, 2),  # 6k
        ("deberta-v3-base", "QKV", 8, 8, 9_216, 3),  # 9k
        ("deberta-v3-base", "QKVO", 8, 8, 18_816, 5),  # 18.4k
        ("roberta-large", "QKVOI", 8, 8, 64_512, 6),  # Table 1: 0.06M
        ("roberta-large", "QKVOI", 2, 2, 221_760, 6),  # 0.21M
        ("deberta-v2-xxlarge", "QKVOI", 8, 8, 184_320, 6),  # Table 2: 0.18M
    ],
)
def test_count_is_the_papers(model_name, targets, kernel_size, stride, exact, adapted):
    blocks, build = MODELS[model_name]
    with torch.device("meta"):
        model = build()
    before = parameter_counts(model)
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    endings = [e for letter in targets for e in ENDINGS[letter] if e.rsplit(".", 1)[-1] in present]

    names = swap_linear(model, endings, kernel_size=kernel_size, stride=stride)

    after = parameter_counts(model)
    assert after.adapter == exact
    assert after.total == before.total + exact
    assert len(names) == blocks * adapted
    assert not any("pooler" in name or "classifier" in name for name in names)
    freeze_base(model)
    assert parameter_counts(model).trainable == exact


@pytest.mark.parametrize("init", ["balanced", "paper", "zero"])
def test_swap_leaves_the_base_on_the_meta_device(init):
    with torch.device("meta"):
        model = _deberta(1, 768)
    names = swap_linear(model, init=init)
    assert names
    assert all(isinstance(model.get_submodule(name), DCFTLinear) for name in names)
    for name, parameter in model.named_parameters():
        # No checkpoint of the base brings the adapters' values.
        assert parameter.is_meta is (".dcft_" not in name)
