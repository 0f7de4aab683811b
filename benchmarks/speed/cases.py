"""What one measurement is of: level, shape, dtype and direction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd", "inference")


@dataclass(frozen=True)
class Case:
    """One input, shared by all providers that are compared on it.

    `T` tokens of `n` features to `m`, where the level has them; `model` where the shapes are those
    of a model.
    """

    level: str  # a key of benchmarks.speed.levels.LEVELS
    T: int | None
    n: int | None
    m: int | None
    dtype: str  # a key of DTYPES
    direction: str = "fwd+bwd"  # one of DIRECTIONS, or what else the level times, such as "merge"
    model: str | None = None
    sweep: str = "main"  # what varies from case to case or from provider to provider
    threads: int | None = None  # intra-op; None: as many as PyTorch chooses
    neighbour: bool = False  # whether another process keeps one core busy

    @property
    def shape(self) -> str:
        """`2048x768->768`, or the model's name."""
        if self.model is not None:
            return self.model if self.T is None else f"{self.model}@{self.T}"
        if self.T is None:
            return f"{self.n}->{self.m}"
        return f"{self.T}x{self.n}->{self.m}"

    @property
    def conditions(self) -> tuple[str, ...]:
        """`("2t", "busy")`: what differs from an idle machine with PyTorch's threads."""
        threads = () if self.threads is None else (f"{self.threads}t",)
        return (*threads, *("busy",) * self.neighbour)

    def __str__(self) -> str:
        inside = ", ".join((self.sweep, *self.conditions))
        return f"{self.level} {self.shape} {self.dtype} {self.direction} ({inside})"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`(T, n, m)`.

        Raises:
            ValueError: a case without them.
        """
        if self.T is None or self.n is None or self.m is None:
            raise ValueError(f"{self}: has no T, n and m")
        return self.T, self.n, self.m


class Scope(NamedTuple):
    """Which cases a level proposes: those for a CPU or a GPU, or tiny ones to try the program."""

    device_type: str  # "cpu" or "cuda"
    tiny: bool = False

    @property
    def gpu(self) -> bool:
        return self.device_type == "cuda"


_SHAPE = re.compile(r"(\d+)x(\d+)(?:->|x)(\d+)")


def parse_shape(text: str) -> tuple[int, int, int]:
    """`(T, n, m)` from `4096x768->3072` or `4096x768x3072`.

    Raises:
        ValueError: any other text.
    """
    found = _SHAPE.fullmatch(text)
    T, n, m = (int(part) for part in found.groups()) if found else (0, 0, 0)
    if 0 in (T, n, m):
        raise ValueError(
            f"shape: expected tokens, features in and out such as 4096x768x3072, got {text!r}"
        )
    return T, n, m
