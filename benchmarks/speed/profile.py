"""Which kernels does a step run, and how long do they take? `python -m benchmarks.speed.profile`.

Profiles forward and backward of one layer, for DCFT by each strategy and for its peers. Each kernel
is a line of `profile.jsonl`: its device time, or on a CPU each operator's own time. A profiler from
outside can watch `--once`, which runs every step once without PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks import environment, rows
from benchmarks.speed import methods
from benchmarks.speed.cases import Case, parse_shape
from benchmarks.speed.levels.layer import LayerProblem, providers_of
from benchmarks.speed.provider import BASELINE, UnavailableError
from benchmarks.speed.timing import Step, warm_up

FILE = "profile.jsonl"
METHODS = (BASELINE, "dcft_row_block", "dcft_torch", "lora_by_hand", "lora_r8")
SHAPES = ("8192x4096x4096", "4096x768x768")
_STEPS = 5


def kernels(step: Step, device: torch.device) -> list[dict[str, Any]]:
    """Name, calls per step and microseconds per step of every kernel, the longest first."""
    gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(_STEPS):
            warm_up(step)
    found = []
    for event in profiler.key_averages():
        average: Any = event
        total = average.self_device_time_total if gpu else average.self_cpu_time_total
        if total:
            calls, microseconds = average.count / _STEPS, total / _STEPS
            found.append({"kernel": event.key, "calls": calls, "microseconds": microseconds})
    return sorted(found, key=lambda kernel: -kernel["microseconds"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.profile", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"for {FILE}")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="TxNxM")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME")
    parser.add_argument("--once", action="store_true", help="run the steps once, store nothing")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = environment.describe(device.type)
    dtype = "bf16" if device.type == "cuda" else "fp32"
    for text in options.shapes:
        case = Case("layer", *parse_shape(text), dtype)
        problem = LayerProblem(case, device)
        for provider in providers_of(methods.by_name(*options.methods)):
            try:
                step = provider.build(problem).step
            except UnavailableError as error:
                print(f"{case.shape} {provider.key}: {error}")
                continue
            warm_up(step)
            if options.once:
                continue
            for kernel in kernels(step, device):
                line = "{microseconds:10.1f} us  {calls:5.1f} x  {kernel:.80}".format(**kernel)
                print(f"{case.shape} {provider.key}: {line}", flush=True)
                row = {"shape": case.shape, "dtype": dtype, "provider": provider.key, **kernel}
                rows.append_line(options.out / FILE, row | vars(described))
    return 0


if __name__ == "__main__":
    sys.exit(main())
