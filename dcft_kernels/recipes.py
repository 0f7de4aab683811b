"""The training recipes of the DCFT paper (arXiv 2503.01419, appendix E, Tables 9 and 10) by name.

    recipe = recipes.glue("cola")
    swap_linear(model, **recipe.dcft_options())
    TrainingArguments(output_dir, **recipe.training_arguments())
    loss = loss + recipe.penalty(model)

The numbers are as printed, for DeBERTaV3-base. Where the tables are incomplete, or contradict
other published material, is listed here; `dataclasses.replace(recipe, dropout=0.0)` makes
another choice.

- *Scaling.* The published code scales by `lora_alpha / r` with an `r` that is only a
  divisor: its factors have rank one regardless. So `r = 8` with `lora_alpha = 32` is `rank = 1`,
  `alpha = 4` here. No table prints `lora_alpha`: 32 is what the published scripts pass for CoLA,
  MRPC, STS-B, QNLI and RTE; those for SST-2, QQP and MNLI pass 16, which would be `alpha = 2`.
- *gamma.* Tables 9 and 10 have a column `γ` that the paper does not define. In AdaLoRA, whose code
  and tables these come from, γ is the weight of the orthogonality term; but in Table 9 it is, in
  all eight rows, what AdaLoRA's scripts and DCFT's own pass as `cls_dropout`, the classifier's,
  while the column "Dropout" is, in six of eight (CoLA and STS-B differ), what they pass as the
  weight of the orthogonality term. The two headings may well be exchanged. Here both columns are
  what their headings say: `dropout` is the adapter's, for which no published script sets anything,
  and `gamma` is recorded and read by nothing. The term's weight is the published code's default,
  0.1, which the scripts pass too, except for RTE and STS-B (0.3).
- *Table 10* calls SQuAD "AQuAD". Its columns `r` and `Epochs` read 10 and 25 for v1.1, 12 and 24
  for v2.0; AdaLoRA trains SQuAD for 10 and 12 epochs, so `r` may hold the epochs, and `Epochs` two
  numbers of Table 9. They are kept as printed: `dataclasses.replace(recipe, epochs=10)` trains as
  AdaLoRA does. The scaling is Table 9's, since no script for SQuAD is published.
- *Table 9* is not always what the published scripts pass: for CoLA a learning rate of 8e-4; for
  QNLI one of 5e-4, a batch of 16 and 5 epochs; for QQP 5 epochs.
- *init_warmup, delta_T, t_f* are settings of AdaLoRA's rank allocation, which DCFT does not have:
  recorded, but nothing reads them. They do not warm up the learning rate.
- Schedules, warm-up, weight decay, lengths and seeds are in neither table and left to the trainer.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from torch import Tensor, nn

from dcft_kernels.constraints import ConstraintForm, constraint_loss

__all__ = ["Recipe", "glue", "names", "squad"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of Table 9 or 10; what is doubtful about it is in the module's docstring."""

    name: str
    """The task, as printed; SQuAD's with its name."""
    learning_rate: float
    batch_size: int
    published_rank: int
    """The column `r`, a divisor of the scaling and no rank."""
    epochs: int
    dropout: float
    """Of the adapter's input: Table 9's column "Dropout"; Table 10 has none, so 0."""
    gamma: float
    """The column `γ`, as printed and undefined; nothing reads it."""
    init_warmup: int
    """Of AdaLoRA; nothing reads it."""
    delta_T: int
    """Of AdaLoRA; nothing reads it."""
    t_f: int | None = None
    """Of AdaLoRA; nothing reads it. Table 9 has no such column."""
    alpha: float = 4.0
    """`scaling * rank`: 32 / 8 in the published code's terms, for a product of rank one."""
    rank: int = 1
    init: str = "paper"
    orthogonality_weight: float = 0.1
    """Of the regulariser: the published code's, not a column of the tables."""
    orthogonality_form: ConstraintForm = "published_code"

    def dcft_options(self) -> dict[str, Any]:
        """Keywords for `swap_linear` and `DCFTLinear`; the kernel size is a choice left open."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "init": self.init,
        }

    def training_arguments(self) -> dict[str, Any]:
        """Keywords for `transformers.TrainingArguments`, version 5.0 or newer.

        The batch is of one device: on several, or with accumulated gradients, divide it by their
        number for the published one.
        """
        return {
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
        }

    def penalty(self, model: nn.Module) -> Tensor:
        """The regulariser (equation 4, as the published code has it) times its weight.

        A scalar to add to the task's loss in every step; see `constraint_loss`.

        Raises:
            TypeError: `model` is not a module.
            ValueError: `model` has no adapters.
        """
        return self.orthogonality_weight * constraint_loss(
            model, "orthogonal", self.orthogonality_form
        )


# Table 9: learning rate, batch size, r, epochs, dropout, γ, init_warmup, ΔT.
_TABLE_9: dict[str, tuple[float, int, int, int, float, float, int, int]] = {
    "CoLA": (5e-4, 32, 8, 25, 0.5, 0.1, 800, 10),
    "SST-2": (8e-4, 32, 8, 24, 0.1, 0.0, 6000, 100),
    "MRPC": (1e-3, 32, 8, 30, 0.1, 0.0, 600, 1),
    "QQP": (8e-4, 32, 8, 20, 0.1, 0.15, 8000, 100),
    "STS-B": (2.2e-3, 32, 8, 25, 0.1, 0.2, 800, 10),
    "MNLI": (5e-4, 32, 8, 7, 0.1, 0.15, 8000, 100),
    "QNLI": (1.2e-3, 32, 8, 6, 0.1, 0.1, 2000, 100),
    "RTE": (1.2e-3, 32, 8, 50, 0.3, 0.2, 600, 1),
}

# Table 10, which has no dropout: learning rate, batch size, r, epochs, 0, γ, init_warmup, ΔT, t_f.
_TABLE_10: dict[str, tuple[float, int, int, int, float, float, int, int, int]] = {
    "v1.1": (1e-3, 16, 10, 25, 0.0, 0.1, 5000, 100, 25000),
    "v2.0": (1e-3, 16, 12, 24, 0.0, 0.1, 5000, 100, 50000),
}


def glue(task: str) -> Recipe:
    """The recipe of a GLUE task, Table 9.

    Args:
        task: its name in any case, with or without a hyphen: `"SST-2"`, `"sst2"`.

    Raises:
        TypeError: `task` is not a string.
        ValueError: a task that the table does not have; those it has are listed.
    """
    name = _lookup("task", task, {name: [name] for name in _TABLE_9})
    return Recipe(name, *_TABLE_9[name])


def squad(version: str) -> Recipe:
    """The recipe of SQuAD, Table 10, whose epochs are doubtful: see the module's docstring.

    Args:
        version: `"v1.1"` or `"v2.0"`; the `v` may be left out.

    Raises:
        TypeError: `version` is not a string.
        ValueError: another version.
    """
    name = _lookup("version", version, {name: [name, name[1:]] for name in _TABLE_10})
    return Recipe(f"SQuAD {name}", *_TABLE_10[name])


def names() -> dict[str, tuple[str, ...]]:
    """The known names, by the function that takes them."""
    return {"glue": tuple(_TABLE_9), "squad": tuple(_TABLE_10)}


def _lookup(argument: str, given: Any, spellings: dict[str, list[str]]) -> str:
    """The name that `given` is a spelling of, letters and digits alone being compared."""
    if not isinstance(given, str):
        raise TypeError(f"{argument}: expected a name, got {given!r}")
    known = {_key(text): name for name, texts in spellings.items() for text in texts}
    if _key(given) in known:
        return known[_key(given)]
    near = difflib.get_close_matches(_key(given), known, n=1, cutoff=0.5)
    hint = f"; did you mean {known[near[0]]!r}?" if near else ""
    raise ValueError(
        f"{argument}: expected one of {', '.join(map(repr, spellings))}, got {given!r}{hint}"
    )


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
