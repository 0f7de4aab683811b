"""The block and step levels: models of transformers with every linear layer adapted.

A block is a model of one layer, forward and backward; a step is a model of several, forward,
backward and AdamW over the trained parameters. Weights are random and inputs are embeddings, so
nothing is downloaded and the vocabulary does not matter; the input requires a gradient, so every
layer passes one on.

The gate compares with a peer (`gate.check_against_peer`): the same model with dense layers in place
of the adapted ones, in the same dtype; the truth is that model in float64, or in float32 for 16-bit
models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed import gate, methods
from benchmarks.speed.cases import DTYPES, Case, Scope
from benchmarks.speed.methods import AdaptedLayer, LayerMethod
from benchmarks.speed.methods.peft_methods import required
from benchmarks.speed.models import MODELS, ModelSpec, adapted_layers
from benchmarks.speed.provider import BASELINE, Provider, Workload

_LEARNING_RATE = 1e-4
_METHODS = (
    f"{BASELINE} dcft lora_r8 lora_r1 lora_r8_16bit published lora_by_hand full lokr dora "
    "frozen_compiled"
)


def block_cases(scope: Scope) -> list[Case]:
    """Blocks of real models."""
    if scope.tiny:
        return [_case("block", name, 16, "fp32") for name in ("tiny-llama", "tiny-roberta")]
    if not scope.gpu:
        return [_case("block", "deberta-v3-base", 512, "fp32")]
    names = ("llama-3-8b", "deberta-v3-base", "roberta-large")
    return [_case("block", name, 4096, "bf16") for name in names]


def step_cases(scope: Scope) -> list[Case]:
    """Training steps of whole models."""
    if scope.tiny:
        return [_case("step", "tiny-roberta", 16, "fp32", "step")]
    if not scope.gpu:
        return [_case("step", "deberta-v3-base", 256, "fp32", "step")]
    names = ("llama-3-8b-4-layers", "deberta-v3-base", "roberta-large")
    return [_case("step", name, 4096, "bf16", "step") for name in names]


def _case(level: str, name: str, T: int, dtype: str, direction: str = "fwd+bwd") -> Case:
    width = MODELS[name].width
    return Case(level, T, width, width, dtype, direction, name)


def providers(case: Case) -> list[Provider]:
    """The methods that a case compares."""
    return [method.provider(workload_of) for method in methods.by_name(*_METHODS.split())]


@dataclass
class ModelProblem:
    """A frozen model with random weights, an input and the gradient of its output."""

    case: Case
    device: torch.device
    generator: torch.Generator = field(init=False)
    spec: ModelSpec = field(init=False)

    def __post_init__(self) -> None:
        required("transformers")
        spec = self.spec = MODELS[self.case.model or ""]
        self.dtype = DTYPES[self.case.dtype]
        self.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        layers = 1 if self.case.level == "block" else spec.layers
        self.base = spec.build(layers, self.dtype, self.device).requires_grad_(False)
        self.targets = list(adapted_layers(self.base))
        T = self.case.T or 1
        batch, length = spec.batched(T)
        shape = (batch, length, spec.width)
        on_device = torch.Generator(self.device).manual_seed(0)

        def draw() -> Tensor:
            values = torch.randn(shape, generator=on_device, device=self.device)
            return values.to(self.dtype)

        self.x = draw().requires_grad_()
        self.g = draw()
        self._in_dtype: dict[torch.dtype, nn.Module] = {self.dtype: self.base}

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the truth."""
        return torch.float64 if self.dtype == torch.float32 else torch.float32

    def adapted(self, method: LayerMethod) -> tuple[nn.Module, dict[str, AdaptedLayer]]:
        """A model that shares the base's weights, and its adapted layers by name."""
        model = _shallow_copy(self.base)
        self.generator.manual_seed(0)
        adapted_by_name = {
            name: method.build(self.base.get_submodule(name), self.generator)  # type: ignore[arg-type]
            for name in self.targets
        }
        for name, adapted in adapted_by_name.items():
            model.set_submodule(name, adapted.layer)
        return model, adapted_by_name

    def dense(
        self, adapted_by_name: dict[str, AdaptedLayer], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Output and gradients with every adapted layer as a dense one, computed in `dtype`."""
        if dtype not in self._in_dtype:
            self._in_dtype[dtype] = copy.deepcopy(self.base).to(dtype).requires_grad_(False)
        model = _shallow_copy(self._in_dtype[dtype])
        parameters: dict[str, dict[str, Tensor]] = {}
        for name, adapted in adapted_by_name.items():
            own = {
                key: p.detach()
                .to(torch.promote_types(p.dtype, dtype))
                .requires_grad_(p.requires_grad)
                for key, p in adapted.layer.named_parameters()
            }
            parameters[name] = own
            model.set_submodule(name, _Dense(adapted, own))
        x = self.x.detach().to(dtype).requires_grad_()
        y = model(inputs_embeds=x).last_hidden_state
        results = {"y": y.detach()}
        y.backward(self.g.to(dtype))
        leaves = {"gradient of x": x}
        for name, own in parameters.items():
            leaves |= {f"gradient of {name}.{key}": p for key, p in own.items() if p.requires_grad}
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            results[name] = leaf.grad
        return results


class _Dense(nn.Module):
    """The dense layer that an adapted layer is equal to, rebuilt in every forward pass."""

    def __init__(self, adapted: AdaptedLayer, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._adapted, self._values = adapted, parameters

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._adapted.dense(self._values)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that shares its parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=dict(shared))


@dataclass
class ModelStep:
    """Forward and backward of a model, and an optimizer's step at the step level.

    Every run starts from the same parameters, which the gate computes from as well.
    """

    problem: ModelProblem
    model: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None

    def __post_init__(self) -> None:
        self.x = self.problem.x
        self.y: Tensor | None = None
        moved = self.trained if self.optimizer is not None else {}
        self._initial = {name: p.detach().clone() for name, p in moved.items()}

    def prepare(self) -> None:
        self.release()
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the optimizer's steps."""
        for name, value in self._initial.items():
            self.trained[name].copy_(value)

    def unmoved(self) -> list[str]:
        """Parameters that the optimizer's step has not changed."""
        return [n for n, value in self._initial.items() if torch.equal(self.trained[n], value)]

    def run(self) -> None:
        y = self.y = self.model(inputs_embeds=self.x).last_hidden_state
        y.backward(self.problem.g)
        if self.optimizer is not None:
            self.optimizer.step()

    def release(self) -> None:
        self.y = None
        self.x.grad = None
        for parameter in self.trained.values():
            parameter.grad = None

    def results(self) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {"y": self.y, "gradient of x": self.x.grad}
        found.update({f"gradient of {name}": p.grad for name, p in self.trained.items()})
        return found


def workload_of(problem: ModelProblem, method: LayerMethod) -> Workload:
    """A model adapted by a method, with its step and its check."""
    model, adapted_by_name = problem.adapted(method)
    trained = {
        f"{name}.{key}": p
        for name, adapted in adapted_by_name.items()
        for key, p in adapted.trained().items()
    }
    step_level = problem.case.level == "step"
    optimizer = None
    if step_level and trained:
        optimizer = torch.optim.AdamW(trained.values(), lr=_LEARNING_RATE, weight_decay=0.0)
    called: Any = torch.compile(model) if method.compiled else model
    step = ModelStep(problem, called, trained, optimizer)

    def forward() -> Tensor:
        y: Tensor = model(inputs_embeds=problem.x).last_hidden_state
        return y

    def check() -> str | None:
        unmoved = step.unmoved()
        if unmoved:
            return f"the optimizer did not change {unmoved[0]}"
        results = step.results()
        step.restore()
        peer = problem.dense(adapted_by_name, problem.dtype)
        truth = problem.dense(adapted_by_name, problem.wide)
        return gate.check_against_peer(results, peer, truth, problem.dtype, together=True)

    return Workload(
        step,
        check,
        forward=None if step_level or method.compiled else forward,
        parameters=(*model.parameters(), *model.buffers()),
        compiles=method.compiled,
        graphable=problem.spec.graphable and not step_level and not method.compiled,
    )
