"""The experiment: one task, one encoder, several ways of fine-tuning it, everything measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapters import DCFTSettings, adapter_parameters, add_dcft, add_lora, save_dcft, save_lora
from backbone import Backbone
from fidelity import Fidelity, check_fidelity, check_work
from fine_tuning import Recipe, batch_order, fine_tune, in_batches, score, train_head, warm_up_head
from progress_bars import ProgressBars
from step_timing import StepTime, let_gradients_through, time_steps
from text_classifier import EncodedTexts, TextClassifier
from text_task import TextTask

HEAD_ONLY = "frozen + head"
DCFT = "DCFT"
PUBLISHED = "published algorithm"
LORA = "LoRA r=1"


@dataclass(frozen=True)
class Experiment:
    """What to compare on what; `compare` does it."""

    task: TextTask
    backbone: Backbone
    settings: DCFTSettings
    recipe: Recipe
    seeds: int
    timing_rounds: int
    device: torch.device
    output: Path


@dataclass
class Method:
    """What one way of fine-tuning costs and achieves; None and empty where it was not measured."""

    adapter_parameters: int | None = None
    adapter_bytes: int | None = None
    scores: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    step: StepTime | None = None


@dataclass(frozen=True)
class Outcome:
    """Everything that the report shows."""

    methods: dict[str, Method]
    fidelity: Fidelity
    constant_baseline: float
    train_size: int
    held_out_size: int
    device: str


def compare(experiment: Experiment, bars: ProgressBars) -> Outcome:
    """Train head only, DCFT and LoRA from the same heads on the same batches; check; time.

    Writes the last seed's adapters to `experiment.output`.
    """
    task, backbone, output = experiment.task, experiment.backbone, experiment.output
    backbone.encoder.to(experiment.device)
    train = EncodedTexts(task.train, task, backbone.tokenizer, experiment.device)
    held_out = EncodedTexts(task.held_out, task, backbone.tokenizer, experiment.device)
    methods = {name: Method() for name in (HEAD_ONLY, DCFT, PUBLISHED, LORA)}

    last = _train_all(experiment, train, held_out, methods, bars)
    methods[DCFT].adapter_bytes = save_dcft(last[DCFT], output / "dcft")
    methods[LORA].adapter_bytes = save_lora(last[LORA], output / "lora")

    with bars.phase("checks: reference, merge, reload", check_work(held_out)) as advance:
        fidelity = check_fidelity(last[DCFT], backbone, task, held_out, output / "dcft", advance)
    _time_all(experiment, train, methods, bars)

    return Outcome(
        methods=methods,
        fidelity=fidelity,
        constant_baseline=task.constant_baseline(),
        train_size=len(train),
        held_out_size=len(held_out),
        device=_device_name(experiment.device),
    )


def _train_all(
    experiment: Experiment,
    train: EncodedTexts,
    held_out: EncodedTexts,
    methods: dict[str, Method],
    bars: ProgressBars,
) -> dict[str, TextClassifier]:
    """Losses and scores of every trained method and seed; returns the last seed's classifiers."""
    task, recipe = experiment.task, experiment.recipe
    frozen = _fresh_classifier(experiment)
    with bars.phase("features of the frozen encoder", len(train) + len(held_out)) as advance:
        train_features = in_batches(train, frozen.features, advance)
        held_out_features = in_batches(held_out, frozen.features, advance)

    classifiers: dict[str, TextClassifier] = {}
    for seed in range(experiment.seeds):
        order = batch_order(train, recipe, seed)
        torch.manual_seed(seed)
        start = _fresh_classifier(experiment)
        warm_up_head(start.head, task, train_features, train.targets, recipe, seed)

        head = copy.deepcopy(start.head)
        losses = train_head(head, task, train_features, train.targets, order, recipe)
        with torch.no_grad():
            logits = head(held_out_features)
        methods[HEAD_ONLY].losses.append(losses)
        methods[HEAD_ONLY].scores.append(score(task, logits, held_out))

        for name, add_adapter in _adapters(experiment).items():
            classifier = classifiers[name] = copy.deepcopy(start)
            add_adapter(classifier)
            learning_rate = recipe.lora_lr if name == LORA else recipe.dcft_lr
            work = sum(map(len, order)) + len(held_out)
            with bars.phase(f"{name}, seed {seed + 1} of {experiment.seeds}", work) as advance:
                losses = fine_tune(classifier, task, train, order, recipe, learning_rate, advance)
                logits = in_batches(held_out, classifier, advance)
            methods[name].losses.append(losses)
            methods[name].scores.append(score(task, logits, held_out))
            methods[name].adapter_parameters = adapter_parameters(classifier)
    return classifiers


def _time_all(
    experiment: Experiment, train: EncodedTexts, methods: dict[str, Method], bars: ProgressBars
) -> None:
    """One training step of every method, side by side."""
    classifiers = {name: _fresh_classifier(experiment) for name in methods}
    for classifier in classifiers.values():
        let_gradients_through(classifier)
    for name, add_adapter in _adapters(experiment).items():
        add_adapter(classifiers[name])
    add_dcft(classifiers[PUBLISHED], experiment.settings, backend="reference")
    methods[PUBLISHED].adapter_parameters = adapter_parameters(classifiers[PUBLISHED])
    rounds = experiment.timing_rounds
    with bars.phase("step time, side by side", rounds + 1) as advance:
        times = time_steps(
            classifiers, HEAD_ONLY, experiment.task, train, experiment.recipe, rounds, advance
        )
    for name, method in methods.items():
        method.step = times[name]


def _fresh_classifier(experiment: Experiment) -> TextClassifier:
    return TextClassifier(experiment.backbone, experiment.task.outputs).eval()


def _adapters(experiment: Experiment) -> dict[str, Callable[[TextClassifier], None]]:
    """How each method that is trained puts its adapter into a classifier."""
    return {
        DCFT: lambda classifier: add_dcft(classifier, experiment.settings),
        LORA: add_lora,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"
