"""The one place that decides how a call is computed.

| `backend` | runs |
| --- | --- |
| `"auto"` | the Triton kernels on a GPU that can run them, `torch` everywhere else |
| `"torch"` | PyTorch operations, on any device |
| `"reference"` | the paper's equation, materialised: the oracle |
| `"triton"` | the Triton kernels; raises, and says why, where they cannot run |

| `strategy` | forward | backward |
| --- | --- | --- |
| `seeded` | a pass over `x`, then a product that carries the adapter | the same over `g` |
| `row_block` | one kernel over rows of `x`, then `y += x W^T` | one over rows of `g`, `gx += g W` |
| `torch` | the adapter as a LoRA of rank `k*d_in`: products, in place where possible | the same |
| `composite` | the same as operations that PyTorch sees and differentiates | PyTorch's own |

`"auto"` runs the kernels wherever they can run on the device (`triton.why_unavailable`) and take
the adapter (`why_kernels_cannot`), and `torch` otherwise; which of the kernels' strategies is
decided for every call (`triton.passes`). There is no silent fallback: what was requested by name
runs or raises. Empty inputs launch no kernel and run in PyTorch.

`composite` cannot be requested. It runs in place of `torch` where a compiler, a tensor subclass,
`torch.func`, `torch.jit.trace`, forward mode or an export has to see through a call (all but
compilers and subclasses in place of the kernels too), and for a layer with a nonlinearity between
its factors, for which `"triton"` and `"reference"` raise (`check_nonlinear`).
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from dcft_kernels.adapter import Adapter, Geometry
from dcft_kernels.nonlinearity import NONLINEARITIES
from dcft_kernels.validation import one_of

BACKENDS = ("auto", "torch", "reference", "triton")
STRATEGIES = ("auto", "seeded", "row_block", "torch")
# What `select` says where the kernels run: a strategy, or that calls choose one.
KERNELS = ("triton", "seeded", "row_block")

_TOKEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 64
_MAX_COLUMNS = 128


def select(
    backend: str,
    adapter: Adapter,
    dtype: torch.dtype,
    strategy: str = "auto",
    nonlinearity: str | None = None,
) -> str:
    """What runs calls of a kind: one of `KERNELS`, `"torch"`, `"composite"` or `"reference"`.

    Args:
        backend: the name that was requested.
        adapter: the call's adapter, checked; its device is the call's.
        dtype: of the tokens, or of the result of `delta_weight`.
        strategy: the strategy that was requested.
        nonlinearity: the name of the function between the factors, or None.

    Raises:
        ValueError: an unknown name, or names that do not go together.
        RuntimeError: what was requested by name cannot run.
    """
    if nonlinearity is not None:
        check_nonlinear(nonlinearity, backend, strategy)
        return "composite"
    one_of("backend", backend, BACKENDS)
    one_of("strategy", strategy, STRATEGIES)
    if backend in ("torch", "reference") and strategy not in ("auto", "torch"):
        raise ValueError(
            f"strategy: {strategy!r} is one of the Triton kernels', got backend={backend!r}; "
            "use backend='auto' or 'triton'"
        )
    if backend == "triton" and strategy == "torch":
        raise ValueError("strategy: 'torch' is not one of backend='triton'; use backend='torch'")
    if backend == "reference":
        return "reference"
    if "torch" in (backend, strategy):
        return "torch"
    reason = why_not_triton(adapter, dtype)
    if reason is None and strategy == "seeded":
        from dcft_kernels.triton import seeded

        rank, outputs, inputs, per_rank = adapter.geometry
        device = adapter.A.device
        reason = seeded.why_not_constant(dtype, device, per_rank, rank, *outputs, *inputs)
    if reason is None:
        return "triton" if strategy == "auto" else strategy
    if strategy != "auto":
        raise RuntimeError(
            f"strategy={strategy!r} cannot run: {reason}; use strategy='auto' or 'torch'"
        )
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {reason}; use backend='auto' or 'torch'")
    return "torch"


def select_for_call(selected: str, backend: str, strategy: str = "auto", *, traced: bool) -> str:
    """What runs this very call: `composite` in place of `selected` where its operations are seen.

    Args:
        selected: what `select` returned.
        backend: the name that was requested, like `strategy`.
        strategy: the strategy that was requested.
        traced: whether a compiler or a tensor subclass has to see the operations.

    Raises:
        RuntimeError: kernels were requested by name for a transform.
    """
    if selected in ("reference", "composite"):
        return selected
    by_name = backend == "triton" or strategy in KERNELS
    if is_transformed():
        if by_name:
            asked = f"{backend=}" if backend == "triton" else f"{strategy=}"
            raise RuntimeError(
                f"{asked}: torch.func, torch.jit.trace and forward mode cannot pass through the "
                "kernels; use backend='auto' or 'torch' with strategy='auto'"
            )
        return "composite"
    # An exported program needs this package only if the kernels were requested by name. (The flag:
    # under torch.compile, torch 2.11 takes is_exporting() to be true.)
    if torch.compiler._is_exporting_flag and not by_name:
        return "composite"
    return "composite" if traced and selected == "torch" else selected


def is_transformed() -> bool:
    """Whether `torch.func`, `torch.jit.trace` or forward mode follows the operations."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._is_tracing() or forward_ad._current_level >= 0


def check_nonlinear(nonlinearity: str, backend: str, strategy: str = "auto") -> None:
    """Check that a layer with a nonlinearity between its factors can run as requested.

    Raises:
        ValueError: an unknown name, or a backend or strategy that does not compute nonlinearities.
    """
    one_of("nonlinearity", nonlinearity, NONLINEARITIES)
    one_of("backend", backend, BACKENDS)
    one_of("strategy", strategy, STRATEGIES)
    if backend in ("triton", "reference"):
        raise ValueError(
            f"backend: {backend!r} does not compute nonlinearity={nonlinearity!r}, PyTorch "
            "operations do; use backend='auto' or 'torch', or leave the nonlinearity out"
        )
    if strategy not in ("auto", "torch"):
        raise ValueError(
            f"strategy: {strategy!r} is one of the Triton kernels', which do not compute "
            f"nonlinearity={nonlinearity!r}; use strategy='auto', or leave the nonlinearity out"
        )


def why_not_triton(adapter: Adapter, dtype: torch.dtype) -> str | None:
    """The reason why `"auto"` runs PyTorch for this call, or None if it runs the kernels."""
    from dcft_kernels.triton import why_unavailable

    reason = why_unavailable(adapter.A.device)
    for factor in adapter[:3]:
        reason = reason or why_kernels_cannot(adapter.geometry, dtype, factor.dtype)
    return reason


def why_kernels_cannot(
    geometry: Geometry, dtype: torch.dtype, adapter_dtype: torch.dtype = torch.float32
) -> str | None:
    """Why the Triton kernels cannot take an adapter, or None if they can: the whole rule."""
    for what, got in (("tokens", dtype), ("factors", adapter_dtype)):
        if got not in _TOKEN_DTYPES:
            short = str(got).removeprefix("torch.")
            return f"the kernels take {what} in float32, bfloat16 or float16, not {short}"
    width = max(geometry.outputs.width, geometry.inputs.width)
    if width > _MAX_WIDTH:
        return f"the kernels take kernel sizes up to {_MAX_WIDTH}, not {width}"
    if geometry.rank * width > _MAX_COLUMNS:
        return (
            f"the kernels take rank * kernel_size up to {_MAX_COLUMNS}, "
            f"not {geometry.rank} * {width} = {geometry.rank * width}"
        )
    return None
