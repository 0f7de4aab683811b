"""The error that a backend may make, derived from what PyTorch itself makes in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, peer: Tensor, truth: Tensor, size: Tensor, dtype: torch.dtype, what: str
) -> None:
    """Check `actual` against the float64 `truth`, with the error of `peer` as the measure.

    Allowed is twice the error of `peer`, the reference run in the dtypes under test, plus a few
    roundings: of a result that sums many products, `size` is how large such a sum of random signs
    would be (the root of the sum of their squares; the sum itself may cancel). One rounding of it
    is allowed in the RMS (fewer than 16 values are too few to be meaningful), four in the maximum.
    No wider dtype can judge float64, whose truth is rounded too: it is allowed 64 roundings.

    Args:
        actual: the result under test.
        peer: the reference's result in the same dtypes.
        truth: the reference's result in float64.
        size: the root of the reference's result in float64 for squared inputs.
        dtype: the narrowest dtype in the computation.
        what: the name of the result, for the message.
    """
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
    assert actual.dtype == peer.dtype, f"{what}: dtype {actual.dtype}, expected {peer.dtype}"
    if truth.numel() == 0:
        return
    rounding = torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 1)
    error = (actual.double() - truth).abs()
    peer_error = (peer.double() - truth).abs()
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), truth.shape))
    allowed = 2 * float(peer_error.max()) + 4 * rounding * float(size.max())
    # Written so that a NaN fails.
    assert float(error.max()) <= allowed, (
        f"{what}: error {float(error.max()):.3e} over the budget {allowed:.3e} at {where}: "
        f"got {float(actual[where]):.9g}, expected {float(truth[where]):.9g}"
    )
    if truth.numel() < 16:
        return
    allowed = 2 * _rms(peer_error) + rounding * _rms(size)
    assert _rms(error) <= allowed, (
        f"{what}: RMS error {_rms(error):.3e} over the budget {allowed:.3e}; worst at {where}"
    )


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
