"""Stored rows by case, and what providers are called in reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import Row
from benchmarks.speed.cases import Case
from benchmarks.speed.methods.table import KERNEL_SIZE, RANK, STRATEGIES

CLOCKS = ("device", "wall", "graph", "host")
"""Of a GPU, the usual one first; see benchmarks/README.md."""

MAIN_SWEEPS = ("main", "asked")
"""Sweeps of separate cases, in contrast to those that vary one size."""

# In the order of reports. Other providers follow under the names that they are stored with.
LABELS = {
    "frozen": "frozen nn.Linear",
    "frozen_forward": "frozen nn.Linear, forward",
    "frozen_backward": "frozen nn.Linear, backward",
    "frozen_compiled": "frozen, compiled",
    "copy": "copy",
    "dcft": "DCFT",
    "dcft_compiled": "DCFT, compiled",
    "dcft_in_place": "DCFT, in place",
    **{f"dcft_{name}": f"DCFT, {name}" for name in STRATEGIES},
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
    "base_added_forward": "base product, added, forward",
    "base_added_backward": "base product, added, backward",
}
_PLACES = {name: place for place, name in enumerate(LABELS)}


def label(row: Row) -> str:
    """`DCFT`, or `DCFT, k=4` where its sizes are not the defaults."""
    return ", ".join([LABELS.get(row.provider, row.provider), *unusual_sizes(row)])


def unusual_sizes(row: Row) -> list[str]:
    """Where a DCFT differs from rank 1 and kernel size 8 without overlap."""
    if row.stride is None:  # not a DCFT
        return []
    parts = [f"k={row.k}"] if row.k != RANK else []
    parts += [f"d={row.d}"] if row.d != KERNEL_SIZE else []
    return parts + ([f"stride={row.stride}"] if row.stride != row.d else [])


def order(row: Row) -> tuple[int, str, int, int, int]:
    """A sort key: providers as in `LABELS`, variants by size."""
    place = _PLACES.get(row.provider, len(_PLACES))
    return (place, row.provider, row.k or 0, row.d or 0, row.stride or 0)


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
    def size(self) -> int:
        """A sort key: how much there is to compute."""
        T, n, m = (size or 1 for size in self.first.shape)
        return T * n * m

    @property
    def rounds(self) -> int:
        """Of the provider that has most."""
        return max(row.rounds for row in self.rows)

    def of(self, provider: str) -> Row | None:
        """The row of a provider at its default sizes."""
        found = (r for r in self.rows if r.provider == provider and not unusual_sizes(r))
        return next(found, None)


@dataclass(frozen=True)
class StoredRows:
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

    def cases(self, level: str) -> list[tuple[str, str]]:
        """The directions and sweeps that a level has rows of."""
        return list(dict.fromkeys((r.direction, r.sweep) for r in self.rows if r.level == level))

    def groups(self, level: str, sweep: str, direction: str = "fwd+bwd") -> list[Group]:
        """The cases of a level, by dtype in the order of the file, then by size."""
        cases: dict[tuple[object, ...], list[Row]] = {}
        dtypes: dict[str, int] = {}
        for row in self.rows:
            if (row.level, row.sweep, row.direction) == (level, sweep, direction):
                dtypes.setdefault(row.dtype, len(dtypes))
                case = (row.model, row.dtype, row.shape, row.threads, row.neighbour)
                cases.setdefault(case, []).append(row)
        found = [Group(tuple(sorted(together, key=order))) for together in cases.values()]
        return sorted(found, key=lambda g: (dtypes[g.first.dtype], g.size))

    def layers(self) -> list[Group]:
        """The main cases of a layer, forward and backward."""
        return [group for sweep in MAIN_SWEEPS for group in self.groups("layer", sweep)]


def load(folder: Path) -> StoredRows:
    """The rows of a folder.

    Raises:
        ValueError: there are none, or a line is not a row.
    """
    file = folder / rows.ROWS_FILE
    if not file.is_file():
        raise ValueError(f"{file}: no such file; `python -m benchmarks --out {folder}` measures")
    found = rows.read(file)
    if not found:
        raise ValueError(f"{file}: expected rows, and there are none")
    return StoredRows(folder, tuple(rows.latest(found)))


def provenance(found: Sequence[Row]) -> str:
    """Hardware, versions, commits and days of some rows, in a line."""
    parts = [", ".join(_distinct(row.device for row in found))]
    processors = _distinct(row.processor for row in found)
    parts += [f"processor {', '.join(processors)}"] if processors else []
    bf16 = {True: "bf16 instructions", False: "no bf16 instructions"}
    parts += [text for has, text in bf16.items() if any(row.native_bf16 is has for row in found)]
    for package in ("torch", "triton", "peft", "commit"):
        versions = _distinct(getattr(row, package) for row in found)
        if versions:
            parts.append(f"{package} {', '.join(versions)}")
    return "; ".join([*parts, ", ".join(_distinct(row.time[:10] for row in found))])


def _distinct(values: Iterable[str | None]) -> list[str]:
    return sorted({value for value in values if value is not None})
