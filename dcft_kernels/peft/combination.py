"""The weighted sum of adapters as one adapter, by concatenating their ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dcft_kernels.adapter import PER_RANK, SHARED, Adapter, Geometry
from dcft_kernels.peft.config import DCFTConfig, exactly, names_alone
from dcft_kernels.peft.layer import layers_with


def combine(
    model: nn.Module,
    configs: Mapping[str, DCFTConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
) -> tuple[DCFTConfig, dict[str, Adapter]]:
    """The config of the sum and, by layer, its factors; see `DCFTModel.add_weighted_adapter`."""
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            "weights: expected one for each of at least one adapter, got "
            f"{len(adapters)} adapters and {len(weights)} weights"
        )
    for name in adapters:
        if name not in configs:
            raise ValueError(f"Adapter {name} does not exist; there are {', '.join(configs)}")
        if configs[name].modules_to_save or configs[name].bias != "none":
            raise ValueError(
                f"adapters: {name!r} has modules_to_save or biases, which a sum cannot hold"
            )
    terms = {
        name: [
            (layer.adapter(adapter), weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if adapter in layer.geometry
        ]
        for name, layer in layers_with(model, *adapters).items()
    }
    per_rank = not all(_share_a_kernel(summed) for summed in terms.values())
    sums = {name: _weighted_sum(name, summed, per_rank) for name, summed in terms.items()}
    by_pattern = {exactly(name): adapter.geometry for name, adapter in sums.items()}
    config = DCFTConfig(
        target_modules=names_alone(sums),
        kernels=PER_RANK if per_rank else SHARED,
        rank_pattern={key: g.rank for key, g in by_pattern.items()},
        alpha_pattern={key: float(g.rank) for key, g in by_pattern.items()},
        kernel_size_pattern={key: [*g.kernel_size] for key, g in by_pattern.items()},
        stride_pattern={key: [*g.stride] for key, g in by_pattern.items()},
        task_type=configs[adapters[0]].task_type,
        base_model_name_or_path=configs[adapters[0]].base_model_name_or_path,
    )
    return config, sums


def _share_a_kernel(terms: Sequence[tuple[Adapter, float]]) -> bool:
    """Whether all ranks of these adapters of a layer have one kernel."""
    first = terms[0][0].C
    return all(not term.geometry.per_rank and torch.equal(term.C, first) for term, _ in terms)


@torch.no_grad()
def _weighted_sum(
    layer_name: str, terms: Sequence[tuple[Adapter, float]], per_rank: bool
) -> Adapter:
    """One layer's adapters as one, with a scaling of one."""
    _, outputs, inputs, _ = terms[0][0].geometry
    kernels = []
    for term, _ in terms:
        rank, *sides, _ = term.geometry
        if sides != [outputs, inputs]:
            raise ValueError(
                f"adapters: their kernel sizes or strides differ in {layer_name!r}, so their sum "
                "is no DCFT adapter; export each with export_lora and add those with LoRA's "
                "add_weighted_adapter(combination_type='cat')"
            )
        kernels.append(term.C.expand(rank, -1, -1))
    A = torch.cat([term.A for term, _ in terms])
    B = torch.cat([term.scaling * weight * term.B for term, weight in terms], 1)
    C = torch.cat(kernels) if per_rank else terms[0][0].C.clone()
    return Adapter(A, B, C, 1.0, Geometry(A.shape[0], outputs, inputs, per_rank))
