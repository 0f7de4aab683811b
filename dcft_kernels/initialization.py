"""How the factors of a fresh adapter are drawn, and which scaling goes with them.

`"balanced"`, the default: B is zero, so the layer starts exactly at the base model; A and C share
one standard deviation, that of LoRA's A in `peft`; and the scaling stands midway between two that
would make a first step of the optimizer equal to LoRA's: in how much it lowers the loss, and in
how far it moves the outputs. Derived for Adam, whose first steps change every entry by the learning
rate h, whatever the gradients' sizes are:

- A factor whose entries have the standard deviation σ changes by h / σ of itself in a step. For A
  and C to be learned equally fast, and as fast as LoRA's A, their σ is LoRA's, whatever d is:

      σ = 1 / sqrt(3 n)                       (uniform on ±1/sqrt(n))

- A step of h against the signs of a factor's gradient lowers the loss by h times the sum of the
  gradient's magnitudes. Where the entries of the dense gradient `g^T x`, `[m, n]`, are independent
  of size γ, an entry of `gB` sums `I d_in d_out` of them, and there are J k = k m / s_out entries:

      DCFT   h s (k m / s_out) γ σ^2 sqrt(I d_in d_out)
      LoRA   h s' r m γ σ sqrt(n)

  Against LoRA of rank r = k with `s' = 1 / sqrt(r)` (rsLoRA, arXiv 2312.03732), both are alike for

      s_loss = n s_out sqrt(3 / (k I d_in d_out))  = sqrt(3 n d_out / k) without overlap

- The same step moves an output, for inputs of variance v, where every output adds
  `d_out / s_out` windows, by

      DCFT   h s sqrt(k) σ^2 sqrt(I d_in v) sqrt(d_out / s_out)
      LoRA   h σ sqrt(n v)

  which are alike for `s_output = s_loss / sqrt(s_out)`.

With fewer parameters, each has to move the layer further for the same gain, so no scaling does
both. With `s_loss` training is as fast as LoRA's at low learning rates but diverges at rates at
which LoRA still trains; with `s_output` it is stable there but slow at low ones. The geometric mean

      s = s_loss / s_out^(1/4)                = sqrt(3 n / k) d_out^(1/4) without overlap

trains over LoRA's range of rates where all three were measured (MiniLM, windows without overlap,
slices of the training splits of STS-B and SST-2: `benchmarks/quality`, study `initialization`): at
the highest rate `s_loss` diverges on both, at the lowest `s_output` is far behind on one. An
explicit `alpha` replaces this scaling.

With a kernel per rank both comparisons come out the same: an entry of `gB` sums as many entries
with `C_κ` as with a shared `C`, and the ranks' parts of an output are independent either way, since
the rows of `A` are.

`"zero"`: B is zero as well, and A and C have the variances that pass the input on at its own size,
for a scaling of one. For inputs of variance v, `U` sums I of them and `V` sums d_in of `U`:

    Var(U) = I Var(A) v        = v   for  Var(A) = 1 / I
    Var(V) = d_in Var(C) Var(U) = v   for  Var(C) = 1 / d_in

With overlapping windows every output adds `d_out / s_out` windows, so there `Var(C)` is
`s_out / (d_out d_in)`. The first step moves outputs `sqrt(3 k)` times as far as LoRA's, but entries
of A and C are `sqrt(3 d_in)` and `sqrt(3 n / d_in)` times as large as LoRA's: at the same learning
rate they are learned that much more slowly.

`"paper"`: every entry of A, B and C from N(0, 0.02^2), as the published code does. `DW` is then
tiny but not zero, and so are the first gradients (each holds a product of two such factors): the
start is slow, and its length depends on n, m and d.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcft_kernels.adapter import Geometry
from dcft_kernels.validation import one_of

INITS = ("balanced", "zero", "paper")
PAPER_STD = 0.02


def default_alpha(geometry: Geometry, init: str) -> float | None:
    """The `alpha` that goes with `init` where none is given; None is a scaling of one."""
    if init != "balanced":
        return None
    outputs, inputs = geometry.outputs, geometry.inputs
    terms = inputs.windows * inputs.width * outputs.width
    as_loras_loss = inputs.size * outputs.stride * math.sqrt(3.0 * geometry.rank / terms)
    return as_loras_loss / outputs.stride**0.25


def scaling_of(geometry: Geometry, init: str, alpha: float | None) -> float:
    """`alpha / rank`; where `alpha` is None, with the one that goes with `init`."""
    alpha = default_alpha(geometry, init) if alpha is None else alpha
    return 1.0 if alpha is None else alpha / geometry.rank


@torch.no_grad()
def initialize(A: Tensor, B: Tensor, C: Tensor, geometry: Geometry, init: str) -> None:
    """Draw the factors in place, from PyTorch's default generator of their device."""
    one_of("init", init, INITS)
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
