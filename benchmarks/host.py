"""What the processor does in a call of a layer: `python -m benchmarks.host [--out FOLDER]`.

Without a GPU: launches are dropped (`absent_gpu`), so nothing is computed but PyTorch's own
products, of tiny tensors. Whether prepared launches are the right ones is what
`tests/test_launching.py` shows. On a GPU, the clock `host` of every other benchmark is this share.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import adapters, environment
from benchmarks.absent_gpu import TARGETS, dropping
from benchmarks.host_rows import FILE, table
from benchmarks.rows import append_line
from benchmarks.timing import order

PROVIDERS = (
    "frozen", "lora_autograd", "lora_r8", "dcft_row_block", "dcft_fused", "dcft_torch",
)  # fmt: skip
DIRECTIONS = ("forward without gradients", "forward", "forward + backward")
_SHAPES = {"16x64": (16, 64), "2x8x64": (2, 8, 64)}
_FEATURES = 64
_CALLS = 20  # in a sample, so that the clock's own time does not count

Call = Callable[[], object]


def call(layer: nn.Module, direction: str, shape: tuple[int, ...]) -> Call:
    """One call of a layer; gradients are None before each, as after `zero_grad`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_()
    g = torch.randn(shape, generator=generator)
    trained: list[Tensor] = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def forward() -> None:
        layer(x)

    def without_gradients() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        layer(x).backward(g)
        for tensor in trained:
            tensor.grad = None

    return dict(zip(DIRECTIONS, (without_gradients, forward, both), strict=True))[direction]


def seconds(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """The least processor time of a call of each, over interleaved rounds."""
    found = dict.fromkeys(calls, float("inf"))
    for each in calls.values():
        for _ in range(_CALLS):
            each()
    for number in range(rounds):
        for name in order(list(calls), number):
            each = calls[name]
            start = time.process_time()
            for _ in range(_CALLS):
                each()
            found[name] = min(found[name], (time.process_time() - start) / _CALLS)
    return found


def measure(architecture: str, rounds: int, providers: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every shape, direction and provider."""
    rows = []
    described = environment.describe("cpu")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for shape in _SHAPES:
        for direction in DIRECTIONS:
            calls: dict[str, Call] = {}
            for kind in adapters.by_name(*providers):
                base = nn.Linear(_FEATURES, _FEATURES).requires_grad_(False)
                layer = kind.layer(base, torch.Generator().manual_seed(0)).layer
                calls[kind.name] = call(layer, direction, _SHAPES[shape])
            for name, least in seconds(calls, rounds).items():
                rows.append(
                    {
                        "provider": name,
                        "direction": direction,
                        "x": shape,
                        "dtype": "fp32",
                        "microseconds": round(least * 1e6, 1),
                        "rounds": rounds,
                        "architecture": architecture,
                        "device": described.device,
                        "torch": described.torch,
                        "triton": described.triton,
                        "peft": described.peft,
                        "commit": described.commit,
                        "time": started,
                    }
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and store; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the device's under results")
    parser.add_argument("--rounds", type=int, default=300, help="interleaved samples (300)")
    parser.add_argument(
        "--architecture", choices=TARGETS, default="sm_90", help="to compile for (sm_90)"
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    out = options.out or environment.RESULTS / environment.describe("cpu").slug
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take processor time
    collects = gc.isenabled()
    gc.disable()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(dropping(options.architecture))
            rows = measure(options.architecture, options.rounds, options.providers)
    except RuntimeError as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()
    print(table(rows))
    for row in rows:
        append_line(out / FILE, row)
    print(f"rows: {out / FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
