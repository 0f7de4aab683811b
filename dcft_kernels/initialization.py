"""How the factors of a fresh adapter are drawn.

`"paper"`: every entry of A, B and C from N(0, 0.02^2), as the published code does. `DW` is then
tiny but not zero, and so are the first gradients (each holds a product of two such factors).

`"zero"`: B is zero, so the layer starts exactly at the base model. The first step moves B alone,
by the gradient `gB[j, κ] = s sum_{t, q} g[t, j, q] V[t, q, κ]`, so `V` should be as large as the
layer's input. For inputs of variance v, `U` sums I of them and `V` sums d_in of `U`:

    Var(U) = I Var(A) v        = v   for  Var(A) = 1 / I
    Var(V) = d_in Var(C) Var(U) = v   for  Var(C) = 1 / d_in

With overlapping windows every output adds `d_out / s_out` windows, so there `Var(C)` is
`s_out / (d_out d_in)`. Then a step of size `h` in every entry of B changes an output by about
`h sqrt(v)`, whatever n, m, d and the stride are: what a rank-1 LoRA with a unit-gain A would do, so
learning rates carry over.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dcft_kernels.geometry import Geometry

InitName = Literal["paper", "zero"]
INITS: tuple[str, ...] = get_args(InitName)

PAPER_STD = 0.02


def check_init(init: str) -> None:
    """Raise ValueError unless `init` is a known scheme."""
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(map(repr, INITS))}, got {init!r}")


@torch.no_grad()
def initialize(A: Tensor, B: Tensor, C: Tensor, geometry: Geometry, init: str) -> None:
    """Draw the factors in place, from PyTorch's default generator of their device."""
    check_init(init)
    if init == "paper":
        for factor in (A, B, C):
            factor.normal_(0.0, PAPER_STD)
        return
    outputs, inputs = geometry.outputs, geometry.inputs
    A.normal_(0.0, math.sqrt(1.0 / inputs.windows))
    B.zero_()
    C.normal_(0.0, math.sqrt(outputs.stride / (outputs.width * inputs.width)))
