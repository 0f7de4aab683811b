"""One run: adapt a model, train it, score it. Interrupted runs resume exactly."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.environment import ROOT, commit, describe
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.layers import find_layers
from benchmarks.quality.methods.adapted import Adapted, Method
from benchmarks.quality.pretrained import head_parameters, load_model
from benchmarks.quality.runs import Result, Run
from benchmarks.quality.tasks import Prepared, Task, spread

CHECKPOINTS = ROOT / "outputs" / "quality"

_EVALUATION_BATCH = 64
_MAX_GRADIENT_NORM = 1.0
_CURVE_POINTS = 50
_POOL_BATCHES = 16  # batches of similar length are cut from random pools of this many


@dataclass
class _Progress:
    """How far a run has come; `values` are the task's metrics at the last evaluation."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    value_curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def train(
    run: Run,
    task: Task,
    method: Method,
    prepared: Prepared,
    study: str,
    on_step: Callable[[], object] = lambda: None,
) -> Result:
    """Fine-tune once and score the outcome; a diverged run has a result with its error.

    An interrupted run resumes from its last checkpoint; with a method that keeps more state than
    its parameters (`after_step`: AdaLoRA, SoRA) it starts over.

    Raises:
        QualityError: options that the method rejects.
    """
    transformers.set_seed(run.seed)
    model = load_model(run.model, task, prepared.outputs)
    head = head_parameters(model, task)
    model.requires_grad_(False)
    layers = find_layers(model, run.targets) if method.uses_layers else []
    try:
        adapted = method.adapt(model, layers, run.steps, **run.options)
    except (TypeError, ValueError) as error:
        raise QualityError(f"--option: {run.method}: {error}") from error
    in_head = {id(parameter) for parameter in head}
    own = [p for p in adapted.model.parameters() if p.requires_grad and id(p) not in in_head]
    for parameter in head:
        parameter.requires_grad_(True)
    if not own and run.method != "head":
        raise QualityError(f"--method: {run.method} trains nothing of {run.model}")
    rates = ((own, run.learning_rate), (head, run.head_learning_rate))
    groups = [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]
    # Code of another commit would not continue the same run.
    folder = CHECKPOINTS / f"{run.key()}-{prepared.digest}-{commit(ROOT)}"
    outcome: dict[str, Any]
    try:
        done = _fit(run, adapted, prepared, groups, folder / "checkpoint.pt", on_step)
    except DivergedError as error:
        outcome = {"error": f"{error}; a lower --lr may help (it was {run.learning_rate:g})"}
    else:
        outcome = {
            "value": done.values[task.metric],
            "values": done.values,
            "trainable_parameters": sum(p.numel() for p in own),
            "head_parameters": sum(p.numel() for p in head),
            "loss_curve": _curve(done.losses),
            "value_curve": done.value_curve,
            "seconds": round(done.seconds, 2),
        }
    shutil.rmtree(folder, ignore_errors=True)
    environment = describe("cuda" if torch.cuda.is_available() else "cpu")
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Result(
        key=run.key(),
        study=study,
        run=run,
        metric=task.metric,
        constant_value=prepared.constant_score[task.metric],
        data=prepared.digest,
        device=environment.device,
        versions={**packages, **({"peft": environment.peft} if environment.peft else {})},
        commit=environment.commit,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **outcome,
    )


def _fit(
    run: Run,
    adapted: Adapted,
    prepared: Prepared,
    groups: list[dict[str, Any]],
    checkpoint: Path,
    on_step: Callable[[], object],
) -> _Progress:
    """Train and score; without parameter groups, only score."""
    started = time.perf_counter()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = adapted.model.to(device)
    train = spread(prepared.train, run.train_size)
    order = batch_order([len(f["input_ids"]) for f in train], run.batch_size, run.steps, run.seed)
    # Dropout does not depend on what a method has drawn.
    transformers.set_seed(run.seed)
    _advance_generator()
    done = _Progress()
    if groups:
        optimizer = torch.optim.AdamW(groups, weight_decay=run.weight_decay)
        warm_up = round(run.warm_up * run.steps)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, warm_up, run.steps)
        trained = [p for p in model.parameters() if p.requires_grad]
        if checkpoint.exists() and adapted.after_step is None:
            done = _load(checkpoint, trained, optimizer, schedule)
    before = done.seconds
    scored = {run.steps * n // run.evaluations for n in range(1, run.evaluations)}
    save_every = max(1, min(run.steps // run.evaluations, run.steps // 4))
    for step in range(done.step, run.steps if groups else 0):
        indices = order[step * run.batch_size : (step + 1) * run.batch_size]
        model.train()
        loss = _forward(run, model, prepared, [train[index] for index in indices], device).loss
        if adapted.penalty is not None:
            loss = loss + adapted.penalty()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"step {step + 1} of {run.steps} has the loss {value}")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()
        if adapted.after_step is not None:
            adapted.after_step(step + 1)
        schedule.step()
        model.zero_grad()
        done.step = step + 1
        done.losses.append(value)
        done.seconds = before + time.perf_counter() - started
        if done.step in scored:
            _score(run, model, prepared, device, done)
        if done.step % save_every == 0:
            _save(checkpoint, done, trained, optimizer, schedule)
        on_step()
    _score(run, model, prepared, device, done)
    done.seconds = before + time.perf_counter() - started
    return done


def _forward(
    run: Run, model: nn.Module, prepared: Prepared, features: Sequence[Any], device: torch.device
) -> Any:
    batch = {name: tensor.to(device) for name, tensor in prepared.collate(list(features)).items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        return model(**batch)


@torch.no_grad()
def _score(
    run: Run, model: nn.Module, prepared: Prepared, device: torch.device, done: _Progress
) -> None:
    model.eval()
    _advance_generator()
    outputs: list[Any] = []
    for start in range(0, len(prepared.evaluation), _EVALUATION_BATCH):
        features = prepared.evaluation[start : start + _EVALUATION_BATCH]
        outputs += prepared.reduce(_forward(run, model, prepared, features, device), features)
    try:
        done.values = dict(prepared.score(outputs))
    except DivergedError as error:
        raise DivergedError(f"after step {done.step} of {run.steps} {error}") from error
    done.value_curve.append((done.step, next(iter(done.values.values()))))


def _advance_generator() -> None:
    """Draw a number, as a DataLoader does when it starts: the stored runs used one."""
    torch.empty((), dtype=torch.int64).random_()


def _save(
    path: Path, done: _Progress, trained: list[nn.Parameter], optimizer: Any, schedule: Any
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "done": dataclasses.asdict(done),
        "trained": [parameter.data for parameter in trained],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "generator": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def _load(path: Path, trained: list[nn.Parameter], optimizer: Any, schedule: Any) -> _Progress:
    state = torch.load(path, weights_only=True)
    for parameter, stored in zip(trained, state["trained"], strict=True):
        parameter.data.copy_(stored)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["generator"])
    torch.cuda.set_rng_state_all(state["cuda"])
    return _Progress(**state["done"])


def _curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    """The mean losses of about `_CURVE_POINTS` pieces of the run, each with its last step."""
    size = max(1, len(losses) // _CURVE_POINTS)
    pieces = [losses[start : start + size] for start in range(0, len(losses), size)]
    ends = [min(start + size, len(losses)) for start in range(0, len(losses), size)]
    return [(end, round(sum(p) / len(p), 8)) for end, p in zip(ends, pieces, strict=True)]


def batch_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """The indices of a whole run's examples, in the order of its batches.

    An epoch is a permutation in which batches hold examples of similar length. After an epoch that
    does not divide into batches, batches are shifted against these groups; the stored runs used
    this order, so it stays. It depends on the seed alone: all methods see the same batches, and a
    resumed run continues with those it would have seen.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    pool_size = batch_size * _POOL_BATCHES
    while len(order) < steps * batch_size:
        shuffled = torch.randperm(len(lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), pool_size):
            pool = sorted(shuffled[start : start + pool_size], key=lengths.__getitem__)
            batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
        places = torch.randperm(len(batches), generator=generator).tolist()
        order += [index for place in places for index in batches[place]]
    return order[: steps * batch_size]
