"""Small models with DCFT adapters of PEFT."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dcft_kernels.peft import DCFTConfig, DCFTLinearLayer

TARGETS = ["query", "value", "dense"]


class Base(nn.Module):
    """Linear layers of both layouts; the kernel size divides some of the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.query, self.value = nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.dense = Conv1D(19, 24)  # out, in
        self.head = nn.Linear(19, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.dense((self.query(x) * self.value(x)).tanh()))


TOKENS = torch.arange(10).reshape(2, 5)


def base(seed: int = 1) -> Base:
    torch.manual_seed(seed)
    return Base()


def adapted(seed: int = 2, model: nn.Module | None = None, **settings: Any) -> peft.PeftModel:
    """The base with an adapter that changes its output, in evaluation mode."""
    settings = {"target_modules": TARGETS, "init_weights": False} | settings
    model = base() if model is None else model
    torch.manual_seed(seed)
    return peft.get_peft_model(model, DCFTConfig(**settings)).eval()


def layers(model: nn.Module) -> dict[str, DCFTLinearLayer]:
    """The adapted layers by their last name."""
    return {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, DCFTLinearLayer)
    }


def factors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters of adapters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".dcft_" in n}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the order of float32 operations, relative to the largest element."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5 * scale)
