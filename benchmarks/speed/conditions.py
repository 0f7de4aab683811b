"""The conditions of a case: threads, gradients, and a busy neighbour."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.speed.cases import Case

# Ends with its parent, also when the parent is killed.
_MULTIPLY = """
import os, numpy
parent, a = os.getppid(), numpy.ones((512, 512), numpy.float32)
a @ a
print("busy", flush=True)
while os.getppid() == parent:
    a @ a
"""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def under(case: Case) -> Iterator[None]:
    """Run the block with the case's threads, and without gradients for inference."""
    before = torch.get_num_threads()
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    try:
        with torch.set_grad_enabled(case.direction != "inference"):
            yield
    finally:
        if case.threads is not None:
            torch.set_num_threads(before)


@contextlib.contextmanager
def busy_neighbour() -> Iterator[subprocess.Popen[str]]:
    """Run the block while another process multiplies matrices in one thread."""
    one_thread = os.environ | dict.fromkeys(_THREADS, "1")
    command = [sys.executable, "-c", _MULTIPLY]
    process = subprocess.Popen(command, env=one_thread, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("the busy neighbour did not start")
        yield process
    finally:
        process.kill()
        process.communicate()
