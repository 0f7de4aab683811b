"""Fine-tune a text classifier with DCFT and transformers' Trainer; with --peft, through PEFT.

python examples/finetune.py glue/cola
python examples/finetune.py nyu-mll/glue:rte --columns sentence1 sentence2 label --peft
"""

import argparse
import copy
import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel, get_peft_model

import dcft_kernels as dcft
from dcft_kernels.peft import DCFTConfig, export_lora


def read_split(source: str, split: str, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Read "train" or "dev" from a folder or from the hub (`owner/name[:configuration]`)."""
    if Path(source).is_dir():
        path = min(Path(source).glob(f"{split}.tsv*"), default=Path(source, f"{split}.tsv"))
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            dataset: Any = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    else:
        from datasets import load_dataset

        dataset = load_dataset(*source.split(":"), split={"dev": "validation"}.get(split, split))
    if wrong := [row for row in dataset if None in row or None in map(row.get, columns)]:
        raise ValueError(f"{source}: {split} has rows with other fields than {columns}: {wrong[0]}")
    return [tuple(str(row[column]) for column in columns) for row in dataset]


def encode(rows: Any, classes: Any, tokenizer: Any, max_length: int = 128) -> list[dict[str, Any]]:
    """Tokenise rows of one or two texts and a label."""
    *texts, labels = (list(column) for column in zip(*rows, strict=True))
    columns = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    columns["labels"] = [classes.index(label) for label in labels]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def make_trainer(model: Any, tokenizer: Any, train: Any, dev: Any, **options: Any) -> Any:
    """Build a Trainer that reports accuracy; `options` go to TrainingArguments."""
    options = {"report_to": "none", "save_strategy": "no", **options}
    args = transformers.TrainingArguments("outputs", **options)
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, args, collator, train, dev)
    trainer.compute_metrics = lambda p: {"accuracy": (p[0].argmax(-1) == p[1]).mean()}
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, load into the base model and, with --peft, export; score each result."""
    parser = argparse.ArgumentParser(description="Fine-tune a text classifier with DCFT.")
    parser.add_argument("data", help="folder with train.tsv and dev.tsv, or a dataset on the hub")
    parser.add_argument("--columns", nargs="+", default=["sentence1", "label"], help="label last")
    parser.add_argument("--model", default="FacebookAI/roberta-base", help="hub name or folder")
    parser.add_argument("--head", nargs="+", default=["classifier"], help="layers trained in full")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune"))
    parser.add_argument("--peft", action="store_true", help="use PEFT, and export to plain LoRA")
    args = parser.parse_args(argv)
    transformers.set_seed(0)
    rows = [read_split(args.data, split, args.columns) for split in ("train", "dev")]
    classes = sorted({label for *_, label in rows[0]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    data = [encode(split, classes, tokenizer) for split in rows]
    auto = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(args.model, num_labels=len(classes))

    def score(model: Any, what: str, **training: Any) -> None:
        trainer = make_trainer(model, tokenizer, *data, **training)
        if training:
            trainer.train()
        print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f} {what}")

    model, training = copy.deepcopy(base), {"learning_rate": 5e-3, "num_train_epochs": 3}
    if args.peft:
        config = DCFTConfig(target_modules="all-linear", modules_to_save=args.head)
        model = get_peft_model(model, config)
        score(model, "trained", **training)
        model.save_pretrained(args.output / "peft")
        score(PeftModel.from_pretrained(copy.deepcopy(base), args.output / "peft"), "reloaded")
        print(export_lora(args.output / "peft", args.output / "lora"))
        score(PeftModel.from_pretrained(base, args.output / "lora"), "served as LoRA by stock PEFT")
    else:
        dcft.swap_linear(model, "all-linear")
        dcft.freeze_base(model, trainable=args.head)
        score(model, "trained", **training)
        dcft.save_adapter(model, args.output)  # with the head, which is trained too
        dcft.load_adapter(base, args.output)
        score(base, "reloaded")


if __name__ == "__main__":
    main()
