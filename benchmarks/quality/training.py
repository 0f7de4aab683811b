"""One run: adapt a model, train it, score it. Interrupted runs resume exactly."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.environment import ROOT, commit, describe, package_version
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.methods import Adapted, Method
from benchmarks.quality.metrics import LOWER_IS_BETTER
from benchmarks.quality.models import find_layers, head_parameters, load_model
from benchmarks.quality.runs import DEV, Result, Run
from benchmarks.quality.tasks import Feature, Prepared, Task, spread

CHECKPOINTS = ROOT / "outputs" / "quality"

_EVALUATION_BATCH = 64
_MAX_GRADIENT_NORM = 1.0
_CURVE_POINTS = 50
_POOL_BATCHES = 16  # batches of similar length are cut from random pools of this many


OnStep = Callable[[], object]


def train(
    run: Run, task: Task, method: Method, prepared: Prepared, study: str, on_step: OnStep
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
    training = _Training(run, task, adapted, prepared, groups)
    outcome: dict[str, Any]
    try:
        training.fit(on_step)
        outcome = {
            "value": training.scored["values"][task.metric],
            **training.scored,
            "trainable_parameters": sum(p.numel() for p in own),
            "head_parameters": sum(p.numel() for p in head),
            "loss_curve": _curve(training.losses),
            "value_curve": training.value_curve,
            "seconds": round(training.seconds, 2),
        }
    except DivergedError as error:
        outcome = {"error": f"{error}; a lower --lr may help (it was {run.learning_rate:g})"}
    shutil.rmtree(training.checkpoint.parent, ignore_errors=True)
    environment = describe("cuda" if torch.cuda.is_available() else "cpu")
    versions = {name: package_version(name) for name in ("torch", "transformers", "peft")}
    return Result(
        key=run.key(),
        study=study,
        run=run,
        metric=task.metric,
        constant_value=prepared.constant_score[task.metric],
        data=prepared.digest,
        device=environment.device,
        versions={name: version for name, version in versions.items() if version},
        commit=environment.commit,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        **outcome,
    )


class _Training:
    """The state of a run, and its checkpoint; without parameter groups it only scores."""

    def __init__(
        self, run: Run, task: Task, adapted: Adapted, prepared: Prepared, groups: list[Any]
    ) -> None:
        self.losses: list[float] = []  # one per step
        self.scored: dict[str, Any] = {}  # a result's values, jackknife and scored_step
        self.value_curve: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._lowest_loss = math.inf  # on the slice that decides when to stop
        self._run, self._task, self._adapted, self._prepared = run, task, adapted, prepared
        available = torch.accelerator.current_accelerator(check_available=True)
        self._device = available or torch.device("cpu")
        self._model = adapted.model.to(self._device)
        self._groups = groups
        # Code of another commit would not continue the same run.
        folder = CHECKPOINTS / f"{run.key()}-{prepared.digest}-{commit(ROOT)}"
        self.checkpoint = folder / "checkpoint.pt"
        if groups:
            self._optimizer = torch.optim.AdamW(groups, weight_decay=run.weight_decay)
            self._schedule = transformers.get_linear_schedule_with_warmup(
                self._optimizer, round(run.warm_up * run.steps), run.steps
            )

    def fit(self, on_step: OnStep) -> None:
        """Train and score."""
        run, adapted, model = self._run, self._adapted, self._model
        train = spread(self._prepared.train, run.train_size)
        lengths = [len(feature["input_ids"]) for feature in train]
        order = batch_order(lengths, run.batch_size, run.steps, run.seed)
        scored = {run.steps * n // run.evaluations for n in range(1, run.evaluations)}
        save_every = max(1, min(run.steps // run.evaluations, run.steps // 4))
        # Dropout does not depend on what a method has drawn.
        transformers.set_seed(run.seed + 1000 * run.replicate)
        torch.empty((), dtype=torch.int64).random_()  # as when scoring
        if self._groups and adapted.after_step is None and self.checkpoint.exists():
            self._load()
        started = time.perf_counter() - self.seconds
        for step in range(len(self.losses) + 1, run.steps + 1 if self._groups else 1):
            model.train()
            indices = order[(step - 1) * run.batch_size : step * run.batch_size]
            loss = self._forward([train[index] for index in indices]).loss
            if adapted.penalty is not None:
                loss = loss + adapted.penalty()
            self.losses.append(float(loss.detach()))
            if not math.isfinite(self.losses[-1]):
                raise DivergedError(f"step {step} of {run.steps} has the loss {self.losses[-1]}")
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
            self._optimizer.step()
            if adapted.after_step is not None:
                adapted.after_step(step)
            self._schedule.step()
            model.zero_grad()
            if step in scored:
                self._score()
            self.seconds = time.perf_counter() - started
            if step % save_every == 0:
                self._save()
            on_step()
        self._score()
        self.seconds = time.perf_counter() - started

    def _forward(self, features: Sequence[Feature]) -> Any:
        batch = self._prepared.collate(list(features)).items()
        inputs = {name: tensor.to(self._device) for name, tensor in batch}
        is_bf16 = self._run.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_bf16):
            return self._model(**inputs)

    def _score(self) -> None:
        prepared, step = self._prepared, len(self.losses)
        self._model.eval()
        # Draw a number, as a DataLoader does when it starts: the stored runs used one.
        torch.empty((), dtype=torch.int64).random_()
        outputs, loss = self._outputs(prepared), 0.0  # the same loss: the last evaluation counts
        try:
            values = dict(prepared.score(outputs))
            if prepared.held_out is not None:
                held_out = prepared.held_out.score(self._outputs(prepared.held_out))
                sign = 1.0 if self._task.loss in LOWER_IS_BETTER else -1.0
                loss = sign * held_out[self._task.loss]
        except DivergedError as error:
            raise DivergedError(f"after step {step} of {self._run.steps} {error}") from error
        self.value_curve.append((step, values[self._task.metric]))
        if loss <= self._lowest_loss:
            self._lowest_loss = loss
            jackknife = prepared.jackknife(outputs) if self._run.scored == DEV else {}
            self.scored = {"values": values, "jackknife": jackknife, "scored_step": step}

    @torch.no_grad()
    def _outputs(self, prepared: Prepared) -> list[Any]:
        outputs: list[Any] = []
        for start in range(0, len(prepared.evaluation), _EVALUATION_BATCH):
            features = prepared.evaluation[start : start + _EVALUATION_BATCH]
            outputs += prepared.reduce(self._forward(features), features)
        return outputs

    def _trained(self) -> list[Tensor]:
        return [p.data for p in self._model.parameters() if p.requires_grad]

    def _save(self) -> None:
        state = {
            "curves": (self.losses, self.value_curve, self.seconds),
            "scored": (self.scored, self._lowest_loss),
            "trained": self._trained(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generators": (torch.get_rng_state(), torch.cuda.get_rng_state_all()),
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.losses, self.value_curve, self.seconds = state["curves"]
        self.scored, self._lowest_loss = state["scored"]
        for parameter, stored in zip(self._trained(), state["trained"], strict=True):
            parameter.copy_(stored)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["generators"][0])
        torch.cuda.set_rng_state_all(state["generators"][1])


def _curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    """The mean losses of about `_CURVE_POINTS` pieces of the run, each with its last step."""
    size = max(1, len(losses) // _CURVE_POINTS)
    pieces = [(n, losses[n : n + size]) for n in range(0, len(losses), size)]
    return [(n + len(piece), round(sum(piece) / len(piece), 8)) for n, piece in pieces]


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
