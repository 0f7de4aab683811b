"""The offline tuner: measures tiles on a GPU and writes the faster ones into `tiles.json`.

    python -m benchmarks.tune [--kernels backward ...] [--dtypes bf16 ...] [--budget SECONDS]
    TRITON_INTERPRET=1 python -m benchmarks.tune --dry-run      # tiny, on a CPU, into a copy

For every kernel, dtype and class of columns it climbs from the table's tile: neighbours of the best
tile so far, with one or two fields changed, are compiled, checked against PyTorch on every shape,
and timed against the best one in interleaved rounds, with the L2 cache flushed before each launch.
A neighbour wins if its ratio to the best tile in the same round, as the geometric mean over the
shapes, is below 0.98 in four rounds of five. Every measurement is a line of `tune.jsonl`.

The most valuable entries come first, so a run that the budget cuts off keeps what matters.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from benchmarks import environment
from benchmarks.rows import append_line
from benchmarks.speed.cases import Case
from benchmarks.speed.gate import check_against_peer
from benchmarks.speed.levels.kernel import ADAPTERS, KERNELS, KernelProblem, LaunchStep
from benchmarks.speed.timing import Plan, paired_rounds, percentiles, stopwatch_for
from dcft_kernels.triton import tiles
from dcft_kernels.triton.tiles import Tile

FILE = "tune.jsonl"
Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]
Shape = tuple[int, int, int]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES: tuple[Shape, ...] = ((8192, 4096, 4096), (4096, 768, 768), (2048, 4096, 14336))
DRY_SHAPES: tuple[Shape, ...] = ((20, 32, 48),)

# The fields of a tile, as they stand in the table, that a kernel has a use for.
_COLUMNS = ("tokens", "features", "outputs", "programs", "warps", "stages")
_FIELDS = {
    "shrink_expand": ("tokens", "features", "warps", "stages"),
    "backward": ("tokens", "features", "programs", "warps", "stages"),
    "expand": ("tokens", "outputs", "warps"),
    "expand_backward": ("tokens", "features", "programs", "warps", "stages"),
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
_BY_ONE = ("programs", "stages")
_SIZES = ("tokens", "features", "outputs")

_WIN = 0.98  # a smaller gain is noise
_ROUNDS = 15
_STEPS = 3  # of the climb


def row_of(tile: Tile) -> list[int]:
    """A tile as it stands in the table."""
    return [getattr(tile, column) for column in _COLUMNS]


def format_table(table: Table) -> str:
    """The text of `tiles.json`: a line for each kernel and size of an element."""
    architectures = []
    for architecture, kernels in table.items():
        blocks = []
        for kernel, sizes in kernels.items():
            rows = ",\n".join(f'      "{size}": {json.dumps(row)}' for size, row in sizes.items())
            blocks.append(f'    "{kernel}": {{\n{rows}\n    }}')
        architectures.append(f'  "{architecture}": {{\n' + ",\n".join(blocks) + "\n  }")
    return "{\n" + ",\n".join(architectures) + "\n}\n"


def read_table(path: Path) -> Table:
    """The tiles in a file."""
    table: Table = json.loads(path.read_text(encoding="utf-8"))
    return table


class Job(NamedTuple):
    """One entry of the table."""

    kernel: str
    dtype: torch.dtype
    columns: int  # the most that the entry is for
    classes: tuple[int, ...]  # the keys of ADAPTERS that the entry is for

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {dtype} {self.columns}"


def store_tile(path: Path, job: Job, architecture: str, tile: Tile) -> None:
    """Change one entry of the table; the file is replaced as a whole."""
    table = read_table(path)
    table[architecture][job.kernel][str(job.dtype.itemsize)][str(job.columns)] = row_of(tile)
    temporary = path.with_suffix(".partial")
    temporary.write_text(format_table(table), encoding="utf-8")
    temporary.replace(path)


def jobs(
    table: Table, architecture: str, kernels: Sequence[str], dtypes: Sequence[torch.dtype]
) -> list[Job]:
    """All entries to tune: few columns first, then 16 bit, then in the order of the kernels."""
    found = []
    for kernel, dtype in itertools.product(kernels, dtypes):
        row = table[architecture][kernel].get(str(dtype.itemsize), {})
        least = 0
        for columns in sorted(map(int, row)):
            classes = tuple(c for c in ADAPTERS if least < c <= columns)
            found.append(Job(kernel, dtype, columns, classes))
            least = columns
    return sorted(found, key=lambda job: (job.classes[0], job.dtype.itemsize))


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
            low, high = _BOUNDS[field]
            if not low <= moved <= high:
                break
            candidate = candidate._replace(**{field: moved})
        else:
            found.append(candidate)
    return list(dict.fromkeys(found))


class Run(NamedTuple):
    """What all measurements of a run share."""

    device: torch.device
    architecture: str
    shapes: tuple[Shape, ...]
    plan: Plan
    steps: int
    most_neighbours: int | None
    deadline: float
    table: Path
    rows: Path

    def over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self.deadline

    def record(self, job: Job, **values: Any) -> None:
        """Store a row."""
        described = vars(environment.describe(self.device.type))
        dtype = str(job.dtype).removeprefix("torch.")
        row = {"kernel": job.kernel, "dtype": dtype, "columns": job.columns, **values}
        append_line(self.rows, row | {"architecture": self.architecture} | described)


class TileStep(LaunchStep):
    """A kernel's launch with a tile."""

    def __init__(self, kernel: str, problem: KernelProblem, tile: Tile) -> None:
        super().__init__(KERNELS[kernel](problem))
        self._kernel, self._tile = kernel, tile

    def run(self) -> None:
        with tiles.override(self._kernel, self._tile):
            super().run()


class Checked:
    """A kernel on a problem, and what it has to compute."""

    def __init__(self, kernel: str, problem: KernelProblem) -> None:
        self.kernel, self.problem = kernel, problem
        call = KERNELS[kernel](problem)
        self._truth, self._peer = call.expected(torch.float64), call.expected(problem.dtype)

    def why_wrong(self, tile: Tile) -> str | None:
        """Why the kernel cannot run with a tile, or is wrong with it."""
        step = TileStep(self.kernel, self.problem, tile)
        try:
            with _poisoned_allocations():
                step.prepare()
                step.run()
            return check_against_peer(
                step.results, self._peer, self._truth, self.problem.dtype, few=True
            )
        except Exception as error:  # the compiler and the driver refuse tiles in many ways
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@contextlib.contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """NaN in what `torch.empty` returns, so that an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


Times = dict[Tile, list[float]]  # seconds by round


def interleaved(checked: Checked, candidates: Sequence[Tile], run: Run) -> Times:
    """Seconds per launch of every candidate."""
    steps = {
        str(number): TileStep(checked.kernel, checked.problem, tile)
        for number, tile in enumerate(candidates)
    }

    def failed(name: str, error: Exception) -> None:
        raise error

    rounds = paired_rounds(steps, {}, run.plan, stopwatch_for(run.device), failed)
    return {
        tile: [s.device or s.wall for samples in rounds for s in (samples[str(number)],)]
        for number, tile in enumerate(candidates)
    }


def ratios(times: Sequence[Times], tile: Tile, best: Tile) -> list[float]:
    """A tile's ratio to the best one by round: the geometric mean over the shapes."""
    by_shape = [
        [a / b for a, b in zip(of_shape[tile], of_shape[best], strict=True)] for of_shape in times
    ]
    return [math.exp(statistics.fmean(map(math.log, r))) for r in zip(*by_shape, strict=False)]


def wins(by_round: Sequence[float]) -> bool:
    """Whether a tile is faster by more than noise: in four rounds of five."""
    return sorted(by_round)[math.ceil(0.8 * len(by_round)) - 1] < _WIN


def climb(job: Job, run: Run) -> tuple[Tile, Tile, float]:
    """The table's tile, the best one found from there, and their ratio.

    Raises:
        RuntimeError: the table's own tile is wrong.
    """
    row = read_table(run.table)[run.architecture][job.kernel][str(job.dtype.itemsize)]
    first = best = Tile(*row[str(job.columns)])
    dtype = next(name for name, each in DTYPES.items() if each.itemsize == job.dtype.itemsize)

    def checked(shape: Shape, columns: int) -> Checked:
        problem = KernelProblem(Case("kernel", *shape, dtype), run.device, columns)
        return Checked(job.kernel, problem)

    timed = [checked(shape, job.classes[0]) for shape in run.shapes]
    # The widest adapter that the entry is for must run as well, however fast.
    checks = list(timed)
    if job.classes[-1] != job.classes[0]:
        checks.append(checked(min(run.shapes), job.classes[-1]))

    def why_wrong(tile: Tile) -> str | None:
        return next((text for check in checks if (text := check.why_wrong(tile))), None)

    wrong = why_wrong(best)
    if wrong is not None:
        raise RuntimeError(f"the table's own tile {row_of(best)} fails: {wrong}")
    tried, ratio = {best}, 1.0
    for _ in range(run.steps):
        candidates = []
        for tile in neighbours(job.kernel, best)[: run.most_neighbours]:
            if tile in tried or run.over():
                continue
            tried.add(tile)
            wrong = why_wrong(tile)
            if wrong is None:
                candidates.append(tile)
            else:
                run.record(job, tile=row_of(tile), gate="failed", error=wrong)
        if not candidates:
            break
        times = [interleaved(each, [best, *candidates], run) for each in timed]
        winner, gain = best, 1.0
        for tile in [best, *candidates]:
            by_round = ratios(times, tile, best)
            median = statistics.median(by_round)
            for shape, of_shape in zip(run.shapes, times, strict=True):
                run.record(
                    job,
                    tile=row_of(tile),
                    gate="passed",
                    shape=shape,
                    rounds=len(by_round),
                    compared_with=row_of(best),
                    ratio=median,
                    **{f"ms_{p}": v for p, v in percentiles(of_shape[tile])._asdict().items()},
                )
            if tile != best and wins(by_round) and median < gain:
                winner, gain = tile, median
        if winner == best:
            break
        best, ratio = winner, ratio * gain
    return first, best, ratio


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tuner; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.dry_run and not triton.knobs.runtime.interpret:
        parser.error("--dry-run: needs TRITON_INTERPRET=1 in the environment")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU: PyTorch finds none; --dry-run runs on a CPU")
    run = _run(options, parser)
    pending = jobs(
        read_table(run.table),
        run.architecture,
        options.kernels,
        [DTYPES[name] for name in options.dtypes],
    )
    failures = 0
    for number, job in enumerate(pending):
        if run.over():
            print(f"the budget is spent; not tuned: {', '.join(map(str, pending[number:]))}")
            break
        try:
            first, best, ratio = climb(job, run)
        except Exception as error:  # the next entry may do better
            failures += 1
            run.record(job, error=str(error))
            print(f"{job}: failed: {error}", file=sys.stderr)
            continue
        if best == first:
            print(f"{job}: {row_of(first)} stays", flush=True)
        else:
            store_tile(run.table, job, run.architecture, best)
            print(f"{job}: {row_of(first)} -> {row_of(best)}, {ratio:.2f} of the time", flush=True)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description="Measure tiles on a GPU."
    )
    for option, names in (("--kernels", list(KERNELS)), ("--dtypes", list(DTYPES))):
        parser.add_argument(
            option, nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
        )
    parser.add_argument(
        "--budget", type=float, default=480.0, metavar="SECONDS", help="stop after this time (480)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"for {FILE} (benchmarks/results/<device>)"
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="a copy of tiles.json to change instead"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, into a copy")
    return parser


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Run:
    dry = options.dry_run
    device = torch.device("cpu" if dry else "cuda")
    out: Path = options.out or environment.RESULTS / environment.describe(device.type).slug
    if dry and options.out is None:
        parser.error("--dry-run: needs --out")
    table: Path = options.table or (out / tiles.TABLE.name if dry else tiles.TABLE)
    if not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiles.TABLE, table)
    if dry and table.samefile(tiles.TABLE):
        parser.error(f"--table: a dry run must not write the shipped table, got {table}")
    return Run(
        device,
        tiles.architecture(device),
        DRY_SHAPES if dry else SHAPES,
        Plan(budget_s=5.0, max_rounds=2 if dry else _ROUNDS, enough_rounds=0),
        1 if dry else _STEPS,
        1 if dry else None,
        time.monotonic() + options.budget,
        table,
        out / FILE,
    )


if __name__ == "__main__":
    sys.exit(main())
