"""`explain`: which strategy a layer runs with on a GPU, what that is predicted to cost, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dcft_kernels import validation
from dcft_kernels.cost_model import Call, Cost, Estimate, bucket
from dcft_kernels.geometry import Geometry, Pair
from dcft_kernels.gpu_rates import Gpu, identify, lookup, named
from dcft_kernels.precision import tf32_is_allowed
from dcft_kernels.strategy import Candidate, Choice, check_strategy, choose


class Layer(Protocol):
    """What `explain` reads of a layer: `DCFTLinear` has it."""

    in_features: int
    out_features: int
    weight: torch.Tensor
    geometry: Geometry


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """The answer of `explain`; printed, or shown by a Python prompt, it is a short text."""

    call: Call
    tokens: int  # as asked; `call.tokens` is the power of two above
    gpu: Gpu | None
    strategy: str  # what runs
    reason: str  # one sentence
    choice: Choice | None  # None where no strategy had to be chosen

    def __str__(self) -> str:
        lines = [_headline(self.call, self.tokens)]
        if self.gpu is not None:
            lines.append(f"on {self.gpu.name} ({self.call.architecture})")
        lines += ["", f"runs {self.strategy}: {self.reason}"]
        if self.choice is not None and self.gpu is not None:
            lines += ["", *_table(self.choice), "", *_rates(self.gpu, self.call)]
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    layer: Layer | None = None,
    *,
    tokens: int,
    in_features: int | None = None,
    out_features: int | None = None,
    rank: int | None = None,
    kernel_size: int | Pair | None = None,
    stride: int | Pair | None = None,
    dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    dropout: float | None = None,
    strategy: str | None = None,
    device: torch.device | str | None = None,
    gpu: str | None = None,
) -> Explanation:
    """Say which strategy runs, what each is predicted to cost, and why; nothing is run.

        print(explain(layer, tokens=8192))
        print(explain(in_features=4096, out_features=4096, tokens=8192, gpu="H100"))

    Args:
        layer: a `DCFTLinear`, or None and the sizes instead.
        tokens: rows of the input, all its leading dimensions together.
        in_features: `n`; this and what follows up to `dtype` only without a layer.
        out_features: `m`.
        rank: `k`; 1 if not given.
        kernel_size: an int or `(out, in)`; 8 if not given.
        stride: an int or `(out, in)`; the kernel size if not given.
        dtype: of the tokens; bfloat16 if not given. With a layer: autocast's, if not the weight's.
        adapter_dtype: of the factors; float32 if not given.
        dropout: probability; with a layer, the layer's own while it trains.
        strategy: a name of `dcft_kernels.strategy.STRATEGIES`; the layer's own, else `"auto"`.
        device: where the tokens are, such as `"cuda"`; the layer's device, else a GPU if one is
            there.
        gpu: the name of a GPU that need not be there, such as `"H100"`; in place of `device`.

    Raises:
        TypeError: an argument of the wrong type, or one that the layer answers already.
        ValueError: a number out of range, an unknown name, a strategy that cannot run.
    """
    tokens = validation.positive_int("tokens", tokens)
    requested = "auto" if strategy is None else check_strategy(strategy)
    if dtype is not None:
        validation.float_dtype("dtype", dtype)
    sizes = {
        "in_features": in_features,
        "out_features": out_features,
        "rank": rank,
        "kernel_size": kernel_size,
        "stride": stride,
        "adapter_dtype": adapter_dtype,
    }
    settled: tuple[str, str] | None = None
    if layer is None:
        call = _call_of_sizes(sizes, dtype or torch.bfloat16)
        dropped = 0.0 if dropout is None else validation.probability("dropout", dropout)
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        given = [name for name, value in sizes.items() if value is not None]
        if given:
            raise TypeError(f"{given[0]}: the layer has its own; leave it out, or leave out layer")
        call, settled = _call_of_layer(layer, dtype)
        active = getattr(layer, "dropout", 0.0) if getattr(layer, "training", False) else 0.0
        dropped = active if dropout is None else validation.probability("dropout", dropout)
        where = layer.weight.device
        if strategy is None:
            requested = _strategy_of_layer(layer)
    rates, architecture, device_name = _device(gpu, device, where)
    call = call._replace(
        tokens=bucket(tokens),
        architecture=architecture,
        device_name=device_name,
        dropout=dropped > 0.0,
        tf32=tf32_is_allowed(),
    )
    if settled is not None and strategy is None:
        return Explanation(call, tokens, rates, *settled, None)
    choice = choose(call, requested)
    if architecture is None and requested == "auto":
        reason = "the tokens are not on a GPU; gpu='H100' asks what would run on one"
        return Explanation(call, tokens, None, choice.strategy, reason, None)
    return Explanation(call, tokens, rates, choice.strategy, choice.reason, choice)


def _call_of_sizes(sizes: dict[str, Any], dtype: torch.dtype) -> Call:
    """The call that keyword arguments describe, device and tokens left open."""
    for name in ("in_features", "out_features"):
        if sizes[name] is None:
            raise TypeError(f"{name}: missing; pass a layer, or in_features and out_features")
    kernel_size = validation.pair("kernel_size", _default(sizes["kernel_size"], 8))
    geometry = Geometry.build(
        validation.positive_int("in_features", sizes["in_features"]),
        validation.positive_int("out_features", sizes["out_features"]),
        validation.positive_int("rank", _default(sizes["rank"], 1)),
        kernel_size,
        validation.stride_pair(sizes["stride"], kernel_size),
    )
    adapter_dtype = _default(sizes["adapter_dtype"], torch.float32)
    return Call(1, geometry, dtype, validation.float_dtype("adapter_dtype", adapter_dtype), None)


def _call_of_layer(layer: Any, dtype: torch.dtype | None) -> tuple[Call, tuple[str, str] | None]:
    """The call of a layer, and what runs and why if that is settled without a choice."""
    missing = [n for n in ("geometry", "weight", "dcft_A") if not hasattr(layer, n)]
    if missing:
        raise TypeError(
            f"layer: expected a DCFTLinear, got {type(layer).__name__}, which has no {missing[0]}; "
            "for sizes alone pass in_features= and out_features="
        )
    weight = layer.weight
    call = Call(
        1,
        layer.geometry,
        weight.dtype if dtype is None else dtype,
        layer.dcft_A.dtype,
        None,
        weight_trained=weight.requires_grad,
    )
    if getattr(layer, "merged", False):
        return call, ("one plain product", "the layer is merged")
    if getattr(layer, "nonlinearity", None) is not None:
        reason = (
            f"nonlinearity={layer.nonlinearity!r} is between the factors, which no kernel takes"
        )
        return call, ("torch", reason)
    if getattr(layer, "backend", "auto") == "reference":
        return call, ("the reference", "backend='reference' builds DW and knows no strategies")
    return call, None


def _strategy_of_layer(layer: Any) -> str:
    """The strategy that a layer was given; its backend may settle it."""
    if getattr(layer, "backend", "auto") == "torch":
        return "torch"
    return check_strategy(getattr(layer, "strategy", "auto"))


def _device(
    gpu: str | None, device: torch.device | str | None, default: torch.device
) -> tuple[Gpu | None, str | None, str | None]:
    """Rates, architecture and name of the GPU asked about; all None for another device."""
    rates: Gpu | None
    if gpu is not None:
        if not isinstance(gpu, str):
            raise TypeError(f"gpu: expected a name such as 'H100', got {gpu!r}")
        if device is not None:
            raise TypeError("gpu: stands in place of device; pass one of the two")
        rates = named(gpu)
        return rates, rates.architecture, gpu
    where = default if device is None else torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: expected one that is here, got {str(where)!r} and PyTorch finds no GPU; "
            "gpu='H100' asks about one that is not here"
        )
    architecture, name = identify(where)
    rates = None if architecture is None else lookup(name, architecture)
    return rates, architecture, name


def _headline(call: Call, tokens: int) -> str:
    geometry = call.geometry
    parts = [
        f"{tokens} tokens" + (f" (as {call.tokens})" if call.tokens != tokens else ""),
        f"{geometry.inputs.size} -> {geometry.outputs.size}",
        f"rank {geometry.rank}",
        f"kernel {_pair(geometry.outputs.width, geometry.inputs.width)}",
        f"stride {_pair(geometry.outputs.stride, geometry.inputs.stride)}",
        _short(call.dtype),
    ]
    if call.adapter_dtype != call.dtype:
        parts.append(f"{_short(call.adapter_dtype)} adapter")
    parts += ["dropout"] * call.dropout + ["trained weight"] * call.weight_trained
    parts += [] if call.base else ["increment alone"]
    return "DCFT layer: " + ", ".join(parts)


_HEADER = ("", "MB", "launches", "us", "MB", "launches", "us", "us in all", "x frozen", "")
_CHOSEN = "*"


def _table(choice: Choice) -> list[str]:
    """Predicted bytes, launches and time of every strategy, aligned."""
    rows: list[Sequence[str]] = [_HEADER]
    if choice.frozen is not None:
        rows.append(("frozen layer", *_figures(choice.frozen, choice.frozen), ""))
    said = ""
    for candidate in choice.candidates:
        mark = f" {_CHOSEN}" if candidate.strategy == choice.strategy else ""
        *figures, note = _cells(candidate, choice)
        same = note != "" and note == said
        rows.append((candidate.strategy + mark, *figures, "likewise" if same else note))
        said = note
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = ["  ".join(_padded(row, widths)).rstrip() for row in rows]
    # Over each direction's three columns, its name.
    title = " " * (widths[0] + 2) + "forward".ljust(sum(widths[1:4]) + 6) + "backward"
    return [title, *lines]


def _cells(candidate: Candidate, choice: Choice) -> tuple[str, ...]:
    note = candidate.why_not or ""
    if candidate.strategy == choice.strategy and candidate.estimate is not None:
        note = "" if candidate.estimate.exact else "not exact: loses small updates"
    if candidate.estimate is None:
        return (*("-",) * (len(_HEADER) - 2), note)
    return (*_figures(candidate.estimate, choice.frozen), note)


def _figures(estimate: Estimate, frozen: Estimate | None) -> tuple[str, ...]:
    ratio = "-" if frozen is None else f"{estimate.seconds / frozen.seconds:.2f}"
    directions = (*_direction(estimate.forward), *_direction(estimate.backward))
    return (*directions, _microseconds(estimate.seconds), ratio)


def _direction(cost: Cost) -> tuple[str, str, str]:
    if cost.launches == 0:
        return ("-", "-", "-")
    return (f"{cost.bytes / 1e6:,.1f}", str(cost.launches), _microseconds(cost.seconds))


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"


def _padded(row: Sequence[str], widths: list[int]) -> list[str]:
    """Words to the left, figures to the right."""
    last = len(row) - 1
    return [
        cell.ljust(width) if i in (0, last) else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _rates(gpu: Gpu, call: Call) -> list[str]:
    matrix = gpu.matrix_rate(call.dtype, call.tf32)
    name = _short(call.dtype) if call.dtype.itemsize == 2 or not call.tf32 else "tf32"
    return [
        f"predicted with {gpu.bandwidth / 1e12:.2f} TB/s, {matrix / 1e12:.0f} TFLOP/s {name},",
        f"    {gpu.launch_seconds * 1e6:.1f} us from kernel to kernel,",
        f"    {gpu.host_seconds * 1e6:.1f} us of the processor a launch,",
        f"    Triton's matrix product at {gpu.triton_gemm:.2f} of the vendor's speed",
        f"rates of {gpu.name}: {gpu.source}",
    ]


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _pair(first: int, second: int) -> str:
    return f"{first}x{second}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
