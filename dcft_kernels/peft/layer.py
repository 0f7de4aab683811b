"""The layer that PEFT puts in place of a linear one: DCFT adapters on a base layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from dcft_kernels import validation
from dcft_kernels.adapter import PER_RANK, Adapter, Geometry
from dcft_kernels.functional import dcft_linear, dcft_update, delta_weight, merged_weight
from dcft_kernels.initialization import initialize, scaling_of
from dcft_kernels.linear import is_conv1d
from dcft_kernels.peft.config import DCFTConfig

FACTORS = ("dcft_A", "dcft_B", "dcft_C")
BASE_ONLY = "__base__"  # in `adapter_names`: no adapter for this row


class DCFTLinearLayer(nn.Module, BaseTunerLayer):
    """A base layer plus the increments of its active adapters (equations 5, 6 of arXiv 2503.01419).

    Each adapter has `dcft_A[name] [k, I]`, `dcft_B[name] [J, k]` and `dcft_C[name] [d_out, d_in]`
    (or `[k, d_out, d_in]`), as in `dcft_kernels.DCFTLinear`, and is computed by the same functions.

    Args:
        base_layer: an `nn.Linear`, a `Conv1D` of transformers, a quantised layer that PEFT knows,
            or a layer of another PEFT method around one of these.
        adapter_name: the first adapter, which becomes active.
        config: its settings.
        settings: `r`, `kernel_size`, `stride` and `alpha` of this layer.
        get_apply_tensor_subclass: how to quantise a torchao layer again after merging.
    """

    adapter_layer_names = FACTORS
    other_param_names = ("geometry", "scaling", "dropout")
    # Inherited from PEFT, which has no types.
    active_adapters: list[str]
    merged: bool
    disable_adapters: bool
    weight: Tensor
    get_base_layer: Callable[[], nn.Module]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: DCFTConfig,
        settings: dict[str, Any],
        get_apply_tensor_subclass: Any = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=get_apply_tensor_subclass
        )
        self.geometry: dict[str, Geometry] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.dcft_A, self.dcft_B, self.dcft_C = (nn.ParameterDict() for _ in FACTORS)
        self.merged_adapters: list[str] = []
        # The base weight before adapters were merged into it, and a checksum of the merged one.
        # None if it is quantised, or was changed between two merges.
        self._unmerged_weight: Tensor | None = None
        self._merged_checksum = 0
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, settings)

    def update_layer(self, adapter_name: str, config: DCFTConfig, settings: dict[str, Any]) -> None:
        """Add an adapter, or put a fresh one in the place of one with this name."""
        kernel_size = validation.pair("kernel_size", settings["kernel_size"])
        stride = validation.stride_pair(settings["stride"], kernel_size)
        geometry = Geometry.build(
            self.in_features,
            self.out_features,
            settings["r"],
            kernel_size,
            stride,
            config.kernels == PER_RANK,
        )
        self.geometry[adapter_name] = geometry
        self.scaling[adapter_name] = scaling_of(geometry, config.init, settings["alpha"])
        self.dropout[adapter_name] = config.dropout
        A, B, C = (
            nn.Parameter(torch.empty(shape))
            for shape in (geometry.shape_A, geometry.shape_B, geometry.shape_C)
        )
        initialize(A, B, C, geometry, config.init)
        if config.init_weights is False:
            # An input of variance v gets an increment of variance v / 9 (without overlap), as from
            # LoRA's init_lora_weights=False.
            nn.init.normal_(B, std=1.0 / math.sqrt(3.0 * math.sqrt(geometry.outputs.width)))
        self.dcft_A[adapter_name], self.dcft_B[adapter_name], self.dcft_C[adapter_name] = A, B, C
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """The base layer's output plus the increments of the active adapters, or of the rows'.

        Args:
            x: `[..., n]`.
            *args: for the base layer.
            adapter_names: an adapter for each row `x[i]`, or `"__base__"`; for inference.
            **kwargs: for the base layer.

        Returns:
            `[..., m]`, in the dtype of the base layer's output.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif adapter_names is not None:
            return self._forward_by_row(x, adapter_names, *args, **kwargs)
        elif not self.merged:
            return self._forward_active(x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _forward_active(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.dcft_A]
        if active and not args and not kwargs and self._base_is_plain():
            base: Any = self.base_layer
            weight = base.weight.t() if self.fan_in_fan_out else base.weight
            factors, options = self._operands(active[0])
            y = dcft_linear(x, weight, base.bias, *factors, **options)
            del active[0]
        else:
            y = self.base_layer(x, *args, **kwargs)
        for name in active:
            y = self._add_increment(y, x, name)
        return y

    def _forward_by_row(
        self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        y: Tensor = self.base_layer(x, *args, **kwargs).clone()  # others may hold the output
        for name in self.dcft_A.keys() & set(adapter_names):
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            y[rows] = self._add_increment(y[rows], x[rows], name)
        return y

    def _add_increment(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        factors, options = self._operands(adapter_name)
        return dcft_update(y, x.to(y.dtype), *factors, **options).to(y.dtype)

    def _operands(self, adapter_name: str) -> tuple[list[Tensor], dict[str, Any]]:
        """The factors and settings of an adapter, as the functions take them."""
        return [getattr(self, name)[adapter_name] for name in FACTORS], {
            "scaling": self.scaling[adapter_name],
            "stride": self.geometry[adapter_name].stride,
            "dropout_p": self.dropout[adapter_name],
            "training": self.training,
        }

    def _base_is_plain(self) -> bool:
        """Whether a call of the base layer is `x W^T + b`, so that one op can do it all."""
        base: Any = self.base_layer
        return (
            (type(base) is nn.Linear or is_conv1d(base))
            and type(base.weight) is nn.Parameter
            and base.weight.dtype in validation.FLOAT_DTYPES
            and "forward" not in base.__dict__
            and not (
                base._forward_hooks
                or base._forward_pre_hooks
                or base._backward_hooks
                or base._backward_pre_hooks
            )
        )

    def adapter(self, adapter_name: str) -> Adapter:
        """The factors and settings of an adapter as backends take them, without dropout."""
        if adapter_name not in self.dcft_A:
            raise ValueError(f"Adapter {adapter_name} not found; there are {list(self.dcft_A)}.")
        A, B, C = (getattr(self, name)[adapter_name].detach() for name in FACTORS)
        return Adapter(A, B, C, self.scaling[adapter_name], self.geometry[adapter_name])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The increment of an adapter, in the shape of the base weight and the factors' dtype."""
        A, B, C, scaling, geometry, *_ = self.adapter(adapter)
        delta = delta_weight(
            A, B, C, in_features=self.in_features, out_features=self.out_features,
            stride=geometry.stride, scaling=scaling,
        )  # fmt: skip
        return delta.t() if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add increments to the base weight, in float32 or wider, rounded once to its dtype.

        Args:
            safe_merge: raise, and leave the weight as it is, if the sum is not finite.
            adapter_names: the adapters to merge; None for the active ones.

        Raises:
            ValueError: with `safe_merge`; or a weight that is computed from other parameters.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.dcft_A:
                self._merge_one(name, safe_merge)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def _merge_one(self, adapter_name: str, safe_merge: bool) -> None:
        weight = self.get_base_weight()
        merged = self._sum(weight, self.adapter(adapter_name))
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                "NaNs detected in the merged weights. "
                f"The adapter {adapter_name} seems to be broken"
            )
        if self.quantization_backend is None:
            if "weight" not in self.get_base_layer()._parameters:
                raise ValueError(
                    "merge: the base layer computes its weight from other parameters (pruning, "
                    "parametrizations); undo that first, since the sum would be lost"
                )
            if not self.merged:
                self._unmerged_weight = weight
            elif self._checksum() != self._merged_checksum:
                self._unmerged_weight = None  # restoring it would lose that change
        self.set_base_weight(merged)
        self._merged_checksum = self._checksum()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo all merges.

        A base weight that is not quantised comes back bit for bit, unless it was changed since, for
        example by another layer that shares it: then the increments are subtracted.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        names, self.merged_adapters = self.merged_adapters, []
        before, self._unmerged_weight = self._unmerged_weight, None
        if before is not None and self._checksum() == self._merged_checksum:
            self.set_base_weight(before)
            return
        weight = self.get_base_weight()
        for name in reversed(names):
            adapter = self.adapter(name)
            weight = self._sum(weight, adapter._replace(scaling=-adapter.scaling))
        self.set_base_weight(weight)

    def _checksum(self) -> int:
        """Of the bits of the base weight; zero for quantised ones, and on the meta device."""
        if self.quantization_backend is not None or self.weight.is_meta:
            return 0
        integers = getattr(torch, f"int{8 * self.weight.dtype.itemsize}")
        return int(self.weight.detach().view(integers).sum(dtype=torch.int64))

    def _sum(self, weight: Tensor, adapter: Adapter) -> Tensor:
        """A new tensor, base weight plus increment, in the base weight's shape and dtype."""
        if self.fan_in_fan_out:
            return merged_weight(weight.t(), adapter, "auto").t()
        return merged_weight(weight, adapter, "auto")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DCFTLinearLayer:
        """Also move or convert the weight that `unmerge` restores."""
        unchanged = self.merged and self._checksum() == self._merged_checksum
        super()._apply(fn, recurse)
        if self._unmerged_weight is not None:
            self._unmerged_weight = fn(self._unmerged_weight)
        if unchanged:
            self._merged_checksum = self._checksum()
        return self

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: a LoRA of rank `k d` is the same increment, exactly (see `export_lora`)."""
        return True

    def __repr__(self) -> str:
        return "dcft." + super().__repr__()

    def extra_repr(self) -> str:
        """The quantisation, if any, and the adapters' settings."""
        lines = [quantization_extra_repr(self)] if self.quantization_backend is not None else []
        for name, geometry in self.geometry.items():
            kernels = f"kernels={PER_RANK!r}, " if geometry.per_rank else ""
            lines.append(
                f"({name}): r={geometry.rank}, kernel_size={geometry.kernel_size}, {kernels}"
                f"stride={geometry.stride}, scaling={self.scaling[name]:g}"
            )
        return "\n".join(lines)


def layers_with(model: nn.Module, *adapters: str) -> dict[str, DCFTLinearLayer]:
    """The layers that have one of these adapters, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DCFTLinearLayer) and not module.geometry.keys().isdisjoint(adapters)
    }
