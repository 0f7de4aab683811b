"""State dicts without the frozen base: their content, and training resumed from them exactly."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dcft_kernels import freeze_base, load_adapter, save_adapter, small_checkpoints, swap_linear
from tests.small_models import VOCABULARY

STEPS = 4


@pytest.fixture(scope="module")
def base() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
        hidden_dropout_prob=0.2,
    )
    return transformers.BertForSequenceClassification(config)


class Task(nn.Module):
    """Holds the model as an attribute, as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model


def _adapted(base: nn.Module) -> nn.Module:
    """As each process builds it: the head and the adapters are drawn, the rest is given."""
    model = copy.deepcopy(base)
    swap_linear(model, dropout=0.1, init="paper")
    freeze_base(model, trainable=["classifier"])
    nn.init.normal_(model.classifier.weight)
    return model


def _trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    data = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(3, VOCABULARY, (6,), generator=data), "labels": i % 2}
        for i in range(16)
    ]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        eval_steps=STEPS // 2,
        eval_strategy="steps",
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def _kept(model: nn.Module) -> set[str]:
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return model.state_dict().keys() - frozen


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("best", [False, True])
def test_trainer_resumes_exactly_from_small_checkpoints(base, tmp_path, caplog, best):
    options = {"load_best_model_at_end": best}
    whole, resumed = _adapted(base), _adapted(base)
    trainer = _trainer(whole, tmp_path / "whole", **options)
    with small_checkpoints(whole):
        trainer.train()
    half = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    assert load_file(half / "model.safetensors").keys() == _kept(whole)
    torch.manual_seed(5)  # another process
    again = _trainer(resumed, tmp_path / "resumed", **options)
    with small_checkpoints(resumed):
        again.train(resume_from_checkpoint=str(half))
    assert again.state.global_step == STEPS
    assert _equal(whole.state_dict(), resumed.state_dict())
    assert "missing keys" not in caplog.text
    kept = {name: whole.state_dict()[name] for name in _kept(whole)}
    path = Path(trainer.state.best_model_checkpoint) if best else half
    assert _equal(load_file(path / "model.safetensors"), kept) is best


def test_accelerate_saves_and_loads_small_states(base, tmp_path):
    model, other = _adapted(base), _adapted(base)
    for each, action in ((model, "save_state"), (other, "load_state")):
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(each)
        with small_checkpoints(each):
            getattr(accelerator, action)(str(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() == _kept(model)
    assert _equal(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("wrap", [Task, checkpoint_wrapper, torch.compile])
def test_wrapped_models_and_layers(base, wrap):
    model = _adapted(base)
    kept = _kept(model)
    model.bert.encoder.layer[0] = wrap(model.bert.encoder.layer[0])
    outer = wrap(model)
    state = outer.state_dict()
    with small_checkpoints(model):
        small = outer.state_dict()
        outer.load_state_dict(small)
        factor = next(name for name in small if "dcft_A" in name)
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) .*dcft_A"\.'):
            outer.load_state_dict({name: small[name] for name in small if name != factor})
    assert small.keys() <= state.keys()
    assert {re.sub(r"net\.|_orig_mod\.", "", name) for name in small} == kept
    assert _equal(outer.state_dict(), state)


def test_state_dicts_are_whole_outside_the_context_and_in_copies(base, tmp_path):
    """A state dict without its base is for resuming only."""
    model = _adapted(base)
    names = model.state_dict().keys()
    with contextlib.suppress(KeyError), small_checkpoints(model):
        assert model.state_dict().keys() < names
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert all(each.state_dict().keys() == names for each in copies)
        save_adapter(model, tmp_path)
        raise KeyError
    assert model.state_dict().keys() == names
    load_adapter(other := copy.deepcopy(base), tmp_path)
    assert _equal(other.state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_frozen_batch_norms_and_merged_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    swap_linear(model)
    freeze_base(model)
    with small_checkpoints(model):
        names = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
        assert model.state_dict().keys() >= names
        model[0].merge()
        assert not model.state_dict().keys() & {"0.weight", "0.bias", "1.weight"}
        model[0].unmerge()
        model[0].weight.requires_grad_(True)
        assert "0.weight" in model.state_dict()
