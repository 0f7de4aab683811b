"""Adapters as plain LoRA, exactly, for any server of LoRA adapters."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Collection

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcft_kernels.adapter_files import save_adapter
from dcft_kernels.model import find_dcft_layers
from dcft_kernels.nonlinearity import not_mergeable
from dcft_kernels.peft import saved
from dcft_kernels.peft.layer import layers_with
from dcft_kernels.torch_backend import lora_factors

# vLLM 0.33: the values of `max_lora_rank` (`MaxLoRARanks` in vllm/config/lora.py), and the layers
# that it takes besides factors (`parse_fine_tuned_lora_name` in vllm/lora/utils.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
VLLM_MODULES = ("classifier", "score")


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_lora` wrote.

    Attributes:
        rank: `r` of all layers, padded with zeros.
        ranks: by layer, the rank that is not zeros, `k * min(kernel_size)`.
        modules_to_save: modules that the adapter holds in full, such as a classification head.
        refused: by server, why it would refuse the adapter. Empty: all take it.
        notes: what a server has to be told, such as `--max-lora-rank`.
    """

    rank: int
    ranks: dict[str, int]
    modules_to_save: list[str]
    refused: dict[str, str]
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"LoRA of rank {self.rank} on {len(self.ranks)} layers"]
        lines += [f"{server} refuses it: {why}" for server, why in self.refused.items()]
        return "\n".join([*lines, *self.notes])


def export_lora(
    model_or_dir: nn.Module | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    modules_to_save: bool = True,
) -> ExportReport:
    """Write a DCFT adapter as a plain LoRA adapter with the same increments, up to rounding.

    In closed form, without SVD: for windows that tile the layer, `lora_A = kron(A, I)` and
    `lora_B = s kron(B, C)`, rank by rank if each has its own kernel; overlapping windows are added,
    ragged ones cropped. The rank is `k d`, and the adapter is as large as a LoRA of that rank. All
    layers are padded with zeros to one `r`, the smallest that vLLM can be set to. Stock PEFT, vLLM,
    SGLang and llama.cpp's converter read the result: `lora_alpha = r`, no patterns, an explicit
    list of `target_modules`.

    Args:
        model_or_dir: a PEFT model with a DCFT adapter, a model with `DCFTLinear` layers, or a
            folder of `PeftModel.save_pretrained` or `save_adapter`.
        out_dir: the folder to write; a LoRA adapter in it is replaced, all or nothing.
        adapter_name: which adapter of a PEFT model.
        modules_to_save: whether to write modules that were trained in full, too. Servers refuse
            most of them; without them, outputs are not those of the trained model.

    Returns:
        What was written, and which server would refuse it and why.

    Raises:
        RuntimeError: a layer has a nonlinearity, which no LoRA expresses.
        ValueError: no adapter, or an unknown one; trained biases of adapted layers, which servers
            do not take; files that are truncated or of another method; an adapter of another kind
            in `out_dir`.
        FileNotFoundError, NotADirectoryError, OSError: folders that cannot be read or written.
    """
    source = _read(model_or_dir, adapter_name)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, record in source.layers.items():
        if record.options.nonlinearity is not None:
            raise not_mergeable(f"export_lora: the layer {name!r}", record.options.nonlinearity)
        factors[name] = lora_factors(source.adapter(name))
    # PEFT also saves the weight of an adapted output layer: the base model has it.
    others = {k: t for k, t in source.others.items() if k.removesuffix(".weight") not in factors}
    biases = [key for key in others if key.rpartition(".")[0] in factors]
    if biases:
        raise ValueError(
            f"export_lora: {biases[0]!r} was trained, which LoRA servers do not take; merge the "
            "adapter (merge_and_unload) and serve the merged model"
        )
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    largest = max(ranks.values())
    rank = min((r for r in VLLM_RANKS if r >= largest), default=largest)
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        missing = rank - ranks[name]
        dtype = torch.promote_types(source.factors[f"{name}.dcft_A"].dtype, torch.float32)
        tensors[f"{name}.lora_A.weight"] = F.pad(A, (0, 0, 0, missing)).to(dtype)
        tensors[f"{name}.lora_B.weight"] = F.pad(B, (0, missing)).to(dtype)
    others = others if modules_to_save else {}
    if others:
        source.check_modules_are_whole()
        tensors |= others
    kept = [
        m for m in dict.fromkeys(source.modules_to_save) if any(f".{m}." in f".{o}" for o in others)
    ]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        modules_to_save=kept or None,
        base_model_name_or_path=source.base_model,
        task_type=source.task_type,
    )
    saved.write(out_dir, config, tensors)
    return _report(rank, ranks, kept, others)


def _read(
    model_or_dir: nn.Module | str | os.PathLike[str], adapter_name: str
) -> saved.SavedAdapter:
    if not isinstance(model_or_dir, nn.Module):
        if not isinstance(model_or_dir, (str, os.PathLike)):
            raise TypeError(f"model_or_dir: expected a model or a path, got {model_or_dir!r}")
        return saved.read(model_or_dir)
    model = saved.unwrapped(model_or_dir)
    configs = getattr(model, "peft_config", {})
    if layers_with(model, adapter_name):
        return saved.from_model(model, adapter_name)
    if find_dcft_layers(model):
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, folder)
            return saved.read(folder)
    raise ValueError(
        f"model_or_dir: has no DCFT adapter {adapter_name!r} and no DCFTLinear layers; its "
        f"adapters are {', '.join(configs) or 'none'}"
    )


def _report(
    rank: int, ranks: dict[str, int], modules: list[str], others: Collection[str]
) -> ExportReport:
    refused: dict[str, list[str]] = {}
    notes = []
    owners = sorted({key.rpartition(".")[0] for key in others})
    unknown = [name for name in owners if name.rpartition(".")[2] not in VLLM_MODULES]
    if unknown:
        refused["vLLM"] = [f"weights of {unknown}; it takes only layers named {VLLM_MODULES}"]
    if owners:
        refused["llama.cpp's converter"] = [f"weights of {owners}; it takes only factors"]
    if rank > VLLM_RANKS[-1]:
        why = f"rank {rank}; the largest that it takes is {VLLM_RANKS[-1]}"
        refused.setdefault("vLLM", []).append(why)
    elif rank > VLLM_DEFAULT_RANK:
        notes.append(f"vLLM needs --max-lora-rank {rank} (its default is {VLLM_DEFAULT_RANK})")
    if owners:
        notes.append(
            "to serve without these weights, pass modules_to_save=False; to serve the model as it "
            "was trained, merge the adapter (merge_and_unload)"
        )
    return ExportReport(
        rank, ranks, modules, {name: "; ".join(why) for name, why in refused.items()}, notes
    )
