"""What a step needs in addition to time: saved bytes, peak bytes, launches."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from benchmarks.speed.timing import Step


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes of all distinct storages that `forward` saves for backward, without `parameters`.

    The input counts: a layer that saves `x` keeps it alive. A saved view counts with its whole
    storage.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # holding it keeps its address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del output
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most bytes that PyTorch's allocator holds during a run, above what it held before."""
    if device.type != "cuda":
        return _peak_bytes_on_cpu(step)
    step.prepare()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step.run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    step.release()
    return peak


def _peak_bytes_on_cpu(step: Step) -> int:
    """From the profiler's record of allocations, which excludes those of other libraries."""
    step.prepare()
    with _profile(torch.profiler.ProfilerActivity.CPU, profile_memory=True) as profiler:
        step.run()
    step.release()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def launches(step: Step, device: torch.device) -> int | None:
    """Kernels that a run launches; None where nothing counts them."""
    if device.type != "cuda":
        return None
    step.prepare()
    torch.cuda.synchronize(device)
    with _profile(torch.profiler.ProfilerActivity.CUDA) as profiler:
        step.run()
        torch.cuda.synchronize(device)
    step.release()
    found = sum(
        event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        for event in profiler.events()
    )
    return found or None  # a driver that records nothing


@contextlib.contextmanager
def _profile(activity: Any, **options: Any) -> Iterator[Any]:
    """PyTorch's profiler, without the lines that it writes to standard error."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with torch.profiler.profile(activities=[activity], acc_events=True, **options) as profiler:
            yield profiler
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
