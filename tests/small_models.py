"""Transformers models small enough for a test, one per architecture that DCFT is checked on.

The default kernel size, 8, divides some of the sizes and not others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 61
# The usual 0.02 would leave layers this narrow with next to no influence on the output.
WEIGHT_STD = 0.2
DECODER_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """One architecture: how to build it and what to expect of it."""

    build: Callable[[], nn.Module]
    # Linear layers outside of the backbone, which "all-linear" leaves out.
    heads: frozenset[str]
    # Names of one shared parameter, the output head's first.
    tied: tuple[str, ...] = ()
    encoder_decoder: bool = False


def _bert() -> nn.Module:
    sizes = _encoder_sizes(hidden_size=24, intermediate_size=40)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def _roberta() -> nn.Module:
    sizes = _encoder_sizes(hidden_size=20, intermediate_size=37, num_labels=40)
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))


def _deberta() -> nn.Module:
    config = transformers.DebertaV2Config(
        **_encoder_sizes(hidden_size=24, intermediate_size=36, num_labels=40),
        relative_attention=True,
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def _encoder_sizes(**sizes: int) -> dict[str, Any]:
    return sizes | {
        "vocab_size": VOCABULARY,
        "initializer_range": WEIGHT_STD,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        initializer_range=WEIGHT_STD,
        n_embd=20,
        n_layer=2,
        n_head=2,
        n_positions=32,
        **DECODER_TOKENS,
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        initializer_range=WEIGHT_STD,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=43,
        max_position_embeddings=32,
        **DECODER_TOKENS,
    )
    return transformers.LlamaForCausalLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=20,
        d_kv=6,
        d_ff=30,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


SMALL_MODELS = {
    "bert": SmallModel(
        _bert,
        frozenset({"cls.predictions.transform.dense", "cls.predictions.decoder"}),
        tied=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ),
    "roberta": SmallModel(_roberta, frozenset({"classifier.dense", "classifier.out_proj"})),
    "deberta": SmallModel(_deberta, frozenset({"pooler.dense", "classifier"})),
    "gpt2": SmallModel(
        _gpt2, frozenset({"lm_head"}), tied=("lm_head.weight", "transformer.wte.weight")
    ),
    "llama": SmallModel(_llama, frozenset({"lm_head"})),
    "t5": SmallModel(
        _t5,
        frozenset({"lm_head"}),
        tied=(
            "lm_head.weight",
            "shared.weight",
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
        ),
        encoder_decoder=True,
    ),
}


def build_small_model(name: str) -> nn.Module:
    """The model of this name in evaluation mode; the same weights in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        return SMALL_MODELS[name].build().eval()


def small_inputs(name: str) -> dict[str, Any]:
    """A batch of two rows, the second one shorter and padded."""
    generator = torch.Generator().manual_seed(21)
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if SMALL_MODELS[name].encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 5), generator=generator)
    if name in ("gpt2", "llama", "t5"):
        inputs["use_cache"] = False
    return inputs


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's output for `inputs`."""
    return model(**inputs).logits


def randomize_adapters(model: nn.Module, std: float = 0.5, seed: int = 22) -> None:
    """Give every adapter an increment as large as the base's weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dcft_" in f".{name}":
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(std * draw)
