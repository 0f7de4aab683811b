"""The methods by name. A new one is an entry here and a function that adapts a model."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.quality.errors import unknown
from benchmarks.quality.layers import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT
from benchmarks.quality.methods import dcft, elementary, factors, peft_methods
from benchmarks.quality.methods.adapted import Method
from benchmarks.quality.methods.elementary import each
from benchmarks.quality.methods.factors import ParallelAdapter, SerialAdapter, bottleneck, low_rank
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
    "lora_fa": Method(low_rank(factors.LoRAFALinear, 1)),
    "dora": Method(peft_methods.dora),
    "adalora": Method(peft_methods.adalora),
    "sora": Method(factors.sora),
    "trilora": Method(low_rank(factors.TriLoRALinear, 2)),
    "flora": Method(low_rank(factors.FLoRALinear, 2)),
    "lokr": Method(peft_methods.lokr),
    "vera": Method(peft_methods.vera, _SCALES),
    "ia3": Method(peft_methods.ia3, _SCALES),
    "ssl": Method(each(elementary.SSLLinear), _SCALES),
    "ssb": Method(each(elementary.SSBLinear), _SCALES),
    "sam_parser": Method(each(elementary.SAMPARSERLinear)),
    # Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2021. Not the last one's ReLU: at r = 1,
    # a unit that is off for all tokens would never learn.
    "houlsby": Method(bottleneck(SerialAdapter, 8, "gelu", ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT)),
    "pfeiffer": Method(bottleneck(SerialAdapter, 16, "relu", FEED_FORWARD_OUTPUT)),
    "parallel_adapter": Method(bottleneck(ParallelAdapter, 1, "gelu")),
}


def by_name(name: str) -> Method:
    """The method of this name."""
    if name not in METHODS:
        raise unknown("--method", name, METHODS)
    return METHODS[name]
