"""`DCFTConfig`, and how PEFT comes to know the method."""

from __future__ import annotations

import copy
import enum
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from dcft_kernels import validation
from dcft_kernels.adapter import PER_RANK, SHARED
from dcft_kernels.initialization import INITS

# The settings that can differ between layers, and the fields with the values of single layers.
PATTERNS = {
    "r": "rank_pattern",
    "kernel_size": "kernel_size_pattern",
    "stride": "stride_pattern",
    "alpha": "alpha_pattern",
}
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "r": validation.positive_int,
    "kernel_size": validation.pair,
    "stride": validation.pair,
    "alpha": validation.finite_number,
}
# An attribute of a config, but not a field: it must not bind the config to the model it came from.
SIZES_TO_SAVE = "_sizes_to_save"


class DcftType(str, enum.Enum):  # noqa: UP042 - PEFT takes the name out of "DcftType.DCFT"
    """The method's entry in PEFT's tables, whose keys are the members of such an enum."""

    DCFT = "DCFT"


@dataclass
class DCFTConfig(PeftConfig):
    """The settings of a DCFT adapter (arXiv 2503.01419) in PEFT.

    Layer patterns are as in `peft.LoraConfig`: their keys are names, endings of names or regular
    expressions, and the first that matches a layer counts.

    Args:
        r: `k`, the rank of `dcft_B @ dcft_A`; the paper uses 1.
        kernel_size: `d`, an int or a pair `(out, in)`; need not divide the layers' sizes.
        stride: distance between windows, an int or a pair `(out, in)`; None is the kernel size.
        alpha: `scaling = alpha / r`; None takes the scaling that belongs to `init_weights`.
        kernels: `"shared"`: one kernel `dcft_C` for all ranks, as in the paper; `"per_rank"`: each
            rank has its own.
        dropout: probability of zeroing an element of the adapter's own view of the input.
        init_weights: True or `"balanced"`, `"zero"`: start at the base model; `"paper"`: near it
            (see `dcft_kernels.initialization`). False: start away from it, for tests.
        target_modules: names or endings of names; a regular expression; or `"all-linear"`. None
            takes what PEFT adapts with LoRA in this architecture.
        exclude_modules: names, endings or a regular expression of layers to leave alone.
        layers_to_transform: indices of the transformer layers to adapt; with a list of names only.
        layers_pattern: the name of the list of layers that these count, such as `"layers"`.
        rank_pattern: `r` of single layers.
        kernel_size_pattern: `kernel_size` of single layers.
        stride_pattern: `stride` of single layers.
        alpha_pattern: `alpha` of single layers.
        bias: which biases to train: `"none"`, `"all"` or `"dcft_only"`, those of adapted layers.
        modules_to_save: modules to train in full and save, such as a new classification head.
        layer_sizes: `[out, in]` features of the adapted layers, written by saving. Adding the
            adapter to a model with other sizes is an error, unless this is None.

    Raises:
        TypeError, ValueError: naming the argument, for values that no layer can have.
    """

    r: int = 1
    kernel_size: int | list[int] = 8
    stride: int | list[int] | None = None
    alpha: float | None = None
    kernels: str = SHARED
    dropout: float = 0.0
    init_weights: bool | str = True
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    kernel_size_pattern: dict[str, int | list[int]] = field(default_factory=dict)
    stride_pattern: dict[str, int | list[int]] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layer_sizes: dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DcftType.DCFT
        for name, check in _CHECKS.items():
            pattern = getattr(self, PATTERNS[name]) or {}
            if not isinstance(pattern, dict):
                raise TypeError(
                    f"{PATTERNS[name]}: expected a dict from layer names to values, got {pattern!r}"
                )
            value = getattr(self, name)
            if value is not None or name in ("r", "kernel_size"):
                check(name, value)
            for key, special in pattern.items():
                check(f"{PATTERNS[name]}[{key!r}]", special)
            # Lists, as JSON has them, so that a saved config equals the one that was saved.
            listed = {k: [*v] if isinstance(v, tuple) else v for k, v in pattern.items()}
            setattr(self, name, [*value] if isinstance(value, tuple) else value)
            setattr(self, PATTERNS[name], listed)
        if self.layer_sizes is not None and not isinstance(self.layer_sizes, dict):
            raise TypeError(f"layer_sizes: expected a dict of pairs, got {self.layer_sizes!r}")
        for layer, size in (self.layer_sizes or {}).items():
            validation.pair(f"layer_sizes[{layer!r}]", size)
        if not (self.kernel_size_pattern or self.stride_pattern):
            validation.stride_pair(self.stride, validation.pair("kernel_size", self.kernel_size))
        validation.one_of("kernels", self.kernels, (SHARED, PER_RANK))
        validation.probability("dropout", self.dropout)
        if not isinstance(self.init_weights, bool) and self.init_weights not in INITS:
            raise ValueError(
                f"init_weights: expected True, False or one of {', '.join(map(repr, INITS))}, "
                f"got {self.init_weights!r}"
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a str. Select the layers in "
                    "that regular expression, or pass a list of names."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )

    @property
    def init(self) -> str:
        """The name in `dcft_kernels.initialization`; False differs from True in `dcft_B` alone."""
        return self.init_weights if isinstance(self.init_weights, str) else "balanced"

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, with the `layer_sizes` of the model that is being saved."""
        saved = copy.copy(self)
        saved.layer_sizes = self.__dict__.get(SIZES_TO_SAVE, self.layer_sizes)
        super(DCFTConfig, saved).save_pretrained(save_directory, **kwargs)


def exactly(name: str) -> str:
    """The key of a pattern that matches the layer of this name alone."""
    return "^" + names_alone([name])


def names_alone(names: Iterable[str]) -> str:
    """`target_modules` that match these layers alone; a list would match endings of names."""
    return "|".join(re.escape(name).replace(r"_orig_mod\.", r"(_orig_mod\.)?") for name in names)
