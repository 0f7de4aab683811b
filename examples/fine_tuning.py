"""Training: a head on frozen features, or a head and adapters together, with the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text_classifier import EncodedTexts, TextClassifier
from text_task import TextTask

# Batches of similar length are cut from pools of so many batches, which are drawn at random.
_POOL_BATCHES = 8
_WARM_UP_SHARE = 0.1
_WARM_UP_BATCH = 128
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """How everything is trained. The rates suit MiniLM on the docstring task; they were chosen
    with `--validate`, never on the held-out split."""

    epochs: int = 1
    batch_size: int = 16
    dcft_lr: float = 5e-3
    lora_lr: float = 1e-2
    head_lr: float = 3e-3
    head_weight_decay: float = 1e-2
    head_steps: int = 150
    head_steps_lr: float = 1e-2
    max_grad_norm: float = 1.0


class Advance(Protocol):
    """Told how much work is done, and the latest loss where there is one."""

    def __call__(self, amount: int, loss: float | None = None) -> None: ...


def batch_order(texts: EncodedTexts, recipe: Recipe, seed: int) -> list[list[int]]:
    """The batches of a whole training run: every text once an epoch, similar lengths together."""
    generator = torch.Generator().manual_seed(seed)
    size = recipe.batch_size
    order: list[list[int]] = []
    for _ in range(recipe.epochs):
        shuffled = torch.randperm(len(texts), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), size * _POOL_BATCHES):
            pool = sorted(
                shuffled[start : start + size * _POOL_BATCHES], key=texts.lengths.__getitem__
            )
            batches += [pool[first : first + size] for first in range(0, len(pool), size)]
        order += [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return order


def task_loss(task: TextTask, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, or the squared error of scores."""
    if task.is_regression:
        return F.mse_loss(logits.squeeze(-1), targets)
    return F.cross_entropy(logits, targets)


def predictions(task: TextTask, logits: Tensor) -> Tensor:
    """Class indices, or scores, `[N]`."""
    return logits.squeeze(-1) if task.is_regression else logits.argmax(-1)


def score(task: TextTask, logits: Tensor, texts: EncodedTexts) -> float:
    """The task's metric of these logits."""
    return task.metric.score(predictions(task, logits), texts.labels)


@torch.no_grad()
def in_batches(
    texts: EncodedTexts,
    compute: Callable[[dict[str, Tensor]], Tensor],
    advance: Advance,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """`compute` of the inputs of all texts, or of those in `rows`, stacked in their order."""
    rows = range(len(texts)) if rows is None else rows
    # Texts of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(rows)), key=lambda place: texts.lengths[rows[place]])
    results: list[Tensor] = []
    for start in range(0, len(order), _EVALUATION_BATCH):
        batch = [rows[place] for place in order[start : start + _EVALUATION_BATCH]]
        results.append(compute(texts.inputs(batch)))
        advance(len(batch))
    stacked = torch.cat(results)
    return torch.empty_like(stacked).index_copy_(
        0, torch.tensor(order, device=stacked.device), stacked
    )


def warm_up_head(
    head: nn.Module, task: TextTask, features: Tensor, targets: Tensor, recipe: Recipe, seed: int
) -> None:
    """Fit the head to the frozen encoder's features, so that adapters start from a good head."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=recipe.head_steps_lr, weight_decay=recipe.head_weight_decay
    )
    schedule = _linear_schedule(optimizer, recipe.head_steps)
    for _ in range(recipe.head_steps):
        rows = torch.randint(len(targets), (_WARM_UP_BATCH,), generator=generator)
        rows = rows.to(targets.device)
        _step(optimizer, schedule, task_loss(task, head(features[rows]), targets[rows]), recipe)


def train_head(
    head: nn.Module,
    task: TextTask,
    features: Tensor,
    targets: Tensor,
    order: Sequence[list[int]],
    recipe: Recipe,
) -> list[float]:
    """The run without adapters: the same steps on the same batches, of the head alone."""
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=recipe.head_lr, weight_decay=recipe.head_weight_decay
    )
    schedule = _linear_schedule(optimizer, len(order))
    losses = []
    for batch in order:
        loss = task_loss(task, head(features[batch]), targets[batch])
        losses.append(_step(optimizer, schedule, loss, recipe))
    return losses


def fine_tune(
    classifier: TextClassifier,
    task: TextTask,
    texts: EncodedTexts,
    order: Sequence[list[int]],
    recipe: Recipe,
    adapter_lr: float,
    advance: Advance,
) -> list[float]:
    """Train whatever of the encoder requires a gradient, at `adapter_lr`, and the head.

    The encoder's own dropout stays off, as it is when the head alone trains on stored features.
    """
    classifier.eval()
    optimizer = adapter_optimizer(classifier, recipe, adapter_lr)
    schedule = _linear_schedule(optimizer, len(order))
    losses = []
    for batch in order:
        loss = task_loss(task, classifier(texts.inputs(batch)), texts.targets[batch])
        losses.append(_step(optimizer, schedule, loss, recipe))
        advance(len(batch), losses[-1])
    return losses


def adapter_optimizer(
    classifier: TextClassifier, recipe: Recipe, adapter_lr: float
) -> torch.optim.AdamW:
    """AdamW over the encoder's trainable parameters, undecayed, and the head's."""
    adapters = [p for p in classifier.encoder.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": adapters, "lr": adapter_lr, "weight_decay": 0.0},
            {
                "params": list(classifier.head.parameters()),
                "lr": recipe.head_lr,
                "weight_decay": recipe.head_weight_decay,
            },
        ]
    )


def _linear_schedule(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Up for a tenth of the steps, then down to zero."""
    rising = max(1, round(_WARM_UP_SHARE * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising)),
    )


def _step(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loss: Tensor,
    recipe: Recipe,
) -> float:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], recipe.max_grad_norm)
    optimizer.step()
    schedule.step()
    return loss.item()
