"""What a step needs in addition to time: saved bytes, peak bytes, launches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from benchmarks.speed.timing import Step

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would log every start and stop


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
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        step.run()
    step.release()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
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
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        step.run()
        torch.cuda.synchronize(device)
    step.release()
    events: Iterable[Any] = profiler.events()
    found = sum(
        event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        for event in events
    )
    return found or None  # a driver that records nothing
