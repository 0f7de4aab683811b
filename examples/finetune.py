"""Fine-tune a text classifier with DCFT and transformers' Trainer.

    python examples/finetune.py glue/cola
    python examples/finetune.py nyu-mll/glue:rte --columns sentence1 sentence2 label

The data is a folder with train.tsv and dev.tsv, or a dataset on the Hugging Face hub
(`pip install datasets`) with the splits train and validation.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

import dcft_kernels as dcft


def read_tsv(path: str | Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Read columns of a tab-separated file with a header. Quotes are text; .gz is unpacked."""
    open_text = gzip.open if str(path).endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header, rows = reader.fieldnames or [], []
        for column in columns:
            if column not in header:
                raise ValueError(f"{path}: no column {column!r}; it has {', '.join(header)}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: expected {len(header)} fields")
            rows.append(tuple(row[column] for column in columns))
    return rows


def read_split(source: str, split: str, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Read "train" or "dev" from a folder or from the hub (`owner/name[:configuration]`)."""
    if Path(source).is_dir():
        name = f"{split}.tsv"
        return read_tsv(min(Path(source).glob(f"{name}*"), default=Path(source, name)), columns)
    from datasets import load_dataset

    dataset = load_dataset(*source.split(":"), split={"dev": "validation"}.get(split, split))
    return [tuple(str(row[column]) for column in columns) for row in dataset]


def encode(rows: Any, classes: Any, tokenizer: Any, max_length: int = 128) -> list[dict[str, Any]]:
    """Tokenise rows of one or two texts and a label."""
    *texts, labels = (list(column) for column in zip(*rows, strict=True))
    columns = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    columns["labels"] = [classes.index(label) for label in labels]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def make_trainer(model: Any, tokenizer: Any, train: Any, dev: Any, **options: Any) -> Any:
    """Build a Trainer that reports accuracy; `options` go to TrainingArguments."""
    return transformers.Trainer(
        model,
        transformers.TrainingArguments("outputs", report_to="none", save_strategy="no", **options),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=dev,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, score and save, then load the result into the base model and score it again."""
    parser = argparse.ArgumentParser(description="Fine-tune a text classifier with DCFT.")
    parser.add_argument("data", help="folder with train.tsv and dev.tsv, or a dataset on the hub")
    parser.add_argument("--columns", nargs="+", default=["sentence1", "label"], help="label last")
    parser.add_argument("--model", default="FacebookAI/roberta-base", help="hub name or folder")
    parser.add_argument("--head", nargs="+", default=["classifier"], help="layers trained in full")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune"))
    args = parser.parse_args(argv)

    transformers.set_seed(0)
    rows = [read_split(args.data, split, args.columns) for split in ("train", "dev")]
    classes = sorted({label for *_, label in rows[0]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    data = [encode(split, classes, tokenizer) for split in rows]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=len(classes)
    )
    model = copy.deepcopy(base)
    dcft.swap_linear(model, "all-linear")
    dcft.freeze_base(model, trainable=args.head)
    print(dcft.parameter_counts(model))
    trainer = make_trainer(model, tokenizer, *data, learning_rate=5e-3, num_train_epochs=3)
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}; saving to {args.output}")
    dcft.save_adapter(model, args.output)  # with the head, which is trained too

    dcft.load_adapter(base, args.output)
    score = make_trainer(base, tokenizer, *data).evaluate()["eval_accuracy"]
    print(f"accuracy {score:.3f} when loaded into the base model")


if __name__ == "__main__":
    main()
