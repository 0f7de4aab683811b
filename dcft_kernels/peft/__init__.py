"""DCFT as a method of the library PEFT: `peft.get_peft_model(model, DCFTConfig())`.

Importing this package registers the method in PEFT's tables, which are plain dictionaries. It needs
peft and transformers, which `pip install 'dcft_kernels[peft]'` brings.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from dcft_kernels.peft.config import DCFTConfig, DcftType
from dcft_kernels.peft.conversion import convert_adapter, import_published
from dcft_kernels.peft.export import ExportReport, export_lora
from dcft_kernels.peft.hotswap import hotswap_adapter
from dcft_kernels.peft.layer import DCFTLinearLayer
from dcft_kernels.peft.model import DCFTModel
from dcft_kernels.peft.saved import save_pretrained

__all__ = [
    "DCFTConfig",
    "DCFTLinearLayer",
    "DCFTModel",
    "ExportReport",
    "convert_adapter",
    "export_lora",
    "hotswap_adapter",
    "import_published",
    "save_pretrained",
]

_present = PEFT_TYPE_TO_CONFIG_MAPPING.get(DcftType.DCFT, DCFTConfig)
if _present.__module__ != DCFTConfig.__module__:
    raise ImportError(
        f"peft has a method named DCFT itself ({_present.__module__}), and saved adapters do not "
        "tell the two apart; use that one, or an earlier peft with this package"
    )
PEFT_TYPE_TO_CONFIG_MAPPING[DcftType.DCFT] = DCFTConfig
PEFT_TYPE_TO_TUNER_MAPPING[DcftType.DCFT] = DCFTModel
PEFT_TYPE_TO_PREFIX_MAPPING[DcftType.DCFT] = DCFTModel.prefix
