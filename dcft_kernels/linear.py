"""`DCFTLinear`: a linear layer with a DCFT adapter, in place of `nn.Linear`."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcft_kernels import validation
from dcft_kernels.adapter import PER_RANK, SHARED, Adapter, Geometry, Pair
from dcft_kernels.backends import BACKENDS, STRATEGIES, check_nonlinear
from dcft_kernels.functional import dcft_linear, delta_weight, merged_weight
from dcft_kernels.initialization import INITS, default_alpha, initialize
from dcft_kernels.nonlinearity import NONLINEARITIES, not_mergeable

SETTINGS = "dcft_settings"
# State dicts hold the position.
_NONLINEARITIES = (None, *NONLINEARITIES)
_UNDO = (
    "undo its pruning or parametrization (torch.nn.utils.prune.remove, remove_weight_norm, "
    "parametrize.remove_parametrizations)"
)
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


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
    kernels: str = SHARED

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
        validation.one_of("init", self.init, INITS)
        validation.one_of("backend", self.backend, BACKENDS)
        validation.one_of("strategy", self.strategy, STRATEGIES)
        validation.one_of("kernels", self.kernels, (SHARED, PER_RANK))
        if self.nonlinearity is not None:
            check_nonlinear(self.nonlinearity, self.backend, self.strategy)
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


class DCFTLinear(nn.Linear):
    """A frozen linear layer plus `scaling * DW`, `DW = ConvTranspose2d(B A, C)` (equations 5, 6).

    Replaces `nn.Linear`: the same `weight` and `bias` names and shapes, so a state dict
    of the base loads unchanged (with `strict=False`, since it has no adapter). Added are three
    parameters, the only trainable ones:

    | parameter | shape | |
    | --- | --- | --- |
    | `dcft_A` | `[rank, I]` | the input side, `I = ceil((in_features - d_in) / s_in) + 1` windows |
    | `dcft_B` | `[J, rank]` | the output side, with `J` windows |
    | `dcft_C` | `[d_out, d_in]`, per rank `[rank, d_out, d_in]` | the convolution's kernel |

    The state dict never depends on `merged`: it always holds the base weight and the adapter, and
    says so with a warning while merged. Its `dcft_settings` are what the factors' shapes do not
    show: scaling, stride and nonlinearity. Loading a state dict with other settings is an error; a
    state dict without them, such as the base's, loads as usual.

    Args:
        in_features: `n`.
        out_features: `m`.
        bias: whether the base has a bias.
        rank: `k`, the rank of `dcft_B @ dcft_A`; the paper uses 1.
        kernel_size: `d`, an int or `(d_out, d_in)`.
        stride: distance between windows, an int or `(s_out, s_in)`; None is the kernel size.
        alpha: `scaling = alpha / rank`; None gives the scaling that goes with `init`.
        dropout: probability of zeroing an element of the adapter's own view of the input.
        init: `"balanced"`, `"zero"`: the layer starts at its base; `"paper"`: near it. See
            `dcft_kernels.initialization`.
        backend: `"auto"`, `"torch"`, `"reference"` or `"triton"`, see `dcft_kernels.backends`.
        device: of all parameters. Where the default is the meta device (`torch.device("meta")`,
            accelerate's `init_empty_weights`), the adapter is created on the CPU: checkpoints of a
            base have no values for it.
        dtype: of `weight` and `bias`.
        adapter_dtype: of the adapter; None gives float32 over a 16-bit base, where 16-bit
            parameters would lose small optimizer steps, else `dtype`.
        strategy: `"auto"`, `"seeded"`, `"row_block"` or `"torch"`, see `dcft_kernels.backends`.
        nonlinearity: None, or `"relu"`, `"gelu"`, `"silu"`, `"tanh"` between the factors (MPC_n,
            see `dcft_kernels.constraints`). Such a layer is computed by PyTorch operations at the
            same cost, has no `DW`, and cannot be merged.
        kernels: `"shared"`: one kernel for all ranks, as in the paper; `"per_rank"`: each its own,
            `DW = sum over κ of kron(b_κ a_κ, C_κ)`, a transposed convolution with `k` input
            channels and `(k - 1) d_out d_in` more parameters.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: sizes or numbers out of range, unknown names.
    """

    weight: nn.Parameter
    dcft_A: nn.Parameter
    dcft_B: nn.Parameter
    dcft_C: nn.Parameter
    dcft_settings: Tensor
    nonlinearity: str | None = None
    kernels: str = SHARED
    _default_alpha: float | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 1,
        kernel_size: int | Pair = 8,
        stride: int | Pair | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: str = "balanced",
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        strategy: str = "auto",
        nonlinearity: str | None = None,
        kernels: str = SHARED,
    ) -> None:
        options = DCFTOptions(
            rank, kernel_size, stride, alpha, dropout, init, backend, adapter_dtype, strategy,
            nonlinearity, kernels,
        )  # fmt: skip
        in_features = validation.positive_int("in_features", in_features)
        out_features = validation.positive_int("out_features", out_features)
        validation.boolean("bias", bias)
        if dtype is not None:
            validation.float_dtype("dtype", dtype)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt_base(self.weight, self.bias, options, fan_in_fan_out=False, device=device)
        self.freeze_base()

    def _adopt_base(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        options: DCFTOptions,
        *,
        fan_in_fan_out: bool,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Use these parameters, not copies, as the base, and create the adapter on `device`.

        The default is the weight's device, or the CPU if that is the meta device: checkpoints of a
        base have no values for the adapter.
        """
        if device is None:
            device = torch.device("cpu") if weight.is_meta else weight.device
        self.rank = options.rank
        self.kernel_size: Pair = options.kernel_size  # type: ignore[assignment]
        self.stride: Pair = options.stride  # type: ignore[assignment]
        self.alpha = options.alpha
        self.dropout = options.dropout
        self.init = options.init
        self.backend = options.backend
        self.strategy = options.strategy
        self.nonlinearity = options.nonlinearity
        self.kernels = options.kernels
        # Whether `weight` is stored [n, m], as GPT-2's Conv1D does.
        self.fan_in_fan_out = fan_in_fan_out
        # The base weight while `weight` is the merged one, see `_weight_and_base`. In a list, since
        # nn.Module would register a bare parameter.
        self._base_while_merged: list[nn.Parameter] = []
        dtype = options.adapter_dtype
        if dtype is None:
            dtype = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
        geometry = self.geometry
        self._default_alpha = default_alpha(geometry, options.init)
        A, B, C = (
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            for shape in (geometry.shape_A, geometry.shape_B, geometry.shape_C)
        )
        # Not by register_parameter: under accelerate's init_empty_weights it moves to meta.
        self._parameters.update(weight=weight, bias=bias, dcft_A=A, dcft_B=B, dcft_C=C)
        self._buffers[SETTINGS] = self._settings().to(device)
        self.reset_dcft_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Module, **dcft_options: Any) -> DCFTLinear:
        """Adapt an existing layer; the result shares its weight and bias, which become frozen.

        The adapter is created on the weight's device, or on the CPU if that is the meta device.

        Args:
            linear: an `nn.Linear`, or a `Conv1D` of transformers (GPT-2), whose weight is stored
                `[in, out]` and stays so.
            **dcft_options: `rank`, `kernel_size`, `stride`, `alpha`, `dropout`, `init`, `backend`,
                `adapter_dtype`, `strategy`, `nonlinearity`, `kernels`, as for the class.

        Raises:
            TypeError: a layer of another kind, or an unknown option.
            ValueError: an option out of range.
        """
        options = DCFTOptions.from_keywords(dcft_options)
        reason = why_not_adaptable(linear)
        if reason is not None:
            raise TypeError(f"linear: {reason}")
        layer = cls.wrap(linear, options)
        layer.freeze_base()
        return layer

    @classmethod
    def wrap(cls, linear: nn.Module, options: DCFTOptions) -> DCFTLinear:
        """`from_linear` without its checks, and with the base not frozen yet.

        `linear` is not changed, so that several layers can be prepared before any is replaced.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear_sizes(linear)
        layer._adopt_base(
            linear.weight,  # type: ignore[arg-type]
            linear.bias,  # type: ignore[arg-type]
            options,
            fan_in_fan_out=is_conv1d(linear),
        )
        # The tables themselves, so that handles that users hold can remove their hooks.
        for table in _HOOK_TABLES:
            layer.__dict__[table] = linear.__dict__[table]
        layer.train(linear.training)
        return layer

    def freeze_base(self) -> None:
        """Stop training `weight` and `bias`, wherever else these parameters are used."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)

    @property
    def scaling(self) -> float:
        """`s = alpha / rank`; when `alpha` is None, what goes with `init`."""
        alpha = self._default_alpha if self.alpha is None else self.alpha
        return 1.0 if alpha is None else alpha / self.rank

    @property
    def merged(self) -> bool:
        """Whether `weight` currently holds base plus increment."""
        weight, base = self._weight_and_base()
        return weight is not base

    def _weight_and_base(self) -> tuple[Tensor, Tensor]:
        """`weight` and the base weight, at one moment; they are one object unless merged.

        Another thread may merge or unmerge meanwhile. Each assigns a new `_base_while_merged` list,
        and `weight` changes only while that list holds the base. So if the list is the same before
        and after reading `weight`, the two belong together.
        """
        while True:
            kept = self._base_while_merged
            weight = self.weight
            if kept is self._base_while_merged:
                return weight, kept[0] if kept else weight

    @property
    def geometry(self) -> Geometry:
        """The adapter's shapes."""
        return Geometry.build(
            self.in_features,
            self.out_features,
            self.rank,
            self.kernel_size,
            self.stride,
            self.kernels == PER_RANK,
        )

    @property
    def adapter(self) -> Adapter:
        """The factors and their settings as backends take them, without dropout."""
        return Adapter(self.dcft_A, self.dcft_B, self.dcft_C, self.scaling, self.geometry)

    @property
    def options(self) -> DCFTOptions:
        """The adapter's settings as one value."""
        return DCFTOptions(
            self.rank, self.kernel_size, self.stride, self.alpha, self.dropout, self.init,
            self.backend, self.dcft_A.dtype, self.strategy, self.nonlinearity, self.kernels,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear has
        """`input W^T + bias + scaling * dropout(input) DW^T`; `[..., n]` to `[..., m]`."""
        stored, base = self._weight_and_base()
        weight = stored.t() if self.fan_in_fan_out else stored
        if stored is not base:
            return F.linear(validation.tokens("x", input, self.in_features), weight, self.bias)
        return dcft_linear(
            input,
            weight,
            self.bias,
            self.dcft_A,
            self.dcft_B,
            self.dcft_C,
            scaling=self.scaling,
            stride=self.stride,
            dropout_p=self.dropout,
            training=self.training,
            backend=self.backend,
            strategy=self.strategy,
            nonlinearity=self.nonlinearity,
        )

    def delta_weight(self) -> Tensor:
        """The increment `scaling * DW`, `[out_features, in_features]`, differentiable.

        Raises:
            RuntimeError: the layer has a nonlinearity.
        """
        self._refuse_if_nonlinear("delta_weight")
        return delta_weight(
            self.dcft_A,
            self.dcft_B,
            self.dcft_C,
            in_features=self.in_features,
            out_features=self.out_features,
            stride=self.stride,
            scaling=self.scaling,
            backend=self.backend,
        )

    def merge(self) -> None:
        """Put base plus increment in `weight`; the forward is then a plain linear layer's.

        The base weight is kept unchanged for `unmerge`, and the state dict still holds it and the
        adapter: a merged layer has two weights, a layer from `to_linear` only one. The sum is
        computed in float32 or wider and rounded once to the base's dtype; in 16 bits, increments
        below half a unit in the last place vanish.

        In eager mode, other threads may use the layer meanwhile: each call is computed either
        unmerged or merged. Only one thread at a time may merge and unmerge.

        Raises:
            RuntimeError: the layer is merged already, or has a nonlinearity.
            ValueError: the weight is computed from other parameters (pruned, weight-normed,
                parametrized), sharded or without values, or the merged weight is not finite.
            Nothing is changed then.
        """
        self._refuse_if_nonlinear("merge")
        self._refuse_unless_plain("merge", "weight")
        if self.merged:
            raise RuntimeError("merge: this DCFTLinear is merged already; call unmerge() first")
        base = self.weight
        merged = nn.Parameter(self._merged_weight(base), requires_grad=False)
        # In this order, see _weight_and_base.
        self._base_while_merged = [base]
        self.weight = merged

    def unmerge(self) -> None:
        """Restore the base weight bit for bit: the same parameter as before `merge`.

        Raises:
            RuntimeError: the layer is not merged.
            ValueError: since `merge`, the weight was replaced by one that is computed or sharded.
        """
        if not self.merged:
            raise RuntimeError("unmerge: this DCFTLinear is not merged; call merge() first")
        self._refuse_unless_plain("unmerge", "weight")
        # In this order, see _weight_and_base.
        (self.weight,) = self._base_while_merged
        self._base_while_merged = []

    def to_linear(self) -> nn.Module:
        """A plain layer with base plus increment as its weight, of the kind that was adapted.

        Its weight is a new tensor; its bias is this layer's own.

        Raises:
            RuntimeError: the layer has a nonlinearity.
            ValueError: as for `merge`; also for a bias that is computed from other parameters.
        """
        self._refuse_if_nonlinear("to_linear")
        self._refuse_unless_plain("to_linear", "weight", "bias")
        weight, base = self._weight_and_base()
        weight = self._merged_weight(base) if weight is base else weight.detach().clone()
        if self.fan_in_fan_out:
            conv1d: Any = _conv1d_class()
            with torch.device("meta"):
                plain = conv1d(1, 1)
            plain.nf, plain.nx = self.out_features, self.in_features
        else:
            plain = nn.Linear(1, 1, bias=False, device="meta")
            plain.in_features, plain.out_features = self.in_features, self.out_features
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = self.bias
        plain.train(self.training)
        return plain

    @torch.no_grad()
    def _merged_weight(self, base: Tensor) -> Tensor:
        """Base plus increment, as `weight` is stored, rounded once to its dtype."""
        if base.is_meta:
            raise ValueError(
                "merge: the weight is on the meta device; load its values first, or undo "
                "offloading (accelerate.hooks.remove_hook_from_submodules)"
            )
        turned = base.t() if self.fan_in_fan_out else base
        merged = merged_weight(turned, self.adapter, self.backend)
        if self.fan_in_fan_out:
            merged = merged.t()
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(
                "merge: base plus increment is not finite: one of them has diverged, or the sum "
                f"overflows {base.dtype}; nothing was changed"
            )
        return merged

    def reset_parameters(self) -> None:
        """Draw the base as `nn.Linear` does and, once it exists, the adapter as `init` says.

        Raises:
            RuntimeError: the layer is merged.
        """
        if "dcft_A" not in self._parameters:  # nn.Linear.__init__ calls this
            super().reset_parameters()
            return
        self._refuse_if_merged("reset_parameters")
        bound = self.in_features**-0.5
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                if parameter is not None:
                    parameter.uniform_(-bound, bound)
        self.reset_dcft_parameters()

    def reset_dcft_parameters(self) -> None:
        """Draw the adapter again as `init` says; the base stays.

        Raises:
            RuntimeError: the layer is merged.
        """
        self._refuse_if_merged("reset_dcft_parameters")
        initialize(self.dcft_A, self.dcft_B, self.dcft_C, self.geometry, self.init)

    def _refuse_if_nonlinear(self, action: str) -> None:
        if self.nonlinearity is not None:
            raise not_mergeable(f"{action}: this DCFTLinear", self.nonlinearity)

    def _refuse_unless_plain(self, action: str, *names: str) -> None:
        """Raise ValueError for parameters of the base that are computed from others or sharded."""
        m, n = self.out_features, self.in_features
        shapes = {"weight": [n, m] if self.fan_in_fan_out else [m, n], "bias": [m]}
        for name in names:
            found = getattr(self, name)
            if found is None:
                continue
            # A DTensor has full_tensor, and the shape of the whole.
            sharded = list(found.shape) != shapes[name] or hasattr(found, "full_tensor")
            if name not in self._parameters or sharded:
                raise ValueError(
                    f"{action}: expected {name} to be an nn.Parameter of shape {shapes[name]}, got "
                    f"a {type(found).__name__} of shape {list(found.shape)}, computed or sharded; "
                    f"{_UNDO}, or load the saved adapter into a plain model and merge there"
                )

    def _refuse_if_merged(self, action: str) -> None:
        if self.merged:
            raise RuntimeError(f"{action}: this DCFTLinear is merged; call unmerge() first")

    def train(self, mode: bool = True) -> DCFTLinear:
        """Set training mode; warns if merged, since a merged adapter cannot learn."""
        if mode and self.merged:
            warnings.warn(
                "a merged DCFTLinear is set to train: its adapter learns nothing until unmerge()",
                stacklevel=2,
            )
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """One line: sizes, options, and what the adapter costs in parameters."""
        count = self.dcft_A.numel() + self.dcft_B.numel() + self.dcft_C.numel()
        strategy = "" if self.strategy == "auto" else f"strategy={self.strategy!r}, "
        between = "" if self.nonlinearity is None else f"nonlinearity={self.nonlinearity!r}, "
        kernels = "" if self.kernels == SHARED else f"kernels={self.kernels!r}, "
        return (
            f"{super().extra_repr()}, rank={self.rank}, kernel_size={self.kernel_size}, {kernels}"
            f"stride={self.stride}, scaling={self.scaling:g}, dropout={self.dropout:g}, "
            f"init={self.init!r}, backend={self.backend!r}, {strategy}{between}"
            f"adapter_parameters={count}, merged={self.merged}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DCFTLinear:
        """Also move or convert the base weight that `merge` keeps."""
        super()._apply(fn, recurse)
        for base in self._base_while_merged:
            with torch.no_grad():
                moved = fn(base)
            if torch._has_compatible_shallow_copy_type(base, moved):
                # In place, so that layers tied to the base stay tied.
                base.data = moved
            else:
                self._base_while_merged = [nn.Parameter(moved, base.requires_grad)]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Not the buffer's: `alpha` may have changed since it was created.
        destination[prefix + SETTINGS] = self._settings().to(self.dcft_settings.device)
        if prefix + "weight" not in destination:  # pruned or parametrized
            return
        weight, base = self._weight_and_base()
        destination[prefix + "weight"] = base if keep_vars else base.detach()
        if weight is not base:
            warnings.warn(
                "the state dict of a merged DCFTLinear holds the base weight and the adapter, not "
                "the merged weight; for a plain model with merged weights, call "
                "merge_model(model, unload=True) before saving it",
                stacklevel=2,
            )

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        error_messages: list[str] = rest[-1]
        name = prefix.rstrip(".") or "DCFTLinear"
        if self.merged:
            error_messages.append(f"{name} is merged: call unmerge() before loading")
            return
        key = prefix + SETTINGS
        settings, found = self._settings(), state_dict.get(key)
        comparable = isinstance(found, Tensor) and found.shape == settings.shape
        if comparable and not (found.is_meta or _close(found, settings)):
            error_messages.append(
                f"{name}: {_describe_settings(settings)} in the model, but "
                f"{_describe_settings(found)} in the state dict; swap the model's layers with "
                f"those settings, or delete {key!r} from the state dict to load it all the same"
            )
            return
        if comparable or found is None:  # those of a base and of earlier versions have none
            weight = state_dict.get(prefix + "weight", self.dcft_settings)
            state_dict = {**state_dict, key: settings.to(weight.device)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def _settings(self) -> Tensor:
        """Scaling, stride and nonlinearity, which the factors' shapes do not show.

        In float32, since tools that cast or average state dicts can handle that.
        """
        settings = [self.scaling, *self.stride, _NONLINEARITIES.index(self.nonlinearity)]
        return torch.tensor(settings, dtype=torch.float32, device="cpu")


def _close(found: Tensor, settings: Tensor) -> bool:
    """Whether settings are equal, apart from casts to 16 bits and averages of equal ones."""
    rtol = 1e-4 if found.dtype.itemsize > 2 else 1e-2
    return torch.allclose(found.to(settings), settings, rtol=rtol, atol=0.0)


def _describe_settings(settings: Tensor) -> str:
    scaling, s_out, s_in, function = settings.tolist()
    nonlinearity = dict(enumerate(_NONLINEARITIES)).get(function, "unknown")
    return f"scaling={scaling:.7g}, stride=({s_out:g}, {s_in:g}), nonlinearity={nonlinearity}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, without importing transformers."""
    conv1d = _conv1d_class()
    return conv1d is not None and type(module) is conv1d


def why_not_adaptable(module: nn.Module) -> str | None:
    """The reason why `DCFTLinear.from_linear` cannot take `module`, or None if it can.

    Only the exact classes count: subclasses of `nn.Linear` (quantised, parametrised, attention
    projections whose forward is bypassed) may not compute `x W^T + b` from `weight`.
    """
    if isinstance(module, DCFTLinear):
        return "this layer is a DCFTLinear already"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return (
            f"expected an nn.Linear or a transformers Conv1D, got {type(module).__qualname__}; "
            "for other base layers add the adapter with dcft_update"
        )
    if "forward" in module.__dict__:
        return (
            "expected the forward of its class, got another one set on the instance; swap it "
            "first, for example before accelerate dispatches or offloads the model"
        )
    for name in ("weight", "bias"):
        if getattr(module, name) is not None and name not in module._parameters:
            return f"expected {name} to be an nn.Parameter, got a computed one; {_UNDO}"
    weight: Any = module.weight
    if weight.dtype not in validation.FLOAT_DTYPES:
        return f"expected a float weight, got {weight.dtype}"
    if weight.dim() != 2:
        return (
            f"expected a 2-D weight, got shape {list(weight.shape)}: is it sharded or not loaded?"
        )
    return None


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of an adaptable layer."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def _conv1d_class() -> type | None:
    # Whoever holds a Conv1D has imported its module.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return None if pytorch_utils is None else getattr(pytorch_utils, "Conv1D", None)
