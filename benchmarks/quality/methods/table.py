"""The methods by name. A new one is an entry here and a function that adapts a model or a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from benchmarks.quality.errors import unknown
from benchmarks.quality.methods import Adapted, Method, dcft, layerwise, peft_methods
from benchmarks.quality.models import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT
from dcft_kernels import DCFTLinear

# Pretrained weights need smaller steps than factors that start near zero, scales larger ones.
_FULL = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4)
_SCALES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)


def _head(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    return Adapted(model)


def _full(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    return Adapted(model.requires_grad_(True))


def _bitfit(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """Every bias, also the layer norms' (Zaken et al. 2021; equation 8 of arXiv 2407.05417)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rsplit(".", 1)[-1] == "bias")
    return Adapted(model)


def _layerwise(
    build: Callable[..., layerwise.AdaptedLinear], *roles: str, **settings: Any
) -> Method:
    return Method(layerwise.each(build, *roles), options_of=(build,), **settings)


METHODS: Mapping[str, Method] = {
    "head": Method(_head, (1e-3,), uses_layers=False),
    "full": Method(_full, _FULL, uses_layers=False),
    "bitfit": Method(_bitfit, uses_layers=False),
    "dcft": Method(dcft.dcft, options_of=(dcft.dcft, DCFTLinear)),
    "ssb_dcft": Method(dcft.ssb_dcft, options_of=(dcft.dcft, DCFTLinear)),
    "lora": Method(peft_methods.lora),
    "lora_fa": _layerwise(layerwise.lora_fa),
    "dora": Method(functools.partial(peft_methods.lora, use_dora=True)),
    "adalora": Method(peft_methods.adalora),
    "sora": Method(
        layerwise.thresholded_sora, options_of=(layerwise.sora, layerwise.thresholded_sora)
    ),
    "trilora": _layerwise(layerwise.trilora),
    "flora": _layerwise(layerwise.flora),
    "lokr": Method(peft_methods.lokr),
    "vera": Method(peft_methods.vera, _SCALES),
    "miss": Method(peft_methods.miss),
    "unilora": Method(peft_methods.unilora, _SCALES),
    "ia3": Method(peft_methods.ia3, _SCALES),
    "ssl": _layerwise(layerwise.ssl, learning_rates=_SCALES),
    "ssb": _layerwise(layerwise.ssb, learning_rates=_SCALES),
    "sam_parser": _layerwise(layerwise.sam_parser),
    "houlsby": _layerwise(layerwise.houlsby, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT),
    "pfeiffer": _layerwise(layerwise.pfeiffer, FEED_FORWARD_OUTPUT),
    "parallel_adapter": _layerwise(layerwise.parallel_adapter),
}


def by_name(name: str) -> Method:
    """The method of this name."""
    if name not in METHODS:
        raise unknown("--method", name, METHODS)
    return METHODS[name]
