"""How a call is computed on a GPU: the strategies, what each can take, and the choice among them.

| strategy | forward | backward |
| --- | --- | --- |
| `row_block` | one kernel over rows of `x`, then `y += x W^T` | one over rows of `g`, `gx += g W` |
| `fused` | one matrix product, adapter inside | the same, and gradients in it or in one more |
| `scratch` | `W + s DW` to a buffer, then a product | likewise, and one kernel for gradients |
| `torch` | the factored identity as PyTorch operators | likewise |

Large shapes suit `row_block`, whose products are the vendor's; small ones `fused`, which launches
least; `torch` takes what the kernels cannot. `"auto"` takes of these three the one that
`dcft_kernels.cost_model` predicts to be quickest; `backend="triton"`, of the first two. `scratch`
has to be asked for: its buffer is as
large as `W`, and in 16 bit `W + s DW` loses every update below half a unit in the last place of
`W`, so it is not exact.

The environment variable `DCFT_STRATEGY` takes the place of `"auto"` wherever kernels can run.
"""

from __future__ import annotations

import functools
import os
from typing import Literal, NamedTuple, get_args

import torch

from dcft_kernels.cost_model import Call, Estimate, bucket, estimate, ranks_of_a_launch
from dcft_kernels.geometry import Geometry
from dcft_kernels.gpu_rates import INTERPRETER, lookup

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "STRATEGIES",
    "Call",
    "Candidate",
    "Choice",
    "StrategyName",
    "bucket",
    "check_strategy",
    "choose",
    "requested_strategy",
    "why_kernels_cannot",
    "why_strategy_cannot",
]

StrategyName = Literal["auto", "row_block", "fused", "scratch", "torch"]
STRATEGIES: tuple[str, ...] = get_args(StrategyName)
ENVIRONMENT_VARIABLE = "DCFT_STRATEGY"

_TOKEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_WIDTH = 64
_MOST_COLUMNS = 128


class Candidate(NamedTuple):
    """A strategy in a choice: what it costs, and why it was out of the question, if it was."""

    strategy: str
    estimate: Estimate | None  # None if it cannot run, or there are no rates
    why_not: str | None  # None: `auto` may choose it


class Choice(NamedTuple):
    """The strategy that runs, what each was predicted to cost, and why."""

    strategy: str
    candidates: tuple[Candidate, ...]
    frozen: Estimate | None  # the base layer alone; None without a base or without rates
    reason: str  # one sentence

    @property
    def estimate(self) -> Estimate | None:
        """The chosen strategy's."""
        return self.candidate(self.strategy).estimate

    def candidate(self, strategy: str) -> Candidate:
        """A strategy by name."""
        return next(c for c in self.candidates if c.strategy == strategy)


def check_strategy(strategy: object, name: str = "strategy") -> str:
    """`strategy` as a known name; ValueError says where it came from and what is known."""
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}"
        )
    return strategy


def requested_strategy(strategy: str) -> tuple[str, str]:
    """The strategy asked for, and by what: the argument, or the environment where it is `auto`.

    Raises:
        ValueError: an unknown name.
    """
    check_strategy(strategy)
    if strategy != "auto":
        return strategy, "strategy"
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if not value:
        return "auto", "strategy"
    return check_strategy(value, ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE


@functools.cache
def why_kernels_cannot(
    geometry: Geometry, dtype: torch.dtype, adapter_dtype: torch.dtype = torch.float32
) -> str | None:
    """Why the Triton kernels cannot take an adapter, or None if they can.

    This is the whole rule; they take

    - tokens in float32, bfloat16 or float16;
    - factors in any of these, the same or another;
    - kernel sizes up to 64;
    - rank times the larger kernel size up to 128.

    What they cannot take goes to `torch` under `"auto"`, and is an error where asked for by name.
    """
    for what, got in (("tokens", dtype), ("factors", adapter_dtype)):
        if got not in _TOKEN_DTYPES:
            return f"the kernels take {what} in float32, bfloat16 or float16, not {_short(got)}"
    width = max(geometry.outputs.width, geometry.inputs.width)
    if width > _MOST_WIDTH:
        return f"the kernels take kernel sizes up to {_MOST_WIDTH}, not {width}"
    if geometry.rank * width > _MOST_COLUMNS:
        return (
            f"the kernels take rank * kernel_size up to {_MOST_COLUMNS}, "
            f"not {geometry.rank} * {width} = {geometry.rank * width}"
        )
    return None


@functools.cache
def why_strategy_cannot(strategy: str, call: Call) -> str | None:
    """Why a strategy cannot run a call, or None if it can; `torch` and `auto` always can."""
    if strategy == "torch" and call.kernels_only:
        return "backend='triton' was asked for"
    if strategy in ("auto", "torch"):
        return None
    if call.architecture is None:
        return "the tokens are not on a GPU"
    reason = why_kernels_cannot(call.geometry, call.dtype, call.adapter_dtype)
    if reason is not None or strategy == "row_block":
        return reason
    if not call.base:
        return f"{strategy} computes the base layer as well, and this call has none"
    if strategy == "scratch":
        if call.dropout:
            return "dropout acts on the adapter's input alone, which one product cannot tell apart"
        return None
    rank, outputs, inputs = call.geometry
    most = ranks_of_a_launch(call.geometry, call.dtype.itemsize)
    if rank > most:
        return f"fused takes what one launch holds, here a rank of {most}, not {rank}"
    if outputs.stride != outputs.width or inputs.stride != inputs.width:
        return (
            "fused takes windows that do not overlap, stride == kernel_size, not "
            f"stride {(outputs.stride, inputs.stride)} under {(outputs.width, inputs.width)}"
        )
    return None


def choose(call: Call, requested: str = "auto") -> Choice:
    """The strategy for a call; the same call is decided once.

    Args:
        call: what is to be computed, its tokens rounded up by `bucket`.
        requested: a name of `STRATEGIES`; `DCFT_STRATEGY` takes the place of `"auto"`.

    Raises:
        ValueError: an unknown name, or a strategy asked for by name that cannot run.
    """
    strategy, source = requested_strategy(requested)
    return _choose(call, strategy, source)


@functools.cache
def _choose(call: Call, requested: str, source: str) -> Choice:
    impossible = why_strategy_cannot(requested, call)
    if impossible is not None:
        way_out = "unset it" if source == ENVIRONMENT_VARIABLE else "use auto"
        if not call.kernels_only:
            way_out += ", or use 'torch'"
        raise ValueError(f"{source}: {requested!r} cannot run here: {impossible}; {way_out}")
    candidates = tuple(_candidate(name, call) for name in STRATEGIES if name != "auto")
    frozen = None
    if _predictable(call) and call.base:
        frozen = _estimate("frozen", call)
    if requested != "auto":
        return Choice(requested, candidates, frozen, f"asked for by {source}={requested!r}")
    open_to_auto = [c for c in candidates if c.why_not is None]
    if len(open_to_auto) == 1:
        reason = candidates[0].why_not or "nothing else can run"
        return Choice(open_to_auto[0].strategy, candidates, frozen, reason)
    best, second = sorted(open_to_auto, key=_seconds)[:2]
    reason = (
        f"the quickest by prediction: {_seconds(best) * 1e6:.0f} us, "
        f"{second.strategy} {_seconds(second) * 1e6:.0f} us"
    )
    return Choice(best.strategy, candidates, frozen, reason)


def _candidate(strategy: str, call: Call) -> Candidate:
    why_not = why_strategy_cannot(strategy, call)
    if why_not is not None or not _predictable(call):
        return Candidate(strategy, None, why_not)
    predicted = _estimate(strategy, call)
    if strategy == "scratch":
        why_not = (
            "only if asked for: a buffer of the size of W"
            if predicted.exact
            else f"only if asked for: W + s DW in {_short(call.dtype)} loses small updates"
        )
    return Candidate(strategy, predicted, why_not)


def _predictable(call: Call) -> bool:
    """Whether there are rates: of a GPU, and for the dtype."""
    return call.architecture is not None and call.dtype in _TOKEN_DTYPES


def _estimate(strategy: str, call: Call) -> Estimate:
    return estimate(strategy, call, lookup(call.device_name, call.architecture or INTERPRETER))


def _seconds(candidate: Candidate) -> float:
    if candidate.estimate is None:
        raise ValueError(f"{candidate.strategy}: has no estimate")
    return candidate.estimate.seconds


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
