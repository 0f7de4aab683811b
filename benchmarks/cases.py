"""What is measured: the shapes and dtypes, and the tensors that all providers of a case share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One input of a layer: `T` tokens, `n` features in, `m` features out, of one dtype."""

    T: int
    n: int
    m: int
    dtype: str  # a key of DTYPES

    @property
    def shape(self) -> str:
        return f"{self.T}x{self.n}->{self.m}"

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


# BERT-base attention and feed-forward projections, and an attention projection of a 7B-8B model.
LAYER_SHAPES = ((2048, 768, 768), (2048, 768, 3072), (1024, 4096, 4096))
# For trying the suite out: says nothing about speed.
QUICK_SHAPES = ((32, 64, 64), (32, 64, 128))


def layer_cases(*, quick: bool = False) -> list[Case]:
    """The cases of the layer suite; fp32 first, since a slow dtype must not hold up the other."""
    shapes = QUICK_SHAPES if quick else LAYER_SHAPES
    return [Case(*shape, dtype=dtype) for dtype in DTYPES for shape in shapes]


class Problem:
    """The tensors of a case: the same input, output gradient and base layer for every provider.

    `x` and `g` are independent and standard normal, weight and bias are what `nn.Linear` starts
    with. `x` asks for a gradient, as the input of a layer inside a network does.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case = case
        self.device = device
        self.dtype = DTYPES[case.dtype]
        self.generator = torch.Generator().manual_seed(seed)
        self.x = self._draw(case.T, case.n).requires_grad_()
        self.g = self._draw(case.T, case.m)
        bound = case.n**-0.5
        self.weight = self._draw(case.m, case.n, uniform=bound)
        self.bias = self._draw(case.m, uniform=bound)

    def base(self) -> nn.Linear:
        """A new frozen `nn.Linear` over the shared weight and bias."""
        linear = nn.Linear(self.case.n, self.case.m, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    @cached_property
    def x64(self) -> Tensor:
        return self.x.detach().double()

    @cached_property
    def g64(self) -> Tensor:
        return self.g.double()

    @cached_property
    def dense_gradient(self) -> Tensor:
        """`g^T x [m, n]` in float64, from which the gradient of every adapter follows."""
        return self.g64.t() @ self.x64

    def _draw(self, *shape: int, uniform: float | None = None) -> Tensor:
        values = torch.empty(shape)
        if uniform is None:
            values.normal_(generator=self.generator)
        else:
            values.uniform_(-uniform, uniform, generator=self.generator)
        return values.to(self.device, self.dtype)
