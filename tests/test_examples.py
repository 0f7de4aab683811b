"""The examples, with a tiny BERT in place of a pretrained model."""

from __future__ import annotations

import gzip
import re
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import dcft_kernels as dcft
from examples import demo, finetune

WORDS = {"0": "bad sad poor", "1": "good glad rich"}


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *" ".join(WORDS.values()).split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    rows = [f"{text}\t{label}" for label, text in WORDS.items() for _ in range(12)]
    text = "\n".join(["sentence1\tlabel", *rows, ""])
    (folder / "dev.tsv").write_text(text)
    with gzip.open(folder / "train.tsv.gz", "wt") as file:
        file.write(text)
    return str(folder)


def test_read_split_returns_the_named_columns_in_file_order(tmp_path: Path) -> None:
    text = 'id\tsentence1\tlabel\n7\tsay "ä"\t1\n8\t"\t0\n'
    (tmp_path / "train.tsv").write_text(text, encoding="utf-8-sig")
    read = finetune.read_split(str(tmp_path), "train", ["label", "sentence1"])
    assert read == [("1", 'say "ä"'), ("0", '"')]
    with pytest.raises(ValueError, match=r"train has rows with other fields than \['sentence2'\]"):
        finetune.read_split(str(tmp_path), "train", ["sentence2"])


@pytest.mark.parametrize("row", ["only one field", "one\ttwo\tthree"])
def test_read_split_shows_a_row_with_wrong_fields(tmp_path: Path, row: str) -> None:
    (tmp_path / "dev.tsv").write_text(f"sentence1\tlabel\nfine\t1\n{row}\n")
    with pytest.raises(ValueError, match=r"dev has rows with other fields than .* 'o"):
        finetune.read_split(str(tmp_path), "dev", ["sentence1", "label"])


def test_read_split_reads_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*name: str, split: str) -> list[dict[str, Any]]:
        calls.append((*name, split))
        return [{"sentence": "good", "label": 1, "idx": 0}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = finetune.read_split("nyu-mll/glue:cola", "dev", ["sentence", "label"])
    assert rows == [("good", "1")]
    assert calls == [("nyu-mll/glue", "cola", "validation")]


def load_base(folder: str) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("options", [[], ["--peft"]])
def test_finetune_trains_saves_and_loads(
    model_folder: str, data_folder: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.main([data_folder, "--model", model_folder, "--output", "saved", *options])
    printed = capsys.readouterr().out
    trained, loaded, *served = re.findall(r"^accuracy ([\d.]+)", printed, re.MULTILINE)
    assert loaded == trained
    if options:
        assert "LoRA of rank 8 on 13 layers\n" in printed
        assert len(served) == 1
        assert Path("saved/lora/adapter_config.json").exists()
        return
    model = load_base(model_folder)
    dcft.load_adapter(model, "saved")
    layers = [module for module in model.modules() if isinstance(module, dcft.DCFTLinear)]
    assert len(layers) == 13  # six in each of two blocks, and the pooler
    assert all(layer.dcft_B.abs().max() > 0 for layer in layers)  # zero before training


def test_demo_compares_the_methods_on_files(
    model_folder: str, data_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [data_folder, "--model", model_folder, "--seeds", "1", "--train-size", "8"]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "8 training and 24 held-out rows, 2 classes" in printed
    table = {line[:18].strip(): line[18:].split() for line in printed.splitlines()}
    base = load_base(model_folder)
    dcft.swap_linear(base, "all-linear")
    assert table[demo.DCFT][0] == f"{dcft.parameter_counts(base).adapter:,}"
    assert table[demo.FROZEN][0] == "0"
    assert table[demo.FROZEN][3] == "1.00"
    assert {demo.LORA, demo.PUBLISHED} <= table.keys()
    assert "unmerged: logits are equal bit for bit" in printed
    assert Path("outputs/demo/lora/adapter_model.safetensors").exists()
    assert Path("outputs/demo/demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fails_when_unmerging_does_not_restore_the_model(
    model_folder: str, data_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_model(model: Any) -> None:
        torch.nn.init.ones_(model.classifier.weight)

    monkeypatch.setattr(dcft, "unmerge_model", break_model)
    monkeypatch.setattr(demo, "TIMED_STEPS", 1)
    assert demo.main([data_folder, "--model", model_folder, "--seeds", "1"]) == 1


def test_sentences_are_balanced_labelled_and_split_by_module() -> None:
    train, held_out = splits = demo.read_sentences()
    few = demo.read_sentences((7, 5))  # a standard library may have an odd number
    assert (few[0][:3], few[1][:2]) == (train[:3], held_out[:2])
    assert len(held_out) >= 500
    for rows in (*splits, *few):
        labels = [label for _, label in rows]
        assert labels.count("swapped") == labels.count("in order") == len(rows) / 2
    # The words of a row tell its sentence, in order or swapped.
    sides = [{" ".join(sorted(text[:-1].split())) for text, _ in rows} for rows in splits]
    assert not sides[0] & sides[1]
    documented = " ".join(
        " ".join(docstring.lower().split())
        for _, docstring in demo._docstrings(Path(sysconfig.get_path("stdlib")))
    )
    assert all(text in documented for text, label in train + held_out if label == "in order")


def test_swap_halves_moves_the_second_half_of_the_words_to_the_front() -> None:
    assert demo.swap_halves("return the first of them.") == "first of them return the."
