"""Launch every kernel on small shapes, ragged where it takes them: what a sanitizer watches.

    compute-sanitizer --tool memcheck python -m tests.kernels.sanitizer_program

It runs under Triton's interpreter as well, on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcft_kernels import add_delta_weight_, dcft_linear, dcft_update, delta_weight
from dcft_kernels.backends import STRATEGIES
from tests.adapter_cases import AdapterShape, Inputs, random_inputs

RAGGED = AdapterShape(21, 19, 1, (8, 8), (8, 8))
OVERLAP = AdapterShape(20, 17, 2, (5, 7), (2, 3))
TILING = AdapterShape(264, 328, 1, (8, 8), (8, 8))  # what every strategy takes
TOKENS = 37


def main(device: torch.device) -> None:
    """Forward and backward, with and without dropout, and all other kernels."""
    for case, dropout_p in ((RAGGED, 0.0), (RAGGED, 0.3), (OVERLAP, 0.3)):
        inputs = _inputs(case, device)
        y = dcft_linear(*inputs.operands, stride=case.stride, dropout_p=dropout_p, backend="triton")
        _differentiate([y], inputs.operands, [inputs.grad])

    for strategy in STRATEGIES:
        inputs = _inputs(TILING, device)
        try:
            y = dcft_linear(*inputs.operands, stride=TILING.stride, strategy=strategy)
        except RuntimeError as error:
            if "cannot run" not in str(error):
                raise
            print(error)
            continue
        _differentiate([y], inputs.operands, [inputs.grad])

    for case in (RAGGED, OVERLAP):
        inputs = _inputs(case, device)
        factors = (inputs.A, inputs.B, inputs.C)
        y = dcft_update(inputs.grad, inputs.x, *factors, stride=case.stride, backend="triton")
        _differentiate([y], (inputs.x, *factors), [inputs.grad])
        dense = delta_weight(
            *factors,
            in_features=case.in_features,
            out_features=case.out_features,
            stride=case.stride,
            backend="triton",
        )
        _differentiate([dense], factors, [torch.ones_like(dense)])
        for rounding in (False, True):
            weight = inputs.weight.detach().clone()
            add_delta_weight_(
                weight,
                *factors,
                stride=case.stride,
                stochastic_rounding=rounding,
                backend="triton",
            )
            _check([weight])
    if device.type == "cuda":
        torch.cuda.synchronize()


def _inputs(case: AdapterShape, device: torch.device) -> Inputs:
    inputs = random_inputs(case, (TOKENS,), torch.bfloat16, torch.float32)
    return Inputs(*(tensor.to(device) for tensor in inputs)).requiring()


def _differentiate(
    outputs: list[Tensor], operands: tuple[Tensor, ...], grads: list[Tensor]
) -> None:
    _check(outputs)
    _check(torch.autograd.grad(outputs, operands, grads))


def _check(tensors: list[Tensor] | tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise ArithmeticError("a kernel left an element unwritten, or wrote NaN")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print("every kernel ran")
