"""The files level: saving the adapter of a whole model to a file and loading it.

Only names and shapes of the adapters matter, so the model is a stack of its linear layers without
weights. The file lies in a temporary folder, in the operating system's cache: what is timed is the
library, not a disk.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.speed.cases import Case, Scope
from benchmarks.speed.methods.peft_methods import required
from benchmarks.speed.models import linear_shapes
from benchmarks.speed.provider import Provider, Workload
from dcft_kernels import load_adapter, save_adapter, swap_linear


def cases(scope: Scope) -> list[Case]:
    """One whole model."""
    name = "tiny-bert" if scope.tiny else "deberta-v3-base"
    return [Case("files", None, None, None, "fp32", each, name) for each in ("save", "load")]


class FilesProblem:
    """A stack of layers with the shapes of a model's."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.shapes = linear_shapes(case.model or "")

    def model(self) -> nn.Module:
        """A new model; its weights share one element."""
        layers = {}
        for index, (n, m) in enumerate(self.shapes):
            with torch.device("meta"):
                linear = nn.Linear(n, m, bias=False)
            weight = torch.zeros(1, 1, device=self.device).expand(m, n)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            layers[f"layer_{index}"] = linear
        return nn.ModuleDict(layers)


class _Format(NamedTuple):
    """How a library adapts a model and stores the adapter."""

    adapt: Callable[[nn.Module], nn.Module]
    save: Callable[[nn.Module, Path], None]
    load: Callable[[nn.Module, Path], nn.Module]
    prefix: str  # of the names of the adapter's tensors

    def tensors(self, model: nn.Module) -> Mapping[str, Tensor]:
        return {name: p for name, p in model.named_parameters() if self.prefix in name}


class _FileStep:
    """Saves from one model, or loads into a new one; the folder is new every time."""

    def __init__(self, problem: FilesProblem, library: _Format, source: nn.Module) -> None:
        self.saving = problem.case.direction == "save"
        self.problem, self.library, self.source = problem, library, source
        self._root = Path(tempfile.mkdtemp(prefix="dcft_benchmark_"))
        self.folder = self._root / "adapter"
        self._target: nn.Module | None = None
        self._loaded: nn.Module | None = None

    def prepare(self) -> None:
        self.release()
        if not self.saving:
            self.library.save(self.source, self.folder)
            self._target = self.problem.model()

    def run(self) -> None:
        if self.saving:
            self.library.save(self.source, self.folder)
        else:
            assert self._target is not None
            self._loaded = self.library.load(self._target, self.folder)
            if self.problem.device.type == "cuda":
                torch.cuda.synchronize()  # copies to the GPU are part of loading

    def release(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._target = self._loaded = None

    def restored(self) -> nn.Module:
        """A model with what the file holds."""
        return self._loaded or self.library.load(self.problem.model(), self.folder)

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


def _workload(problem: FilesProblem, make: Callable[[FilesProblem], _Format]) -> Workload:
    library = make(problem)
    source = library.adapt(problem.model())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in library.tensors(source).values():
            value.copy_(torch.randn(value.shape, generator=generator))
    step = _FileStep(problem, library, source)

    def check() -> str | None:
        expected, found = library.tensors(source), library.tensors(step.restored())
        if set(expected) != set(found):
            return f"expected {len(expected)} tensors of these names, got {len(found)}"
        wrong = [name for name in expected if not torch.equal(expected[name], found[name])]
        return f"{wrong[0]} differs from what was saved" if wrong else None

    library.save(source, step.folder)
    size = sum(file.stat().st_size for file in step.folder.rglob("*") if file.is_file())
    step.release()
    return Workload(step, check, moved_bytes=size, on_host=True, close=step.close)


def _dcft(problem: FilesProblem) -> _Format:
    def adapt(model: nn.Module) -> nn.Module:
        swap_linear(model)
        return model

    def load(model: nn.Module, folder: Path) -> nn.Module:
        load_adapter(model, folder)
        return model

    return _Format(adapt, save_adapter, load, "dcft_")


def _lora(problem: FilesProblem, *, rank: int) -> _Format:
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

    return _Format(adapt, save, load, "lora_")


def providers(case: Case) -> list[Provider]:
    """DCFT and LoRA."""
    found = [Provider("dcft", functools.partial(_workload, make=_dcft), 8, 1, 8)]
    for rank in (8, 1):
        make = functools.partial(_lora, rank=rank)
        build = functools.partial(_workload, make=make)
        found.append(Provider(f"lora_r{rank}", build, k=rank))
    return found
