"""A layer's results on the kernels against float64, with the reference as the measure."""

from __future__ import annotations

import torch
from torch import Tensor

from dcft_kernels import dcft_linear
from tests.adapter_cases import Case, Inputs
from tests.error_budget import assert_within_budget

SCALING = 0.7
NAMES = ("y", "gx", "gW", "gb", "gA", "gB", "gC")

Results = tuple[Tensor, ...]


def to(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on another device."""
    return Inputs(*(tensor.to(device) for tensor in inputs))


def run(
    inputs: Inputs,
    case: Case,
    backend: str,
    *,
    strategy: str = "auto",
    scaling: float = SCALING,
    dropout_p: float = 0.0,
) -> Results:
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
    inputs: Inputs, case: Case, strategy: str = "row_block", *, dropout_p: float = 0.0
) -> Results:
    """Check all that the kernels compute from `inputs`, and return it."""
    wide = inputs.to(torch.float64)
    squares = Inputs(*(tensor.square() for tensor in wide))
    actual = run(inputs, case, "triton", strategy=strategy, dropout_p=dropout_p)
    results = (
        actual,
        run(inputs, case, "reference", dropout_p=dropout_p),
        run(wide, case, "reference", dropout_p=dropout_p),
        # What is kept counts 1 / (1 - p) times here, and has to count the square of that.
        tuple(
            square.sqrt()
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
