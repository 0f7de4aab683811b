"""Methods as the `peft` library has them, injected into the given model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.layers import FEED_FORWARD_OUTPUT, KEY, VALUE, role_of
from benchmarks.quality.methods.adapted import Adapted

_ADAPTER = "default"


def lora(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 1, alpha: float | None = None
) -> Adapted:
    """LoRA (Hu et al. 2022): `DW = B A`, scaled by `alpha / r`; None is `alpha = r`."""
    return _lora(model, layers, r, alpha)


def dora(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 1, alpha: float | None = None
) -> Adapted:
    """DoRA (Liu et al. 2024): LoRA with trained magnitudes, equation 27 of arXiv 2407.05417."""
    return _lora(model, layers, r, alpha, use_dora=True)


def _lora(
    model: nn.Module, layers: Sequence[str], r: int, alpha: float | None, **config: Any
) -> Adapted:
    from peft import LoraConfig, LoraModel

    alpha = r if alpha is None else alpha
    config = LoraConfig(target_modules=_exactly(layers), r=r, lora_alpha=alpha, **config)
    return Adapted(LoraModel(model, config, _ADAPTER).model)


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

    Every layer has `init_r` ranks for a tenth of the steps; then the budget falls, until half of the
    steps are left, to `target_r` per layer on average. The penalty is `orthogonality` times the mean
    over all `A` and `B` of `||A A^T - I||_F` and `||B^T B - I||_F`.
    The scaling is `alpha / init_r`; None is `alpha = init_r`.
    """
    from peft import AdaLoraConfig, AdaLoraModel

    if not target_r < init_r or steps < 2:
        raise ValueError(
            f"target_r: expected less than init_r={init_r} and at least 2 steps to cut ranks in, "
            f"got {target_r} and {steps}"
        )
    initial = int(0.1 * steps)
    config = AdaLoraConfig(
        target_modules=_exactly(layers),
        target_r=target_r,
        init_r=init_r,
        lora_alpha=init_r if alpha is None else alpha,
        total_step=steps,
        tinit=initial,
        # The last cut comes after the first one, which is not in the first step.
        tfinal=min(steps // 2, steps - max(initial + 1, 2)),
        deltaT=max(1, steps // 1000),
        orth_reg_weight=orthogonality,
    )
    tuner = AdaLoraModel(model, config, _ADAPTER)
    adapted: nn.Module = tuner.model
    wide = []  # the factors as [r, n] and [r, m]
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)  # a constant that peft may leave trainable
        if ".lora_A." in name or ".lora_B." in name:
            wide.append((parameter, ".lora_B." in name))

    def penalty() -> Tensor:
        deviations = []
        for factor, transposed in wide:
            columns = factor if transposed else factor.t()
            identity = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
            deviations.append(torch.linalg.matrix_norm(columns.t() @ columns - identity))
        return orthogonality * torch.stack(deviations).mean()

    return Adapted(adapted, penalty if orthogonality else None, tuner.update_and_allocate)


def ia3(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """(IA)3 (Liu et al. 2022): scales keys, values and the activations inside the feed-forward.

    Of `layers` only those are adapted. Keys and values are scaled after their layer with its bias,
    `W D2` in section 3.2 of arXiv 2407.05417; the activations before the feed-forward's output.
    """
    from peft import IA3Config, IA3Model

    feed_forward = [name for name in layers if role_of(name) == FEED_FORWARD_OUTPUT]
    targets = [name for name in layers if role_of(name) in (KEY, VALUE)] + feed_forward
    if not targets:
        raise ValueError("ia3: expected targets with keys, values or feed-forward outputs")
    config = IA3Config(target_modules=_exactly(targets), feedforward_modules=_exactly(feed_forward))
    return Adapted(IA3Model(model, config, _ADAPTER).model)


def lokr(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    r: int = 1,
    alpha: float | None = None,
    decompose_factor: int = 8,
    decompose_both: bool = False,
) -> Adapted:
    """LoKr (Yeh et al. 2023): `DW = kron(w1, w2)`, scaled by `alpha / r`; None is `alpha = r`.

    `w1` is square of size `decompose_factor` where that divides the layer's sizes, and `w2` has
    rank `r`: at the defaults it has as many parameters as DCFT with a kernel of 8 and rank 1, with
    the Kronecker factors exchanged. `decompose_factor=-1` makes the factors as similar in size as
    possible; `decompose_both` gives `w1` rank `r` too.
    """
    from peft import LoKrConfig, LoKrModel

    config = LoKrConfig(
        target_modules=_exactly(layers),
        r=r,
        alpha=r if alpha is None else alpha,
        decompose_factor=decompose_factor,
        decompose_both=decompose_both,
    )
    return Adapted(LoKrModel(model, config, _ADAPTER).model)


def vera(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 256, d_initial: float = 0.1
) -> Adapted:
    """VeRA (Kopiczko et al. 2024): `DW = diag(b) B diag(d) A` with `b` and `d` trained.

    `A` and `B` are random, frozen and shared by all layers; the run's seed determines them.
    """
    from peft import VeraConfig, VeraModel

    config = VeraConfig(
        target_modules=_exactly(layers),
        r=r,
        d_initial=d_initial,
        projection_prng_key=int(torch.randint(2**31, ())),
    )
    return Adapted(VeraModel(model, config, _ADAPTER).model)


def _exactly(names: Sequence[str]) -> str:
    """A pattern that matches these names only; peft would match a list's endings."""
    return "|".join(map(re.escape, names))
