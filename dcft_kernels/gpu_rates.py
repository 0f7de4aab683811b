"""What GPUs can do: the rates that predictions of `dcft_kernels.cost_model` rest on.

`gpu_rates.json` has one entry a GPU, named by a part of the name that the driver gives it. Every
entry says in `source` where its numbers come from: most are data-sheet peaks times a factor for
what programs reach. `python -m benchmarks.tune` measures the GPU it runs on and adds an entry under
the GPU's full name, which is then the one that is found.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("gpu_rates.json")

# Whose rates stand in where kernels run on CPU tensors under Triton's interpreter: the choice of a
# strategy is then that of a GPU.
INTERPRETER = "interpreter"
_STAND_IN = "H100"


class Gpu(NamedTuple):
    """The rates of one GPU, as programs reach them."""

    name: str
    architecture: str  # "sm_90", "gfx942"
    multiprocessors: int
    bandwidth: float  # bytes/s of the memory, reads and writes together
    matrix_16: float  # flop/s of the vendor's matrix product: bfloat16 and float16
    matrix_tf32: float  # float32 where PyTorch allows tf32
    matrix_fp32: float  # float32 where it does not
    triton_gemm: float  # speed of this package's matrix product, over the vendor's
    launch_seconds: float  # from the end of a kernel to the start of the next one in the queue
    host_seconds: float  # what the processor needs to enqueue an operator, without a CUDA graph
    source: str

    def matrix_rate(self, dtype: torch.dtype, tf32: bool) -> float:
        """Flop/s of the vendor's matrix product of tokens in `dtype`."""
        if dtype.itemsize == 2:
            return self.matrix_16
        return self.matrix_tf32 if tf32 else self.matrix_fp32


def from_entry(name: str, entry: dict[str, Any]) -> Gpu:
    """The `Gpu` of an entry of the table, in SI units."""
    flops = entry["teraflops"]
    return Gpu(
        name,
        entry["architecture"],
        entry["multiprocessors"],
        entry["terabytes_per_second"] * 1e12,
        flops["16"] * 1e12,
        flops["tf32"] * 1e12,
        flops["fp32"] * 1e12,
        entry["triton_gemm"],
        entry["launch_microseconds"] * 1e-6,
        entry["host_microseconds"] * 1e-6,
        entry["source"],
    )


@functools.lru_cache(maxsize=1)
def table() -> dict[str, Gpu]:
    """All GPUs that have an entry, by name."""
    with TABLE.open(encoding="utf-8") as file:
        return {name: from_entry(name, entry) for name, entry in json.load(file).items()}


def named(name: str) -> Gpu:
    """The GPU of a name as users or drivers write it: "H100", "NVIDIA A100-SXM4-80GB".

    Raises:
        ValueError: there is no entry for it.
    """
    found = _match(name)
    if found is None:
        raise ValueError(f"gpu: expected one of {', '.join(table())}, got {name!r}")
    return found


@functools.cache
def lookup(device_name: str | None, architecture: str) -> Gpu:
    """The rates for a device: by its name, else by its architecture, else by the nearest older one.

    Args:
        device_name: as the driver says it; None if unknown.
        architecture: "sm_90", "gfx942", or `INTERPRETER`.

    Raises:
        ValueError: an architecture of an unknown kind.
    """
    found = None if device_name is None else _match(device_name)
    if found is not None:
        return found
    if architecture == INTERPRETER:
        return table()[_STAND_IN]
    gpus = list(table().values())
    if architecture.startswith("gfx"):
        return next(gpu for gpu in gpus if gpu.architecture.startswith("gfx"))
    generation = _generation(architecture)
    if generation is None:
        raise ValueError(
            f"architecture: expected 'sm_<number>', 'gfx<number>' or {INTERPRETER!r}, "
            f"got {architecture!r}"
        )
    known = [g for gpu in gpus if (g := _generation(gpu.architecture)) is not None]
    nearest = max([g for g in known if g <= generation], default=min(known))
    return next(gpu for gpu in gpus if _generation(gpu.architecture) == nearest)


class Device(NamedTuple):
    """How a device is called: by its architecture and by its driver."""

    architecture: str | None  # None: not a GPU
    name: str | None


def identify(device: torch.device) -> Device:
    """The names of a device, asked of the driver once."""
    if device.type != "cuda":
        return Device(None, None)
    index: int | None = device.index
    return _identify(torch.cuda.current_device() if index is None else index)


@functools.cache
def _identify(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Device(properties.gcnArchName.split(":")[0], properties.name)
    return Device(f"sm_{properties.major}{properties.minor}", properties.name)


def _match(device_name: str) -> Gpu | None:
    """The entry whose name is the longest of those that the device's name contains."""
    words = f" {_normalised(device_name)} "
    names = [name for name in table() if f" {_normalised(name)} " in words]
    return table()[max(names, key=len)] if names else None


def _normalised(name: str) -> str:
    """Lower case, words parted by one space: "L40S" must not be taken for "L4"."""
    return " ".join(name.lower().replace("-", " ").split())


def _generation(architecture: str) -> int | None:
    number = architecture.removeprefix("sm_")
    return int(number) if architecture.startswith("sm_") and number.isdigit() else None
