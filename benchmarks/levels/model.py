"""The block and step levels: models of transformers with every linear layer adapted.

A block is a model of one layer, forward and backward; a step is a model of several, forward,
backward and AdamW over what is trained. Weights are random and inputs are embeddings, so that no
hub is asked and no vocabulary counts; the input asks for its gradient, so every layer passes one
on.

The gate is a peer's (`gate.check_beside`): the same model with every adapted layer as the dense
layer that it is equal to, in the same dtype, and the truth likewise in float64, or in float32 for
16-bit models.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import adapters, gate
from benchmarks.adapters import AdapterKind, Candidate
from benchmarks.adapters.packages import required
from benchmarks.cases import DTYPES, PAPER_KERNEL_SIZES, PAPER_STRIDES, Case, Scope
from benchmarks.entries import BASELINE, AnyEntry, Subject, UnavailableError
from benchmarks.levels.shared_input import group_layers
from benchmarks.models import MODELS, ModelSpec

_LEARNING_RATE = 1e-4


def block_cases(scope: Scope) -> list[Case]:
    """Blocks of real models; Llama's with growing numbers of tokens on a GPU."""
    if scope.tiny:
        return [_case("block", "tiny-llama", 16, "fp32"), _case("block", "tiny-bert", 16, "fp32")]
    if not scope.gpu:
        names = ("deberta-v3-base", "roberta-large") if scope.full else ("deberta-v3-base",)
        return [_case("block", name, 512, "fp32") for name in names]
    tokens = (2048, 4096, 8192, 16384, 32768) if scope.full else (8192, 2048)
    found = [_case("block", "llama-3-8b", T, "bf16") for T in tokens]
    found += [_case("block", name, 4096, "bf16") for name in ("deberta-v3-base", "roberta-large")]
    for direction in ("fwd", "bwd") if scope.full else ():
        found.append(_case("block", "llama-3-8b", 8192, "bf16", direction))
    return found


def step_cases(scope: Scope) -> list[Case]:
    """Training steps; with the paper's kernel sizes and strides where every sweep is wanted."""
    names: tuple[str, ...]
    if scope.tiny:
        names, T, dtype = ("tiny-bert",), 16, "fp32"
    elif scope.gpu:
        names, T, dtype = ("llama-3-8b-4-layers", "deberta-v3-base", "roberta-large"), 4096, "bf16"
    else:
        names, T, dtype = ("deberta-v3-base",), 256, "fp32"
    found = [_case("step", name, T, dtype, "step") for name in names]
    if scope.full or scope.tiny:
        paper = "tiny-bert" if scope.tiny else "deberta-v3-base"
        found.append(_case("step", paper, T, dtype, "step", "paper"))
        if scope.full and not scope.gpu:
            found.append(_case("step", "roberta-large", T, dtype, "step"))
    return found


def _case(
    level: str, name: str, T: int, dtype: str, direction: str = "fwd+bwd", sweep: str = "main"
) -> Case:
    width = MODELS[name].width
    return Case(level, T, width, width, dtype, direction, name, sweep)


def entries(case: Case) -> list[AnyEntry]:
    """The adapters that a case compares."""
    if case.sweep == "paper":
        kinds = [
            *adapters.by_name(BASELINE, "lora_r1", "lora_r8"),
            *adapters.variants(kernel_sizes=PAPER_KERNEL_SIZES),
            *adapters.variants(strides=PAPER_STRIDES[:-1]),
            *adapters.variants(kernel_sizes=PAPER_KERNEL_SIZES, of="published"),
            *adapters.variants(strides=PAPER_STRIDES[:-1], of="published"),
        ]
    else:
        kinds = adapters.by_name(
            BASELINE,
            "dcft",
            "dcft_grouped",
            "lora_r8",
            "lora_r1",
            "lora_r8_16bit",
            "published",
            "lora_autograd",
            "full",
            "lokr",
            "dora",
            "frozen_compiled",
        )
    return [kind.entry(subject_of) for kind in kinds]


@dataclass
class ModelProblem:
    """A frozen model with random weights, an input and the gradient of its output."""

    case: Case
    device: torch.device
    generator: torch.Generator = field(init=False)
    spec: ModelSpec = field(init=False)

    def __post_init__(self) -> None:
        required("transformers")
        if self.case.model not in MODELS:
            known = ", ".join(MODELS)
            raise ValueError(f"model: expected one of {known}, got {self.case.model!r}")
        spec = self.spec = MODELS[self.case.model]
        self.dtype = DTYPES[self.case.dtype]
        self.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        layers = 1 if self.case.level == "block" else spec.layers
        self.base = spec.build(layers, self.dtype, self.device).requires_grad_(False)
        self.targets = [
            name
            for name, module in self.base.named_modules()
            if type(module) is nn.Linear and "pooler" not in name
        ]
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

    def adapted(self, kind: AdapterKind) -> tuple[nn.Module, dict[str, Candidate]]:
        """A model that shares the base's weights, and the candidates in place of its layers."""
        model = _shallow_copy(self.base)
        self.generator.manual_seed(0)
        candidates = {
            name: kind.layer(self.base.get_submodule(name), self.generator)  # type: ignore[arg-type]
            for name in self.targets
        }
        for name, candidate in candidates.items():
            model.set_submodule(name, candidate.layer)
        return model, candidates

    def dense(self, candidates: dict[str, Candidate], dtype: torch.dtype) -> gate.Results:
        """Output and gradients with every adapted layer as a dense one, computed in `dtype`."""
        if dtype not in self._in_dtype:
            self._in_dtype[dtype] = copy.deepcopy(self.base).to(dtype).requires_grad_(False)
        model = _shallow_copy(self._in_dtype[dtype])
        parameters: dict[str, dict[str, Tensor]] = {}
        for name, candidate in candidates.items():
            own = {
                key: p.detach()
                .to(torch.promote_types(p.dtype, dtype))
                .requires_grad_(p.requires_grad)
                for key, p in candidate.layer.named_parameters()
            }
            parameters[name] = own
            model.set_submodule(name, _Dense(candidate, own))
        x = self.x.detach().to(dtype).requires_grad_()
        with _every_head_its_own():
            y = model(inputs_embeds=x).last_hidden_state
        results = {"y": y.detach()}
        if self.case.direction == "fwd":
            return results
        y.backward(self.g.to(dtype))
        results["gradient of x"] = _present(x.grad)
        for name, own in parameters.items():
            for key, p in own.items():
                if p.requires_grad:
                    results[f"gradient of {name}.{key}"] = _present(p.grad)
        return results


class _Dense(nn.Module):
    """The plain linear layer that a candidate is equal to, built anew in every forward pass."""

    def __init__(self, candidate: Candidate, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._candidate, self._of_candidate = candidate, parameters

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._candidate.dense(self._of_candidate)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@contextlib.contextmanager
def _every_head_its_own() -> Iterator[None]:
    """Repeat keys and values that heads share, in attention.

    PyTorch's fused attention takes shared ones in 16 bit alone; in float32 it would fall back to
    one that builds every head's matrix of `T * T`.
    """
    attention = F.scaled_dot_product_attention

    def repeated(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        enable_gqa: bool = False,
        **named: Any,
    ) -> Tensor:
        if enable_gqa:
            heads = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(heads, dim=-3) for t in (key, value))
        result: Tensor = attention(query, key, value, *rest, **named)
        return result

    F.scaled_dot_product_attention = repeated
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


def _present(grad: Tensor | None) -> Tensor:
    if grad is None:
        raise ValueError("no gradient where one is expected: the peer is wrong")
    return grad


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that shares its parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=dict(shared))


class ModelStep:
    """Forward and backward of a model, and its optimizer's step where the level has one.

    Every run starts from the same parameters: the gate, which computes from these, may come after
    several.
    """

    def __init__(
        self,
        problem: ModelProblem,
        model: nn.Module,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.direction = problem.case.direction
        self.x, self.g = problem.x, problem.g
        self.model, self.trained, self.optimizer = model, trained, optimizer
        self.y: Tensor | None = None
        self._initial = {}
        if optimizer is not None:
            self._initial = {name: p.detach().clone() for name, p in trained.items()}

    def prepare(self) -> None:
        self.release()
        self.restore()
        if self.direction == "bwd":
            self._forward()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back that the optimizer has moved."""
        for name, value in self._initial.items():
            self.trained[name].copy_(value)

    def unmoved(self) -> list[str]:
        """Parameters that are what they were before the optimizer's step."""
        return [n for n, value in self._initial.items() if torch.equal(self.trained[n], value)]

    def run(self) -> None:
        if self.direction != "bwd":
            self._forward()
        if self.direction != "fwd":
            assert self.y is not None
            self.y.backward(self.g)
        if self.optimizer is not None:
            self.optimizer.step()

    def _forward(self) -> None:
        self.y = self.model(inputs_embeds=self.x).last_hidden_state

    def release(self) -> None:
        self.y = None
        self.x.grad = None
        for parameter in self.trained.values():
            parameter.grad = None

    def results(self) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {"y": self.y, "gradient of x": self.x.grad}
        found.update({f"gradient of {name}": p.grad for name, p in self.trained.items()})
        return found


def subject_of(problem: ModelProblem, kind: AdapterKind) -> Subject:
    """A model adapted in one way, with its step and its gate."""
    model, candidates = problem.adapted(kind)
    if kind.grouped:
        names = group_layers(model, candidates)
        if not names:
            raise UnavailableError("no layers of this model share their input")
    trained = {
        f"{name}.{key}": p
        for name, candidate in candidates.items()
        for key, p in candidate.trained().items()
    }
    step_level = problem.case.level == "step"
    optimizer = None
    if step_level and trained:
        optimizer = torch.optim.AdamW(trained.values(), lr=_LEARNING_RATE, weight_decay=0.0)
    called: Any = torch.compile(model) if kind.compiled else model
    step = ModelStep(problem, called, trained, optimizer)

    def forward() -> Tensor:
        y: Tensor = model(inputs_embeds=problem.x).last_hidden_state
        return y

    def check() -> str | None:
        unmoved = step.unmoved()
        if unmoved:
            return f"the optimizer left {unmoved[0]} as it was"
        results = step.results()
        step.restore()
        peer = problem.dense(candidates, problem.dtype)
        truth = problem.dense(candidates, problem.wide)
        return gate.check_beside(results, peer, truth, problem.dtype, together=True)

    return Subject(
        step,
        check,
        forward=None if step_level or kind.compiled else forward,
        parameters=(*model.parameters(), *model.buffers()),
        compiles=kind.compiled,
        graphable=problem.spec.graphable and problem.case.direction in ("fwd", "fwd+bwd"),
    )
