"""The methods by name. A new one is an entry here and a function that adapts a model."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.quality.errors import unknown
from benchmarks.quality.methods import dcft, elementary, factors, peft_methods
from benchmarks.quality.methods.adapted import Method
from dcft_kernels import DCFTLinear

# Pretrained weights need smaller steps than factors that start near zero, scales larger ones.
_FULL = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4)
_SCALES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)

METHODS: Mapping[str, Method] = {
    "head": Method(elementary.head, (1e-3,), uses_layers=False),
    "full": Method(elementary.full, _FULL, uses_layers=False),
    "bitfit": Method(elementary.bitfit, uses_layers=False),
    "dcft": Method(dcft.dcft, options_of=(dcft.dcft, DCFTLinear)),
    "ssb_dcft": Method(dcft.ssb_dcft, options_of=(dcft.dcft, DCFTLinear)),
    "lora": Method(peft_methods.lora),
    "lora_fa": Method(factors.lora_fa),
    "dora": Method(peft_methods.dora),
    "adalora": Method(peft_methods.adalora),
    "sora": Method(factors.sora),
    "trilora": Method(factors.trilora),
    "flora": Method(factors.flora),
    "lokr": Method(peft_methods.lokr),
    "vera": Method(peft_methods.vera, _SCALES),
    "ia3": Method(peft_methods.ia3, _SCALES),
    "ssl": Method(elementary.ssl, _SCALES),
    "ssb": Method(elementary.ssb, _SCALES),
    "sam_parser": Method(elementary.sam_parser),
    "houlsby": Method(factors.houlsby),
    "pfeiffer": Method(factors.pfeiffer),
    "parallel_adapter": Method(factors.parallel_adapter),
}


def by_name(name: str) -> Method:
    """The method of this name."""
    if name not in METHODS:
        raise unknown("--method", name, METHODS)
    return METHODS[name]
