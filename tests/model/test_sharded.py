"""Saving and loading with FSDP: two processes on the CPU."""

from __future__ import annotations

import copy
import datetime
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dcft_kernels import (
    adapter_folder,
    freeze_base,
    load_adapter,
    save_adapter,
    small_checkpoints,
    swap_linear,
)

X = torch.linspace(-1, 1, 40).reshape(2, 20)
WORLD = 2


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(20, 17), nn.Tanh(), nn.Linear(17, 20))
        self.head = nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


def _base() -> Network:
    torch.manual_seed(3)
    return Network().eval()


def _adapted(seed: int = 4, *, all_trainable: bool = False) -> Network:
    """A model whose adapters and head are trained."""
    model = _base()
    swap_linear(model, ["block.0", "block.2"], rank=2, kernel_size=(4, 8), init="paper")
    freeze_base(model, trainable=["head"])
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    nn.init.normal_(model.head[0].running_mean)
    return model.requires_grad_(True) if all_trainable else model


def _shard(model: Network, kind: str) -> Any:
    if kind == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32)
        # After a forward pass, the block is left with whole parameters in bfloat16.
        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(model.block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        use_orig_params=kind == "fsdp1",
        auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
        device_id=torch.device("cpu"),
    )


def _content(folder: Path) -> tuple[Any, dict[str, list[float]]]:
    config, tensors = adapter_folder.read(folder)
    names = ("format_version", "layers", "modules_to_save")
    return [config[name] for name in names], {n: t.tolist() for n, t in tensors.items()}


def _in_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", datetime.timedelta(seconds=60), WORLD, rank
    )
    try:
        for kind in ("fsdp1", "fsdp1-flat", "fsdp2"):
            _check_sharded(kind, folder / kind)
        _check_ddp(folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _check_sharded(kind: str, folder: Path) -> None:
    flat = kind == "fsdp1-flat"
    trained = _adapted(all_trainable=flat)
    if dist.get_rank() == 0:
        save_adapter(trained, folder / "bare")
    model = _shard(copy.deepcopy(trained), kind)
    for parts in ("new", "after a forward pass"):
        save_adapter(model, folder / parts)
        assert _content(folder / parts) == _content(folder / "bare"), parts
        with torch.no_grad():
            model(X)
    with small_checkpoints(model):
        assert model.state_dict().keys() == trained.state_dict().keys()
    base = _base()
    load_adapter(base, folder / parts)
    assert torch.equal(base(X), trained(X))

    other = _shard(_adapted(seed=5, all_trainable=flat), kind)
    names = load_adapter(other, folder / "bare")
    assert all(hasattr(other.get_submodule(name), "dcft_A") for name in names)
    save_adapter(other, folder / "loaded")
    assert _content(folder / "loaded") == _content(folder / "bare")
    assert torch.equal(other(X), model(X))

    for read_or_write, error in ((save_adapter, OSError), (load_adapter, FileNotFoundError)):
        with pytest.raises(error):  # on both ranks
            read_or_write(other, folder.parent / "rendezvous")
    with pytest.raises(ValueError, match="load the adapter before sharding the model"):
        load_adapter(_shard(_base(), kind), folder / "bare")


def _check_ddp(folder: Path) -> None:
    trained = _adapted()
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(trained))
    if dist.get_rank() == 0:  # the other rank is not needed
        save_adapter(model, folder / "adapter")
        base = _base()
        load_adapter(base, folder / "adapter")
        assert torch.equal(base(X), trained(X))


def test_sharded_models_save_and_load_whole_values(tmp_path):
    torch.multiprocessing.spawn(_in_process, (tmp_path,), WORLD)
