"""A layer's results on the kernels against float64, with the reference as the measure."""

from __future__ import annotations

import torch
from torch import Tensor

from dcft_kernels import dcft_linear
from tests.adapter_cases import AdapterShape, Inputs
from tests.error_budget import assert_within_budget

SCALING = 0.7
NAMES = ("y", "gx", "gW", "gb", "gA", "gB", "gC")

# GPUs compute float32 products as three tf32 products of the operands' halves (`tf32x3`). A half
# has 11 bits, so that an operand x is off by up to 2^-22 |x|, and the product of the two lower
# halves, up to 2^-22 |x y|, is left out. Uniformly distributed, that is sqrt(2/3 + 1/9) 2^-22 of
# a product in the RMS: 1.76 roundings of float32 instead of one half. A result passes through
# three such products (shrink, mix, expand), whose errors add up like independent ones.
TF32X3_ROUNDINGS = 1.76 * 3**0.5


def to(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on another device."""
    return Inputs(*(tensor.to(device) for tensor in inputs))


def run(
    inputs: Inputs,
    case: AdapterShape,
    backend: str,
    *,
    scaling: float = SCALING,
    dropout_p: float = 0.0,
    strategy: str = "auto",
) -> tuple[Tensor, ...]:
    """The output of `dcft_linear` and all six gradients; the same seed for every call."""
    inputs = inputs.requiring()
    torch.manual_seed(11)
    y = dcft_linear(
        *inputs.operands,
        stride=case.stride,
        scaling=scaling,
        dropout_p=dropout_p,
        backend=backend,
        strategy=strategy,
    )
    return (y.detach(), *torch.autograd.grad(y, inputs.operands, inputs.grad))


def check(
    inputs: Inputs, case: AdapterShape, *, dropout_p: float = 0.0, strategy: str = "auto"
) -> tuple[Tensor, ...]:
    """Check all that the kernels compute from `inputs`, and return it."""
    wide = inputs.to(torch.float64)
    squares = Inputs(*(tensor.square() for tensor in wide))
    actual = run(inputs, case, "triton", dropout_p=dropout_p, strategy=strategy)
    results = (
        actual,
        run(inputs, case, "reference", dropout_p=dropout_p),
        run(wide, case, "reference", dropout_p=dropout_p),
        # Kept elements count 1 / (1 - p) times here, and must count the square of that.
        tuple(
            square.sqrt() * roundings(inputs.x)
            for square in run(
                squares,
                case,
                "reference",
                scaling=SCALING**2 / (1 - dropout_p),
                dropout_p=dropout_p,
            )
        ),
    )
    for name, *values in zip(NAMES, *results, strict=True):
        assert_within_budget(*values, dtype=inputs.x.dtype, what=name)
    return actual


def roundings(tokens: Tensor) -> float:
    """Roundings of its dtype that a sum of the kernels' products is off by."""
    return TF32X3_ROUNDINGS if tokens.is_cuda and tokens.dtype == torch.float32 else 1.0
