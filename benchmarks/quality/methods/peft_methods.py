"""Methods as the `peft` library has them, injected into the model that is given.

`peft` is imported when one of them is asked for. Its patterns for names match endings, so the
layers are handed over as one regular expression that matches their full names and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.methods import option_checks
from benchmarks.quality.methods.adapted import Adapted
from benchmarks.quality.methods.linear_layers import linear_layers
from benchmarks.quality.roles import FEED_FORWARD_OUTPUT, KEY, VALUE, known_endings, with_role
from dcft_kernels import validation

_ADAPTER = "default"


def lora(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 1, alpha: float | None = None
) -> Adapted:
    """LoRA (Hu et al. 2022): `DW = B A`, scaled by `alpha / r`; None is `alpha = r`."""
    return _lora(model, layers, r, alpha)


def dora(
    model: nn.Module, layers: Sequence[str], steps: int, *, r: int = 1, alpha: float | None = None
) -> Adapted:
    """DoRA (Liu et al. 2024), equation 27 of arXiv 2407.05417: LoRA with trained magnitudes."""
    return _lora(model, layers, r, alpha, use_dora=True)


def adalora(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    target_r: int = 1,
    init_r: int = 2,
    alpha: float | None = None,
    init_share: float = 0.1,
    final_share: float = 0.5,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.5,
) -> Adapted:
    """AdaLoRA (Zhang et al. 2023): `DW = B diag(E) A` whose rank is cut where it matters least.

    Every layer has `init_r` ranks for the first `init_share` of the steps; then the budget falls,
    until only `final_share` of the steps are left, to `target_r` a layer on average, spread by
    importance over the layers. `after_step` does this from the gradients of the step, so it has to
    come before they are cleared. The penalty is `orthogonality` times the mean over all `A` and `B`
    of `||A A^T - I||_F` and `||B^T B - I||_F`.

    The scaling is `alpha / init_r`, and it stays that when ranks are cut; None is `alpha = init_r`.

    Raises:
        ValueError: fewer than two steps, or a `target_r` that is not below `init_r`.
    """
    from peft import AdaLoraConfig, AdaLoraModel

    target_r = validation.positive_int("target_r", target_r)
    init_r = validation.positive_int("init_r", init_r)
    if target_r >= init_r:
        raise ValueError(f"target_r: expected less than init_r={init_r}, got {target_r}")
    if steps < 2:
        # The budget is cut by what was learnt about importance in a step before.
        raise ValueError(f"steps: adalora expected at least 2, got {steps}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 < validation.finite_number(name, beta) < 1.0:
            raise ValueError(f"{name}: expected a number in (0, 1), got {beta!r}")
    strength = option_checks.weight("orthogonality", orthogonality)
    alpha = float(init_r) if alpha is None else option_checks.positive_number("alpha", alpha)
    initial = int(option_checks.share("init_share", init_share) * steps)
    final = int(option_checks.share("final_share", final_share) * steps)
    config = AdaLoraConfig(
        target_modules=_exactly(linear_layers(model, layers)),
        target_r=target_r,
        init_r=init_r,
        lora_alpha=alpha,
        total_step=steps,
        tinit=initial,
        # The last cut comes after the first, and not in the first step.
        tfinal=min(final, steps - max(initial + 1, 2)),
        deltaT=max(1, steps // 1000),
        beta1=beta1,
        beta2=beta2,
        orth_reg_weight=strength,
    )
    tuner = AdaLoraModel(model, config, _ADAPTER)
    adapted: nn.Module = tuner.model
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:
            # A constant, which peft leaves trainable where it had to move it to the base's device
            # or dtype.
            parameter.requires_grad_(False)
    tall = [  # [n, r] and [m, r]
        (parameter, ".lora_A." in name)
        for name, parameter in adapted.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    ]

    def penalty() -> Tensor:
        deviations = []
        for factor, transposed in tall:
            columns = factor.t() if transposed else factor
            identity = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
            deviations.append(torch.linalg.matrix_norm(columns.t() @ columns - identity))
        return strength * torch.stack(deviations).mean()

    return Adapted(adapted, penalty if strength else None, tuner.update_and_allocate)


def ia3(model: nn.Module, layers: Sequence[str], steps: int) -> Adapted:
    """(IA)3 (Liu et al. 2022): scales keys, values and the activations inside the feed-forward.

    Of `layers`, only those are adapted. Keys and values are scaled behind their layer with its
    bias, which is `W D2` in section 3.2 of arXiv 2407.05417, the side of the right singular
    vectors. The feed-forward's activations are scaled where they enter its output layer.

    Raises:
        ValueError: `layers` without keys, values and outputs of feed-forwards.
    """
    from peft import IA3Config, IA3Model

    names = list(linear_layers(model, layers))
    roles = (KEY, VALUE, FEED_FORWARD_OUTPUT)
    targets = with_role(names, *roles)
    if not targets:
        endings = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ValueError(
            "layers: ia3 expected keys, values or feed-forward outputs, names ending in "
            f"{known_endings(*roles)}, got names ending in {', '.join(endings)}"
        )
    config = IA3Config(
        target_modules=_exactly(targets),
        feedforward_modules=_exactly(with_role(names, FEED_FORWARD_OUTPUT)),
    )
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

    `w1` is the small factor, `decompose_factor` square where that divides the layer's sizes, and
    `w2` has rank `r` where that saves parameters. At the defaults, then, it has as many parameters
    as DCFT with a kernel of 8 and rank 1, with the Kronecker factors the other way round.
    `decompose_factor=-1` makes both factors as alike in size as can be; `decompose_both` gives
    `w1` rank `r` too.
    """
    from peft import LoKrConfig, LoKrModel

    rank, alpha = option_checks.rank_and_alpha(r, alpha)
    if decompose_factor != -1:
        validation.positive_int("decompose_factor", decompose_factor)
    config = LoKrConfig(
        target_modules=_exactly(linear_layers(model, layers)),
        r=rank,
        alpha=alpha,
        decompose_factor=decompose_factor,
        decompose_both=validation.boolean("decompose_both", decompose_both),
    )
    return Adapted(LoKrModel(model, config, _ADAPTER).model)


def vera(
    model: nn.Module,
    layers: Sequence[str],
    steps: int,
    *,
    r: int = 256,
    d_initial: float = 0.1,
) -> Adapted:
    """VeRA (Kopiczko et al. 2024): `DW = diag(b) B diag(d) A` with `b` and `d` trained.

    `A` and `B` are random, frozen and shared: as large as the largest layer needs, and every layer
    takes the rows and columns that fit it. `b` is zero at the start and `d` is `d_initial`. They
    are drawn from PyTorch's default generator, so that a run's seed settles them.
    """
    from peft import VeraConfig, VeraModel

    config = VeraConfig(
        target_modules=_exactly(linear_layers(model, layers)),
        r=validation.positive_int("r", r),
        d_initial=validation.finite_number("d_initial", d_initial),
        projection_prng_key=int(torch.randint(2**31, ())),
    )
    # The layers hold the shared factors too: they stay when the tuner goes.
    return Adapted(VeraModel(model, config, _ADAPTER).model)


def _lora(
    model: nn.Module, layers: Sequence[str], r: int, alpha: float | None, **config: Any
) -> Adapted:
    from peft import LoraConfig, LoraModel

    rank, alpha = option_checks.rank_and_alpha(r, alpha)
    targets = _exactly(linear_layers(model, layers))
    config = LoraConfig(target_modules=targets, r=rank, lora_alpha=alpha, **config)
    return Adapted(LoraModel(model, config, _ADAPTER).model)


def _exactly(names: Sequence[str] | dict[str, nn.Linear]) -> str:
    """A regular expression that matches these names and nothing else."""
    return "|".join(map(re.escape, names))
