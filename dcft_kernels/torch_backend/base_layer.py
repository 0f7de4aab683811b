"""The base layer's own backward product, where PyTorch's is not the one to take."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the float32 copy of a block of weight rows: 4 MiB.
_BLOCK_ELEMENTS = 1 << 20

# Below AVX-512, PyTorch has no 16-bit matrix product for the layout of `g @ W` but a scalar loop:
# a frozen layer's step takes some seventy times as long as in float32 (benchmarks/results).
_SLOW_16_BIT = not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def base_grad_input(g: Tensor, weight: Tensor) -> Tensor:
    """`g W`, `[T, n]`, in `g`'s dtype.

    On a CPU without 16-bit products it is computed in float32, a block of rows of `W` at a time,
    and rounded once.

    Args:
        g: `[T, m]`.
        weight: `[m, n]`, in `g`'s dtype.
    """
    if not (_SLOW_16_BIT and g.device.type == "cpu" and g.dtype.itemsize == 2):
        return g @ weight
    total = g.new_zeros(g.shape[0], weight.shape[1], dtype=torch.float32)
    length = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], length):
        block = slice(start, start + length)
        total.addmm_(g[:, block].float(), weight[block].float())
    return total.to(g.dtype)
