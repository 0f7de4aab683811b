"""Stored rows by case, and what providers are called in reports."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import Row
from benchmarks.speed.cases import Case
from benchmarks.speed.methods.table import KERNEL_SIZE, RANK
from benchmarks.speed.provider import BASELINE

CLOCKS = ("device", "wall", "graph", "host")
"""Of a GPU, the usual one first; see benchmarks/README.md."""

# In the order of reports. Other providers follow under the names that they are stored with.
LABELS = {
    "frozen": "frozen nn.Linear",
    "frozen_compiled": "frozen, compiled",
    "copy": "copy",
    "dcft": "DCFT",
    "dcft_compiled": "DCFT, compiled",
    "dcft_in_place": "DCFT, in place",
    "dcft_row_block": "DCFT, row_block",
    "dcft_torch": "DCFT, torch",
    "published": "DCFT as published",
    "published_merged": "DCFT as published, W + DW",
    "lora_r1": "LoRA r=1 (peft)",
    "lora_r8": "LoRA r=8 (peft)",
    "lora_r16": "LoRA r=16 (peft)",
    "lora_r8_16bit": "LoRA r=8 (peft), 16-bit factors",
    "lora_by_hand": "LoRA r=8 by hand",
    "lokr": "LoKr r=4 (peft)",
    "miss": "MiSS r=8 (peft)",
    "dora": "DoRA r=8 (peft)",
    "full": "full fine-tuning",
    "base_added": "base products, added",
}
_PLACES = {name: place for place, name in enumerate(LABELS)}


def label(row: Row) -> str:
    """`DCFT`, or `DCFT, k=4` where its sizes are not the defaults."""
    return ", ".join([LABELS.get(row.provider, row.provider), *unusual_sizes(row)])


def unusual_sizes(row: Row) -> list[str]:
    """In what a DCFT differs from rank 1 and kernel size 8 without overlap."""
    if row.stride is None:  # not a DCFT
        return []
    parts = [f"k={row.k}"] if row.k != RANK else []
    parts += [f"d={row.d}"] if row.d != KERNEL_SIZE else []
    return parts + ([f"stride={row.stride}"] if row.stride != row.d else [])


def order(row: Row) -> tuple[int, str, int, int, int]:
    """A sort key: providers as in `LABELS`, variants by size."""
    place = _PLACES.get(row.provider, len(_PLACES))
    return (place, row.provider, row.k or 0, row.d or 0, row.stride or 0)


def ratio(row: Row | None, clock: str | None = None) -> float | None:
    """The ratio to the frozen layer by one of `CLOCKS`, or the usual one."""
    if row is None:
        return None
    value: float | None = row.ratio if clock is None else getattr(row, f"ratio_to_frozen_{clock}")
    return value


def milliseconds(row: Row | None, clock: str | None = None) -> float | None:
    """The median by a clock, or the usual one."""
    if row is None:
        return None
    value: float | None = row.milliseconds if clock is None else getattr(row, f"{clock}_ms_p50")
    return value


@dataclass(frozen=True)
class Group:
    """The rows of one case, which were measured together."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """For what all rows of a case have in common."""
        return self.rows[0]

    @property
    def name(self) -> str:
        """`2048x768->768 fp32`."""
        row = self.first
        case = Case(row.level, row.T, row.n, row.m, row.dtype, row.direction, row.model)
        return f"{case.shape} {row.dtype}"

    @property
    def size(self) -> tuple[int, ...]:
        """A sort key: how much there is to compute."""
        T, n, m = (size or 0 for size in self.first.shape)
        return ((T or 1) * n * m, T, n, m)

    @property
    def rounds(self) -> int:
        """Of the provider that has most."""
        return max(row.rounds for row in self.rows)

    def of(self, provider: str) -> Row | None:
        """The row of a provider at its default sizes."""
        found = (r for r in self.rows if r.provider == provider and not unusual_sizes(r))
        return next(found, None)

    def ratio(self, provider: str, clock: str | None = None) -> float | None:
        """A provider's ratio to the frozen layer."""
        return ratio(self.of(provider), clock)

    def frozen_ms(self, clock: str | None = None) -> float | None:
        """The frozen layer's median."""
        return milliseconds(self.of(BASELINE), clock)


@dataclass(frozen=True)
class Stored:
    """The latest rows of every case in a device's folder."""

    folder: Path
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        return ", ".join(_distinct(row.device for row in self.rows))

    @property
    def gpu(self) -> bool:
        """Whether there is a device clock."""
        return any(row.device_ms_p50 is not None for row in self.rows)

    @property
    def clocks(self) -> tuple[str, ...]:
        """The clocks that ratios are reported by, the usual one first."""
        return CLOCKS if self.gpu else ("wall",)

    def groups(
        self,
        level: str,
        *,
        sweeps: Collection[str] | None = None,
        direction: str | None = None,
        where: Callable[[Row], bool] = lambda row: True,
    ) -> list[Group]:
        """Cases of a level, by dtype in the order of the file, then by size."""
        cases: dict[tuple[object, ...], list[Row]] = {}
        dtypes: dict[str, int] = {}
        for row in self.rows:
            if row.level != level or (sweeps is not None and row.sweep not in sweeps):
                continue
            if (direction is not None and row.direction != direction) or not where(row):
                continue
            dtypes.setdefault(row.dtype, len(dtypes))
            key = (row.sweep, row.model, row.direction, row.dtype, row.shape)
            cases.setdefault(key, []).append(row)
        found = [Group(tuple(sorted(together, key=order))) for together in cases.values()]
        return sorted(found, key=lambda g: (dtypes[g.first.dtype], g.size))

    def layers(self) -> list[Group]:
        """The main cases of a layer, forward and backward."""
        return self.groups("layer", sweeps=("main", "asked"), direction="fwd+bwd")

    def directions(self, level: str) -> list[str]:
        """The directions that a level has rows of, whole passes first."""
        present = dict.fromkeys(row.direction for row in self.rows if row.level == level)
        return sorted(present, key=lambda name: "+" not in name)


def load(folder: Path) -> Stored:
    """The rows of a folder.

    Raises:
        ValueError: there are none, or a line is not a row.
    """
    file = folder / rows.FILE
    if not file.is_file():
        raise ValueError(f"{file}: no such file; `python -m benchmarks --out {folder}` measures")
    found = rows.read(file)
    if not found:
        raise ValueError(f"{file}: expected rows, and there are none")
    return Stored(folder, tuple(rows.latest(found)))


def provenance(found: Sequence[Row]) -> str:
    """Hardware, versions, commits and days of some rows, in a line."""
    parts = [", ".join(_distinct(row.device for row in found))]
    for package in ("torch", "triton", "peft", "commit"):
        versions = _distinct(getattr(row, package) for row in found)
        if versions:
            parts.append(f"{package} {', '.join(versions)}")
    return "; ".join([*parts, ", ".join(_distinct(row.time[:10] for row in found))])


def _distinct(values: Iterable[str | None]) -> list[str]:
    return sorted({value for value in values if value is not None})
