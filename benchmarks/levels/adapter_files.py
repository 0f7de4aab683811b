"""The load level: an adapter of a whole model to a file and back.

The file lies in a temporary folder, so its pages stay in the operating system's cache: what is
timed is the library, not a disk.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adapters.packages import required
from benchmarks.cases import Case, Scope
from benchmarks.entries import Entry, Subject
from benchmarks.model_layers import linear_shapes
from dcft_kernels import load_adapter, save_adapter, swap_linear

# Layers of one input that a model has, without the work that they are for: only names and shapes of
# adapters count here. Bases are of one element a row, which no adapter file holds.


def cases(scope: Scope) -> list[Case]:
    """Whole models; Llama's on request."""
    if scope.tiny:
        names: tuple[str, ...] = ("tiny-bert",)
    else:
        names = ("deberta-v3-base", "roberta-large") if scope.full else ("deberta-v3-base",)
    return [
        Case("load", None, None, None, "fp32", direction, name)
        for name in names
        for direction in ("save", "load")
    ]


@dataclass
class FilesProblem:
    """A stack of layers with the shapes of a model's."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        self.shapes = linear_shapes(self.case.model or "")

    def model(self) -> nn.Module:
        """A new model, its weights uninitialised: an adapter's file does not depend on them."""
        layers = {}
        for index, (n, m) in enumerate(self.shapes):
            with torch.device("meta"):
                linear = nn.Linear(n, m, bias=False)
            linear.weight = nn.Parameter(
                torch.zeros(1, 1, device=self.device).expand(m, n), requires_grad=False
            )
            layers[f"layer_{index}"] = linear
        return nn.ModuleDict(layers)


class _FileStep:
    """Saves from one model, or loads into a new one; the folder is new every time."""

    def __init__(
        self,
        direction: str,
        source: nn.Module,
        fresh: Callable[[], nn.Module],
        save: Callable[[nn.Module, Path], None],
        load: Callable[[nn.Module, Path], nn.Module],
    ) -> None:
        self.direction = direction
        self.source, self._fresh, self._save, self._load = source, fresh, save, load
        self.loaded: nn.Module | None = None
        self._root = Path(tempfile.mkdtemp(prefix="dcft_benchmark_"))
        self._folder = self._root / "adapter"
        self._target: nn.Module | None = None

    def prepare(self) -> None:
        self.release()
        if self.direction == "load":
            self._save(self.source, self._folder)
            self._target = self._fresh()

    def run(self) -> None:
        if self.direction == "save":
            self._save(self.source, self._folder)
        else:
            assert self._target is not None
            self.loaded = self._load(self._target, self._folder)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # loaded is what has arrived

    def release(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._target = self.loaded = None

    def restored(self) -> nn.Module:
        """What the file holds, in a model."""
        if self.loaded is not None:
            return self.loaded
        return self._load(self._fresh(), self._folder)

    def size(self) -> int:
        """Bytes of the adapter's files."""
        return sum(f.stat().st_size for f in self._folder.rglob("*") if f.is_file())

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


def _subject(problem: FilesProblem, ways: Callable[[FilesProblem], _Ways]) -> Subject:
    prepare, save, load, adapter = ways(problem)
    source = prepare(problem.model())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapter(source).values():
            value.copy_(torch.randn(value.shape, generator=generator))
    step = _FileStep(problem.case.direction, source, problem.model, save, load)

    def check() -> str | None:
        expected, found = adapter(source), adapter(step.restored())
        if set(expected) != set(found):
            return f"expected {len(expected)} tensors of these names, got {len(found)}"
        wrong = [name for name in expected if not torch.equal(expected[name], found[name])]
        return f"{wrong[0]} differs from what was saved" if wrong else None

    step.prepare()
    save(source, step._folder)
    size = step.size()
    step.release()
    return Subject(step, check, moved_bytes=size, on_host=True, close=step.close)


_Ways = tuple[
    Callable[[nn.Module], nn.Module],  # adapt a model
    Callable[[nn.Module, Path], None],  # save its adapter
    Callable[[nn.Module, Path], nn.Module],  # load an adapter into a model
    Callable[[nn.Module], Mapping[str, Tensor]],  # the adapter's tensors
]


def _dcft(problem: FilesProblem) -> _Ways:
    def adapt(model: nn.Module) -> nn.Module:
        swap_linear(model)
        return model

    def load(model: nn.Module, folder: Path) -> nn.Module:
        load_adapter(model, folder)
        return model

    def tensors(model: nn.Module) -> Mapping[str, Tensor]:
        return {name: p for name, p in model.named_parameters() if "dcft_" in name}

    return adapt, save_adapter, load, tensors


def _lora(problem: FilesProblem, *, rank: int) -> _Ways:
    peft = required("peft")
    targets = [f"layer_{index}" for index in range(len(problem.shapes))]

    def adapt(model: nn.Module) -> nn.Module:
        config = peft.LoraConfig(r=rank, target_modules=targets)
        adapted: nn.Module = peft.get_peft_model(model, config)
        return adapted

    def save(model: nn.Module, folder: Path) -> None:
        saving: Any = model
        saving.save_pretrained(folder)

    def load(model: nn.Module, folder: Path) -> nn.Module:
        loaded: nn.Module = peft.PeftModel.from_pretrained(model, folder)
        return loaded

    def tensors(model: nn.Module) -> Mapping[str, Tensor]:
        return {name: p for name, p in model.named_parameters() if "lora_" in name}

    return adapt, save, load, tensors


def entries(case: Case) -> list[Entry[FilesProblem]]:
    """DCFT and LoRA."""
    found = [Entry("dcft", "DCFT", functools.partial(_subject, ways=_dcft), 8, 1, 8)]
    for rank in (8, 1):
        ways = functools.partial(_lora, rank=rank)
        build = functools.partial(_subject, ways=ways)
        found.append(Entry(f"lora_r{rank}", f"LoRA r={rank} (peft)", build, k=rank))
    return found
