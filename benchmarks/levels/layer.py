"""The layer level: forward, backward or both of one linear layer, every adapter on one input."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import adapters, gate
from benchmarks.adapters import AdapterKind, Candidate
from benchmarks.cases import (
    DTYPES,
    KERNEL_SIZES,
    PAPER_KERNEL_SIZES,
    RANKS,
    STRIDES,
    Case,
    Scope,
)
from benchmarks.entries import AnyEntry, Subject

Shape = tuple[int, int, int]

# A projection of BERT-base, its feed-forward layer, and a projection of a 7B model.
_CPU_SHAPES: tuple[Shape, ...] = ((2048, 768, 768), (2048, 768, 3072), (1024, 4096, 4096))
# The goals' shapes first, then the layers of Llama-3-8B and of RoBERTa-large.
_GPU_SHAPES: tuple[Shape, ...] = (
    (8192, 4096, 4096),
    (4096, 768, 768),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (8192, 4096, 1024),
    (16384, 8192, 8192),
    (4096, 1024, 4096),
)
# Widths of real models: DeBERTaV3-base, RoBERTa-large, DeBERTaV2-xxlarge, GPT-2 XL's neighbours,
# Llama 2 and 3, with grouped-query keys and values.
_WIDTHS = (
    (768, 768),
    (768, 3072),
    (1024, 1024),
    (1024, 4096),
    (1536, 1536),
    (1536, 6144),
    (2048, 2048),
    (3072, 3072),
    (4096, 1024),
    (4096, 4096),
    (4096, 11008),
    (4096, 14336),
    (8192, 8192),
    (11008, 4096),
    (14336, 4096),
)
_TOKENS = tuple(4**i for i in range(9))  # 1 to 65536
# Tiny: does it run at all.
_TINY_SHAPES: tuple[Shape, ...] = ((32, 64, 64), (32, 64, 128))

# What a sweep over many shapes can afford.
_FEW = ("frozen", "dcft", "lora_r8", "published", "lora_r1", "lora_autograd")


def cases(scope: Scope) -> list[Case]:
    """The cases of this level, the most valuable first."""
    if scope.tiny:
        return _tiny(scope)
    shapes = _GPU_SHAPES if scope.gpu else _CPU_SHAPES
    first = "bf16" if scope.gpu else "fp32"
    found = [_case(shape, first) for shape in shapes]
    # A processor without 16-bit arithmetic takes seconds a product.
    sixteen_bit = (4096, 768, 768) if scope.gpu else (256, 768, 768)
    other = "fp32" if scope.gpu else "bf16"
    found.append(_case(sixteen_bit, other))
    found += [_case(shapes[0], first, direction=each) for each in ("fwd", "bwd")]
    swept = (4096, 4096, 4096) if scope.gpu else (2048, 768, 768)
    found += [_case(swept, first, sweep=name) for name in ("kernel_size", "rank", "stride")]
    tokens = _TOKENS if scope.full else [T for T in _TOKENS if scope.gpu or T <= 4096]
    widths = ((768, 768), (4096, 4096)) if scope.gpu else ((768, 768),)
    found += [_case((T, *w), first, sweep="tokens") for w in widths for T in tokens]
    if not scope.full:
        return found
    T = 4096 if scope.gpu else 256
    found += [_case((T, *w), first, sweep="widths") for w in _WIDTHS]
    for dtype in (d for d in DTYPES if d != first):
        found += [_case((T, 768, 768), dtype, sweep="dtypes")]
        if scope.gpu:
            found += [_case((T, *w), dtype, sweep="dtypes") for w in ((4096, 4096), (4096, 14336))]
    for shape in shapes[1:]:
        found += [_case(shape, first, direction=each) for each in ("fwd", "bwd")]
    return found


def _tiny(scope: Scope) -> list[Case]:
    dtypes = ("bf16", "fp32") if scope.gpu else ("fp32", "bf16")
    found = [_case(shape, dtype) for dtype in dtypes for shape in _TINY_SHAPES]
    shape = _TINY_SHAPES[0]
    found += [_case(shape, "fp32", direction=each) for each in ("fwd", "bwd")]
    found += [_case(shape, "fp32", sweep=name) for name in ("kernel_size", "rank", "stride")]
    return [*found, *(_case((T, 64, 64), "fp32", sweep="tokens") for T in (1, 16))]


def _case(shape: Shape, dtype: str, *, direction: str = "fwd+bwd", sweep: str = "main") -> Case:
    return Case("layer", *shape, dtype=dtype, direction=direction, sweep=sweep)


def entries(case: Case) -> list[AnyEntry]:
    """The adapters that a case compares."""
    return entries_of(kinds(case.sweep))


def entries_of(kinds: Iterable[AdapterKind]) -> list[AnyEntry]:
    """Adapters as this level measures them."""
    return [kind.entry(_subject) for kind in kinds]


def kinds(sweep: str) -> Sequence[AdapterKind]:
    """The adapters of a sweep; of an unknown one all, as of the main one."""
    baseline = adapters.by_name("frozen")
    if sweep == "kernel_size":
        ours = adapters.variants(kernel_sizes=KERNEL_SIZES)
        theirs = adapters.variants(kernel_sizes=PAPER_KERNEL_SIZES, of="published")
        return [*baseline, *ours, *theirs]
    if sweep == "rank":
        return [*baseline, *adapters.variants(ranks=RANKS)]
    if sweep == "stride":
        ours = adapters.variants(strides=STRIDES)
        return [*baseline, *ours, *adapters.variants(strides=STRIDES, of="published")]
    if sweep in ("tokens", "widths", "dtypes"):
        return adapters.by_name(*_FEW)
    return adapters.ADAPTERS


@dataclass
class LayerProblem:
    """The tensors of a case: the same input, output gradient and base layer for every adapter.

    `x` and `g` are independent and standard normal, weight and bias are what `nn.Linear` starts
    with. `x` asks for a gradient, as the input of a layer inside a network does.
    """

    case: Case
    device: torch.device
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        T, n, m = self.case.sizes
        self.dtype = DTYPES[self.case.dtype]
        self.generator = torch.Generator().manual_seed(self.seed)
        self._fast = torch.Generator(self.device).manual_seed(self.seed)
        self.x = self._draw(T, n).requires_grad_()
        self.g = self._draw(T, m)
        bound = n**-0.5
        self.weight = self._draw(m, n, uniform=bound)
        self.bias = self._draw(m, uniform=bound)

    def base(self) -> nn.Linear:
        """A new frozen `nn.Linear` over the shared weight and bias."""
        m, n = self.weight.shape
        linear = nn.Linear(n, m, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    @functools.cached_property
    def given(self) -> gate.LayerInput:
        """What the gate computes from."""
        x = self.x.detach().double()
        if self.case.direction == "fwd":
            return gate.LayerInput(x, None, None, self.dtype)
        g = self.g.double()
        return gate.LayerInput(x, g, g.t() @ x, self.dtype)

    def _draw(self, *shape: int, uniform: float | None = None) -> Tensor:
        values = torch.empty(shape, device=self.device)
        if uniform is None:
            values.normal_(generator=self._fast)
        else:
            values.uniform_(-uniform, uniform, generator=self._fast)
        return values.to(self.dtype)


class LayerStep:
    """A pass of a candidate's layer; gradients are None before a backward pass."""

    def __init__(self, problem: LayerProblem, candidate: Candidate, module: nn.Module) -> None:
        self.direction = problem.case.direction
        self.x, self.g = problem.x, problem.g
        self.module = module
        self.trained = candidate.trained()
        self.y: Tensor | None = None

    def prepare(self) -> None:
        self.release()
        if self.direction == "bwd":
            self.y = self.module(self.x)

    def run(self) -> None:
        if self.direction != "bwd":
            self.y = self.module(self.x)
        if self.direction != "fwd":
            assert self.y is not None
            self.y.backward(self.g)

    def release(self) -> None:
        self.y = None
        for tensor in (self.x, *self.trained.values()):
            tensor.grad = None

    def result(self) -> gate.StepResult:
        assert self.y is not None
        gradients = {name: p.grad for name, p in self.trained.items()}
        return gate.StepResult(self.y.detach(), self.x.grad, gradients)


def _subject(problem: LayerProblem, kind: AdapterKind) -> Subject:
    candidate = kind.layer(problem.base(), problem.generator)
    module: Any = torch.compile(candidate.layer) if kind.compiled else candidate.layer
    step = LayerStep(problem, candidate, module)
    T, n, m = problem.case.sizes
    passes = {"fwd": 1, "bwd": 1, "fwd+bwd": 2}[problem.case.direction]
    base = kind.name == "frozen"  # of others, what is moved and computed depends on the way
    return Subject(
        step,
        check=lambda: gate.check_layer(problem.given, candidate, step.result()),
        forward=None if kind.compiled else lambda: module(problem.x),
        parameters=tuple(candidate.layer.parameters()),
        moved_bytes=passes * (T * n + n * m + T * m) * problem.dtype.itemsize if base else None,
        flops=passes * 2 * T * n * m if base else None,
        compiles=kind.compiled,
        graphable=problem.case.direction != "bwd",
    )
