"""The offline tuner: measures tiles on a GPU and writes the faster ones into `tiles.json`.

    python -m benchmarks.tune [--only 'backward bf16'] [--budget SECONDS]
    TRITON_INTERPRET=1 python -m benchmarks.tune --dry-run --table COPY     # on a CPU

For every kernel, dtype and class of columns it climbs from the table's tile: neighbours of the best
tile so far, with one or two fields changed, are compiled, checked against PyTorch on every shape,
and timed against the best one in interleaved rounds by the benchmarks' own engine. A neighbour wins
if its ratio to the best tile in the same round, as the geometric mean over the shapes, is below
0.98 in four rounds of five. Every measurement is a row of `tune.jsonl`, whose provider is the tile.

The most valuable entries come first, so a run that the budget cuts off keeps what matters.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks import environment, rows
from benchmarks.__main__ import results_folder
from benchmarks.speed.cases import DTYPES, Case
from benchmarks.speed.levels.kernel import ADAPTERS, KERNELS, KernelProblem, LaunchStep
from benchmarks.speed.measure import measure
from benchmarks.speed.provider import Provider, Workload
from benchmarks.speed.timing import Plan
from dcft_kernels.triton import tiles
from dcft_kernels.triton.tiles import Tile

TUNE_FILE = "tune.jsonl"
Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]
Shape = tuple[int, int, int]

# The fields of a tile that a kernel has a use for.
_FIELDS = {
    "shrink_expand": ("tokens", "features", "warps", "stages"),
    "backward": ("tokens", "features", "programs", "warps", "stages"),
    "expand": ("tokens", "outputs", "warps"),
    "gemm": ("outputs", "warps", "stages"),
    "shrink": ("tokens", "warps"),
    "shrink_backward": ("tokens", "programs", "warps"),
}
# Sizes and warps double or halve, the others change by one, between these bounds.
_BOUNDS = {
    "tokens": (16, 256),
    "features": (16, 256),
    "outputs": (16, 256),
    "programs": (1, 8),
    "warps": (2, 16),
    "stages": (1, 5),
}
_BOUNDS_OF = {
    # The smallest layers that it takes have four steps, which are all in flight with five stages.
    "gemm": {"outputs": (128, 256), "warps": (4, 8), "stages": (2, 5)},
    "shrink": {"tokens": (1, 16), "warps": (1, 16)},
    "shrink_backward": {"tokens": (1, 16), "warps": (1, 16)},
}
_BY_ONE = ("programs", "stages")
_SIZES = ("tokens", "features", "outputs")

# Kernels whose entries are for a row's products: a feature's are as many as the rank.
_PASSES = ("shrink", "shrink_backward")
# Kernels that take fewer rows for few tokens.
_HALVE_ROWS = ("backward", "shrink_expand", *_PASSES)

_WIN = 0.98  # a smaller gain is noise


class Settings(NamedTuple):
    """How much a run does."""

    shapes: tuple[Shape, ...] = ((8192, 4096, 4096), (4096, 768, 768), (2048, 4096, 14336))
    plan: Plan = Plan(budget_s=5.0, max_rounds=15, footprint=False)
    steps: int = 3  # of a climb
    most_neighbours: int | None = None


_DRY = Settings(((20, 32, 48),), Plan(budget_s=0.0, footprint=False), 1, 1)


class Job(NamedTuple):
    """One entry of the table."""

    kernel: str
    dtype: str
    columns: int  # the most that the entry is for
    classes: tuple[int, ...]  # the keys of ADAPTERS that the entry is for
    least: int = 0  # columns of the entry before

    @property
    def itemsize(self) -> str:
        """The key of the entry's row in the table."""
        return str(DTYPES[self.dtype].itemsize)

    def shapes(self, usual: Sequence[Shape]) -> Sequence[Shape]:
        """Those of the usual shapes that the entry is for, or one with as long rows as it takes."""
        if self.kernel not in _PASSES:
            return usual
        side = 1 if self.kernel == "shrink" else 2  # whose rows it reads: of x or of g
        found = [shape for shape in usual if self.least < shape[side] <= self.columns]
        tokens, other = max(shape[0] for shape in usual), min(shape[1] for shape in usual)
        n, m = (self.columns, other) if side == 1 else (other, self.columns)
        return found or [(tokens, n, m)]

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} {self.columns}"


def read_table(path: Path) -> Table:
    """The tiles in a file."""
    table: Table = json.loads(path.read_text(encoding="utf-8"))
    return table


def store_tile(path: Path, job: Job, architecture: str, tile: Tile) -> None:
    """Change one entry of the table; the file is replaced as a whole."""
    table = read_table(path)
    table[architecture][job.kernel][job.itemsize][str(job.columns)] = list(tile)
    temporary = path.with_suffix(".partial")
    temporary.write_text(_format(table), encoding="utf-8")
    temporary.replace(path)


def _format(table: Table) -> str:
    """The text of `tiles.json`: a line for each kernel and size of an element."""
    architectures = []
    for architecture, kernels in table.items():
        blocks = []
        for kernel, sizes in kernels.items():
            lines = ",\n".join(f'      "{size}": {json.dumps(row)}' for size, row in sizes.items())
            blocks.append(f'    "{kernel}": {{\n{lines}\n    }}')
        architectures.append(f'  "{architecture}": {{\n' + ",\n".join(blocks) + "\n  }")
    return "{\n" + ",\n".join(architectures) + "\n}\n"


def jobs(table: Table, architecture: str, only: str = "") -> list[Job]:
    """Entries to tune: few columns first, then 16 bit, then in the order of the kernels."""
    found = []
    for kernel, dtype in itertools.product(KERNELS, ("bf16", "fp32")):
        row = table[architecture].get(kernel, {}).get(str(DTYPES[dtype].itemsize), {})
        least = 0
        for columns in sorted(map(int, row)):
            classes = tuple(c for c in ADAPTERS if least < c <= columns)
            if kernel in _PASSES:
                classes = (min(ADAPTERS),)
            elif kernel == "gemm":  # the others are of ranks that it does not take
                classes = classes[:1]
            found.append(Job(kernel, dtype, columns, classes, least))
            least = columns
    found.sort(key=lambda job: (job.classes[0], job.itemsize))
    return [job for job in found if re.search(only, str(job))]


def neighbours(kernel: str, tile: Tile) -> list[Tile]:
    """Tiles around one: a field changed, or two sizes in opposite directions, or size and warps."""
    changes: list[tuple[tuple[str, int], ...]] = [
        ((field, sign),) for field in _FIELDS[kernel] for sign in (1, -1)
    ]
    sizes = [field for field in _FIELDS[kernel] if field in _SIZES]
    changes += [((a, 1), (b, -1)) for a, b in itertools.permutations(sizes, 2)]
    changes += [((a, sign), ("warps", sign)) for a in sizes for sign in (1, -1)]
    found = []
    for change in changes:
        candidate = tile
        for field, sign in change:
            value = getattr(candidate, field)
            moved = value + sign if field in _BY_ONE else value * 2 if sign > 0 else value // 2
            candidate = candidate._replace(**{field: moved})
        bounds = _BOUNDS | _BOUNDS_OF.get(kernel, {})
        within = (bounds[f][0] <= getattr(candidate, f) <= bounds[f][1] for f, _ in change)
        if all(within):
            found.append(candidate)
    return list(dict.fromkeys(found))


class TileStep(LaunchStep):
    """A kernel's launch with a tile."""

    def __init__(self, problem: KernelProblem, kernel: str, tile: Tile) -> None:
        super().__init__(problem, KERNELS[kernel](problem))
        self._kernel, self._tile = kernel, tile

    def run(self) -> None:
        with tiles.override(self._kernel, self._tile):
            super().run()


def workload(problem: KernelProblem, kernel: str, tile: Tile) -> Workload:
    """A tile's launch, checked with NaN in what the launcher allocates.

    Memory that another tile has just filled with the right results would hide what this one leaves
    unwritten.
    """
    step = TileStep(problem, kernel, tile)
    with _poisoned_allocations():
        step.prepare()
        step.run()
    wrong = step.check()
    if wrong is not None:
        raise ValueError(wrong)
    return Workload(step, step.check, graphable=False)


@contextlib.contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """NaN in what `torch.empty` returns."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


Times = dict[Tile, list[float]]  # seconds by round, of the tiles that run and are right


class Tuner:
    """Measures tiles on a device, by the entries of a table."""

    def __init__(self, device: torch.device, settings: Settings, table: Path, file: Path) -> None:
        self.device, self.settings, self.table, self.file = device, settings, table, file
        self.architecture = tiles.architecture(device)

    def times(self, job: Job, shape: Shape, columns: int, chosen: Sequence[Tile]) -> Times:
        """Seconds per launch; tiles that are the same for so many tokens share one measurement."""
        bucket = tiles.token_bucket(shape[0], self.device)
        same: dict[Tile, list[Tile]] = {}
        for tile in chosen:
            taken = tile.for_tokens(bucket) if job.kernel in _HALVE_ROWS else tile
            same.setdefault(taken, []).append(tile)
        timed = [alike[0] for alike in same.values()]
        case = Case("kernel", *shape, job.dtype, direction=job.kernel, sweep=f"{columns} columns")
        outcomes = measure(
            case,
            [
                Provider(
                    "-".join(map(str, tile)),
                    partial(workload, kernel=job.kernel, tile=tile),
                )
                for tile in timed
            ],
            lambda: KernelProblem(case, self.device, columns),
            environment.describe(self.device.type),
            self.settings.plan,
            device=self.device,
            record=lambda row: rows.append(self.file, row),
        )
        return {
            tile: [sample.device or sample.wall for sample in outcome.samples]
            for alike, outcome in zip(same.values(), outcomes, strict=True)
            for tile in alike
            if outcome.samples
        }

    def climb(self, job: Job) -> tuple[Tile, Tile, float]:
        """The table's tile, the best one found from there, and their ratio.

        Raises:
            RuntimeError: the table's own tile is wrong.
        """
        row = read_table(self.table)[self.architecture][job.kernel][job.itemsize]
        first = best = Tile(*row[str(job.columns)])
        tried, ratio = {best}, 1.0
        shapes = job.shapes(self.settings.shapes)
        for _ in range(self.settings.steps):
            new = [tile for tile in neighbours(job.kernel, best) if tile not in tried]
            right = [best, *new[: self.settings.most_neighbours]]
            tried |= set(right)
            times = []
            # The widest adapter that the entry is for comes first: it must run, however fast.
            widest = [(min(shapes), job.classes[-1])] if len(job.classes) > 1 else []
            for shape, columns in [*widest, *((shape, job.classes[0]) for shape in shapes)]:
                times.append(self.times(job, shape, columns, right))
                right = list(times[-1])
            if best not in right:
                raise RuntimeError(f"the table's tile {list(best)} fails, see {self.file}")
            times = times[len(widest) :]
            by_round = {tile: ratios(times, tile, best) for tile in right if tile != best}
            won = [tile for tile, values in by_round.items() if wins(values)]
            if not won:
                break
            best = min(won, key=lambda tile: statistics.median(by_round[tile]))
            ratio *= statistics.median(by_round[best])
        return first, best, ratio


def ratios(times: Sequence[Times], tile: Tile, best: Tile) -> list[float]:
    """A tile's ratio to the best one by round: the geometric mean over the shapes."""
    by_shape = [
        [a / b for a, b in zip(of_shape[tile], of_shape[best], strict=True)] for of_shape in times
    ]
    return [math.exp(statistics.fmean(map(math.log, r))) for r in zip(*by_shape, strict=False)]


def wins(by_round: Sequence[float]) -> bool:
    """Whether a tile is faster by more than noise: in four rounds of five."""
    return sorted(by_round)[math.ceil(0.8 * len(by_round)) - 1] < _WIN


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tuner; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description="Measure tiles on a GPU."
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help=f"for {TUNE_FILE} (benchmarks/results/<device>)")
    add("--only", default="", metavar="REGEX", help="over entries such as 'backward bf16 16'")
    add("--budget", type=float, default=480.0, metavar="SECONDS", help="start no entry after this")
    add("--table", type=Path, default=tiles.TABLE, metavar="FILE", help="the tiles to change")
    add("--dry-run", action="store_true", help="tiny, on a CPU; needs another --table")
    options = parser.parse_args(arguments)
    dry = options.dry_run
    if dry and not triton.knobs.runtime.interpret:
        parser.error("--dry-run: needs TRITON_INTERPRET=1 in the environment")
    if not dry and not torch.cuda.is_available():
        parser.error("no GPU: PyTorch finds none; --dry-run runs on a CPU")
    if not options.table.exists():
        shutil.copyfile(tiles.TABLE, options.table)
    if dry and options.table.samefile(tiles.TABLE):
        parser.error("--table: a dry run must not change the package's own")
    device = torch.device("cpu" if dry else "cuda")
    settings = _DRY if dry else Settings()
    file = results_folder(options.out, device.type, tiny=dry) / TUNE_FILE
    tuner = Tuner(device, settings, options.table, file)
    failures = 0
    start = time.monotonic()
    for job in jobs(read_table(options.table), tuner.architecture, options.only):
        if time.monotonic() - start > options.budget:
            print(f"{job}: not tuned, the budget is spent")
            continue
        try:
            first, best, ratio = tuner.climb(job)
        except Exception as error:  # the next entry may do better
            failures += 1
            print(f"{job}: failed: {error}", file=sys.stderr)
            continue
        if best == first:
            print(f"{job}: {list(first)} stays", flush=True)
        else:
            store_tile(options.table, job, tuner.architecture, best)
            print(f"{job}: {list(first)} -> {list(best)}, {ratio:.2f} of the time", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
