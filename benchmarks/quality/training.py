"""One run with transformers' Trainer: the steps, the curves, and stopping where a loss diverges."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.environment import ROOT, commit, describe
from benchmarks.quality.errors import DivergedError, QualityError
from benchmarks.quality.layers import find_layers
from benchmarks.quality.methods.adapted import Adapted, Method
from benchmarks.quality.prepared import Prepared, spread
from benchmarks.quality.pretrained import Source, head_parameters
from benchmarks.quality.runs import Result, Run
from benchmarks.quality.tasks import Task

CHECKPOINTS = ROOT / "outputs" / "quality"

_EVALUATION_BATCH = 64
_MAX_GRADIENT_NORM = 1.0
_CURVE_POINTS = 50
# Batches of similar length are cut from pools of so many batches, which are drawn at random.
_POOL_BATCHES = 16
_WEIGHTS_FILE = "trained.safetensors"
_CURVES_FILE = "curves.json"

Progress = Callable[[int, float], None]
"""Told the step that is done and its loss."""


def train(
    run: Run,
    task: Task,
    method: Method,
    prepared: Prepared,
    study: str,
    *,
    checkpoints: Path | None = None,
    progress: Progress = lambda step, loss: None,
) -> Result:
    """Fine-tune once and score the outcome.

    Killed in the middle and called again, it goes on from its last checkpoint; with a method that
    keeps more than its parameters (`after_step`: AdaLoRA, SoRA), from the beginning.

    Raises:
        DivergedError: a loss that is not finite.
        QualityError: settings that the model, the task or the method cannot be run with.
    """
    started = time.perf_counter()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(run.seed)
    base: Any = Source.of(run.model).model(task, prepared.outputs)
    head = head_parameters(base, task)
    base.requires_grad_(False)
    layers = find_layers(base, run.targets) if method.uses_layers else []
    try:
        adapted = method.adapt(base, layers, run.steps, **run.options)
    except (TypeError, ValueError) as error:
        raise QualityError(f"--option: {run.method}: {error}") from error
    own = [p for p in adapted.model.parameters() if p.requires_grad and not _holds(head, p)]
    for parameter in head:
        parameter.requires_grad_(True)
    # A language model predicts with its own head: where only a fresh one would be trained, it is
    # scored as it comes.
    trains = bool(own or head)
    if not trains and run.method != "head":
        raise QualityError(f"--method: {run.method} trains nothing of {run.model}")
    folder = _checkpoint_folder(checkpoints or CHECKPOINTS, run, prepared)
    trainer = _QualityTrainer(
        run=run,
        adapted=adapted,
        prepared=prepared,
        optimizer=_optimizer(run, own, head) if trains else None,
        folder=folder,
        progress=progress,
    )
    # What a method keeps outside of parameters and optimizer is not in a checkpoint.
    resume = last_checkpoint(folder) if adapted.after_step is None else None
    if resume is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if trains:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except (RuntimeError, ValueError) as error:
        if trainer.has_started:
            raise
        # What the first forward pass refuses: a backend that cannot run here, a strategy it lacks.
        raise QualityError(f"--option: {run.method}: {error}") from error
    values = trainer.scores()
    value = values[task.metric]
    result = dataclasses.replace(
        _outcome(run, task, prepared, study),
        value=value,
        values=values,
        trainable_parameters=sum(p.numel() for p in own),
        head_parameters=sum(p.numel() for p in head),
        loss_curve=trainer.loss_curve(),
        value_curve=trainer.value_curve,
        seconds=round(trainer.seconds_before + time.perf_counter() - started, 2),
    )
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _checkpoint_folder(checkpoints: Path, run: Run, prepared: Prepared) -> Path:
    """Where the run's checkpoints are; those of other code would go on as another run: dropped."""
    name = f"{run.key()}-{prepared.digest}"
    folder = checkpoints / f"{name}-{commit(ROOT)}"
    for other in checkpoints.glob(f"{name}-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def failed(run: Run, task: Task, prepared: Prepared, study: str, error: str) -> Result:
    """The record of a run that has no value."""
    return dataclasses.replace(_outcome(run, task, prepared, study), error=error)


def _outcome(run: Run, task: Task, prepared: Prepared, study: str) -> Result:
    """What is known of a run's result beforehand."""
    environment = describe("cuda" if torch.cuda.is_available() else "cpu")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if environment.peft:
        versions["peft"] = environment.peft
    return Result(
        key=run.key(),
        study=study,
        run=run,
        metric=task.metric,
        value=None,
        values={},
        constant_value=prepared.constant_score[task.metric],
        trainable_parameters=0,
        head_parameters=0,
        loss_curve=[],
        value_curve=[],
        seconds=0.0,
        data=prepared.digest,
        device=environment.device,
        versions=versions,
        commit=environment.commit,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _holds(parameters: Sequence[nn.Parameter], parameter: nn.Parameter) -> bool:
    return any(parameter is held for held in parameters)


def _optimizer(
    run: Run, own: Sequence[nn.Parameter], head: Sequence[nn.Parameter]
) -> torch.optim.AdamW:
    groups = [
        {"params": list(parameters), "lr": rate}
        for parameters, rate in ((own, run.learning_rate), (head, run.head_learning_rate))
        if parameters
    ]
    return torch.optim.AdamW(groups, weight_decay=run.weight_decay)


class BatchOrder(torch.utils.data.Sampler[int]):
    """Every index of a whole run, in the order of its batches.

    An epoch is a permutation, ordered so that batches hold features of similar length. Where an
    epoch does not divide into batches, what follows its short one is shifted: batches then hold
    features of two lengths. The stored runs have seen these batches, so they stay. The order
    depends on the seed alone, so that all methods see the same batches and a resumed run those it
    would have seen.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> None:
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
        self._order = order[: steps * batch_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class _QualityTrainer(Trainer):
    """A Trainer that adds the method's penalty, keeps the curves, and saves what is trained."""

    def __init__(
        self,
        *,
        run: Run,
        adapted: Adapted,
        prepared: Prepared,
        optimizer: torch.optim.Optimizer | None,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.value_curve: list[tuple[int, float]] = []
        self.seconds_before = 0.0  # that runs which were killed have taken
        self._started = time.perf_counter()
        # The last of the evaluations comes after training.
        self.scored_steps = {run.steps * n // run.evaluations for n in range(1, run.evaluations)}
        self._metric = next(iter(prepared.constant_score))
        self._scored_step = -1
        self._latest: dict[str, float] = {}
        self._run = run
        self._adapted = adapted
        self._prepared = prepared
        self._folder = folder
        self._progress = progress
        self._losses: dict[int, float] = {}
        super().__init__(
            model=adapted.model,
            args=_arguments(run, folder, prepared),
            data_collator=prepared.collate,
            train_dataset=spread(prepared.train, run.train_size),
            eval_dataset=prepared.evaluation,
            compute_metrics=self._scores_of,
            optimizers=(optimizer, None),
            callbacks=[_Steps(self)],
            preprocess_logits_for_metrics=prepared.reduce,
        )
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        """The task's loss and, in training, the method's penalty."""
        found = super().compute_loss(model, inputs, *arguments, **keywords)
        if not model.training:
            return found
        loss: Tensor = found[0] if isinstance(found, tuple) else found
        if self._adapted.penalty is not None:
            loss = loss + self._adapted.penalty()
        value = float(loss.detach())
        if not math.isfinite(value):
            step = self.state.global_step + 1
            raise self._diverged(
                f"loss: step {step} of {self._run.steps} has the loss {value}",
                first_not_finite(model, inputs),
            )
        self._losses[self.state.global_step] = value
        return (loss, found[1]) if isinstance(found, tuple) else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> BatchOrder:
        lengths = [len(feature["input_ids"]) for feature in self.train_dataset]
        return BatchOrder(lengths, self._run.batch_size, self._run.steps, self._run.seed)

    def _scores_of(self, prediction: Any) -> dict[str, float]:
        try:
            return dict(self._prepared.score(prediction.predictions, prediction.label_ids))
        except DivergedError as error:
            found = f"after step {self.state.global_step} of {self._run.steps}: {error}"
            where = _parameter_not_finite(self._adapted.model) or "every parameter is finite"
            raise self._diverged(found, where) from error

    def scores(self) -> dict[str, float]:
        """The task's figures at the end."""
        if self.state.global_step != self._scored_step:
            self.evaluate()
        return self._latest

    def keep_scores(self, found: Mapping[str, float]) -> None:
        """Take what an evaluation found."""
        self._scored_step = self.state.global_step
        self._latest = {n: float(found[f"eval_{n}"]) for n in self._prepared.constant_score}
        self.value_curve.append((self._scored_step, self._latest[self._metric]))

    @property
    def has_started(self) -> bool:
        """Whether a forward pass has gone through."""
        return bool(self._losses)

    def loss_curve(self) -> list[tuple[int, float]]:
        """The mean loss of each of `_CURVE_POINTS` pieces of the run, by its last step."""
        steps = sorted(self._losses)
        piece = max(1, len(steps) // _CURVE_POINTS)
        pieces = [steps[at : at + piece] for at in range(0, len(steps), piece)]
        return [
            (piece[-1] + 1, round(sum(self._losses[step] for step in piece) / len(piece), 8))
            for piece in pieces
        ]

    def step_done(self) -> None:
        """After the optimizer's step, while the gradients are still there."""
        step = self.state.global_step
        if self._adapted.after_step is not None:
            self._adapted.after_step(step + 1)
        self._progress(step + 1, self._losses[step])

    # Checkpoints hold what is trained, kilobytes, not the whole model.

    def _save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        """As the Trainer's, which drops the checkpoint before: only for one that is good."""
        where = _parameter_not_finite(self._adapted.model)
        if where:
            found = f"the update of step {self.state.global_step} of {self._run.steps} diverges"
            raise self._diverged(found, where)
        super()._save_checkpoint(*arguments, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                name: parameter.detach().clone().contiguous()
                for name, parameter in self._trained().items()
            },
            folder / _WEIGHTS_FILE,
        )
        curves = {
            "losses": list(self._losses.items()),
            "values": self.value_curve,
            "seconds": self.seconds_before + time.perf_counter() - self._started,
        }
        (folder / _CURVES_FILE).write_text(json.dumps(curves), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        curves = json.loads((folder / _CURVES_FILE).read_text(encoding="utf-8"))
        self._losses = dict(curves["losses"])
        self.value_curve = [(step, value) for step, value in curves["values"]]
        self.seconds_before = curves["seconds"]
        stored = load_file(folder / _WEIGHTS_FILE)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(stored[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        model: nn.Module = self._adapted.model
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    def _diverged(self, found: str, where: str) -> DivergedError:
        checkpoint = last_checkpoint(self._folder)
        kept = (
            f"the last good checkpoint is {checkpoint}"
            if checkpoint
            else "no checkpoint was written before"
        )
        return DivergedError(
            f"{found}; {where}; {kept}; a lower --lr may help (it was {self._run.learning_rate:g})"
        )


class _Steps(TrainerCallback):
    """Passes the Trainer's events on."""

    def __init__(self, trainer: _QualityTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer.step_done()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self._trainer.scored_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        self._trainer.keep_scores(metrics)


def first_not_finite(model: nn.Module, inputs: Any) -> str:
    """Where the numbers go wrong: a parameter, or the first layer whose output is not finite."""
    parameter = _parameter_not_finite(model)
    if parameter:
        return parameter
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        # Layers inside of a layer are done before it.
        def look(_: Any, __: Any, output: Any, name: str = name) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        handles.append(module.register_forward_hook(look))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    if found:
        return f"the first layer whose output is not finite is {found[0]}"
    return "every layer's output is finite, the loss itself or the method's penalty is not"


def _parameter_not_finite(model: nn.Module) -> str | None:
    """The first parameter that is not finite."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the parameter {name} is not finite"
    return None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _arguments(run: Run, folder: Path, prepared: Prepared) -> TrainingArguments:
    every = min(run.steps // run.evaluations, run.steps // 4)
    keywords: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": run.steps,
        "per_device_train_batch_size": run.batch_size,
        "per_device_eval_batch_size": _EVALUATION_BATCH,
        "warmup_steps": round(run.warm_up * run.steps),
        "lr_scheduler_type": "linear",
        "max_grad_norm": _MAX_GRADIENT_NORM,
        "save_strategy": "steps",
        "save_steps": max(1, every),
        "save_total_limit": 1,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": run.seed,
        "bf16": run.precision == "bf16",
        # Without it bf16 is an error there.
        "use_cpu": not torch.accelerator.is_available(),
        "remove_unused_columns": False,
        "label_names": list(prepared.label_names),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    arguments = TrainingArguments(**keywords)
    # On several GPUs the Trainer would run copies, each with a batch of this size.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
