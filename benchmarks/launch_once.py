"""Launch every kernel a few times at one shape: what a profiler watches.

ncu --csv --kernel-name regex:_kernel python -m benchmarks.launch_once [--shape 8192x4096x4096]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.cases import DTYPES, parse_shape
from benchmarks.kernel_work import KERNELS, Problem
from dcft_kernels import triton

_COLUMNS = 16  # rank 1, kernel size 8
_LAUNCHES = 2  # the first compiles, and finds the caches as the last kernel left them


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_once", description=__doc__)
    parser.add_argument("--shape", default="8192x4096x4096", metavar="TxNxM")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = triton.why_unavailable(device)
    if reason is not None:
        parser.error(reason)
    try:
        shape = parse_shape(options.shape)
    except ValueError as error:
        parser.error(str(error))
    for name, make in KERNELS.items():
        work = make(Problem(shape, _COLUMNS, DTYPES[options.dtype], device, 0))
        for number in range(_LAUNCHES):
            work.launch(number % work.copies)
        print(f"{name}: launched {_LAUNCHES} times")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
