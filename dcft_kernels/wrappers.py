"""Names and whole tensors of a model in wrappers: `torch.compile`, DDP, EMA, FSDP and others."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

_Result = TypeVar("_Result")

# The child's name in torch.compile, checkpoint_wrapper and FSDP1.
_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Maps the names of all modules of `model` to their names without wrappers.

    Shared modules have all their names. A wrapper comes before what it wraps, with the same name.
    """
    canonical = {"": ""}
    for name, module in model.named_modules(remove_duplicate=False):
        for child_name, child in module._modules.items():
            if child is not None:
                canonical[join(name, child_name)] = _child(canonical[name], module, child_name)
    return canonical


def strip(name: str) -> str:
    """Remove the names of wrappers from `name`, by the text alone."""
    parts = [part for part in name.split(".") if part not in _INNER]
    while parts and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def join(name: str, child_name: str) -> str:
    """The name of a module's child, parameter or buffer."""
    return f"{name}.{child_name}" if name else child_name


def visit(
    model: nn.Module,
    action: Callable[[str, nn.Module], None],
    *,
    write: bool = False,
    name: str = "",
) -> None:
    """Call `action(name without wrappers, module)` for every module, parents first.

    Shared modules are visited under each name. FSDP1's parameters are gathered meanwhile; with
    `write`, changes to them are kept. For a sharded model, all ranks must call this.
    """
    with _unsharded(model, write):
        if not _is_wrapper(model):
            action(name, model)
        for child_name, child in model._modules.items():
            if child is not None:
                visit(child, action, write=write, name=_child(name, model, child_name))


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of the parameters: FSDP, tensor parallelism."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    units = (fsdp.FullyShardedDataParallel, fsdp.FSDPModule) if fsdp else ()
    return any(isinstance(module, units) for module in model.modules()) or any(
        map(_is_dtensor, model.parameters())
    )


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered if it is a DTensor; then all ranks must call this."""
    if _is_dtensor(tensor):
        # It may be offloaded to the CPU, for which the mesh has no communication backend.
        dtensor: Any = tensor.to(tensor.device_mesh.device_type)  # type: ignore[attr-defined]
        return dtensor.full_tensor()
    return tensor


def copy_whole(tensor: Tensor, values: Tensor) -> None:
    """Copy `values` into `tensor`; into a DTensor, this rank's part of them."""
    if _is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    tensor.copy_(values)


def once(model: nn.Module, action: Callable[[], _Result]) -> _Result:
    """The result of `action`; for a sharded model, all ranks get the result or error of rank 0."""
    if not is_sharded(model):
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _child(name: str, module: nn.Module, child_name: str) -> str:
    return name if _is_wrapper(module) else join(name, child_name)


def _is_wrapper(module: nn.Module) -> bool:
    """Whether `module` only wraps another. DDP, DeepSpeed and EMA call it `module`."""
    if len(module._modules) != 1 or module._parameters:
        return False
    (child_name,) = module._modules
    return child_name in (*_INNER, "module")


def _unsharded(module: nn.Module, write: bool) -> contextlib.AbstractContextManager[Any]:
    """Gathers the parameters of a module of FSDP1; makes those of FSDP2 DTensors."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp and isinstance(module, fsdp.FullyShardedDataParallel):
        # One module at a time: the whole model may not fit in memory.
        return fsdp.FullyShardedDataParallel.summon_full_params(
            module, recurse=False, writeback=write
        )
    if fsdp and isinstance(module, fsdp.FSDPModule):
        # After a forward pass they may be gathered, in the compute dtype.
        module.reshard()
    return contextlib.nullcontext()


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
