"""Descriptor loads, stores and products of bfloat16, which the interpreter needs repairs for."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conftest import INTERPRETED

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402 - needs Triton


@triton.jit
def _product_kernel(a_desc, b_desc, out_desc, K, BLOCK: tl.constexpr):
    """`out = a b^T` of one tile, all of it through tensor descriptors."""
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        a = a_desc.load([0, k])
        b = b_desc.load([0, k])
        total = tl.dot(a, b.T, total)
    out_desc.store([0, 0], total.to(out_desc.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product_through_descriptors(device: torch.device, dtype: torch.dtype) -> None:
    if not INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need sm_90")
    generator = torch.Generator().manual_seed(0)
    # Small integers: sums are exact in float32. The tile sticks out of every tensor.
    a, b = (
        torch.randint(-4, 5, shape, generator=generator).to(device, dtype)
        for shape in ((13, 40), (24, 40))
    )
    out = torch.full((13, 24), float("nan"), dtype=dtype, device=device)
    block = [32, 32]
    descriptors = [TensorDescriptor.from_tensor(tensor, block) for tensor in (a, b, out)]
    _product_kernel[(1,)](*descriptors, 40, BLOCK=32)
    expected = a.double() @ b.double().t()
    assert torch.equal(out, expected.to(dtype))
