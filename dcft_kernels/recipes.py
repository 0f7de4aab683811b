"""The training recipes of the DCFT paper (arXiv 2503.01419, appendix E) by name.

    recipe = recipes.glue("cola")
    config.cls_dropout = recipe.classifier_dropout  # DeBERTa's name for it
    swap_linear(model, **recipe.dcft_options())
    TrainingArguments(output_dir, **recipe.training_arguments())
    loss = loss + recipe.penalty(model)

The numbers are for DeBERTaV3-base. `dataclasses.replace(recipe, epochs=10)` makes another choice.

GLUE has two readings, because the headings of Table 9 contradict the authors' scripts
(github.com/Godz-z/DCFT, `COMMAND/run_debertav3_*.sh` at commit e18a8ff):

- `"scripts"`, the default, is what the scripts pass. The column "Dropout" is `reg_orth_coef`, the
  weight of the orthogonality term, and the column `γ` is `cls_dropout`, the dropout before the
  classifier. Nothing is dropped from the adapter's input. Where script and table have different
  numbers, the script's are taken:

      |                      | scripts     | Table 9      |
      | CoLA, learning rate  | 8e-4        | 5e-4         |
      | CoLA, "Dropout"      | 0.1         | 0.5          |
      | STS-B, "Dropout"     | 0.3         | 0.1          |
      | QNLI, learning rate  | 5e-4        | 1.2e-3       |
      | QNLI, batch, epochs  | 16, 5       | 32, 6        |
      | QQP, epochs          | 5           | 20           |

  The authors' scripts for RoBERTa-large differ further: they train SST-2 for 30 epochs, those for
  DeBERTaV3-base for 24, as the table.
- `"table"` is Table 9 with the headings as printed: "Dropout" is that of the adapter's input, `γ`,
  which the paper does not define, is recorded and read by nothing, and the weight of the
  orthogonality term is the published code's default, 0.1.

Where the paper is silent or doubtful:

- *Scaling.* The published code scales by `lora_alpha / r` with an `r` that is only a
  divisor: its factors have rank one regardless. So `r = 8` with `lora_alpha = 32` is `rank = 1`,
  `alpha = 4` here. No table prints `lora_alpha`. The scripts pass 32 for CoLA, MRPC, STS-B, QNLI
  and RTE, and 16, `alpha = 2`, for SST-2, QQP and MNLI; `"table"` and SQuAD have 4 throughout.
- *Table 10* calls SQuAD "AQuAD". Its columns `r` and `Epochs` read 10 and 25 for v1.1, 12 and 24
  for v2.0; AdaLoRA trains SQuAD for 10 and 12 epochs, so `r` may hold the epochs, and `Epochs` two
  numbers of Table 9. No script for SQuAD is published, so they are kept as printed:
  `dataclasses.replace(recipe, epochs=10)` trains as AdaLoRA does. `γ` is 0.1 in both rows,
  AdaLoRA's weight of the orthogonality term for SQuAD and the weight used here; it is not read as
  the classifier's dropout.
- *init_warmup, delta_T, t_f* are settings of AdaLoRA's rank allocation, which DCFT does not have:
  recorded, but nothing reads them. They do not warm up the learning rate.
- Schedules, warm-up, weight decay, lengths and seeds are in neither table and left to the trainer,
  though the scripts set some of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any, Literal, get_args

from torch import Tensor, nn

from dcft_kernels.constraints import ConstraintForm, constraint_loss
from dcft_kernels.validation import one_of

__all__ = ["Reading", "Recipe", "glue", "names", "squad"]

Reading = Literal["scripts", "table"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of Table 9 or 10; the module's docstring says how it is read."""

    name: str
    """The task, as printed; SQuAD's with its name."""
    learning_rate: float
    batch_size: int
    published_rank: int
    """The column `r`, a divisor of the scaling and no rank."""
    epochs: int
    dropout: float
    """Of the adapter's input."""
    gamma: float
    """The column `γ`, as printed; nothing reads it."""
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
    """Of `penalty`. The default is the published code's."""
    orthogonality_form: ConstraintForm = "published_code"
    classifier_dropout: float | None = None
    """Before the classifier, for the model's configuration; None is the model's own default.

    DeBERTa's configuration calls it `cls_dropout`, BERT's and RoBERTa's `classifier_dropout`. Set
    it as an attribute: `AutoConfig.from_pretrained(..., cls_dropout=0.1)` ignores it.
    """

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

# What the scripts pass where Table 9 has another number, or, for alpha, none.
_SCRIPTS: dict[str, dict[str, Any]] = {
    "CoLA": {"learning_rate": 8e-4, "orthogonality_weight": 0.1},
    "SST-2": {"alpha": 2.0},
    "QQP": {"epochs": 5, "alpha": 2.0},
    "STS-B": {"orthogonality_weight": 0.3},
    "MNLI": {"alpha": 2.0},
    "QNLI": {"learning_rate": 5e-4, "batch_size": 16, "epochs": 5},
}

# Table 10, which has no dropout: learning rate, batch size, r, epochs, 0, γ, init_warmup, ΔT, t_f.
_TABLE_10: dict[str, tuple[float, int, int, int, float, float, int, int, int]] = {
    "v1.1": (1e-3, 16, 10, 25, 0.0, 0.1, 5000, 100, 25000),
    "v2.0": (1e-3, 16, 12, 24, 0.0, 0.1, 5000, 100, 50000),
}


def glue(task: str, reading: Reading = "scripts") -> Recipe:
    """The recipe of a GLUE task: the authors' script, or Table 9.

    Args:
        task: its name in any case, with or without a hyphen: `"SST-2"`, `"sst2"`.
        reading: `"scripts"`, what the authors' scripts pass, or `"table"`, Table 9 with its
            headings as printed; the module's docstring lists the differences.

    Raises:
        TypeError: `task` is not a string.
        ValueError: an unknown task or reading; the known ones are listed.
    """
    name = _lookup("task", task, {name: [name] for name in _TABLE_9})
    printed = Recipe(name, *_TABLE_9[name])
    if one_of("reading", reading, get_args(Reading)) == "table":
        return printed
    passed = {
        "dropout": 0.0,
        "orthogonality_weight": printed.dropout,
        "classifier_dropout": printed.gamma,
    }
    return dataclasses.replace(printed, **(passed | _SCRIPTS.get(name, {})))


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
