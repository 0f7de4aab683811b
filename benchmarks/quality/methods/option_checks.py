"""Checks of the values of options: errors name the option, what was expected and what came."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dcft_kernels import validation


def positive_number(name: str, value: Any) -> float:
    """`value` as a finite float above zero."""
    number = validation.finite_number(name, value)
    if number <= 0.0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return number


def weight(name: str, value: Any) -> float:
    """`value` as a finite float of at least zero."""
    number = validation.finite_number(name, value)
    if number < 0.0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    return number


def share(name: str, value: Any) -> float:
    """`value` as a float in [0, 1)."""
    number = validation.finite_number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name}: expected a share in [0, 1), got {value!r}")
    return number


def choice(name: str, value: Any, known: Collection[str]) -> str:
    """`value` as one of the names in `known`."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return value


def rank_and_alpha(r: Any, alpha: Any) -> tuple[int, float]:
    """The rank, and the alpha that `alpha / r` scales with; None stands for the rank itself."""
    rank = validation.positive_int("r", r)
    return rank, float(rank) if alpha is None else positive_number("alpha", alpha)
