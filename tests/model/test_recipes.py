"""The published recipes: their numbers, their names, and a run with transformers' Trainer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from torch import Tensor, nn

from dcft_kernels import DCFTLinear, freeze_base, orthogonality_loss, recipes, swap_linear

# As printed in arXiv 2503.01419, appendix E.
TABLE_9 = """
name learning_rate batch_size published_rank epochs dropout gamma init_warmup delta_T
CoLA 5e-4 32 8 25 0.5 0.1 800 10
SST-2 8e-4 32 8 24 0.1 0 6,000 100
MRPC 1e-3 32 8 30 0.1 0 600 1
QQP 8e-4 32 8 20 0.1 0.15 8,000 100
STS-B 2.2e-3 32 8 25 0.1 0.2 800 10
MNLI 5e-4 32 8 7 0.1 0.15 8,000 100
QNLI 1.2e-3 32 8 6 0.1 0.1 2,000 100
RTE 1.2e-3 32 8 50 0.3 0.2 600 1
"""
# As the authors' scripts pass them: COMMAND/run_debertav3_*.sh of github.com/Godz-z/DCFT.
SCRIPTS = """
name learning_rate batch_size epochs orthogonality_weight classifier_dropout lora_alpha lora_r
CoLA 8e-4 32 25 0.1 0.10 32 8
SST-2 8e-4 32 24 0.1 0 16 8
MRPC 1e-3 32 30 0.1 0.0 32 8
QQP 8e-4 32 5 0.1 0.15 16 8
STS-B 2.2e-3 32 25 0.3 0.2 32 8
MNLI 5e-4 32 7 0.1 0.15 16 8
QNLI 5e-4 16 5 0.1 0.1 32 8
RTE 1.2e-3 32 50 0.3 0.20 32 8
"""
TABLE_10 = """
name learning_rate batch_size published_rank epochs gamma init_warmup delta_T t_f
v1.1 1e-3 16 10 25 0.1 5,000 100 25000
v2.0 1e-3 16 12 24 0.1 5,000 100 50000
"""


def rows_of(table: str) -> dict[str, dict[str, float]]:
    header, *rows = (line.replace(",", "").split() for line in table.strip().splitlines())
    return {name: dict(zip(header[1:], map(float, cells), strict=True)) for name, *cells in rows}


@pytest.mark.parametrize("which", ["glue", "squad"])
def test_numbers_are_the_printed_ones(which):
    rows = rows_of({"glue": TABLE_9, "squad": TABLE_10}[which])
    assert tuple(rows) == recipes.names()[which]
    for name, row in rows.items():
        recipe = recipes.glue(name, reading="table") if which == "glue" else recipes.squad(name)
        # What a table does not have, and what the published code has for all tasks.
        expected = {"dropout": 0.0, "t_f": None, "classifier_dropout": None} | row
        expected |= {"alpha": 4.0, "rank": 1, "init": "paper", "orthogonality_weight": 0.1}
        found = dataclasses.asdict(recipe)
        assert found.pop("name") in (name, f"SQuAD {name}")
        assert found.pop("orthogonality_form") == "published_code"
        assert found == expected


def test_the_default_is_what_the_scripts_pass():
    rows = rows_of(SCRIPTS)
    assert tuple(rows) == recipes.names()["glue"]
    for name, passed in rows.items():
        recipe = recipes.glue(name)
        assert recipe == recipes.glue(name, reading="scripts")
        # The scripts do not set the adapter's dropout, and agree with the table on the rest.
        passed |= {"alpha": passed.pop("lora_alpha") / passed.pop("lora_r"), "dropout": 0.0}
        assert recipe == dataclasses.replace(recipes.glue(name, reading="table"), **passed)


@pytest.mark.parametrize("reading", ["paper", None])
def test_unknown_reading(reading):
    message = f"^reading: expected one of 'scripts', 'table', got {reading!r}$"
    with pytest.raises(ValueError, match=message):
        recipes.glue("cola", reading=reading)


def test_spellings_of_a_name():
    for task in ("sst2", "SST_2", " sst 2 "):
        assert recipes.glue(task) == recipes.glue("SST-2")
    for version in ("V1.1", "1.1", "v11"):
        assert recipes.squad(version) == recipes.squad("v1.1")


def test_a_recipe_is_a_value():
    other = dataclasses.replace(recipes.glue("rte"), epochs=10, alpha=2.0)
    assert other.training_arguments()["num_train_epochs"] == 10
    assert other.dcft_options()["alpha"] == 2.0
    assert recipes.glue("rte").epochs == 50


def test_options_and_penalty_fit_a_model():
    """The published scaling is 32 / 8 for factors of rank one."""
    recipe = recipes.glue("CoLA", reading="table")
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    swap_linear(model, **recipe.dcft_options())
    for layer in model:
        assert isinstance(layer, DCFTLinear)
        assert (layer.rank, layer.scaling, layer.dropout) == (1, 32 / 8, 0.5)
        assert layer.init == "paper"
    expected = 0.1 * orthogonality_loss(model, form="published_code")
    assert torch.equal(recipe.penalty(model), expected)
    other = dataclasses.replace(recipe, orthogonality_weight=2.0, orthogonality_form="paper")
    assert torch.equal(other.penalty(model), 2.0 * orthogonality_loss(model))


SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("task", ["RTE", "SST-2"])
def test_classifier_dropout_in_a_models_configuration(task):
    """By the attribute that `Recipe.classifier_dropout` names; SST-2's is zero, not a default."""
    value = recipes.glue(task).classifier_dropout
    deberta = transformers.DebertaV2Config(**SMALL)
    deberta.cls_dropout = value
    assert transformers.DebertaV2ForSequenceClassification(deberta).dropout.p == value
    bert = transformers.BertConfig(**SMALL)
    bert.classifier_dropout = value
    assert transformers.BertForSequenceClassification(bert).dropout.p == value


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 61, (6,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


def test_a_recipe_with_transformers_trainer(tmp_path):
    """Two steps of a tiny BERT, as the documentation shows it."""
    recipe = recipes.glue("cola")
    config = transformers.BertConfig(**SMALL)
    config.classifier_dropout = recipe.classifier_dropout
    model = transformers.BertForSequenceClassification(config)
    frozen = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    swap_linear(model, **recipe.dcft_options())
    freeze_base(model, trainable=["pooler", "classifier"])
    layer = model.bert.encoder.layer[0].output.dense
    before = layer.dcft_A.detach().clone()
    penalties = []

    class RegularizedTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if model.training:
                penalties.append(recipe.penalty(model))
                loss = loss + penalties[-1]
            return (loss, outputs) if return_outputs else loss

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        **recipe.training_arguments(),
        max_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    assert arguments.learning_rate == 8e-4
    assert (arguments.num_train_epochs, arguments.per_device_train_batch_size) == (25, 32)
    RegularizedTrainer(model, arguments, train_dataset=Sentences()).train()
    assert len(penalties) == 2
    assert all(penalty.requires_grad for penalty in penalties)
    assert torch.equal(layer.weight, frozen)
    assert not torch.equal(layer.dcft_A, before)
