"""The table of adapters: what is compared at every level that has linear layers.

In the order in which they matter: a case that runs out of time leaves out the last ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.adapters import packages
from benchmarks.adapters.candidate import Candidate, Parameters, added_to, draw
from benchmarks.adapters.lora_autograd import LoRALinear
from benchmarks.adapters.published import PublishedDCFT
from benchmarks.entries import BASELINE, AnyEntry, Entry, Subject, UnavailableError
from dcft_kernels import DCFTLinear, reference, triton
from dcft_kernels.adapter import Adapter

RANK, KERNEL_SIZE = 1, 8

Build = Callable[[nn.Linear, torch.Generator], Candidate]


@dataclass(frozen=True)
class AdapterKind:
    """A way to fine-tune a linear layer.

    `build` makes a layer of a frozen `nn.Linear`, whose weight it shares, and draws its parameters
    from a generator of the CPU's.
    """

    name: str
    label: str
    build: Build
    d: int | None = None
    k: int | None = None
    stride: int | None = None
    compiled: bool = False  # the layer, or the whole model, goes through torch.compile
    grouped: bool = False  # layers that share their input are computed together
    variant: str = ""

    def layer(self, base: nn.Linear, generator: torch.Generator) -> Candidate:
        """A candidate over `base`; UnavailableError where the kind does not fit or run here."""
        return self.build(base, generator)

    def entry(self, subject: Callable[..., Subject]) -> AnyEntry:
        """The kind as a level measures it, which makes a `subject(problem, kind=...)` of it."""
        return Entry(
            self.name,
            self.label,
            functools.partial(subject, kind=self),
            self.d,
            self.k,
            self.stride,
            self.variant,
        )


def _frozen(base: nn.Linear, generator: torch.Generator) -> Candidate:
    return Candidate(base, "weight", "bias")


def _full(base: nn.Linear, generator: torch.Generator) -> Candidate:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.in_features, linear.out_features = base.in_features, base.out_features
    linear.weight = nn.Parameter(base.weight.detach().clone())
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().clone())
    return Candidate(linear, "weight", "bias")


def _dcft(
    base: nn.Linear,
    generator: torch.Generator,
    *,
    rank: int,
    kernel_size: int,
    stride: int,
    backend: str = "auto",
    strategy: str = "auto",
) -> Candidate:
    if backend == "triton":
        reason = triton.why_unavailable(base.weight.device)
        if reason is not None:
            raise UnavailableError(f"backend='triton': {reason}")
    try:
        layer = DCFTLinear.from_linear(
            base,
            rank=rank,
            kernel_size=kernel_size,
            stride=stride,
            alpha=rank,  # a scaling of one, as in the increment below
            backend=backend,
            strategy=strategy,
        )
    except ValueError as error:
        raise UnavailableError(str(error)) from error
    names = ("dcft_A", "dcft_B", "dcft_C")

    def increment(p: Parameters) -> Tensor:
        A, B, C = (p[name] for name in names)
        if layer.geometry.inputs.tile and layer.geometry.outputs.tile:
            return torch.kron(B @ A, C)
        return reference.delta_weight(Adapter(A, B, C, 1.0, layer.geometry))

    candidate = Candidate(layer, "weight", "bias", added_to("weight", increment))
    parameters = dict(layer.named_parameters())
    draw([parameters[n] for n in names], lambda: increment(parameters), base.weight, generator)
    return candidate


def _published(
    base: nn.Linear,
    generator: torch.Generator,
    *,
    rank: int,
    kernel_size: int,
    stride: int,
    merged: bool,
) -> Candidate:
    for what, size in (("in", base.in_features), ("out", base.out_features)):
        if (size - kernel_size) % stride:
            raise UnavailableError(
                f"the published algorithm takes features that windows of {kernel_size} every "
                f"{stride} fit exactly, not {size} features {what}"
            )
    layer = PublishedDCFT(base, rank, kernel_size, stride, merged=merged)

    def increment(p: Parameters) -> Tensor:
        DW: Tensor = torch.func.functional_call(_Increment(layer), _of_layer(p), ())
        return DW

    candidate = Candidate(
        layer, "base.weight", "base.bias", added_to("base.weight", increment), dense_gradient=True
    )
    parameters = dict(layer.named_parameters())
    draw(
        [layer.A, layer.B, layer.C],
        lambda: increment(parameters),
        base.weight,
        generator,
    )
    return candidate


class _Increment(nn.Module):
    """`delta_weight` of a layer as a module's forward pass, to be called with other parameters."""

    def __init__(self, layer: PublishedDCFT) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.delta_weight()


def _of_layer(parameters: Parameters) -> dict[str, Tensor]:
    return {f"layer.{name}": parameters[name] for name in ("A", "B", "C")}


def _lora_autograd(base: nn.Linear, generator: torch.Generator, *, rank: int) -> Candidate:
    layer = LoRALinear(base, rank, torch.promote_types(base.weight.dtype, torch.float32))

    def increment(p: Parameters) -> Tensor:
        return p["B"] @ p["A"]

    candidate = Candidate(layer, "base.weight", "base.bias", added_to("base.weight", increment))
    parameters = dict(layer.named_parameters())
    draw([layer.A, layer.B], lambda: increment(parameters), base.weight, generator)
    return candidate


def _lora_16_bit(base: nn.Linear, generator: torch.Generator, *, rank: int) -> Candidate:
    if base.weight.dtype.itemsize != 2:
        raise UnavailableError(
            f"factors in the base's dtype differ from float32 over 16 bit only, not over "
            f"{str(base.weight.dtype).removeprefix('torch.')}"
        )
    return packages.peft_lora(base, generator, rank=rank, float32=False)


def _sized(
    name: str, label: str, build: Callable[..., Candidate], **options: object
) -> AdapterKind:
    """A kind of DCFT at its default sizes, which `resized` can change."""
    sizes = {"rank": RANK, "kernel_size": KERNEL_SIZE, "stride": KERNEL_SIZE}
    made = functools.partial(build, **sizes, **options)
    return AdapterKind(name, label, made, KERNEL_SIZE, RANK, KERNEL_SIZE)


def resized(
    kind: AdapterKind,
    *,
    rank: int = RANK,
    kernel_size: int = KERNEL_SIZE,
    stride: int | None = None,
) -> AdapterKind:
    """The same kind of DCFT, ours or the published one, with other sizes; its key tells which."""
    if kind.d is None or not isinstance(kind.build, functools.partial):
        raise ValueError(f"kind: expected one of DCFT, whose sizes can be chosen, got {kind.name}")
    stride = kernel_size if stride is None else stride
    parts = [f"k{rank}"] * (rank != RANK) + [f"d{kernel_size}"] * (kernel_size != KERNEL_SIZE)
    parts += [f"s{stride}"] * (stride != kernel_size)
    build = functools.partial(kind.build, rank=rank, kernel_size=kernel_size, stride=stride)
    return replace(kind, build=build, d=kernel_size, k=rank, stride=stride, variant="-".join(parts))


_LOKR_RANK = KERNEL_SIZE // 2  # the least at which peft's LoKr leaves `C` whole

_DCFT = _sized("dcft", "DCFT", _dcft)

ADAPTERS: tuple[AdapterKind, ...] = (
    AdapterKind(BASELINE, "frozen nn.Linear", _frozen),
    _DCFT,
    AdapterKind("lora_r8", "LoRA r=8 (peft)", functools.partial(packages.peft_lora, rank=8), k=8),
    _sized("published", "DCFT as published", _published, merged=False),
    AdapterKind("lora_r1", "LoRA r=1 (peft)", functools.partial(packages.peft_lora, rank=1), k=1),
    AdapterKind(
        "lora_autograd", "LoRA r=8 by hand", functools.partial(_lora_autograd, rank=8), k=8
    ),
    AdapterKind(
        "lokr",
        f"LoKr r={_LOKR_RANK} (peft)",
        functools.partial(packages.peft_lokr, rank=_LOKR_RANK, kernel_size=KERNEL_SIZE),
        d=KERNEL_SIZE,
        k=_LOKR_RANK,
    ),
    resized(_DCFT, rank=_LOKR_RANK),
    AdapterKind("dora", "DoRA r=8 (peft)", functools.partial(packages.peft_dora, rank=8), k=8),
    AdapterKind("full", "full fine-tuning", _full),
    _sized("published_merged", "DCFT as published, W + DW", _published, merged=True),
    AdapterKind("frozen_compiled", "frozen, compiled", _frozen, compiled=True),
    replace(_DCFT, name="dcft_compiled", label="DCFT, compiled", compiled=True),
    AdapterKind(
        "lora_r8_16bit",
        "LoRA r=8 (peft), 16-bit factors",
        functools.partial(_lora_16_bit, rank=8),
        k=8,
    ),
    AdapterKind(
        "lora_r1_16bit",
        "LoRA r=1 (peft), 16-bit factors",
        functools.partial(_lora_16_bit, rank=1),
        k=1,
    ),
    _sized("dcft_row_block", "DCFT, row_block", _dcft, backend="triton", strategy="row_block"),
    _sized("dcft_fused", "DCFT, fused", _dcft, backend="triton", strategy="fused"),
    _sized("dcft_scratch", "DCFT, scratch", _dcft, backend="triton", strategy="scratch"),
    _sized("dcft_torch", "DCFT, torch", _dcft, backend="torch"),
    AdapterKind(
        "lycoris_lokr",
        f"LoKr r={_LOKR_RANK} (LyCORIS)",
        functools.partial(packages.lycoris_lokr, rank=_LOKR_RANK, kernel_size=KERNEL_SIZE),
        d=KERNEL_SIZE,
        k=_LOKR_RANK,
    ),
    AdapterKind(
        "unsloth_lora", "LoRA r=8 (Unsloth)", functools.partial(packages.unsloth_lora, rank=8), k=8
    ),
    AdapterKind("liger", "Liger", packages.liger),
)

# Of whole models and blocks: q, k, v and gate, up as one call each.
GROUPED = replace(_DCFT, name="dcft_grouped", label="DCFT, grouped", grouped=True)


def by_name(*names: str) -> list[AdapterKind]:
    """Kinds by their names, in this order; those of default sizes."""
    known = {kind.name: kind for kind in reversed((*ADAPTERS, GROUPED))}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"provider: expected one of {', '.join(sorted(known))}, got {unknown[0]!r}"
        )
    return [known[name] for name in names]


def variants(
    *,
    ranks: Iterable[int] = (),
    kernel_sizes: Iterable[int] = (),
    strides: Iterable[int] = (),
    of: str = "dcft",
) -> list[AdapterKind]:
    """A kind of DCFT with one of its sizes varied at a time, all else at the defaults."""
    (kind,) = by_name(of)
    return [
        *(resized(kind, rank=rank) for rank in ranks),
        *(resized(kind, kernel_size=size) for size in kernel_sizes),
        *(resized(kind, stride=stride) for stride in strides),
    ]
