"""The published recipes: their numbers, their names, and a run with transformers' Trainer."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dcft_kernels import DCFTLinear, orthogonality_loss, recipes, swap_linear

# As printed in arXiv 2503.01419, appendix E.
TABLE_9 = """
Task learning_rate batch_size r Epochs Dropout γ init_warmup ∆T
CoLA 5e-4 32 8 25 0.5 0.1 800 10
SST-2 8e-4 32 8 24 0.1 0 6,000 100
MRPC 1e-3 32 8 30 0.1 0 600 1
QQP 8e-4 32 8 20 0.1 0.15 8,000 100
STS-B 2.2e-3 32 8 25 0.1 0.2 800 10
MNLI 5e-4 32 8 7 0.1 0.15 8,000 100
QNLI 1.2e-3 32 8 6 0.1 0.1 2,000 100
RTE 1.2e-3 32 8 50 0.3 0.2 600 1
"""
TABLE_10 = """
Task learning_rate batch_size r Epochs γ init_warmup ∆T tf
v1.1 1e-3 16 10 25 0.1 5,000 100 25000
v2.0 1e-3 16 12 24 0.1 5,000 100 50000
"""
FIELDS = {
    "learning_rate": "learning_rate",
    "batch_size": "batch_size",
    "r": "published_rank",
    "Epochs": "epochs",
    "Dropout": "dropout",
    "γ": "gamma",
    "init_warmup": "init_warmup",
    "∆T": "delta_T",
    "tf": "t_f",
}


def _printed(table: str) -> dict[str, dict[str, float]]:
    header, *rows = (line.split() for line in table.strip().splitlines())
    return {
        row[0]: {
            FIELDS[column]: float(cell.replace(",", ""))
            for column, cell in zip(header[1:], row[1:], strict=True)
        }
        for row in rows
    }


@pytest.mark.parametrize(("table", "recipe"), [(TABLE_9, recipes.glue), (TABLE_10, recipes.squad)])
def test_numbers_are_the_printed_ones(table: str, recipe: Any) -> None:
    printed = _printed(table)
    assert tuple(printed) == recipes.names()[recipe.__name__]
    for name, expected in printed.items():
        found = dataclasses.asdict(recipe(name))
        assert {field: found[field] for field in expected} == expected
        assert found["name"] in (name, f"SQuAD {name}")
        assert (found["alpha"], found["rank"], found["init"]) == (4.0, 1, "paper")
        assert found["orthogonality_weight"] == 0.1
        assert found["orthogonality_form"] == "published_code"


def test_what_a_table_does_not_have() -> None:
    assert recipes.glue("cola").t_f is None
    assert recipes.squad("v1.1").dropout == 0.0


@pytest.mark.parametrize("given", ["SST-2", "sst2", "sst-2", "Sst2", "SST_2", " sst 2 "])
def test_spellings_of_a_task(given: str) -> None:
    assert recipes.glue(given) == recipes.glue("SST-2")
    assert recipes.glue("stsb") == recipes.glue("STS-B")


@pytest.mark.parametrize("given", ["v1.1", "V1.1", "1.1", "v11"])
def test_spellings_of_a_version(given: str) -> None:
    assert recipes.squad(given) == recipes.squad("v1.1")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: recipes.glue("colla"), ValueError,
         r"^task: expected one of 'CoLA', 'SST-2', .*'RTE', got 'colla'; did you mean 'CoLA'\?"),
        (lambda: recipes.glue("wnli"), ValueError, r"got 'wnli'; did you mean '[MQ]NLI'\?"),
        (lambda: recipes.glue(""), ValueError, r"'RTE', got ''$"),
        (lambda: recipes.glue(None), TypeError, r"^task: expected a name, got None"),
        (lambda: recipes.squad("v3"), ValueError,
         r"^version: expected one of 'v1\.1', 'v2\.0', got 'v3'"),
        (lambda: recipes.squad(1.1), TypeError, r"^version: expected a name, got 1\.1"),
        (lambda: recipes.glue("cola").penalty(nn.Linear(8, 8)), ValueError,
         r"^model: has neither DCFTLinear layers"),
        (lambda: recipes.glue("cola").penalty(None), TypeError, r"^model: expected a torch"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_recipe_is_a_value() -> None:
    recipe = recipes.glue("rte")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 1  # type: ignore[misc]
    other = dataclasses.replace(recipe, epochs=10, alpha=2.0)
    assert other.training_arguments()["num_train_epochs"] == 10
    assert other.dcft_options()["alpha"] == 2.0
    assert recipes.glue("rte") == recipe


def test_options_are_those_of_the_layer() -> None:
    """The published scaling is 32 / 8 for factors of rank one."""
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    swap_linear(model, **recipes.glue("CoLA").dcft_options())
    for layer in model:
        assert isinstance(layer, DCFTLinear)
        assert (layer.rank, layer.scaling, layer.dropout) == (1, 32 / 8, 0.5)
        assert layer.init == "paper"


def test_the_penalty_is_the_published_one() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    swap_linear(model, **recipes.glue("CoLA").dcft_options())
    found = recipes.glue("CoLA").penalty(model)
    expected = 0.1 * orthogonality_loss(model, form="published_code")
    assert torch.equal(found, expected)
    found.backward()
    assert model[0].dcft_A.grad.abs().max() > 0
    other = dataclasses.replace(
        recipes.glue("CoLA"), orthogonality_weight=2.0, orthogonality_form="paper"
    )
    assert torch.equal(other.penalty(model), 2.0 * orthogonality_loss(model))


def test_training_arguments_are_fields_of_transformers() -> None:
    known = inspect.signature(transformers.TrainingArguments).parameters
    for name, table in recipes.names().items():
        for entry in table:
            arguments = getattr(recipes, name)(entry).training_arguments()
            assert arguments.keys() <= known.keys()


SHORT = (
    "max_steps=2, logging_steps=1, use_cpu=True, report_to='none', save_strategy='no', "
    "disable_tqdm=True, dataloader_pin_memory=False"
)


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 61, (6,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


def _readme_example() -> str:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
        if "recipe.penalty" in block
    ]
    return block


def test_the_readmes_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a tiny BERT, with the README's own code."""
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    model = transformers.BertForSequenceClassification(config)
    frozen = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    monkeypatch.chdir(tmp_path)
    penalties = []
    original = recipes.Recipe.penalty
    monkeypatch.setattr(
        recipes.Recipe,
        "penalty",
        lambda self, m: penalties.append(original(self, m)) or penalties[-1],
    )
    names: dict[str, Any] = {"model": model, "train_dataset": Sentences()}
    example = _readme_example()
    assert '"my-run", ' in example
    exec(example.replace('"my-run", ', f'"my-run", {SHORT}, '), names)

    arguments = names["arguments"]
    assert arguments.learning_rate == 5e-4
    assert (arguments.num_train_epochs, arguments.per_device_train_batch_size) == (25, 32)
    assert len(penalties) == 2
    assert all(penalty.requires_grad for penalty in penalties)
    # Factors of 0.02 are far from orthonormal, and the rate is small: each norm is nearly one.
    assert penalties[0].item() == pytest.approx(0.1, rel=0.05)
    assert penalties[1].item() < penalties[0].item()
    layer = model.bert.encoder.layer[0].output.dense
    assert isinstance(layer, DCFTLinear)
    assert torch.equal(layer.weight, frozen)
    assert layer.dcft_A.abs().max() < 0.2
    trainer = names["RegularizedTrainer"](model, arguments, eval_dataset=Sentences())
    evaluated = trainer.evaluate()["eval_loss"]
    assert len(penalties) == 2, "evaluation is of the task alone"
    assert 0 < evaluated < 2
