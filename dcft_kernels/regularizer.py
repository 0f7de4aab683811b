"""The orthogonality term of the training loss, equation 4 of arXiv 2503.01419."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dcft_kernels import autocast
from dcft_kernels.model import dcft_layers

OrthogonalityForm = Literal["paper", "published_code"]


def orthogonality_loss(model: nn.Module, *, form: OrthogonalityForm = "paper") -> Tensor:
    """How far the factors are from orthonormal, to be added to the loss with a weight (0.1 there).

    On the k x k Gram matrices, so that the term costs next to nothing:

        "paper"           sum over layers of ||A A^T - I||_F^2 + ||B^T B - I||_F^2   (equation 4)
        "published_code"  mean over all A and B of ||A A^T - I||_F, ||B^T B - I||_F, not squared

    Equation 4 writes `A^T A` and `B B^T` for factors that touch the output and the input; here A
    touches the input and B the output. The two forms differ in scale and in how they grow with the
    number of layers; the published hyperparameters belong to `"published_code"`.

    Args:
        model: a model with `DCFTLinear` layers.
        form: which of the two.

    Returns:
        A float32 scalar (float64 for float64 adapters), differentiable.

    Raises:
        ValueError: an unknown form, or no adapted layers.
    """
    if form not in get_args(OrthogonalityForm):
        raise ValueError(f"form: expected 'paper' or 'published_code', got {form!r}")
    deviations = []
    for layer in dcft_layers(model).values():
        for tall in (layer.dcft_A.t(), layer.dcft_B):  # [I, k] and [J, k]
            tall = tall.to(torch.promote_types(tall.dtype, torch.float32))
            identity = torch.eye(tall.shape[1], dtype=tall.dtype, device=tall.device)
            with autocast.suspended(tall):
                deviations.append(tall.t() @ tall - identity)
    if form == "paper":
        terms = [deviation.square().sum() for deviation in deviations]
        return _gather(terms).sum()
    return _gather([torch.linalg.matrix_norm(deviation) for deviation in deviations]).mean()


def _gather(terms: list[Tensor]) -> Tensor:
    """Scalars from possibly several devices as one vector on the first one's."""
    return torch.stack([term.to(terms[0].device) for term in terms])
