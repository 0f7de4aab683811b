"""The questions that are asked, each as a table of runs that anyone can repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.quality import errors
from benchmarks.quality.layers import TARGETS
from benchmarks.quality.pretrained import SMOLLM2
from benchmarks.quality.runs import Run

GLUE = ("cola", "rte", "stsb", "sst2")


@dataclass(frozen=True)
class Variant:
    """One line of a study's table.

    Attributes:
        label: what the line is called.
        rates: the learning rates that are tried on a slice of train; a single one is taken as it
            is; None for the method's own candidates.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "ALL"
    rates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        question: one sentence.
        settings: what all its runs share.
        paired: whether its runs differ in nothing but arithmetic: their curves are compared.
        differences: pairs of labels whose difference is shown; left out: DCFT minus LoRA r=1.
    """

    name: str
    question: str
    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]
    seeds: int
    settings: Run
    paired: bool = False
    differences: tuple[tuple[str, str], ...] = ()

    def run(self, task: str, variant: Variant) -> Run:
        """A variant's run on a task, at the settings' own seed and learning rate."""
        return replace(
            self.settings,
            task=task,
            method=variant.method,
            options=dict(variant.options),
            targets=variant.targets,
        )


_SETTINGS = Run(task="", method="", steps=120, batch_size=16, max_tokens=128)
_SEEDS = 3
_LOW_RANK_RATES = (2e-3, 5e-3, 1e-2)
_HIGH_RATES = (5e-3, 1e-2, 2e-2)
# What the slices of STS-B and SST-2 choose for the default of d = 8 (study "methods"), and that of
# SST-2 for the published start.
_ABLATION_RATE = 5e-3
_PAPER_RATE = 1e-2
_LONG_RATES = (5e-4, 1e-3, 2e-3)

# Stated, so that a stored run tells its start when the library's default is another. A change of
# what a name stands for has to drop the rows that have it.
_DCFT = {"init": "balanced"}
_PAPER = {"init": "paper", "alpha": 4.0}
# Of d = 8: from the default's scaling to those that it lies between, see
# `dcft_kernels.initialization`.
_LORAS_LOSS, _LORAS_MOVE = 8**0.25, 8**-0.25


def _dcft(label: str, targets: str = "ALL", /, **options: Any) -> Variant:
    return Variant(label, "dcft", {**_DCFT, **options}, targets, _LOW_RANK_RATES)


def _shape(d: int, rank: int = 1) -> dict[str, int]:
    """Options for that kernel size and rank; the defaults are left out: their runs are shared."""
    return {
        **({"kernel_size": d} if d != 8 else {}),
        **({"rank": rank} if rank != 1 else {}),
    }


def _constrained(rank: int, label: str, /, **options: Any) -> Variant:
    """As published, whatever the rank, with a constraint."""
    published = {**_PAPER, "alpha": 4.0 * rank, **_shape(8, rank)}
    return Variant(f"k={rank}, {label}", "dcft", {**published, **options})


def _at_one_rate(variants: tuple[Variant, ...], rate: float) -> tuple[Variant, ...]:
    """An ablation changes one thing: not the learning rate."""
    return tuple(replace(variant, rates=(rate,)) for variant in variants)


_LORA = Variant("LoRA r=1", "lora", {"r": 1}, rates=_LOW_RANK_RATES)

_MAIN = (
    _dcft("DCFT d=8"),
    Variant("DCFT d=8, as published", "dcft", _PAPER, rates=(*_LOW_RANK_RATES, 2e-2)),
    _LORA,
    Variant("LoRA r=8", "lora", {"r": 8}, rates=(1e-3, 2e-3, 5e-3)),
    Variant("full fine-tuning", "full", rates=(5e-5, 1e-4, 2e-4, 5e-4)),
    Variant("head only", "head", rates=(1e-3,)),
)

_SSB = Variant("SSB", "ssb", rates=_HIGH_RATES)
_SSB_DCFT = Variant("SSB + DCFT d=8", "ssb_dcft", _DCFT, rates=_LOW_RANK_RATES)

_PEERS = (
    Variant("BitFit", "bitfit", rates=(1e-3, 2e-3, 5e-3, 1e-2)),
    Variant("DoRA r=1", "dora", {"r": 1}, rates=_HIGH_RATES),
    Variant("AdaLoRA r=1", "adalora", {"target_r": 1, "init_r": 2}, rates=_HIGH_RATES),
    Variant("LoKr r=1", "lokr", {"r": 1}, rates=_LOW_RANK_RATES),
    Variant("VeRA r=256", "vera", {"r": 256}, rates=_HIGH_RATES),
    Variant("(IA)3", "ia3", rates=_HIGH_RATES),
    Variant("LoRA-FA r=8", "lora_fa", {"r": 8}, rates=_HIGH_RATES),
    Variant("SoRA r=4", "sora", {"r": 4}, rates=_LOW_RANK_RATES),
    Variant("TriLoRA r=2", "trilora", {"r": 2}, rates=_LOW_RANK_RATES),
    Variant("FLoRA r=2", "flora", {"r": 2}, rates=_LOW_RANK_RATES),
    Variant("Houlsby adapter r=8", "houlsby", {"r": 8}, rates=_LOW_RANK_RATES),
    Variant("Pfeiffer adapter r=16", "pfeiffer", {"r": 16}, rates=_LOW_RANK_RATES),
    Variant("parallel adapter r=1", "parallel_adapter", {"r": 1}, rates=_HIGH_RATES),
    Variant("SSL", "ssl", rates=(1e-2, 2e-2, 5e-2)),
    _SSB,
    Variant("SAM-PARSER", "sam_parser", rates=_HIGH_RATES),
    _SSB_DCFT,
    # Beside which the others stand; their runs are those of "methods".
    _dcft("DCFT d=8"),
    _LORA,
)


def by_name(name: str) -> Study:
    """The study of that name.

    Raises:
        QualityError: an unknown name.
    """
    if name not in STUDIES:
        raise errors.unknown("--study", name, STUDIES)
    return STUDIES[name]


def _study(
    name: str,
    question: str,
    variants: tuple[Variant, ...],
    tasks: tuple[str, ...] = ("stsb",),
    *,
    paired: bool = False,
    differences: tuple[tuple[str, str], ...] = (),
    **settings: Any,
) -> Study:
    shared = replace(_SETTINGS, **settings)
    return Study(name, question, variants, tasks, _SEEDS, shared, paired, differences)


STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        _study(
            "methods",
            "How well does DCFT do beside LoRA and full fine-tuning, at equal steps?",
            _MAIN,
            GLUE,
        ),
        _study(
            "cola",
            "And on CoLA, of which nothing is learned in so few steps?",
            (
                replace(_dcft("DCFT d=8"), rates=_LONG_RATES),
                replace(_dcft("DCFT d=4, k=4", **_shape(4, 4)), rates=_LONG_RATES),
                replace(_LORA, rates=_LONG_RATES),
                Variant("full fine-tuning", "full", rates=(1e-4,)),
                Variant("head only", "head", rates=(1e-3,)),
            ),
            ("cola",),
            steps=1000,
        ),
        _study(
            "rte",
            "And on RTE, in three epochs?",
            (
                *_at_one_rate((_dcft("DCFT d=8"), _LORA), 1e-3),
                Variant("full fine-tuning", "full", rates=(1e-4,)),
                Variant("head only", "head", rates=(1e-3,)),
            ),
            ("rte",),
            steps=470,
        ),
        _study(
            "peers",
            "How well do other parameter-efficient methods do, at equal steps?",
            _PEERS,
            ("sst2",),
        ),
        _study(
            "initialization",
            "Which start and scaling learn fastest, at learning rates that suit LoRA?",
            (
                _dcft("balanced"),
                _dcft("balanced, LoRA's first loss", scaling_gain=_LORAS_LOSS),
                _dcft("balanced, LoRA's first move", scaling_gain=_LORAS_MOVE),
                _dcft("zero, alpha 4", init="zero", alpha=4.0),
                _dcft("paper, alpha 4", **_PAPER),
                _LORA,
            ),
            ("stsb", "sst2"),
        ),
        _study(
            "rates",
            "Does one learning rate suit all kernel sizes and ranks?",
            (
                *(
                    _dcft(f"d={d}, k={rank}", **_shape(d, rank))
                    for d, rank in ((2, 1), (4, 4), (8, 1), (8, 4), (12, 1))
                ),
                _LORA,
            ),
        ),
        _study(
            "kernel_size",
            "How does DCFT do with larger and smaller kernels (Table 4)?",
            _at_one_rate(
                tuple(_dcft(f"d={d}", **_shape(d)) for d in (2, 4, 6, 8, 12)), _ABLATION_RATE
            ),
        ),
        _study(
            "stride",
            "How does DCFT do with overlapping windows (Table 5, d=8)?",
            _at_one_rate(
                (
                    *(_dcft(f"stride {stride}", stride=stride) for stride in (1, 2, 4)),
                    _dcft("stride 8"),  # the default's runs are shared
                ),
                _ABLATION_RATE,
            ),
        ),
        _study(
            "targets",
            "Which layers should DCFT adapt (Table 6, d=8)?",
            _at_one_rate(tuple(_dcft(name, name) for name in TARGETS), _ABLATION_RATE),
        ),
        _study(
            "rank",
            "How does DCFT do with higher ranks (d=8)?",
            _at_one_rate(
                tuple(_dcft(f"k={rank}", **_shape(8, rank)) for rank in (1, 2, 4, 8)),
                _ABLATION_RATE,
            ),
        ),
        _study(
            "orthogonality",
            "What do the constraints on the factors do (equation 4, d=8, as published)?",
            _at_one_rate(
                (
                    _constrained(1, "no constraint"),
                    _constrained(1, "orthogonal, weight 0.1", orthogonality=0.1),
                    _constrained(1, "ReLU between the factors", nonlinearity="relu"),
                    _constrained(4, "no constraint"),
                    _constrained(4, "orthogonal, weight 0.1", orthogonality=0.1),
                    _constrained(
                        4, "diagonal, weight 0.1", orthogonality=0.1, constraint="diagonal"
                    ),
                    _constrained(4, "ReLU between the factors", nonlinearity="relu"),
                ),
                _PAPER_RATE,
            ),
        ),
        _study(
            "budget",
            "DCFT or LoRA, at about LoRA's number of parameters?",
            (
                _LORA,
                *(
                    _dcft(f"DCFT d={d}, k={rank}", **_shape(d, rank))
                    for d, rank in ((2, 2), (4, 4), (8, 7))
                ),
            ),
        ),
        _study(
            "combination",
            "Does it pay to scale the base's rows and columns beside DCFT (SSB + DCFT)?",
            (
                _SSB_DCFT,
                _SSB,
                _dcft("DCFT d=8"),
                _dcft("DCFT d=4, k=4", **_shape(4, 4)),
            ),
            ("stsb", "sst2"),
            differences=tuple(
                (_SSB_DCFT.label, other) for other in ("DCFT d=8", "DCFT d=4, k=4", _SSB.label)
            ),
        ),
        _study(
            "parity",
            "Do the fast path and the published algorithm train alike, to rounding?",
            _at_one_rate(
                (
                    _dcft("fast path", backend="torch"),
                    _dcft("published algorithm", backend="reference"),
                ),
                _ABLATION_RATE,
            ),
            ("sst2",),
            paired=True,
            steps=200,
        ),
        Study(
            "language",
            "Does DCFT train a language model as well as LoRA does?",
            (
                _dcft("DCFT d=8"),
                _LORA,
                Variant("as it comes, not trained", "head", rates=(_ABLATION_RATE,)),
            ),
            ("shakespeare",),
            _SEEDS,
            Run(
                task="",
                method="",
                model=SMOLLM2,
                steps=20,
                batch_size=4,
                scored_size=16,
                max_tokens=128,
            ),
        ),
    )
}
"""All studies by name."""
