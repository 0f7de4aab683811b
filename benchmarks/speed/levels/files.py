"""The files level: saving the adapter of a whole model to a file and loading it.

Only names and shapes of the adapters matter, so the model is a stack of its linear layers without
weights. The file stays in the operating system's cache: what is timed is the library, not a disk.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.cases import Case, Scope
from benchmarks.speed.methods.peft_methods import required
from benchmarks.speed.models import linear_shapes
from benchmarks.speed.provider import Provider, Workload
from dcft_kernels import load_adapter, save_adapter, swap_linear


def cases(scope: Scope) -> list[Case]:
    """One whole model."""
    name = "tiny-roberta" if scope.tiny else "deberta-v3-base"
    return [Case("files", None, None, None, "fp32", each, name) for each in ("save", "load")]


class FilesProblem:
    """A stack of layers with the shapes of a model's."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.saving, self.device = case.direction == "save", device
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


class _DCFT:
    """How DCFT adapts a model and stores the adapter."""

    prefix = "dcft_"  # of the adapter's tensors

    def adapt(self, model: nn.Module) -> nn.Module:
        swap_linear(model)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        save_adapter(model, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        load_adapter(model, folder)
        return model


class _LoRA:
    """The same for peft's LoRA."""

    prefix = "lora_"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def adapt(self, model: nn.Module) -> nn.Module:
        peft = required("peft")
        targets = [name for name, _ in model.named_children()]
        adapted: nn.Module = peft.get_peft_model(
            model, peft.LoraConfig(r=self.rank, target_modules=targets)
        )
        return adapted

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        loaded: nn.Module = required("peft").PeftModel.from_pretrained(model, folder)
        return loaded


class _FileStep:
    """Saves from one model, or loads into a new one; the folder is new every time."""

    def __init__(self, problem: FilesProblem, library: _DCFT | _LoRA) -> None:
        self.problem, self.library = problem, library
        self.source = library.adapt(problem.model())
        self.target: nn.Module | None = None  # of a load

    def prepare(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="dcft_benchmark_")
        self.folder = Path(self._root.name) / "adapter"
        if not self.problem.saving:
            self.library.save(self.source, self.folder)
            self.target = self.problem.model()

    def run(self) -> None:
        if self.target is None:
            self.library.save(self.source, self.folder)
            return
        self.target = self.library.load(self.target, self.folder)
        if self.problem.device.type == "cuda":
            torch.cuda.synchronize()  # copies to the GPU are part of loading

    def release(self) -> None:
        self._root.cleanup()
        self.target = None

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's."""
        return {n: p for n, p in model.named_parameters() if self.library.prefix in n}


def _workload(problem: FilesProblem, library: _DCFT | _LoRA) -> Workload:
    step = _FileStep(problem, library)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in step.tensors(step.source).values():
            value.copy_(torch.randn(value.shape, generator=generator))

    def check() -> str | None:
        restored = step.target
        if restored is None:
            restored = library.load(problem.model(), step.folder)
        expected, found = step.tensors(step.source), step.tensors(restored)
        if set(expected) != set(found):
            return f"expected {len(expected)} tensors of these names, got {len(found)}"
        wrong = [name for name in expected if not torch.equal(expected[name], found[name])]
        return f"{wrong[0]} differs from what was saved" if wrong else None

    step.prepare()
    library.save(step.source, step.folder)
    size = sum(file.stat().st_size for file in step.folder.rglob("*") if file.is_file())
    step.release()
    return Workload(step, check, moved_bytes=size, on_host=True)


def providers(case: Case) -> list[Provider]:
    """DCFT and LoRA."""
    build = functools.partial
    return [
        Provider("dcft", build(_workload, library=_DCFT()), 8, 1, 8),
        Provider("lora_r8", build(_workload, library=_LoRA(8)), k=8),
        Provider("lora_r1", build(_workload, library=_LoRA(1)), k=1),
    ]
