"""Which kernels does a step run, and how long do they take? `python -m benchmarks.speed.profile`.

Profiles forward and backward of one layer by every strategy and its peers. Each kernel is a line of
`profile.jsonl` with its device time, or on a CPU its operator's. `--once` runs a step of every
strategy without PyTorch's profiler, to be watched by another one.
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
from benchmarks.speed.cases import Case
from benchmarks.speed.levels.layer import LayerProblem, providers_of
from benchmarks.speed.provider import why_unavailable
from benchmarks.speed.smoke import SHAPES, TINY_SHAPES
from benchmarks.speed.timing import warm_up

PROFILE_FILE = "profile.jsonl"
_PEERS = ("frozen", "lora_by_hand", "lora_r8")
_STEPS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.profile", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help=f"for {PROFILE_FILE}"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--once", action="store_true", help="run every strategy, store nothing")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    strategies = [f"dcft_{name}" for name in methods.STRATEGIES]
    peers = () if options.once else _PEERS
    described = vars(environment.describe(device.type))
    for T, n, m in TINY_SHAPES if options.tiny else SHAPES:
        case = Case("layer", T, n, m, "bf16" if gpu else "fp32")
        problem = LayerProblem(case, device)
        for provider in providers_of(methods.by_name(*strategies, *peers)):
            step = provider.build(problem).step
            try:
                warm_up(step)
            except RuntimeError as error:
                if why_unavailable(error) is None:
                    raise
                print(case.shape, provider.key, error, flush=True)
                continue
            if options.once:
                continue
            activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
            with torch.profiler.profile(activities=[activity]) as profiler:
                for _ in range(_STEPS):
                    warm_up(step)
            for event in profiler.key_averages():
                average: Any = event
                total = average.self_device_time_total if gpu else average.self_cpu_time_total
                found = {
                    "shape": case.shape,
                    "provider": provider.key,
                    "kernel": average.key,
                    "calls": average.count / _STEPS,
                    "microseconds": total / _STEPS,
                }
                if total:
                    print(*found.values(), flush=True)
                    rows.append_line(options.out / PROFILE_FILE, found | described)
    return 0


if __name__ == "__main__":
    sys.exit(main())
