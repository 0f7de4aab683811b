"""The table of what is compared.

A provider builds a layer over the shared frozen base weight (see `cases.Problem`) and says which
dense weight that layer amounts to, as a float64 formula of the layer's own parameters: the gate
checks outputs and gradients against it.

Adapters are drawn at random with an increment as large as the base weight. Their usual starting
points (zero, or products of tiny numbers) would hide a missing or wrong adapter behind the rounding
of the base layer's output; the values have no influence on the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Problem
from dcft_kernels import DCFTLinear
from dcft_kernels.adapter import Adapter
from dcft_kernels.geometry import Geometry
from dcft_kernels.reference import delta_weight

DCFT_RANK = 1
DCFT_KERNEL = 8

# Dense `[m, n]` increment from a layer's named parameters, in their dtype.
Increment = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A provider's layer for one problem, and what it should compute."""

    layer: nn.Module
    weight: str  # names of the base's parameters in the layer
    bias: str
    increment: Increment | None = None  # None: the layer is its base

    def dense(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The weight and bias of the plain linear layer that `layer` is equal to."""
        weight, bias = parameters[self.weight], parameters[self.bias]
        return (weight if self.increment is None else weight + self.increment(parameters)), bias

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradient a step computes."""
        return {name: p for name, p in self.layer.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Provider:
    """A way to fine-tune a linear layer."""

    name: str
    label: str
    build: Callable[[Problem], Candidate]
    d: int | None = None
    k: int | None = None
    stride: int | None = None


class PublishedDCFT(nn.Module):
    """DCFT as published, written anew from equations 5 and 6 of arXiv 2503.01419.

    Builds `DW = ConvT(B A, C)` in every forward and leaves the rest to autograd. Over a 16-bit base
    the factors are float32, as in every other adapter here, and `DW` is cast to the base's dtype.
    """

    def __init__(self, base: nn.Linear, rank: int, kernel_size: int) -> None:
        super().__init__()
        self.base = base
        self.kernel_size = kernel_size
        self.scaling = 1.0
        inputs, outputs = base.in_features // kernel_size, base.out_features // kernel_size
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, inputs, device=device))
        self.B = nn.Parameter(torch.empty(outputs, rank, device=device))
        self.C = nn.Parameter(torch.empty(kernel_size, kernel_size, device=device))

    def forward(self, x: Tensor) -> Tensor:
        subspace = self.B @ self.A
        DW = F.conv_transpose2d(subspace[None, None], self.C[None, None], stride=self.kernel_size)
        return self.base(x) + F.linear(x, DW[0, 0].to(x.dtype)) * self.scaling


def _frozen(problem: Problem) -> Candidate:
    return Candidate(problem.base(), "weight", "bias")


def _full(problem: Problem) -> Candidate:
    linear = problem.base()
    linear.weight = nn.Parameter(problem.weight.clone())
    linear.bias = nn.Parameter(problem.bias.clone())
    return Candidate(linear, "weight", "bias")


def _dcft(problem: Problem) -> Candidate:
    layer = DCFTLinear.from_linear(problem.base(), rank=DCFT_RANK, kernel_size=DCFT_KERNEL)
    increment = _dcft_increment(problem, "dcft_A", "dcft_B", "dcft_C")
    return _adapted(problem, layer, "", increment)


def _published(problem: Problem) -> Candidate:
    layer = PublishedDCFT(problem.base(), DCFT_RANK, DCFT_KERNEL)
    return _adapted(problem, layer, "base.", _dcft_increment(problem, "A", "B", "C"))


def _dcft_increment(problem: Problem, A: str, B: str, C: str) -> Increment:
    d = DCFT_KERNEL
    geometry = Geometry.build(problem.case.n, problem.case.m, DCFT_RANK, (d, d), (d, d))
    return lambda p: delta_weight(Adapter(p[A], p[B], p[C], 1.0, geometry))


def _lora(rank: int) -> Callable[[Problem], Candidate]:
    def build(problem: Problem) -> Candidate:
        from peft import LoraConfig

        config = LoraConfig(r=rank, target_modules=["layer"])
        layer = _with_peft(problem, config)
        A, B = "lora_A.default.weight", "lora_B.default.weight"
        scaling = config.lora_alpha / rank
        return _adapted(problem, layer, "base_layer.", lambda p: scaling * (p[B] @ p[A]))

    return build


def _lokr(problem: Problem) -> Candidate:
    from peft import LoKrConfig

    config = LoKrConfig(
        r=DCFT_RANK,
        alpha=DCFT_RANK,
        decompose_both=True,
        decompose_factor=min(problem.case.n, problem.case.m) // DCFT_KERNEL,
        target_modules=["layer"],
    )

    def factor(p: Mapping[str, Tensor], name: str) -> Tensor:
        whole = f"{name}.default"
        return p[whole] if whole in p else p[f"{name}_a.default"] @ p[f"{name}_b.default"]

    return _adapted(
        problem,
        _with_peft(problem, config),
        "base_layer.",
        lambda p: torch.kron(factor(p, "lokr_w1"), factor(p, "lokr_w2")),
    )


def _with_peft(problem: Problem, config: object) -> nn.Module:
    """The layer that `get_peft_model` puts in place of the base in a model of that one layer."""
    from peft import get_peft_model

    model = nn.Sequential()
    model.add_module("layer", problem.base())
    layer: nn.Module = get_peft_model(model, config).base_model.model.layer
    return layer


def _adapted(problem: Problem, layer: nn.Module, base: str, increment: Increment) -> Candidate:
    """A candidate whose adapter is drawn with an increment as large as the base weight."""
    candidate = Candidate(layer, base + "weight", base + "bias", increment)
    trained = candidate.trained().values()
    with torch.no_grad():
        for parameter in trained:
            # Away from zero, so that no product of several has a few entries that rule the rest.
            sign = torch.randint(0, 2, parameter.shape, generator=problem.generator) * 2 - 1
            size = torch.rand(parameter.shape, generator=problem.generator) + 0.5
            parameter.copy_(sign * size)
        size_of = increment(dict(layer.named_parameters())).float().std()
        ratio = (problem.weight.float().std() / size_of).item()
        for parameter in trained:  # the increment is linear in each of them
            parameter.mul_(ratio ** (1 / len(trained)))
    return candidate


# In the order in which they matter: a case that runs out of time leaves out the last ones.
PROVIDERS = (
    Provider("frozen", "frozen nn.Linear", _frozen),
    Provider("dcft", "DCFT", _dcft, DCFT_KERNEL, DCFT_RANK, DCFT_KERNEL),
    Provider("lora_r8", "LoRA r=8 (peft)", _lora(8), k=8),
    Provider("published", "DCFT as published", _published, DCFT_KERNEL, DCFT_RANK, DCFT_KERNEL),
    Provider("lora_r1", "LoRA r=1 (peft)", _lora(1), k=1),
    Provider("lokr", "LoKr r=1 (peft)", _lokr, k=DCFT_RANK),
    Provider("full", "full fine-tuning", _full),
)
BASELINE = "frozen"
