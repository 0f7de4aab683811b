"""Methods as the `peft` library has them, injected into the given model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.methods import Adapted
from benchmarks.quality.models import FEED_FORWARD_OUTPUT, KEY, VALUE, role_of


def _tuner(kind: str, model: nn.Module, layers: Sequence[str], **options: Any) -> Any:
    """A tuner of peft on these layers, and on no others whose names end alike."""
    import peft  # on demand: it takes seconds

    targets = _pattern(layers)
    config = getattr(peft, f"{kind}Config")(target_modules=targets, **options)
    return getattr(peft, f"{kind}Model")(model, config, "default")


def _pattern(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names))


def lora(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    r: int = 1,
    alpha: float | None = None,
    last_blocks: int | None = None,
    use_dora: bool = False,
) -> Adapted:
    """LoRA (Hu et al. 2022): `DW = B A`, scaled by `alpha / r`; None is `alpha = r`.

    With `last_blocks` only the layers of so many last transformer blocks are adapted. `use_dora`
    is DoRA (Liu et al. 2024): trained magnitudes, equation 27 of arXiv 2407.05417.
    """
    if last_blocks is not None:
        block = {name: int(next(filter(str.isdigit, name.split(".")))) for name in layers}
        layers = [name for name in layers if block[name] > max(block.values()) - last_blocks]
    options = {"r": r, "lora_alpha": r if alpha is None else alpha, "use_dora": use_dora}
    return Adapted(_tuner("Lora", model, layers, **options).model)


def adalora(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    target_r: int = 1,
    init_r: int = 2,
    alpha: float | None = None,
    orthogonality: float = 0.5,
) -> Adapted:
    """AdaLoRA (Zhang et al. 2023): `DW = B diag(E) A`, whose rank is cut where it matters least.

    Every layer has `init_r` ranks for a tenth of the steps; then the budget falls to `target_r` per
    layer on average, which it has for the last half. The penalty is `orthogonality` times the mean
    over all `A` and `B` of `||A A^T - I||_F` and `||B^T B - I||_F`. `alpha` is divided by `init_r`.
    """
    if not target_r < init_r or steps < 2:
        raise ValueError(
            f"target_r: expected less than init_r={init_r} and at least 2 steps to cut ranks in, "
            f"got {target_r} and {steps}"
        )
    first, scale = int(0.1 * steps), init_r if alpha is None else alpha
    last = min(steps // 2, steps - max(first + 1, 2))  # after the first, which is not in step 1
    ranks = {"target_r": target_r, "init_r": init_r, "lora_alpha": scale}
    cuts = {"total_step": steps, "tinit": first, "tfinal": last, "deltaT": max(1, steps // 1000)}
    tuner = _tuner("AdaLora", model, layers, **ranks, **cuts, orth_reg_weight=orthogonality)
    tall = []  # the factors as [n, r] and [m, r]
    for name, parameter in tuner.model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)  # a constant that peft may leave trainable
        elif ".lora_A." in name or ".lora_B." in name:
            tall.append((parameter, ".lora_A." in name))

    def penalty() -> Tensor:
        deviations = []
        for factor, transposed in tall:
            columns = factor.t() if transposed else factor
            identity = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
            deviations.append(torch.linalg.matrix_norm(columns.t() @ columns - identity))
        return orthogonality * torch.stack(deviations).mean()

    return Adapted(tuner.model, penalty if orthogonality else None, tuner.update_and_allocate)


def ia3(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """(IA)3 (Liu et al. 2022): scales keys, values and the activations inside the feed-forward.

    Of `layers` only those are adapted. Keys and values are scaled after their layer with its bias,
    `W D2` in section 3.2 of arXiv 2407.05417; the activations before the feed-forward's output.
    """
    inside = [name for name in layers if role_of(name) == FEED_FORWARD_OUTPUT]
    targets = [name for name in layers if role_of(name) in (KEY, VALUE)] + inside
    if not targets:
        raise ValueError("ia3: expected targets with keys, values or feed-forward outputs")
    return Adapted(_tuner("IA3", model, targets, feedforward_modules=_pattern(inside)).model)


def lokr(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 1, alpha: float | None = None
) -> Adapted:
    """LoKr (Yeh et al. 2023): `DW = kron(w1, w2)`, scaled by `alpha / r`; None is `alpha = r`.

    `w1` is 8 x 8 where that divides the layer's sizes, and `w2` has rank `r`: at `r=1` it has as
    many parameters as DCFT with a kernel of 8 and rank 1.
    """
    scale = r if alpha is None else alpha
    return Adapted(_tuner("LoKr", model, layers, r=r, alpha=scale, decompose_factor=8).model)


def vera(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 256, d_initial: float = 0.1
) -> Adapted:
    """VeRA (Kopiczko et al. 2024): `DW = diag(b) B diag(d) A` with `b` and `d` trained.

    `A` and `B` are random, frozen and shared by all layers; the run's seed determines them.
    """
    seed = int(torch.randint(2**31, ()))
    tuner = _tuner("Vera", model, layers, r=r, d_initial=d_initial, projection_prng_key=seed)
    return Adapted(tuner.model)


def miss(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 16, mini_r: int | None = 32
) -> Adapted:
    """MiSS (arXiv 2409.15371): `DW` repeats one block, `[mini_r, r]` in `nn.Linear`'s layout.

    With `mini_r=None` the block has as many rows as the layer, and only its columns repeat.
    """
    mini = {} if mini_r is None else {"mini_r": mini_r, "init_weights": "mini"}
    return Adapted(_tuner("Miss", model, layers, r=r, **mini).model)


def unilora(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 4, length: int = 16_384
) -> Adapted:
    """Uni-LoRA (arXiv 2506.00799): all entries of LoRA's factors come from one trained vector.

    The run's seed determines which entry shares which of the `length` values. Neither factor starts
    at zero: the increment is small at the start, but not zero.
    """
    seed = int(torch.randint(2**31, ()))
    options = {"r": r, "theta_d_length": length, "proj_seed": seed}
    return Adapted(_tuner("UniLora", model, layers, **options).model)
