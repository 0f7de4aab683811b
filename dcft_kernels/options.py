"""The settings of one adapted layer: checked once, compared, written to and read from files."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dcft_kernels import validation
from dcft_kernels.dispatch import check_backend, select_nonlinear
from dcft_kernels.geometry import Geometry, Pair
from dcft_kernels.initialization import check_init
from dcft_kernels.strategy import check_strategy


@dataclasses.dataclass(frozen=True)
class DCFTOptions:
    """The keyword options of `DCFTLinear`, normalised: pairs as pairs, numbers as numbers."""

    rank: int = 1
    kernel_size: int | Pair = 8
    stride: int | Pair | None = None
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "balanced"
    backend: str = "auto"
    adapter_dtype: torch.dtype | None = None
    strategy: str = "auto"
    nonlinearity: str | None = None

    def __post_init__(self) -> None:
        kernel_size = validation.pair("kernel_size", self.kernel_size)
        checked: dict[str, Any] = {
            "rank": validation.positive_int("rank", self.rank),
            "kernel_size": kernel_size,
            "stride": validation.stride_pair(self.stride, kernel_size),
            "dropout": validation.probability("dropout", self.dropout),
        }
        if self.alpha is not None:
            checked["alpha"] = validation.finite_number("alpha", self.alpha)
        if self.adapter_dtype is not None:
            validation.float_dtype("adapter_dtype", self.adapter_dtype)
        check_init(self.init)
        check_backend(self.backend)
        check_strategy(self.strategy)
        if self.nonlinearity is not None:
            select_nonlinear(self.nonlinearity, self.backend, self.strategy)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> DCFTOptions:
        """Build from keyword arguments; TypeError lists the known names for an unknown one."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in keywords if name not in known]
        if unknown:
            raise TypeError(
                f"{', '.join(unknown)}: not a DCFT option; the options are {', '.join(known)}"
            )
        return cls(**keywords)

    def geometry(self, in_features: int, out_features: int) -> Geometry:
        """The geometry of a layer of these sizes."""
        # __post_init__ has turned both into pairs.
        return Geometry.build(
            in_features,
            out_features,
            self.rank,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
        )
