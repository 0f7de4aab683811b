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
    """

    name: str
    question: str
    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]
    seeds: int
    settings: Run
    paired: bool = False

    def run(self, task: str, variant: Variant) -> Run:
        """A variant's run on a task, at the settings' own seed and learning rate."""
        return replace(
            self.settings,
            task=task,
            method=variant.method,
            options=dict(variant.options),
            targets=variant.targets,
        )


_SETTINGS = Run(task="", method="", steps=120, batch_size=16)
_SEEDS = 3
_LOW_RANK_RATES = (2e-3, 5e-3, 1e-2)
_ABLATION_RATE = 5e-3
_PEER_RATES = (5e-3, 1e-2)
_SCALE_RATES = (1e-2, 2e-2)
_ADAPTER_RATES = (2e-3, 5e-3)

# Stated, so that results stay what they were when the library's defaults change.
_DCFT = {"init": "balanced"}
_PAPER = {"init": "paper", "alpha": 4.0}


def _dcft(label: str, targets: str = "ALL", /, **options: Any) -> Variant:
    return Variant(label, "dcft", {**_DCFT, **options}, targets, _LOW_RANK_RATES)


def _at_one_rate(variants: tuple[Variant, ...], rate: float) -> tuple[Variant, ...]:
    """An ablation changes one thing: not the learning rate."""
    return tuple(replace(variant, rates=(rate,)) for variant in variants)


_MAIN = (
    _dcft("DCFT d=8"),
    Variant("DCFT d=8, as published", "dcft", _PAPER, rates=_LOW_RANK_RATES),
    Variant("LoRA r=1", "lora", {"r": 1}, rates=_LOW_RANK_RATES),
    Variant("LoRA r=8", "lora", {"r": 8}, rates=(1e-3, 2e-3, 5e-3)),
    Variant("full fine-tuning", "full", rates=(5e-5, 1e-4, 2e-4)),
    Variant("head only", "head", rates=(1e-3,)),
)

_PEERS = (
    Variant("BitFit", "bitfit", rates=_PEER_RATES),
    Variant("DoRA r=1", "dora", {"r": 1}, rates=_PEER_RATES),
    Variant("AdaLoRA r=1", "adalora", {"target_r": 1, "init_r": 2}, rates=_PEER_RATES),
    Variant("LoKr r=1", "lokr", {"r": 1}, rates=_PEER_RATES),
    Variant("VeRA r=256", "vera", {"r": 256}, rates=_SCALE_RATES),
    Variant("(IA)3", "ia3", rates=_SCALE_RATES),
    Variant("LoRA-FA r=8", "lora_fa", {"r": 8}, rates=_PEER_RATES),
    Variant("SoRA r=4", "sora", {"r": 4}, rates=_PEER_RATES),
    Variant("TriLoRA r=2", "trilora", {"r": 2}, rates=_PEER_RATES),
    Variant("FLoRA r=2", "flora", {"r": 2}, rates=_PEER_RATES),
    Variant("Houlsby adapter r=8", "houlsby", {"r": 8}, rates=_ADAPTER_RATES),
    Variant("Pfeiffer adapter r=16", "pfeiffer", {"r": 16}, rates=_ADAPTER_RATES),
    Variant("parallel adapter r=1", "parallel_adapter", {"r": 1}, rates=_PEER_RATES),
    Variant("SSL", "ssl", rates=_SCALE_RATES),
    Variant("SSB", "ssb", rates=_SCALE_RATES),
    Variant("SAM-PARSER", "sam_parser", rates=_PEER_RATES),
    Variant("SSB + DCFT d=8", "ssb_dcft", _DCFT, rates=_PEER_RATES),
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
    **settings: Any,
) -> Study:
    return Study(
        name, question, variants, tasks, _SEEDS, replace(_SETTINGS, **settings), paired=paired
    )


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
            "peers",
            "How well do other parameter-efficient methods do, at equal steps?",
            _PEERS,
            ("sst2",),
        ),
        _study(
            "initialization",
            "Which start and scaling learn fastest, at learning rates that suit LoRA?",
            tuple(
                replace(variant, label=f"{variant.label}, lr {rate:g}", rates=(rate,))
                for rate in _LOW_RANK_RATES
                for variant in (
                    _dcft("balanced"),
                    # Near sqrt(3 n): outputs move as far as LoRA's in the first step.
                    _dcft("balanced, alpha 34", alpha=34.0),
                    _dcft("zero", init="zero"),
                    _dcft("zero, alpha 4", init="zero", alpha=4.0),
                    _dcft("paper", init="paper"),
                    _dcft("paper, alpha 4", init="paper", alpha=4.0),
                    Variant("LoRA r=1", "lora", {"r": 1}),
                )
            ),
        ),
        _study(
            "kernel_size",
            "How does DCFT do with larger and smaller kernels (Table 4)?",
            _at_one_rate(
                tuple(_dcft(f"d={d}", kernel_size=d) for d in (2, 4, 6, 8, 12)), _ABLATION_RATE
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
                (_dcft("k=1"), *(_dcft(f"k={rank}", rank=rank) for rank in (2, 4, 8))),
                _ABLATION_RATE,
            ),
        ),
        _study(
            "orthogonality",
            "What does the orthogonality term do (equation 4, d=8, as published)?",
            _at_one_rate(
                tuple(
                    Variant(
                        f"k={rank}, weight {weight:g}",
                        "dcft",
                        {**_PAPER, "rank": rank, "alpha": 4.0 * rank, "orthogonality": weight},
                    )
                    for rank in (1, 4)
                    for weight in (0.0, 0.1)
                ),
                _ABLATION_RATE,
            ),
        ),
        _study(
            "budget",
            "DCFT or LoRA, at about LoRA's number of parameters?",
            _at_one_rate(
                (
                    Variant("LoRA r=1", "lora", {"r": 1}),
                    _dcft("DCFT d=2, k=2", kernel_size=2, rank=2),
                    _dcft("DCFT d=4, k=4", kernel_size=4, rank=4),
                    _dcft("DCFT d=8, k=7", rank=7),
                ),
                _ABLATION_RATE,
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
                Variant("DCFT d=8", "dcft", _DCFT, rates=(_ABLATION_RATE,)),
                Variant("LoRA r=1", "lora", {"r": 1}, rates=(_ABLATION_RATE,)),
            ),
            ("shakespeare",),
            1,
            Run(
                task="",
                method="",
                model=SMOLLM2,
                steps=20,
                batch_size=4,
                scored_size=16,
                evaluations=1,
            ),
        ),
    )
}
"""All studies by name."""
