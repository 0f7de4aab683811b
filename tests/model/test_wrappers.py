"""Adapters of compiled, parallel, averaged and checkpointed models load into bare ones and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from dcft_kernels import (
    DCFTLinear,
    adapter_folder,
    freeze_base,
    load_adapter,
    save_adapter,
    swap_linear,
)

X = torch.linspace(-1, 1, 24).reshape(2, 12)
LAYERS = ["blocks.0.query", "blocks.0.module", "blocks.1.query", "blocks.1.module"]


class Block(nn.Module):
    """Has a child with the name that DDP gives to the model that it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.module = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(self.query(x).tanh())


class Residual(nn.Module):
    """Holds one module, as wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def _adapted(base: Network) -> Network:
    model = copy.deepcopy(base)
    assert swap_linear(model, ["query", "module"], rank=2) == LAYERS
    freeze_base(model, trainable=["head"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def _each(wrap: Callable[..., nn.Module], *names: str) -> Callable[[nn.Module], nn.Module]:
    def wrap_each(model: nn.Module) -> nn.Module:
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wrap(model.get_submodule(name)))
        return model

    return wrap_each


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


BLOCKS = ("blocks.0", "blocks.1")
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": _compiled,
    "compiled-blocks": _each(_compiled, *BLOCKS),
    "compiled-layers": _each(_compiled, *LAYERS, "head"),
    "checkpointed-layers": _each(checkpoint_wrapper, *LAYERS),
    "averaged": AveragedModel,
    "ddp": nn.parallel.DistributedDataParallel,
    "nested": lambda model: _compiled(
        nn.parallel.DistributedDataParallel(
            _each(lambda block: _compiled(checkpoint_wrapper(block)), *BLOCKS)(model)
        )
    ),
    "own": _each(Residual, *BLOCKS),
}


@pytest.fixture(autouse=True)
def _process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", world_size=1, rank=0)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_and_bare_models_load_each_others_files(wrap, tmp_path):
    base = Network()
    bare = _adapted(base)
    wrapped = wrap(copy.deepcopy(bare))
    save_adapter(bare, tmp_path / "bare")
    save_adapter(wrapped, tmp_path / "wrapped")
    config, tensors = adapter_folder.read(tmp_path / "wrapped")
    assert list(config["layers"]) == LAYERS
    assert config["modules_to_save"] == ["head.bias", "head.weight"]
    # Version 5f5390c wrote the names that the wrapped model has, and no head.
    actual = [name for name, m in wrapped.named_modules() if isinstance(m, DCFTLinear)]
    records = dict(zip(actual, config["layers"].values(), strict=True))
    factors = {
        f"{name}.dcft_{factor}": tensors[f"{layer}.dcft_{factor}"]
        for name, layer in zip(actual, LAYERS, strict=True)
        for factor in "ABC"
    }
    adapter_folder.write(tmp_path / "old", {"format_version": 1, "layers": records}, factors)

    own = wrap is WRAPPERS["own"]
    for folder in ("bare", "wrapped", "old"):
        for make, expected in ((copy.deepcopy, bare(X)), (wrap, wrapped(X))):
            if (folder, make, own) == ("old", copy.deepcopy, True):
                continue  # a name in the middle of names can be anybody's
            for target in (copy.deepcopy(base), _adapted(base)):
                if folder == "old":
                    target.head = copy.deepcopy(bare.head)
                target = make(target)
                names = load_adapter(target, tmp_path / folder)
                assert all(isinstance(target.get_submodule(n), DCFTLinear) for n in names)
                assert len(names) == len(LAYERS)
                assert torch.equal(target(X), expected)


def test_names_that_only_look_wrapped_are_not_taken_for_another_layer(tmp_path):
    """Without `module.`, the second layer of the file would be the first."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "module": nn.ModuleDict({"a": nn.Linear(8, 8)})})
    swap_linear(model)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"module\.a: not in the model"):
        load_adapter(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}), tmp_path)


def test_a_module_with_parameters_of_its_own_is_no_wrapper(tmp_path):
    class Scaled(Residual):
        def __init__(self) -> None:
            super().__init__(nn.Linear(12, 12, bias=False))
            self.weight = nn.Parameter(torch.ones(12))

    model = nn.ModuleDict({"query": nn.Linear(12, 12), "scaled": Scaled()})
    swap_linear(model, "query")
    freeze_base(model, trainable="scaled")
    save_adapter(model, tmp_path)
    config, _ = adapter_folder.read(tmp_path)
    assert config["modules_to_save"] == ["scaled.module.weight", "scaled.weight"]
