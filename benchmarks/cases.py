"""What a measurement is of: its level, shape, dtype and direction, and what limits a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")

# Other things than a pass of a layer that are measured, in the same column of the rows.
OTHER_DIRECTIONS = ("copy", "product", "merge", "unmerge", "save", "load", "step")


# What is varied of DCFT; the paper has 2 to 12 (Table 4) and strides of 1, 2, 4 and 8 (Table 5).
KERNEL_SIZES = (2, 4, 6, 8, 12, 16, 32)
PAPER_KERNEL_SIZES = (2, 4, 6, 8, 12)
RANKS = (1, 2, 4, 8, 16)
STRIDES = (1, 2, 3, 4, 5, 6, 7, 8)
PAPER_STRIDES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """One input: what all providers that are compared with each other get.

    `T` tokens of `n` features to `m`, where the level has them; a `model` where the shape, or the
    set of tensors, is that of a model.
    """

    level: str  # a key of benchmarks.levels.LEVELS
    T: int | None
    n: int | None
    m: int | None
    dtype: str  # a key of DTYPES
    direction: str = "fwd+bwd"
    model: str | None = None
    sweep: str = "main"  # what is varied from case to case, or from provider to provider

    @property
    def shape(self) -> str:
        """Such as `2048x768->768`; a model's name where that stands for it."""
        if self.model is not None:
            return self.model if self.T is None else f"{self.model}@{self.T}"
        if self.T is None:
            return f"{self.n}->{self.m}"
        return f"{self.T}x{self.n}->{self.m}"

    def __str__(self) -> str:
        return f"{self.level} {self.shape} {self.dtype} {self.direction} ({self.sweep})"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`(T, n, m)` of a case that has all three."""
        if self.T is None or self.n is None or self.m is None:
            raise ValueError(f"{self}: has no T, n and m")
        return self.T, self.n, self.m


class Scope(NamedTuple):
    """How much is measured: which cases a level proposes."""

    device_type: str  # "cpu" or "cuda"
    size: str  # "tiny": does it run at all; "main": minutes; "full": every sweep

    @property
    def tiny(self) -> bool:
        """Whether times say nothing, and only the program is tried out."""
        return self.size == "tiny"

    @property
    def full(self) -> bool:
        """Whether every sweep is wanted."""
        return self.size == "full"

    @property
    def gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device_type == "cuda"


SIZES = ("tiny", "main", "full")

_SHAPE = re.compile(r"(\d+)x(\d+)(?:->|x)(\d+)")


def parse_shape(text: str) -> tuple[int, int, int]:
    """`(T, n, m)` from `4096x768->3072`, or, since a shell reads `>`, `4096x768x3072`.

    Raises:
        ValueError: anything else.
    """
    found = _SHAPE.fullmatch(text)
    sizes = tuple(int(part) for part in found.groups()) if found else ()
    if len(sizes) != 3 or 0 in sizes:
        raise ValueError(
            f"shape: expected tokens, features in and out such as 4096x768x3072, got {text!r}"
        )
    return sizes
