"""The table of methods: what is compared at every level that has linear layers.

In order of importance: a case that runs out of time leaves out the last ones.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.speed.methods import peft_methods, published
from benchmarks.speed.methods.adapted_layer import AdaptedLayer, Parameters, with_increment
from benchmarks.speed.methods.lora_by_hand import LoRALinear
from benchmarks.speed.provider import BASELINE, Provider, UnavailableError, Workload
from dcft_kernels import DCFTLinear, backends

RANK, KERNEL_SIZE = 1, 8
STRATEGIES = tuple(name for name in backends.STRATEGIES if name != "auto")
"""Each is the method `dcft_NAME`."""


@dataclass(frozen=True)
class LayerMethod:
    """A way to fine-tune a linear layer.

    `build` makes an adapted layer of a frozen `nn.Linear`, whose weight it shares, and draws its
    parameters from a CPU generator. It raises UnavailableError if it cannot run.
    """

    name: str
    build: Callable[[nn.Linear, torch.Generator], AdaptedLayer]
    d: int | None = None
    k: int | None = None
    stride: int | None = None
    compiled: bool = False  # the layer, or the whole model, goes through torch.compile
    variant: str = ""

    def provider(self, workload: Callable[..., Workload]) -> Provider:
        """The method at a level that makes a `workload(problem, method=...)` of it."""
        build = functools.partial(workload, method=self)
        return Provider(self.name, build, self.d, self.k, self.stride, self.variant)


def _frozen(base: nn.Linear, generator: torch.Generator) -> AdaptedLayer:
    return AdaptedLayer(base)


def _full(base: nn.Linear, generator: torch.Generator) -> AdaptedLayer:
    return AdaptedLayer(copy.deepcopy(base).requires_grad_())


def _dcft(
    base: nn.Linear,
    generator: torch.Generator,
    *,
    rank: int,
    kernel_size: int,
    stride: int,
    strategy: str = "auto",
) -> AdaptedLayer:
    layer = DCFTLinear.from_linear(
        base,
        rank=rank,
        kernel_size=kernel_size,
        stride=stride,
        alpha=rank,  # a scaling of one, as in the increment below
        strategy=strategy,
    )
    m, n = base.weight.shape

    def increment(p: Parameters) -> Tensor:
        DW = published.increment(p["dcft_A"], p["dcft_B"], p["dcft_C"], stride)
        return DW[:m, :n]  # windows may stick out

    return with_increment(layer, "", increment, generator)


def _published(
    base: nn.Linear,
    generator: torch.Generator,
    *,
    rank: int,
    kernel_size: int,
    stride: int,
    merged: bool,
) -> AdaptedLayer:
    for side, size in (("in", base.in_features), ("out", base.out_features)):
        if (size - kernel_size) % stride:
            raise UnavailableError(
                f"the published algorithm needs features that windows of {kernel_size} every "
                f"{stride} fit exactly, not {size} features {side}"
            )
    layer = published.PublishedDCFT(base, rank, kernel_size, stride, merged=merged)

    def increment(p: Parameters) -> Tensor:
        return published.increment(p["A"], p["B"], p["C"], stride)

    return with_increment(layer, "base.", increment, generator, dense_gradient=True)


def _lora_by_hand(base: nn.Linear, generator: torch.Generator, *, rank: int) -> AdaptedLayer:
    return with_increment(LoRALinear(base, rank), "base.", lambda p: p["B"] @ p["A"], generator)


def _sized(
    name: str,
    build: Callable[..., AdaptedLayer],
    *,
    rank: int = RANK,
    kernel_size: int = KERNEL_SIZE,
    stride: int | None = None,
    compiled: bool = False,
    **options: object,
) -> LayerMethod:
    """A method of DCFT; its variant tells sizes other than the defaults."""
    stride = kernel_size if stride is None else stride
    parts = [f"k{rank}"] * (rank != RANK) + [f"d{kernel_size}"] * (kernel_size != KERNEL_SIZE)
    parts += [f"s{stride}"] * (stride != kernel_size)
    made = functools.partial(build, rank=rank, kernel_size=kernel_size, stride=stride, **options)
    return LayerMethod(name, made, kernel_size, rank, stride, compiled, "-".join(parts))


def dcft(**sizes: int) -> LayerMethod:
    """`DCFTLinear` with a rank, kernel size or stride."""
    return _sized("dcft", _dcft, **sizes)  # type: ignore[arg-type]


def published_dcft(**sizes: int) -> LayerMethod:
    """The published algorithm with a rank, kernel size or stride."""
    return _sized("published", _published, merged=False, **sizes)  # type: ignore[arg-type]


_LOKR_RANK = KERNEL_SIZE // 2  # the least at which peft's LoKr keeps `C` whole

LAYER_METHODS: tuple[LayerMethod, ...] = (
    LayerMethod(BASELINE, _frozen),
    dcft(),
    LayerMethod("lora_r8", functools.partial(peft_methods.lora, rank=8), k=8),
    published_dcft(),
    LayerMethod("lora_r1", functools.partial(peft_methods.lora, rank=1), k=1),
    LayerMethod("lora_by_hand", functools.partial(_lora_by_hand, rank=8), k=8),
    LayerMethod("lora_r16", functools.partial(peft_methods.lora, rank=16), k=16),
    LayerMethod(
        "lokr",
        functools.partial(peft_methods.lokr, rank=_LOKR_RANK, kernel_size=KERNEL_SIZE),
        d=KERNEL_SIZE,
        k=_LOKR_RANK,
    ),
    dcft(rank=_LOKR_RANK),
    LayerMethod("miss", functools.partial(peft_methods.miss, rank=8), k=8),
    LayerMethod("dora", functools.partial(peft_methods.dora, rank=8), k=8),
    LayerMethod(
        "lora_r8_16bit", functools.partial(peft_methods.lora, rank=8, sixteen_bit=True), k=8
    ),
    *(_sized(f"dcft_{name}", _dcft, strategy=name) for name in STRATEGIES),
    LayerMethod("full", _full),
    _sized("published_merged", _published, merged=True),
    LayerMethod("frozen_compiled", _frozen, compiled=True),
    _sized("dcft_compiled", _dcft, compiled=True),
)


def by_name(*names: str) -> list[LayerMethod]:
    """Methods by their names, in this order, at their default sizes."""
    known = {method.name: method for method in LAYER_METHODS if not method.variant}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"method: expected one of {', '.join(known)}, got {unknown[0]!r}")
    return [known[name] for name in names]
