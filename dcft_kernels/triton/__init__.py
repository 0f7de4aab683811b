"""Triton kernels for DCFT, and whether they can run here.

The folder shadows the name `triton` only for scripts run from inside it: kernels import the
compiler absolutely (`import triton`), and the package never binds this module at its top level.
Nothing is imported from Triton until a call on a GPU asks for a kernel.
"""

from __future__ import annotations

import functools
import os

import torch

# The oldest version that the kernels are tested with.
OLDEST_TRITON = (3, 6)
# Asynchronous copies and bfloat16 matrix instructions.
OLDEST_CAPABILITY = (8, 0)
# AMD architectures that the tiles are made for.
AMD_ARCHITECTURES = ("gfx942", "gfx950")


def why_unavailable(device: torch.device) -> str | None:
    """The reason why Triton kernels cannot run on `device`, or None if they can."""
    return _why_unavailable(device)


# The compiler takes the result as a constant. `torch.compiler.assume_constant_result` does this too
# but imports the compiler, which would delay the first eager call by seconds.
why_unavailable._dynamo_marked_constant = True


@functools.cache
def _why_unavailable(device: torch.device) -> str | None:
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type!r}, and Triton kernels need a GPU"
    try:
        import triton
    except ImportError as error:
        return f"the package triton cannot be imported ({error}); on Linux: pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {triton.__version__} is too old; pip install 'triton>={oldest}'"
    if interpreted:
        return None
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        if name.startswith(AMD_ARCHITECTURES):
            return None
        known = ", ".join(AMD_ARCHITECTURES)
        return f"{name} is not one of the AMD architectures that the kernels are for: {known}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and the kernels need {oldest} or newer"
        )
    return None
