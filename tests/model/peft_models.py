"""Small models with DCFT layers, with adapters of PEFT, and with both."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dcft_kernels import swap_linear

TOKENS = torch.arange(10).reshape(2, 5)


class Base(nn.Module):
    """Layers of every kind that adapters are put on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.query, self.value = nn.Linear(16, 24), nn.Linear(16, 24)
        self.dense = Conv1D(16, 24)  # out, in
        self.convolution = nn.Conv1d(16, 8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.dense((self.query(x) * self.value(x)).tanh())
        return self.convolution(x.transpose(1, 2))


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64, with adapters as large as they get."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "dcft_" in name:
            nn.init.normal_(parameter)
    return model.double()


def lora(targets: Any = ("query", "value", "dense"), **options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"r": 3, "target_modules": list(targets)} | options
    return randomized(peft.get_peft_model(Base(), peft.LoraConfig(**settings)))


def adalora() -> nn.Module:
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=3, target_r=2, target_modules=["query", "value"], total_step=10
    )
    return randomized(peft.get_peft_model(Base(), config))


def dcft() -> nn.Module:
    torch.manual_seed(0)
    model = Base()
    swap_linear(model, ["query", "value", "dense"], rank=3, kernel_size=4, init="paper")
    return randomized(model)


def both() -> nn.Module:
    """DCFT on one layer, LoRA on another."""
    torch.manual_seed(0)
    model = Base()
    swap_linear(model, ["query"], rank=2, init="paper")
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["value"]))
    for name, parameter in model.named_parameters():  # PEFT froze parameters it does not know
        parameter.requires_grad_("lora_" in name or "dcft_" in name)
    return randomized(model)


def bare_parameter() -> nn.Module:
    """An adapter of a parameter that no layer holds as such."""
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["query.weight"])
    return peft.get_peft_model(Base(), config)


def add_second(model: nn.Module, targets: list[str]) -> None:
    """Another adapter, which is not active yet."""
    model.add_adapter("second", peft.LoraConfig(r=5, target_modules=targets))
    randomized(model)


MODELS = {"dcft": dcft, "lora": lora, "adalora": adalora, "both": both}
