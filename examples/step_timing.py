"""Time of one training step of several classifiers, measured side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fine_tuning import Advance, Recipe, adapter_optimizer, task_loss
from text_classifier import EncodedTexts, TextClassifier
from text_task import TextTask


@dataclass(frozen=True)
class StepTime:
    """Median time of a step, and the median of its ratios to the frozen model, round by round."""

    milliseconds: float
    ratio: float


def time_steps(
    classifiers: dict[str, TextClassifier],
    baseline: str,
    task: TextTask,
    texts: EncodedTexts,
    recipe: Recipe,
    rounds: int,
    advance: Advance,
) -> dict[str, StepTime]:
    """Forward, backward and optimizer step on the longest texts of one batch size.

    Every round times each classifier once, in an order that rotates, so that a busy moment of the
    machine falls on all alike. One round before them is not counted.
    """
    steps = {name: _training_step(c, task, texts, recipe) for name, c in classifiers.items()}
    device = texts.labels.device
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = _timed(steps[name], device)
            if round_number:
                seconds[name].append(elapsed)
        advance(1)
    return {
        name: StepTime(
            milliseconds=1e3 * statistics.median(times),
            ratio=statistics.median(
                mine / base for mine, base in zip(times, seconds[baseline], strict=True)
            ),
        )
        for name, times in seconds.items()
    }


def let_gradients_through(classifier: TextClassifier) -> None:
    """Make the embeddings' output require a gradient.

    Then backward passes through all layers even where nothing in them trains, which is what the
    frozen model has to do to be compared with; to be called before adapters are added.
    """
    classifier.encoder.enable_input_require_grads()


def _training_step(
    classifier: TextClassifier, task: TextTask, texts: EncodedTexts, recipe: Recipe
) -> Callable[[], None]:
    batch = texts.longest(recipe.batch_size)
    inputs, targets = texts.inputs(batch), texts.targets[batch]
    optimizer = adapter_optimizer(classifier, recipe, adapter_lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        task_loss(task, classifier(inputs), targets).backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
