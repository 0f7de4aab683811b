"""The matrix pattern constraints (MPC) of arXiv 2407.05417, section 4.2, for DCFT and LoRA layers.

The paper writes an increment `DW = A B` with `A [n, r]` on the input side and `B [r, m]` on the
output side. In this package and in PEFT, `A` is stored as `[r, n]` (`dcft_A [k, I]`,
`lora_A [r, n]`) and `B` as `[m, r]` (`dcft_B [J, k]`, `lora_B [m, r]`): both transposed. So the
paper's `A^T A` is `A A^T` here and its `B B^T` is `B^T B`, the r x r Gram matrices of the same
vectors.

    MPC_o, equation 20    ||A^T A - I||_F^2 + ||B B^T - I||_F^2
    MPC_d, equation 21    ||A^T A - I||_F^2 + ||B B^T - diag(B B^T)||_F^2
    MPC_n, no equation    "a non-linear operation between the matrix multiplications of A and B"

with the paper's letters; here `constraint_loss(model, "orthogonal")`, `constraint_loss(model,
"diagonal")` and `add_nonlinearity(model, "relu")`.

MPC_o is also equation 4 of the DCFT paper, arXiv 2503.01419. MPC_n follows equation 25, the paper's
formula for the adapters that it compares with: `x W + h(x A) B`, with an elementwise `h` on the
output of the input-side factor.

The constraints cover every `DCFTLinear`, and the active adapters of every PEFT layer with `lora_A`
and `lora_B` (LoRA, AdaLoRA) or `dcft_A` and `dcft_B` (`dcft_kernels.peft`). They leave out PEFT's
adapters of embeddings (`lora_embedding_A`), convolutions and bare parameters (`target_parameters`),
which have no such pair of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dcft_kernels import autocast, peft_layers, validation
from dcft_kernels.backends import check_nonlinear
from dcft_kernels.linear import DCFTLinear
from dcft_kernels.model import find_dcft_layers
from dcft_kernels.nonlinearity import NONLINEARITIES

ConstraintName = Literal["orthogonal", "diagonal"]
ConstraintForm = Literal["paper", "published_code"]


def constraint_loss(
    model: nn.Module,
    constraint: ConstraintName = "orthogonal",
    form: ConstraintForm = "paper",
) -> Tensor:
    """How far the adapters' factors are from a pattern, to be added to the loss with a weight.

        "orthogonal"   A A^T = I, B^T B = I          MPC_o, equation 20 of arXiv 2407.05417
        "diagonal"     A A^T = I, B^T B diagonal     MPC_d, equation 21: B's columns may have any
                                                     length, and one column alone costs nothing

    Computed on the k x k Gram matrices, at negligible cost. With `R` for the deviation of a Gram
    matrix, and the sum and mean over the A and B of all layers and active adapters:

        "paper"            sum of ||R||_F^2
        "published_code"   mean of ||R||_F, not squared: MPC_o in the code published with DCFT (and
                           with AdaLoRA before it)

    The two differ in scale and in how they grow with the number of layers.

    Factors of norm one suit `init="paper"` and a scaling near one, as published; with the large
    scaling of `init="balanced"`, increments would grow needlessly.

    Args:
        model: a model with `DCFTLinear` layers, with adapters of PEFT, or with both.
        constraint: which pattern.
        form: how the deviations are combined.

    Returns:
        A float32 scalar (float64 if a factor is), differentiable, on the first factor's device.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown constraint or form, or no factors to constrain.
    """
    pairs = _dcft_pairs(model)
    for other in peft_layers.lora_layers(model).values():
        pairs += peft_layers.active_factors(other)
    if not pairs:
        raise ValueError(
            "model: has neither DCFTLinear layers nor active PEFT adapters with lora_A and lora_B "
            "of linear layers; call swap_linear(model) or peft.get_peft_model first"
        )
    return _loss(pairs, constraint, form)


def orthogonality_loss(model: nn.Module, *, form: ConstraintForm = "paper") -> Tensor:
    """`constraint_loss(model, "orthogonal")` of a model's DCFT adapters only.

        "paper"           sum over layers of ||A A^T - I||_F^2 + ||B^T B - I||_F^2   (equation 4)
        "published_code"  mean over all A and B of ||A A^T - I||_F, ||B^T B - I||_F, not squared

    Equation 4 of arXiv 2503.01419 writes `A^T A` and `B B^T` for factors that touch the output and
    the input; here A touches the input and B the output. The published weight of the term, 0.1,
    belongs to `"published_code"`.

    Args:
        model: a model with `DCFTLinear` layers, or a PEFT model with a DCFT adapter.
        form: which of the two.

    Returns:
        A float32 scalar (float64 for float64 adapters), differentiable.

    Raises:
        ValueError: an unknown form, or no adapted layers.
    """
    pairs = _dcft_pairs(model)
    if not pairs:
        raise ValueError(
            "model: has no DCFTLinear layers and no active DCFT adapter of PEFT; call "
            "swap_linear(model) or peft.get_peft_model first"
        )
    return _loss(pairs, "orthogonal", form)


class NonlinearityHandle:
    """Returned by `add_nonlinearity`; removes the nonlinearity that the call added."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = tuple(layers)

    def remove(self) -> None:
        """Remove the nonlinearity from these layers; calling it again does nothing."""
        layers, self._layers = self._layers, ()
        _take_out(layers)


def add_nonlinearity(model: nn.Module, nonlinearity: str) -> NonlinearityHandle:
    """Put a nonlinearity between the factors of every adapter: MPC_n of arXiv 2407.05417.

        DCFT    y = x W^T + b + s expand(C h(U)),     U = shrink(dropout(x)) by A
        LoRA    y = x W^T + b + s B h(A dropout(x))

    A `DCFTLinear` is then as if built with `nonlinearity=`; in a PEFT model, it goes into the
    active adapters. The costs:

    - such adapters cannot be merged: their update is not a matrix. `merge`, `delta_weight` and
      everything else that needs the matrix raise until the nonlinearity is removed;
    - DCFT layers run on PyTorch operations, with the same three small products, and never on the
      GPU kernels; more is saved for the backward pass (`U`, `h(U)`, and a float32 copy of the input
      where a CPU computes 16 bits);
    - PEFT does not know about it: adapters saved, added or combined (`add_weighted_adapter`) by
      PEFT lack it, so call this again after loading. `save_adapter` does keep it.

    Args:
        model: a model with `DCFTLinear` layers, with LoRA adapters of PEFT, or with both; nothing
            merged. Adapters of embeddings are passed over.
        nonlinearity: `"relu"`, `"gelu"`, `"silu"` or `"tanh"`.

    Returns:
        A handle with `remove()`; `remove_nonlinearity(model)` does the same without it.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown name; no adapters; a layer that has a nonlinearity already, a backend
            or strategy that does not compute one, or an adapter whose factors are not called one
            after the other (AdaLoRA, DoRA, `target_parameters`, fused attention).
        RuntimeError: a layer is merged.
        The model is unchanged then.
    """
    validation.module("model", model)
    validation.one_of("nonlinearity", nonlinearity, NONLINEARITIES)
    dcft, lora = find_dcft_layers(model), peft_layers.lora_layers(model)
    adapters = frozenset(
        name for layer in lora.values() for name in peft_layers.active_adapters(layer)
    )
    if not dcft and not adapters:
        raise ValueError(
            "model: has neither DCFTLinear layers nor active PEFT adapters with lora_A and lora_B; "
            "call swap_linear(model) or peft.get_peft_model first"
        )
    for name, layer in dcft.items():
        if layer.merged:
            raise RuntimeError(f"model: {name!r} is merged; call unmerge_model(model) first")
        _refuse_second(name, layer.nonlinearity)
        try:
            check_nonlinear(nonlinearity, layer.backend, layer.strategy)
        except ValueError as error:
            raise ValueError(f"model: {name!r}: {error}") from None
    for name, other in lora.items():
        if getattr(other, "merged", False):
            raise RuntimeError(f"model: {name!r} is merged; call unmerge_adapter() first")
        _refuse_second(name, peft_layers.nonlinearity_of(other))
        reason = peft_layers.why_no_nonlinearity(other)
        if reason is not None:
            raise ValueError(
                f"model: {name!r} {reason}: no nonlinearity can stand between them; "
                "use plain LoRA on linear layers, or deactivate the adapter"
            )
    # Nothing can fail from here on.
    for layer in dcft.values():
        layer.nonlinearity = nonlinearity
    if adapters:
        for other in lora.values():
            peft_layers.put_nonlinearity(other, nonlinearity, adapters)
    return NonlinearityHandle([*dcft.values(), *lora.values()])


def remove_nonlinearity(model: nn.Module) -> None:
    """Remove the nonlinearity from every adapter of `model`, however it was added.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no adapter has one.
    """
    dcft, lora = find_dcft_layers(model), peft_layers.lora_layers(model)
    if all(layer.nonlinearity is None for layer in dcft.values()) and all(
        peft_layers.nonlinearity_of(layer) is None for layer in lora.values()
    ):
        raise ValueError(
            "model: no adapter has a nonlinearity; add_nonlinearity(model, 'relu') puts one there"
        )
    _take_out([*dcft.values(), *lora.values()])


def _dcft_pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """`(dcft_A [k, I], dcft_B [J, k])` of every layer and, in PEFT's, every active adapter."""
    layers = find_dcft_layers(model).values()
    pairs: list[tuple[Tensor, Tensor]] = [(layer.dcft_A, layer.dcft_B) for layer in layers]
    for other in peft_layers.dcft_layers(model).values():
        pairs += peft_layers.active_factors(other)
    return pairs


def _loss(pairs: Sequence[tuple[Tensor, Tensor]], constraint: str, form: str) -> Tensor:
    """The loss of pairs `(A [k, I], B [J, k])`."""
    if constraint not in get_args(ConstraintName):
        raise ValueError(
            f"constraint: expected 'orthogonal' or 'diagonal', got {constraint!r}; "
            "MPC_n is not a loss term; use add_nonlinearity"
        )
    if form not in get_args(ConstraintForm):
        raise ValueError(f"form: expected 'paper' or 'published_code', got {form!r}")
    deviations = []
    for A, B in pairs:
        for tall, free_lengths in ((A.t(), False), (B, constraint == "diagonal")):
            deviations.append(_deviation(tall, free_lengths))
    if form == "paper":
        return _gather([deviation.square().sum() for deviation in deviations]).sum()
    return _gather([torch.linalg.matrix_norm(deviation) for deviation in deviations]).mean()


def _deviation(tall: Tensor, free_lengths: bool) -> Tensor:
    """`G - I`, or `G - diag(G)`, for the Gram matrix `G [k, k]` of the columns of `tall [n, k]`."""
    tall = tall.to(torch.promote_types(tall.dtype, torch.float32))
    with autocast.suspended(tall):
        gram = tall.t() @ tall
    if free_lengths:
        return gram - torch.diag(gram.diagonal())
    return gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)


def _gather(terms: list[Tensor]) -> Tensor:
    """Scalars from possibly several devices as one vector on the first one's."""
    return torch.stack([term.to(terms[0].device) for term in terms])


def _refuse_second(name: str, present: str | None) -> None:
    if present is not None:
        raise ValueError(
            f"model: {name!r} has nonlinearity={present!r} already; "
            "call remove_nonlinearity(model) first"
        )


def _take_out(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        if isinstance(layer, DCFTLinear):
            layer.nonlinearity = None
        else:
            peft_layers.take_nonlinearity(layer)
