"""Whether a trained DCFT classifier says the same however it is computed, merged or reloaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters import load_dcft
from backbone import Backbone
from dcft_kernels import DCFTLinear, merge_model, unmerge_model
from fine_tuning import Advance, in_batches, predictions
from text_classifier import EncodedTexts, TextClassifier
from text_task import TextTask

# Largest difference of logits allowed between two float32 computations of the same function,
# relative to the largest logit; six layers of float32 rounding stay two orders below.
_TOLERANCE = 1e-4
_FLOAT64_TEXTS = 96


@dataclass(frozen=True)
class Fidelity:
    """Largest differences of logits over the held-out split, and predictions that changed.

    The two errors are those of the chosen and of the reference backend, in the classifier's own
    dtype, against the reference backend in float64, over a sample of the split.
    """

    texts: int
    largest_logit: float
    reference_difference: float
    torch_error: float
    reference_error: float
    merged_difference: float
    merged_changes: int
    reloaded_difference: float
    reloaded_changes: int
    unmerged_is_exact: bool

    def failures(self) -> list[str]:
        """What is not as it must be, in words; empty when all is well."""
        allowed = _TOLERANCE * max(1.0, self.largest_logit)
        checks = {
            f"logits differ from the reference by {self.reference_difference:.2e}": (
                self.reference_difference <= allowed
            ),
            f"logits are off the float64 reference by {self.torch_error:.2e}": (
                self.torch_error <= allowed
            ),
            f"merging changed {self.merged_changes} predictions": self.merged_changes == 0,
            f"merging changed logits by {self.merged_difference:.2e}": (
                self.merged_difference <= allowed
            ),
            f"reloading changed {self.reloaded_changes} predictions": self.reloaded_changes == 0,
            f"reloading changed logits by {self.reloaded_difference:.2e}": (
                self.reloaded_difference <= allowed
            ),
            "unmerging did not restore the base bit for bit": self.unmerged_is_exact,
        }
        return [complaint for complaint, passed in checks.items() if not passed]


def check_fidelity(
    classifier: TextClassifier,
    backbone: Backbone,
    task: TextTask,
    texts: EncodedTexts,
    folder: Path,
    advance: Advance,
) -> Fidelity:
    """Compare the classifier with itself: other backend, float64, merged, unmerged, reloaded.

    `folder` holds what `save_dcft` wrote. The classifier is left as it was.
    """
    classifier.eval()

    def logits_of(model: TextClassifier, rows: Sequence[int] | None = None) -> Tensor:
        return in_batches(texts, model, advance, rows)

    sample = _float64_sample(texts)
    logits = logits_of(classifier)
    with _reference_backend(classifier):
        reference = logits_of(classifier)
        exact = logits_of(copy.deepcopy(classifier).double(), sample)

    base = {name: layer.weight.clone() for name, layer in _dcft_layers(classifier)}
    merge_model(classifier)
    merged = logits_of(classifier)
    unmerge_model(classifier)
    unmerged_is_exact = all(
        torch.equal(layer.weight, base[name]) for name, layer in _dcft_layers(classifier)
    ) and torch.equal(logits_of(classifier), logits)

    reloaded_classifier = TextClassifier(backbone, task.outputs)
    load_dcft(reloaded_classifier, folder)
    reloaded = logits_of(reloaded_classifier.eval())

    return Fidelity(
        texts=len(texts),
        largest_logit=logits.abs().max().item(),
        reference_difference=_largest_difference(logits, reference),
        torch_error=_largest_difference(logits[sample], exact),
        reference_error=_largest_difference(reference[sample], exact),
        merged_difference=_largest_difference(logits, merged),
        merged_changes=_changes(task, logits, merged),
        reloaded_difference=_largest_difference(logits, reloaded),
        reloaded_changes=_changes(task, logits, reloaded),
        unmerged_is_exact=unmerged_is_exact,
    )


def check_work(texts: EncodedTexts) -> int:
    """How many texts `check_fidelity` runs through a model, for a progress bar."""
    return 5 * len(texts) + len(_float64_sample(texts))


def _float64_sample(texts: EncodedTexts) -> list[int]:
    return list(range(0, len(texts), max(1, len(texts) // _FLOAT64_TEXTS)))


def _dcft_layers(classifier: TextClassifier) -> list[tuple[str, DCFTLinear]]:
    return [(n, m) for n, m in classifier.named_modules() if isinstance(m, DCFTLinear)]


@contextmanager
def _reference_backend(classifier: TextClassifier) -> Iterator[None]:
    chosen = [(layer, layer.backend) for _, layer in _dcft_layers(classifier)]
    for layer, _ in chosen:
        layer.backend = "reference"
    try:
        yield
    finally:
        for layer, backend in chosen:
            layer.backend = backend


def _largest_difference(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def _changes(task: TextTask, before: Tensor, after: Tensor) -> int:
    """How many predictions differ; scores do when they move by more than the tolerance."""
    one, other = predictions(task, before), predictions(task, after)
    if task.is_regression:
        return int(((one - other).abs() > _TOLERANCE * max(1.0, one.abs().max().item())).sum())
    return int((one != other).sum())
