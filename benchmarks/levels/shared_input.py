"""Layers of a model that share their input, computed as one call of `dcft_linear_group`.

The first layer of a group that is called computes all of it and keeps the others' outputs until
they are asked for, with the very same input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from dcft_kernels import DCFTLinear, GroupMember, dcft_linear_group

# Names of the layers, last parts, that are called with one input. DeBERTa's are not here: it calls
# its query and key with positions as well, and its value without.
_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
)


class _Group:
    """Layers of one input, and the outputs that wait to be asked for."""

    def __init__(self, layers: Sequence[DCFTLinear]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def output(self, index: int, x: Tensor) -> Tensor:
        if self._input is not x or index not in self._waiting:
            members = [
                GroupMember(
                    layer.weight,
                    layer.bias,
                    layer.dcft_A,
                    layer.dcft_B,
                    layer.dcft_C,
                    layer.scaling,
                )
                for layer in self.layers
            ]
            self._input = x
            self._waiting = dict(enumerate(dcft_linear_group(x, members)))
        output = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return output


class _Member(nn.Module):
    """One layer of a group, in the place that it has in the model."""

    def __init__(self, layer: DCFTLinear, group: _Group, index: int) -> None:
        super().__init__()
        self.layer = layer
        self._group, self._index = group, index

    def forward(self, x: Tensor) -> Tensor:
        return self._group.output(self._index, x)


def group_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Group those of the adapted layers that share an input, in place; the names of all in groups.

    Layers stand beside each other in the model and have the group's names.
    """
    by_parent: dict[str, dict[str, str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        by_parent.setdefault(parent, {})[last] = name
    grouped = []
    for siblings in by_parent.values():
        for group in _GROUPS:
            if not all(last in siblings for last in group):
                continue
            layers = [model.get_submodule(siblings[last]) for last in group]
            adapted = [layer for layer in layers if isinstance(layer, DCFTLinear)]
            if len(adapted) != len(layers):
                continue
            together = _Group(adapted)
            for index, (last, layer) in enumerate(zip(group, adapted, strict=True)):
                model.set_submodule(siblings[last], _Member(layer, together, index))
                grouped.append(siblings[last])
    return grouped
