"""Adapters in which all values and the scaling are one number, so that a mix of two is detected."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcft_kernels import load_adapter, save_adapter, swap_linear


def base_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12))


def save(number: int, folder: Path) -> None:
    model = base_model()
    swap_linear(model, kernel_size=4, alpha=number, dropout=0.125)
    for layer in model:
        for factor in layer.adapter[:3]:
            nn.init.constant_(factor, number)
    save_adapter(model, folder)


def load(folder: Path) -> tuple[int, list[Any]]:
    """The adapter's number, checked in all its values, and its settings."""
    model = base_model()
    load_adapter(model, folder)
    tensors = [factor.flatten() for layer in model for factor in layer.adapter[:3]]
    values = {layer.scaling for layer in model} | set(torch.cat(tensors).tolist())
    assert len(values) == 1, f"values of several saves: {sorted(values)}"
    return int(values.pop()), [layer.options for layer in model]


def check_folder(folder: Path, numbers: Container[int], files: int = 2) -> None:
    """Check that one of these adapters loads, and how many files there are."""
    assert load(folder)[0] in numbers
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == files, names
