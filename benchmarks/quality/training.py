"""One run with transformers' Trainer: losses, curves, checkpoints, divergence."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
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
from benchmarks.quality.pretrained import head_parameters, load_model
from benchmarks.quality.runs import Result, Run
from benchmarks.quality.tasks import Prepared, Task, spread

CHECKPOINTS = ROOT / "outputs" / "quality"

_EVALUATION_BATCH = 64
_MAX_GRADIENT_NORM = 1.0
_CURVE_POINTS = 50
_POOL_BATCHES = 16  # batches of similar length are cut from random pools of this many
_WEIGHTS_FILE = "trained.safetensors"
_CURVES_FILE = "curves.json"

Progress = Callable[[int, float], None]
"""Called after each step with its number and its loss."""


def train(
    run: Run,
    task: Task,
    method: Method,
    prepared: Prepared,
    study: str,
    progress: Progress = lambda step, loss: None,
) -> Result:
    """Fine-tune once and score the outcome; a diverged run has a result with its error.

    An interrupted run resumes from its last checkpoint, exactly; with a method that keeps more
    state than its parameters (`after_step`: AdaLoRA, SoRA) it starts over.

    Raises:
        QualityError: settings that the model or the method rejects.
    """
    started = time.perf_counter()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
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
    folder = _checkpoint_folder(run, prepared)
    optimizer = _optimizer(run, own, head) if own or head else None
    trainer = _QualityTrainer(run, adapted, prepared, optimizer, folder, progress)
    resume = last_checkpoint(folder) if adapted.after_step is None else None
    if resume is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if optimizer:  # `head` has nothing to train of a language model, and scores it as it is
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        values = trainer.scores()
    except DivergedError as error:
        return _result(run, task, prepared, study, error=str(error))
    except (RuntimeError, ValueError) as error:
        if trainer.has_started:
            raise
        # The first forward pass rejects, for example, a backend that cannot run here.
        raise QualityError(f"--option: {run.method}: {error}") from error
    shutil.rmtree(folder, ignore_errors=True)
    return _result(
        run,
        task,
        prepared,
        study,
        value=values[task.metric],
        values=values,
        trainable_parameters=sum(p.numel() for p in own),
        head_parameters=sum(p.numel() for p in head),
        loss_curve=trainer.loss_curve(),
        value_curve=trainer.value_curve,
        seconds=round(trainer.seconds_before + time.perf_counter() - started, 2),
    )


def _checkpoint_folder(run: Run, prepared: Prepared) -> Path:
    """Where the run's checkpoints are; those written by other code are deleted."""
    name = f"{run.key()}-{prepared.digest}"
    folder = CHECKPOINTS / f"{name}-{commit(ROOT)}"
    for other in CHECKPOINTS.glob(f"{name}-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _result(run: Run, task: Task, prepared: Prepared, study: str, **outcome: Any) -> Result:
    environment = describe("cuda" if torch.cuda.is_available() else "cpu")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if environment.peft:
        versions["peft"] = environment.peft
    nothing: dict[str, Any] = {
        "value": None,
        "values": {},
        "trainable_parameters": 0,
        "head_parameters": 0,
        "loss_curve": [],
        "value_curve": [],
        "seconds": 0.0,
    }
    return Result(
        key=run.key(),
        study=study,
        run=run,
        metric=task.metric,
        constant_value=prepared.constant_score[task.metric],
        data=prepared.digest,
        device=environment.device,
        versions=versions,
        commit=environment.commit,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **{**nothing, **outcome},
    )


def _optimizer(
    run: Run, own: Sequence[nn.Parameter], head: Sequence[nn.Parameter]
) -> torch.optim.AdamW:
    groups = [
        {"params": list(parameters), "lr": rate}
        for parameters, rate in ((own, run.learning_rate), (head, run.head_learning_rate))
        if parameters
    ]
    return torch.optim.AdamW(groups, weight_decay=run.weight_decay)


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


class _QualityTrainer(Trainer):
    """A Trainer that adds the method's penalty, records curves, and saves only what is trained."""

    def __init__(
        self,
        run: Run,
        adapted: Adapted,
        prepared: Prepared,
        optimizer: torch.optim.Optimizer | None,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.value_curve: list[tuple[int, float]] = []
        self.seconds_before = 0.0  # spent by interrupted runs
        # The last evaluation comes after training.
        self.scored_steps = {run.steps * n // run.evaluations for n in range(1, run.evaluations)}
        self._started = time.perf_counter()
        self._latest: dict[str, float] = {}
        self._run = run
        self._adapted = adapted
        self._prepared = prepared
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
            raise self._diverged(
                f"step {self.state.global_step + 1} of {self._run.steps} has the loss {value}; "
                f"{first_not_finite(model, inputs)}"
            )
        self._losses[self.state.global_step] = value
        return (loss, found[1]) if isinstance(found, tuple) else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> list[int]:
        lengths = [len(feature["input_ids"]) for feature in self.train_dataset]
        return batch_order(lengths, self._run.batch_size, self._run.steps, self._run.seed)

    def _scores_of(self, prediction: Any) -> dict[str, float]:
        try:
            return dict(self._prepared.score(prediction.predictions, prediction.label_ids))
        except DivergedError as error:
            step = f"step {self.state.global_step} of {self._run.steps}"
            raise self._diverged(f"after {step} {error}") from error

    def scores(self) -> dict[str, float]:
        """The task's metrics at the end."""
        if not self.value_curve or self.value_curve[-1][0] != self.state.global_step:
            self.evaluate()
        return self._latest

    def keep_scores(self, found: Mapping[str, float]) -> None:
        """Record the metrics of an evaluation."""
        self._latest = {n: float(found[f"eval_{n}"]) for n in self._prepared.constant_score}
        first = next(iter(self._latest.values()))
        self.value_curve.append((self.state.global_step, first))

    @property
    def has_started(self) -> bool:
        """Whether a forward pass succeeded."""
        return bool(self._losses)

    def loss_curve(self) -> list[tuple[int, float]]:
        """The mean losses of about `_CURVE_POINTS` pieces of the run, each with its last step."""
        steps = sorted(self._losses)
        size = max(1, len(steps) // _CURVE_POINTS)
        pieces = [steps[at : at + size] for at in range(0, len(steps), size)]
        return [
            (piece[-1] + 1, round(sum(self._losses[step] for step in piece) / len(piece), 8))
            for piece in pieces
        ]

    def step_done(self) -> None:
        """After the optimizer's step, before the gradients are cleared."""
        step = self.state.global_step
        if self._adapted.after_step is not None:
            self._adapted.after_step(step + 1)
        self._progress(step + 1, self._losses[step])

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().clone().contiguous() for name, p in self._trained().items()}
        save_file(trained, folder / _WEIGHTS_FILE)
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

    def _diverged(self, found: str) -> DivergedError:
        rate = self._run.learning_rate
        return DivergedError(f"{found}; a lower --lr may help (it was {rate:g})")


class _Steps(TrainerCallback):
    """Forwards the Trainer's events."""

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
    """Which parameter is not finite, or else the first layer whose output is not."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the parameter {name} is not finite"
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():

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
    return "every layer's output is finite, only the loss or the method's penalty is not"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: the Trainer's state is written last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _arguments(run: Run, folder: Path, prepared: Prepared) -> TrainingArguments:
    keywords: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": run.steps,
        "per_device_train_batch_size": run.batch_size,
        "per_device_eval_batch_size": _EVALUATION_BATCH,
        "warmup_steps": round(run.warm_up * run.steps),
        "lr_scheduler_type": "linear",
        "max_grad_norm": _MAX_GRADIENT_NORM,
        "save_strategy": "steps",
        "save_steps": max(1, min(run.steps // run.evaluations, run.steps // 4)),
        "save_total_limit": 1,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": run.seed,
        "bf16": run.precision == "bf16",
        "use_cpu": not torch.accelerator.is_available(),  # bf16 is an error there otherwise
        "remove_unused_columns": False,
        "label_names": list(prepared.label_names),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    arguments = TrainingArguments(**keywords)
    # On several GPUs the Trainer would run replicas, each with a batch of this size.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
