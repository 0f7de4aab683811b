"""The weighted sum of adapters as one adapter, by concatenating their ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dcft_kernels.adapter import Adapter
from dcft_kernels.peft.config import DCFTConfig, exactly, names_alone
from dcft_kernels.peft.layer import DCFTLinearLayer, layers_with


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
    sums = {
        name: _weighted_sum(name, layer, adapters, weights)
        for name, layer in layers_with(model, *adapters).items()
    }
    by_pattern = {exactly(name): adapter.geometry for name, adapter in sums.items()}
    config = DCFTConfig(
        target_modules=names_alone(sums),
        rank_pattern={key: g.rank for key, g in by_pattern.items()},
        alpha_pattern={key: float(g.rank) for key, g in by_pattern.items()},
        kernel_size_pattern={key: [*g.kernel_size] for key, g in by_pattern.items()},
        stride_pattern={key: [*g.stride] for key, g in by_pattern.items()},
        task_type=configs[adapters[0]].task_type,
        base_model_name_or_path=configs[adapters[0]].base_model_name_or_path,
    )
    return config, sums


@torch.no_grad()
def _weighted_sum(
    layer_name: str, layer: DCFTLinearLayer, adapters: Sequence[str], weights: Sequence[float]
) -> Adapter:
    """One layer's adapters as one, with a scaling of one."""
    summed = [
        (layer.adapter(a), w) for a, w in zip(adapters, weights, strict=True) if a in layer.geometry
    ]
    first = summed[0][0]
    for other, _ in summed:
        alike = other.geometry[1:] == first.geometry[1:]
        if not alike or not torch.equal(other.C, first.C):
            raise ValueError(
                f"adapters: their kernels dcft_C differ in {layer_name!r}, so their sum is no DCFT "
                "adapter; export each with export_lora and add those with LoRA's "
                "add_weighted_adapter(combination_type='cat')"
            )
    A = torch.cat([adapter.A for adapter, _ in summed])
    B = torch.cat([adapter.scaling * weight * adapter.B for adapter, weight in summed], 1)
    geometry = first.geometry._replace(rank=A.shape[0])
    return Adapter(A, B, first.C.clone(), 1.0, geometry)
