"""The adapters that the demo compares: put into a classifier, counted, saved and loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_model as load_module
from safetensors.torch import save_model as save_module

from dcft_kernels import freeze_base, load_adapter, save_adapter, swap_linear
from text_classifier import TextClassifier


@dataclass(frozen=True)
class DCFTSettings:
    """What the demo passes to `swap_linear`, beside the backend."""

    rank: int = 1
    kernel_size: int = 8
    alpha: float | None = None  # the scaling that goes with `init`
    init: str = "balanced"


def add_dcft(classifier: TextClassifier, settings: DCFTSettings, backend: str = "auto") -> None:
    """DCFT in every linear layer of the encoder; the head trains as well."""
    swap_linear(classifier, "all-linear", backend=backend, **asdict(settings))
    freeze_base(classifier, trainable=["head"])


def add_lora(classifier: TextClassifier) -> None:
    """Rank-1 LoRA from `peft` on every linear layer of the encoder; the head trains as well."""
    config = LoraConfig(r=1, lora_alpha=1, target_modules="all-linear")
    classifier.encoder = get_peft_model(classifier.encoder, config)


def adapter_parameters(classifier: TextClassifier) -> int:
    """Trainable numbers in the encoder, that is, all but the head's."""
    return sum(p.numel() for p in classifier.encoder.parameters() if p.requires_grad)


def save_dcft(classifier: TextClassifier, folder: Path) -> int:
    """Save adapter and head; returns the adapter's bytes on disk, weights and configuration."""
    save_adapter(classifier, folder)
    save_module(classifier.head, folder.with_name(f"{folder.name}_head.safetensors"))
    return _adapter_bytes(folder)


def load_dcft(classifier: TextClassifier, folder: Path) -> None:
    """Load what `save_dcft` wrote into a classifier that has no adapters yet."""
    load_adapter(classifier, folder)
    load_module(classifier.head, folder.with_name(f"{folder.name}_head.safetensors"))


def save_lora(classifier: TextClassifier, folder: Path) -> int:
    """Save the LoRA as `peft` does; returns its bytes on disk, weights and configuration."""
    classifier.encoder.save_pretrained(folder)
    return _adapter_bytes(folder)


def _adapter_bytes(folder: Path) -> int:
    return sum(
        file.stat().st_size for file in folder.iterdir() if file.suffix in {".safetensors", ".json"}
    )
