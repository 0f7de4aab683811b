"""The methods by name. A new one is an entry here and a function that adapts a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from benchmarks.quality import errors
from benchmarks.quality.methods import (
    baselines,
    bottleneck,
    dcft,
    low_rank,
    peft_methods,
    scaling,
)
from benchmarks.quality.methods.adapted import (
    LOW_RANK_RATES,
    Adapt,
    Adapted,
    Method,
    check_options,
)
from dcft_kernels import validation

# Weights that are there already move by far less than factors that start near zero ...
_FULL = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4)
# ... and scales, which start at one, by more.
_SCALES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
# It trains nothing of its own, and the head has a rate of its own.
_UNUSED = (1e-3,)


def by_name(name: str) -> Method:
    """The method of this name.

    Raises:
        QualityError: no method has it; the names are listed, and near ones first.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise errors.unknown("--method", name, [method.name for method in METHODS])


def _method(
    name: str,
    description: str,
    function: Callable[..., Adapted],
    learning_rates: tuple[float, ...] = LOW_RANK_RATES,
    *,
    options_of: Callable[..., Adapted] | None = None,
    uses_layers: bool = True,
) -> Method:
    """A method; its options and their defaults are the keywords of its function."""
    options = {
        parameter.name: parameter.default
        for parameter in inspect.signature(options_of or function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    adapt = _checked(name, function, options)
    return Method(name, description, adapt, options, learning_rates, uses_layers)


def _checked(name: str, function: Callable[..., Adapted], known: Mapping[str, Any]) -> Adapt:
    """`function` behind the checks that all methods share."""

    def adapt(model: nn.Module, layers: Sequence[str], steps: int, **options: Any) -> Adapted:
        check_options(name, options, known)
        validation.module("model", model)
        return function(model, layers, validation.positive_int("steps", steps), **options)

    return adapt


METHODS: tuple[Method, ...] = (
    _method("head", "nothing but the task's head", baselines.head, _UNUSED, uses_layers=False),
    _method("full", "every parameter", baselines.full, _FULL, uses_layers=False),
    _method("bitfit", "the biases (Zaken et al. 2021)", baselines.bitfit, uses_layers=False),
    _method("dcft", "DW = ConvTranspose2d(B A, C) (arXiv 2503.01419, eq. 5)", dcft.dcft),
    _method(
        "ssb_dcft",
        "D1 W D2 + DCFT (arXiv 2407.05417, eq. 7 and section 5)",
        dcft.ssb_dcft,
        options_of=dcft.dcft,
    ),
    _method("lora", "DW = B A (arXiv 2106.09685)", peft_methods.lora),
    _method("lora_fa", "LoRA with A frozen (arXiv 2308.03303)", low_rank.lora_fa),
    _method("dora", "LoRA with trained magnitudes (arXiv 2402.09353)", peft_methods.dora),
    _method("adalora", "DW = B diag(E) A, ranks by importance (Zhang 2023)", peft_methods.adalora),
    _method("sora", "DW = B diag(g) A, g made sparse (Ding et al. 2023)", low_rank.sora),
    _method("trilora", "DW = A D B, D diagonal (arXiv 2407.05417, eq. 12)", low_rank.trilora),
    _method("flora", "DW = A G B, G arbitrary (arXiv 2407.05417, eq. 12)", low_rank.flora),
    _method("lokr", "DW = kron(w1, w2), w2 of low rank (Yeh et al. 2023)", peft_methods.lokr),
    _method("vera", "DW = diag(b) B diag(d) A (arXiv 2310.11454)", peft_methods.vera, _SCALES),
    _method("ia3", "scaled keys, values, feed-forward (Liu 2022)", peft_methods.ia3, _SCALES),
    _method("ssl", "D1 W, scaled inputs (arXiv 2407.05417, eq. 7)", scaling.ssl, _SCALES),
    _method("ssb", "D1 W D2, both sides scaled (arXiv 2407.05417, eq. 7)", scaling.ssb, _SCALES),
    _method("sam_parser", "singular values (arXiv 2407.05417, eq. 4)", scaling.sam_parser),
    _method(
        "houlsby",
        "x + h(x A) B after attention and feed-forward (arXiv 2407.05417, eq. 22)",
        bottleneck.houlsby,
    ),
    _method(
        "pfeiffer",
        "x + h(x A) B after the feed-forward (arXiv 2407.05417, eq. 22)",
        bottleneck.pfeiffer,
    ),
    _method(
        "parallel_adapter",
        "x W + h(x A) B at every layer (arXiv 2407.05417, eq. 25)",
        bottleneck.parallel_adapter,
    ),
)
"""All methods, in the order in which they are listed."""
