"""Which layers of a model a user means: names, a regular expression, or "all-linear"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from dcft_kernels.linear import DCFTLinear, is_conv1d, why_not_adaptable

ALL_LINEAR = "all-linear"

Targets = str | Sequence[str]

# PEFT's layers of all kinds have it, and its wrappers of trained modules (modules_to_save).
_OF_PEFT = "adapter_layer_names"

# Common names of output heads, for models that do not declare theirs.
_HEAD_NAMES = frozenset(
    {"lm_head", "head", "heads", "classifier", "score", "qa_outputs", "output_projection"}
)


def select_layers(model: nn.Module, targets: Targets, exclude: Targets) -> list[str]:
    """The names of the layers to adapt, in the model's own order.

    Args:
        model: any module.
        targets: as for `swap_linear`.
        exclude: as for `swap_linear`.

    Raises:
        TypeError: `targets` or `exclude` of the wrong type, or a target that cannot be adapted.
        ValueError: no layer matches, a pattern matches nothing, a match is adapted already.
    """
    check_patterns("targets", targets)
    check_patterns("exclude", exclude)
    check_holds_its_layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    if targets == ALL_LINEAR:
        left_out = _head_and_tied_names(model)
        names = [
            name
            for name in _linear_names(modules)
            if name not in left_out and not _is_swapped(modules[name])
        ]
        if not names and any(map(_is_swapped, modules.values())):
            raise ValueError(
                "targets: every linear layer of this model is a DCFTLinear already; "
                "to adapt it again, start from the base model"
            )
    else:
        if not targets:
            raise ValueError("targets: expected at least one name, got an empty list")
        _check_each_matches("targets", targets, modules)
        names = [
            name for name in modules if matches(name, targets) and not _is_container(modules[name])
        ]
    _check_each_matches("exclude", exclude, modules)
    selected = [name for name in names if not matches(name, exclude)]
    if not selected:
        raise ValueError(
            f"targets: {targets!r}{f' without exclude={exclude!r}' if exclude else ''} leaves no "
            f"layer; {_available(modules)}"
        )
    swapped = [name for name in selected if _is_swapped(modules[name])]
    if swapped:
        left = [name for name in _linear_names(modules) if not _is_swapped(modules[name])]
        raise ValueError(
            f"targets: already swapped: {_short_list(swapped)}; layers not swapped yet: "
            + (_short_list(left) or "none")
        )
    for name in selected:
        owner = _owner(name, modules)
        if owner is not None:
            kind = f"{type(modules[owner]).__module__}.{type(modules[owner]).__qualname__}"
            raise TypeError(
                f"targets: {name!r} belongs to another adapter: {owner!r} is a {kind}; leave it "
                "out with exclude=, or merge and unload that adapter first"
            )
        reason = why_not_adaptable(modules[name])
        if reason is not None:
            raise TypeError(f"targets: {name!r} cannot be adapted: {reason}")
    return selected


def check_holds_its_layers(model: nn.Module) -> None:
    """Raise ValueError if `model` is itself a layer to replace: nothing holds it."""
    if why_not_adaptable(model) is None:
        raise ValueError(
            "model: is itself a linear layer, which nothing holds; use DCFTLinear.from_linear"
        )


def matches(name: str, patterns: Targets) -> bool:
    """Whether a module name is meant.

    A sequence holds names, or endings of names that begin after a dot. A string is one of these,
    or a regular expression for the whole name.
    """
    if isinstance(patterns, str):
        if re.fullmatch(patterns, name) is not None:
            return True
        patterns = [patterns]
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def check_patterns(argument: str, patterns: object) -> None:
    """Raise TypeError or ValueError unless `patterns` is a regular expression or names."""
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise ValueError(
                f"{argument}: {patterns!r} is not a regular expression: {error}"
            ) from None
        return
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{argument}: expected a name, a regular expression or a list of names, "
            f"got {patterns!r}"
        )


def _linear_names(modules: dict[str, nn.Module]) -> list[str]:
    """Names of plain linear layers and of those that DCFT has adapted, without PEFT's."""
    return [
        name
        for name, module in modules.items()
        if (type(module) is nn.Linear or is_conv1d(module) or _is_swapped(module))
        and _owner(name, modules) is None
    ]


def _owner(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The PEFT layer that has this name or holds it, or None.

    Its base layer counts too: IA3, DoRA and others scale or rotate the base weight alone when they
    are merged, not what DCFT adds to it.
    """
    holders = (*ancestry(name), "")
    return next((holder for holder in holders if hasattr(type(modules[holder]), _OF_PEFT)), None)


def ancestry(name: str) -> Iterator[str]:
    """`name`, and the names of the modules that hold it, inside out."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _head_and_tied_names(model: nn.Module) -> set[str]:
    """The layers that "all-linear" leaves out: output heads and layers tied to embeddings.

    A transformers model, which may be a part of this one, tells where its backbone is
    (`base_model_prefix`): linear layers outside of it are the head. It may also tell its output
    embeddings. For other models, a top-level module with a usual head's name is one.
    """
    heads: set[nn.Module] = set()
    for owner in model.modules():
        # Asked of the class: wrappers pass on what their inner model has.
        if hasattr(type(owner), "get_output_embeddings"):
            found = owner.get_output_embeddings()  # type: ignore[operator]
            heads.update([found] if isinstance(found, nn.Module) else [])
        backbone = getattr(owner, getattr(type(owner), "base_model_prefix", "") or "", None)
        for name, child in owner.named_children():
            declared_outside = isinstance(backbone, nn.Module) and child is not backbone
            if declared_outside or (owner is model and backbone is None and name in _HEAD_NAMES):
                heads.update(child.modules())
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if module in heads or id(getattr(module, "weight", None)) in embeddings
    }


def _is_container(module: nn.Module) -> bool:
    """Whether a name that matches stands for a block of layers: it is passed over, not adapted."""
    return next(module.children(), None) is not None and not hasattr(type(module), _OF_PEFT)


def _is_swapped(module: nn.Module) -> bool:
    return isinstance(module, DCFTLinear)


def _check_each_matches(argument: str, patterns: Targets, modules: dict[str, nn.Module]) -> None:
    """Every entry must match a layer, or a typing error would go unnoticed."""
    leaves = [name for name, module in modules.items() if not _is_container(module)]
    if isinstance(patterns, str):
        entries: list[tuple[str, Targets]] = [(patterns, patterns)]
    else:
        entries = [(entry, [entry]) for entry in patterns]
    for text, entry in entries:
        if not any(matches(name, entry) for name in leaves):
            raise ValueError(_no_match(argument, text, modules))


def _no_match(argument: str, pattern: str, modules: dict[str, nn.Module]) -> str:
    endings = list(dict.fromkeys(_endings(modules)))
    near = difflib.get_close_matches(pattern, endings, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else _available(modules)
    return f"{argument}: {pattern!r} matches no layer of the model; {hint}"


def _endings(modules: dict[str, nn.Module]) -> Iterator[str]:
    for name in _linear_names(modules):
        parts = name.split(".")
        for length in (1, 2, 3, len(parts)):
            yield ".".join(parts[-length:])


def _available(modules: dict[str, nn.Module]) -> str:
    endings = dict.fromkeys(name.rsplit(".", 1)[-1] for name in _linear_names(modules))
    if not endings:
        return "the model has no linear layers, or only those of PEFT adapters"
    return f"its linear layers are named {_short_list(list(endings))}"


def _short_list(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
