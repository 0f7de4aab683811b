"""The models whose shapes are measured, built from their configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_VOCABULARY = 32  # inputs are embeddings: the vocabulary does not matter


Config = Callable[[Any, int], Any]  # from the transformers package and the number of layers


@dataclass(frozen=True)
class ModelSpec:
    """A model of transformers by its sizes."""

    width: int
    layers: int
    config: Config
    length: int  # the most tokens of a sequence
    graphable: bool = True  # DeBERTa's forward pass copies numbers to the GPU

    def build(self, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The model's backbone with random weights, without dropout, in training mode."""
        import transformers

        _never_packed()
        config = self.config(transformers, layers)
        with torch.device(device):
            model: nn.Module = transformers.AutoModel.from_config(config)
        return model.to(dtype).train()

    def batched(self, T: int) -> tuple[int, int]:
        """`T` tokens as a batch of sequences, `(batch, length)`."""
        length = min(T, self.length)
        return T // length, length


def _never_packed() -> None:
    """Tell transformers that each row of a batch is one sequence.

    It would otherwise look for several by their positions, which synchronizes with the GPU in every
    forward pass and selects a slower attention under `torch.compile` and in CUDA graphs.
    """
    from transformers import masking_utils

    if hasattr(masking_utils, "find_packed_sequence_indices"):
        masking_utils.find_packed_sequence_indices = lambda position_ids: None


def _deberta(transformers: Any, layers: int) -> Any:
    return transformers.DebertaV2Config(
        vocab_size=_VOCABULARY,
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _roberta(width: int, heads: int) -> Config:
    return lambda transformers, layers: transformers.RobertaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _llama(width: int, heads: int, intermediate: int) -> Config:
    return lambda transformers, layers: transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        intermediate_size=intermediate,
        max_position_embeddings=32768,
        rope_theta=500000.0,
        use_cache=False,
    )


MODELS: dict[str, ModelSpec] = {
    "deberta-v3-base": ModelSpec(768, 12, _deberta, 128, graphable=False),
    "roberta-large": ModelSpec(1024, 24, _roberta(1024, 16), 128),
    "llama-3-8b": ModelSpec(4096, 32, _llama(4096, 32, 14336), 32768),
    # For training steps: few enough weights that the gate's float32 copy fits as well.
    "llama-3-8b-4-layers": ModelSpec(4096, 4, _llama(4096, 32, 14336), 32768),
    "tiny-llama": ModelSpec(64, 2, _llama(64, 4, 96), 512),
    "tiny-roberta": ModelSpec(64, 2, _roberta(64, 4), 512),
}


def adapted_layers(model: nn.Module) -> Iterator[str]:
    """Names of the linear layers that get an adapter."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "pooler" not in name:
            yield name
