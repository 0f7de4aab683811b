"""How the factors of a fresh adapter are drawn, and which scaling goes with them.

`"balanced"`, the default: B is zero, so the layer starts exactly at the base model; A and C share
one standard deviation, that of LoRA's A in `peft`; and the scaling makes a first step of the
optimizer lower the loss as much as LoRA's would, to first order. Derived for Adam, whose first
steps change every entry by the learning rate h, whatever the gradients' sizes are:

- A factor whose entries have the standard deviation σ changes by h / σ of itself in a step. For A
  and C to be learned equally fast, and as fast as LoRA's A, their σ is LoRA's, whatever d is:

      σ = 1 / sqrt(3 n)                       (uniform on ±1/sqrt(n))

- A step of h against the signs of a factor's gradient lowers the loss by h times the sum of the
  gradient's magnitudes. Where the entries of the dense gradient `g^T x`, `[m, n]`, are independent
  of size γ, an entry of `gB` sums `I d_in d_out` of them, and there are J k = k m / s_out entries:

      DCFT   h s (k m / s_out) γ σ^2 sqrt(I d_in d_out)
      LoRA   h s' r m γ σ sqrt(n)

  Against LoRA of rank r = k with `s' = 1 / sqrt(r)` (rsLoRA, arXiv 2312.03732), both are alike for

      s = n s_out sqrt(3 / (k I d_in d_out))  = sqrt(3 n d_out / k) without overlap

That is why learning rates that suit LoRA suit DCFT of any d: with fewer parameters, each has to
move the layer further. The price is a nearer edge: the outputs' first move is `sqrt(d_out)` times
LoRA's (`h s σ^2 sqrt(n v)` against `h σ sqrt(n v)`), so training diverges at lower rates than
LoRA's does; how much lower is measured in `benchmarks/quality`. An `alpha` that is given takes the
place of that scaling: `alpha = sqrt(3 n)`, at rank one, moves outputs as far as LoRA does.

`"zero"`: B is zero as well, and A and C have the variances that pass the input on at its own size,
for a scaling of one. For inputs of variance v, `U` sums I of them and `V` sums d_in of `U`:

    Var(U) = I Var(A) v        = v   for  Var(A) = 1 / I
    Var(V) = d_in Var(C) Var(U) = v   for  Var(C) = 1 / d_in

With overlapping windows every output adds `d_out / s_out` windows, so there `Var(C)` is
`s_out / (d_out d_in)`. The first step moves outputs `sqrt(3)` times as far as LoRA's, but entries
of A and C are `sqrt(3 d_in)` and `sqrt(3 n / d_in)` times as large as LoRA's: at the same learning
rate they are learned that much more slowly.

`"paper"`: every entry of A, B and C from N(0, 0.02^2), as the published code does. `DW` is then
tiny but not zero, and so are the first gradients (each holds a product of two such factors): the
start is slow, and its length depends on n, m and d.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dcft_kernels.geometry import Geometry

InitName = Literal["balanced", "zero", "paper"]
INITS: tuple[str, ...] = get_args(InitName)

PAPER_STD = 0.02


def check_init(init: str) -> None:
    """Raise ValueError unless `init` is a known scheme."""
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(map(repr, INITS))}, got {init!r}")


def default_alpha(geometry: Geometry, init: str) -> float | None:
    """The `alpha` that goes with `init` where none is given; None is a scaling of one."""
    if init != "balanced":
        return None
    outputs, inputs = geometry.outputs, geometry.inputs
    terms = inputs.windows * inputs.width * outputs.width
    return inputs.size * outputs.stride * math.sqrt(3.0 * geometry.rank / terms)


@torch.no_grad()
def initialize(A: Tensor, B: Tensor, C: Tensor, geometry: Geometry, init: str) -> None:
    """Draw the factors in place, from PyTorch's default generator of their device."""
    check_init(init)
    if init == "paper":
        for factor in (A, B, C):
            factor.normal_(0.0, PAPER_STD)
        return
    outputs, inputs = geometry.outputs, geometry.inputs
    B.zero_()
    if init == "balanced":
        for factor in (A, C):
            factor.normal_(0.0, 1.0 / math.sqrt(3.0 * inputs.size))
        return
    A.normal_(0.0, math.sqrt(1.0 / inputs.windows))
    C.normal_(0.0, math.sqrt(outputs.stride / (outputs.width * inputs.width)))
