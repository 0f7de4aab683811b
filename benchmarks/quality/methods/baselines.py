"""What is trained without adding anything: the head alone, the biases, every parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from benchmarks.quality.methods.adapted import Adapted


def head(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """The backbone stays frozen."""
    return Adapted(model)


def full(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """Every parameter of the model is trained, whatever `layers` names."""
    return Adapted(model.requires_grad_(True))


def bitfit(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """Every bias of the model is trained, those of the layer norms too, whatever `layers` names.

    BitFit (Zaken et al. 2021); equation 8 of arXiv 2407.05417.

    Raises:
        ValueError: a model without biases.
    """
    biases = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
    if not biases:
        raise ValueError(f"model: expected one with biases, got {type(model).__name__} without any")
    for bias in biases:
        bias.requires_grad_(True)
    return Adapted(model)
