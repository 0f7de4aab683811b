"""The layer level: forward, backward or both of one linear layer, every method on one input."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment
from benchmarks.speed import gate, methods
from benchmarks.speed.cases import DTYPES, Case, Scope
from benchmarks.speed.methods import AdaptedLayer, LayerMethod
from benchmarks.speed.provider import BASELINE, Provider, Workload

Shape = tuple[int, int, int]

# A projection of BERT-base, its feed-forward layer, and a projection of a 7B model.
_CPU_SHAPES: tuple[Shape, ...] = ((2048, 768, 768), (2048, 768, 3072), (1024, 4096, 4096))
# The project's two goals, other widths and tokens, then layers of Llama-3-8B and RoBERTa-large.
_GPU_SHAPES: tuple[Shape, ...] = (
    (8192, 4096, 4096),
    (4096, 768, 768),
    (4096, 1024, 1024),
    (2048, 4096, 4096),
    (32768, 4096, 4096),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (8192, 4096, 1024),
    (16384, 8192, 8192),
    (4096, 1024, 4096),
)
_TINY_SHAPES: tuple[Shape, ...] = ((32, 64, 64), (32, 64, 128))

# Sizes of DCFT, of ours and of the published algorithm. The paper has kernel sizes 2 to 12 (Table
# 4) and strides 1, 2, 4, 8 (Table 5).
_SWEEPS: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "kernel_size": ((2, 4, 6, 8, 12, 16, 32), (2, 4, 6, 8, 12)),
    "rank": ((1, 2, 4, 8, 16), ()),
    "stride": ((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 4, 8)),
}
# The sweep over what a CPU can meet, with square layers; short cases come first.
CPU_SWEEP = "cpu"
_CPU_TOKENS = (1, 16, 128, 512, 2048)
_CPU_WIDTHS = (384, 768, 2048, 4096)
_BUSY_TOKENS, _BUSY_WIDTHS, _BUSY_THREADS = (128, 512, 2048), (768, 2048), 2
_CPU_METHODS = (BASELINE, "dcft", "lora_r1", "lora_r8", "lora_by_hand")
_SLOW_METHODS = ("lokr", "published")
# T n m, from which on slow methods are left out, and products in bf16 without instructions for it.
_LARGE = 2**31
_FEW_METHODS = (BASELINE, "dcft", "lora_r8", "published", "lora_r1", "lora_by_hand")


def cases(scope: Scope) -> list[Case]:
    """All methods at the main shapes, then sweeps over DCFT's sizes, and tokens or all of a CPU."""
    tokens: tuple[int, ...] = ()  # the sweep of a CPU has its own
    if scope.tiny:
        shapes, dtypes, swept = _TINY_SHAPES, ("fp32", "bf16"), _TINY_SHAPES[0]
        tokens, other = (1, 16), _TINY_SHAPES[0]
    elif scope.gpu:
        shapes, dtypes, swept = _GPU_SHAPES, ("bf16", "fp32"), (4096, 4096, 4096)
        tokens, other = tuple(4**i for i in range(9)), (4096, 768, 768)
    else:
        shapes, dtypes, swept = _CPU_SHAPES, ("fp32", "bf16"), (2048, 768, 768)
        # A processor without 16-bit arithmetic takes seconds per product.
        other = (256, 768, 768)
    first, second = dtypes
    found = [_case(shape, first) for shape in shapes]
    found.append(_case(other, second))
    found += [_case(shapes[0], first, direction=each) for each in ("fwd", "bwd")]
    found += [_case(swept, first, sweep=name) for name in _SWEEPS]
    widths = ((768, 768), (4096, 4096)) if scope.gpu else (shapes[0][1:],)
    found += [_case((T, n, m), first, sweep="tokens") for n, m in widths for T in tokens]
    return found if scope.gpu else found + _cpu_sweep(scope.tiny)


def _cpu_sweep(tiny: bool) -> list[Case]:
    """Every combination of size, dtype, direction and threads; some also with a busy neighbour."""
    sizes = itertools.product((32,) if tiny else _CPU_TOKENS, (64,) if tiny else _CPU_WIDTHS)
    busy = {(32, 64)} if tiny else set(itertools.product(_BUSY_TOKENS, _BUSY_WIDTHS))
    found = []
    for (T, n), dtype, direction, threads in itertools.product(
        sorted(sizes, key=lambda size: size[0] * size[1] ** 2),
        ("fp32", "bf16"),
        ("fwd+bwd", "inference"),
        range(1, 1 + min(2, environment.available_cores())),
    ):
        if dtype == "bf16" and T * n * n >= _LARGE and environment.native_bf16() is False:
            continue
        case = replace(_case((T, n, n), dtype, direction=direction), sweep=CPU_SWEEP)
        found.append(replace(case, threads=threads))
        if (T, n) in busy and threads == _BUSY_THREADS:
            found.append(replace(case, threads=threads, neighbour=True))
    return found


def _case(shape: Shape, dtype: str, *, direction: str = "fwd+bwd", sweep: str = "main") -> Case:
    return Case("layer", *shape, dtype=dtype, direction=direction, sweep=sweep)


def providers(case: Case) -> list[Provider]:
    """The methods that a case compares."""
    return providers_of(_methods(case))


def providers_of(chosen: Iterable[LayerMethod]) -> list[Provider]:
    """Methods at this level."""
    return [method.provider(_workload) for method in chosen]


def _methods(case: Case) -> Sequence[LayerMethod]:
    if case.sweep == CPU_SWEEP:
        few = math.prod(case.sizes) >= _LARGE
        return methods.by_name(*_CPU_METHODS, *(() if few else _SLOW_METHODS))
    if case.sweep == "tokens":
        return methods.by_name(*_FEW_METHODS)
    if case.sweep not in _SWEEPS:
        return methods.LAYER_METHODS
    ours, theirs = _SWEEPS[case.sweep]
    return [
        *methods.by_name(BASELINE),
        *(methods.dcft(**{case.sweep: value}) for value in ours),
        *(methods.published_dcft(**{case.sweep: value}) for value in theirs),
    ]


@dataclass
class LayerProblem:
    """The tensors of a case: one input, output gradient and base layer for every method.

    `x` and `g` are independent and standard normal; weight and bias are initialized as `nn.Linear`
    does. `x` requires a gradient, as the input of a layer inside a network does in training.
    """

    case: Case
    device: torch.device
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        T, n, m = self.case.sizes
        self.dtype = DTYPES[self.case.dtype]
        self.generator = torch.Generator().manual_seed(0)
        self._on_device = torch.Generator(self.device).manual_seed(0)
        self.x = self._draw(T, n).requires_grad_(self.case.direction != "inference")
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
        """The input of the gate."""
        x = self.x.detach().double()
        if self.case.direction in _ONLY_FORWARD:
            return gate.LayerInput(x, None, None, self.dtype)
        g = self.g.double()
        return gate.LayerInput(x, g, g.t() @ x, self.dtype)

    def _draw(self, *shape: int, uniform: float | None = None) -> Tensor:
        values = torch.empty(shape, device=self.device)
        if uniform is None:
            values.normal_(generator=self._on_device)
        else:
            values.uniform_(-uniform, uniform, generator=self._on_device)
        return values.to(self.dtype)


_ONLY_FORWARD = ("fwd", "inference")


class LayerStep:
    """A pass of a layer; gradients are None before a backward pass.

    Before every training step the signs of the trained parameters are flipped, which is exact. As
    after an optimizer's step, nothing that a layer caches by their values is still valid.
    """

    def __init__(
        self,
        problem: LayerProblem,
        adapted: AdaptedLayer,
        module: nn.Module,
        *,
        repeatable: bool = False,  # with the same parameters every time
    ) -> None:
        self.direction = problem.case.direction
        self.repeatable = repeatable or self.direction == "inference"
        self.x, self.g = problem.x, problem.g
        self.adapted, self.module = adapted, module
        self.trained = adapted.trained()
        self.y: Tensor | None = None

    def prepare(self) -> None:
        self.release()
        if not self.repeatable:
            with torch.no_grad():
                for parameter in self.trained.values():
                    parameter.neg_()
        if self.direction == "bwd":
            self.y = self.module(self.x)

    def run(self) -> None:
        if self.direction != "bwd":
            self.y = self.module(self.x)
        if self.direction not in _ONLY_FORWARD:
            assert self.y is not None
            self.y.backward(self.g)

    def release(self) -> None:
        self.y = None
        for tensor in (self.x, *self.trained.values()):
            tensor.grad = None

    def results(self) -> dict[str, Tensor | None]:
        """The output "y", and gradients by name; None where there is none."""
        assert self.y is not None
        gradients = {name: p.grad for name, p in self.trained.items()}
        return {"y": self.y.detach(), "x": self.x.grad, **gradients}


def _workload(problem: LayerProblem, method: LayerMethod) -> Workload:
    adapted = method.build(problem.base(), problem.generator)
    inference = problem.case.direction == "inference"
    adapted.layer.train(not inference)
    module: Any = torch.compile(adapted.layer) if method.compiled else adapted.layer
    step = LayerStep(problem, adapted, module)
    T, n, m = problem.case.sizes
    passes = 2 if problem.case.direction == "fwd+bwd" else 1
    counted = method.name == BASELINE  # what others move and compute depends on the method
    return Workload(
        step,
        check=lambda: gate.check_layer(problem.given, adapted, step.results()),
        forward=None if method.compiled or inference else lambda: module(problem.x),
        parameters=tuple(adapted.layer.parameters()),
        moved_bytes=passes * (T * n + n * m + T * m) * problem.dtype.itemsize if counted else None,
        flops=passes * 2 * T * n * m if counted else None,
        compiles=method.compiled,
        graphable=problem.case.direction != "bwd" and not method.compiled,
    )
