"""The offline tuner: measures tiles and rates on a GPU and writes them into the package's tables.

    python -m benchmarks.tune [--kernels backward ...] [--dtypes bf16 ...] [--budget SECONDS]
    python -m benchmarks.tune --dry-run      # all of it on the CPU, tiny, into copies of the tables

For every kernel, dtype and class of columns it climbs from the table's tile: neighbours of the best
tile so far, one or two fields changed, are compiled, checked against the PyTorch backend on every
shape (`difference`), and then timed beside the best one in interleaved rounds, on inputs that no
cache still holds. A neighbour wins if its time, over that of the best one in the same round and as
the geometric mean over the shapes, is below 1 - 2% in four rounds of five. `dcft_kernels/triton/
tiles.json` changes where one won, entry by entry, and nowhere else; `dcft_kernels/gpu_rates.json`
gets an entry for this GPU. Every measurement is a line of `tune.jsonl`.

The most valuable entries come first, so a run that the budget cuts off keeps what matters.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import environment
from benchmarks.gate import check_beside
from benchmarks.kernel_work import ADAPTERS, COLD_BYTES, KERNELS, Problem, Results, Shape
from benchmarks.rows import append_line
from benchmarks.timing import order, percentiles
from dcft_kernels import cost_model, gpu_rates
from dcft_kernels.triton import tiles
from dcft_kernels.triton.tiles import Tile

Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES: tuple[Shape, ...] = ((8192, 4096, 4096), (4096, 768, 768), (2048, 4096, 14336))
DRY_SHAPES: tuple[Shape, ...] = ((20, 32, 48),)

# What a neighbour may change, and between which bounds. Sizes and warps double or halve.
_FIELDS = {
    "shrink_expand": ("tokens", "features", "warps", "stages"),
    "backward": ("tokens", "features", "programs", "warps", "stages"),
    "fused_linear": (
        "tokens",
        "features",
        "outputs",
        "programs",
        "warps",
        "stages",
        "descriptors",
    ),
    "fused_backward": ("tokens", "features", "outputs", "warps", "stages", "descriptors"),
    "expand": ("tokens", "outputs", "warps"),
    "expand_backward": ("tokens", "features", "programs", "warps", "stages"),
}
_BOUNDS = {
    "tokens": (16, 256),
    "features": (16, 256),
    "outputs": (16, 256),
    "programs": (0, 8),
    "warps": (2, 16),
    "stages": (1, 5),
    "descriptors": (0, 1),
}
_COUNTED = ("programs", "stages", "descriptors")
_SIZES = ("tokens", "features", "outputs")

_GAIN = 0.02  # less is noise
_ROUNDS = 15
_LAUNCHES = 8  # timed together, so that the clock's resolution does not matter
_STEPS = 3  # of the climb
# A clock cycle is half a nanosecond or more; enqueuing a launch takes 50 microseconds or less.
_SLEEP_CYCLES_A_LAUNCH = 100_000


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


def format_rates(entries: dict[str, dict[str, Any]]) -> str:
    """The text of `gpu_rates.json`."""
    return json.dumps(entries, indent=2) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Put `text` in place of a file's content, whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_table(path: Path) -> Table:
    """The tiles in a file."""
    table: Table = json.loads(path.read_text(encoding="utf-8"))
    return table


def store_tile(path: Path, job: Job, architecture: str, tile: Tile) -> None:
    """Change one entry of a table, and nothing that somebody else wrote meanwhile."""
    table = read_table(path)
    table[architecture][job.kernel][str(job.dtype.itemsize)][str(job.columns)] = tile.row()
    replace_file(path, format_table(table))


def store_rates(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Add or change one GPU's entry."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    entries[name] = entry
    replace_file(path, format_rates(entries))


class Job(NamedTuple):
    """One entry of the table."""

    kernel: str
    dtype: torch.dtype
    columns: int  # the class's most
    classes: tuple[int, ...]  # columns that the entry serves, of those in `ADAPTERS`

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {dtype} {self.columns}"


def jobs(
    table: Table, architecture: str, kernels: Sequence[str], dtypes: Sequence[torch.dtype]
) -> list[Job]:
    """All entries to tune, the most valuable first: few columns, then 16 bit, then the layer."""
    found = []
    for kernel, dtype in itertools.product(kernels, dtypes):
        row = table[architecture][kernel].get(str(dtype.itemsize), {})
        least = 0
        for columns in sorted(map(int, row)):
            classes = tuple(c for c in ADAPTERS if least < c <= columns)
            found.append(Job(kernel, dtype, columns, classes or (columns,)))
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
            moved = value + sign if field in _COUNTED else value * 2 if sign > 0 else value // 2
            low, high = _BOUNDS[field]
            if field == "programs" and kernel != "fused_linear":
                low = 1  # of these, only the fused product has a program for every block
            if not low <= moved <= high:
                break
            candidate = candidate._replace(**{field: moved})
        else:
            found.append(candidate)
    return list(dict.fromkeys(found))


def fits(kernel: str, tile: Tile, itemsize: int, columns: int, shared_bytes: int | None) -> bool:
    """Whether what a tile surely keeps in shared memory fits; the compiler may find it does not.

    Loads of a loop are staged `stages` deep; the matrix that a factor is spread to lies beside.
    """
    if shared_bytes is None or kernel == "expand":
        return True
    staged = tile.tokens * tile.features
    if kernel in ("fused_linear", "fused_backward"):
        staged += tile.features * tile.outputs
    if kernel == "expand_backward":
        return tile.stages * staged * itemsize <= shared_bytes
    return (tile.stages * staged + tile.features * columns) * itemsize <= shared_bytes


class Settings(NamedTuple):
    """How much a run does."""

    shapes: tuple[Shape, ...] = SHAPES
    rounds: int = _ROUNDS
    launches: int = _LAUNCHES
    steps: int = _STEPS
    most_neighbours: int | None = None
    cold_bytes: int = COLD_BYTES
    big: int = 1 << 28  # elements of the copy that measures the bandwidth
    product: Shape = (8192, 4096, 4096)  # the product that measures the matrix rates


DRY = Settings(
    shapes=DRY_SHAPES,
    rounds=2,
    launches=1,
    steps=1,
    most_neighbours=1,
    cold_bytes=0,
    big=1 << 16,
    product=(16, 32, 32),
)


class Run(NamedTuple):
    """What all measurements of a run share."""

    device: torch.device
    architecture: str
    shared_bytes: int | None
    settings: Settings
    deadline: float
    table: Path
    rates: Path
    rows: Path

    def over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self.deadline

    def record(self, **values: Any) -> None:
        """Store a row."""
        described = environment.describe(self.device.type)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        append_line(
            self.rows,
            values
            | {
                "architecture": self.architecture,
                "device": described.device,
                "torch": described.torch,
                "triton": described.triton,
                "commit": described.commit,
                "time": now,
            },
        )


class Checked:
    """A kernel on a problem, with what it has to compute."""

    def __init__(self, kernel: str, problem: Problem) -> None:
        self.kernel, self.problem = kernel, problem
        self.work = KERNELS[kernel](problem)
        self._truth: Results = self.work.expected(torch.float64)
        self._peer: Results = self.work.expected(problem.dtype)

    def why_wrong(self, tile: Tile) -> str | None:
        """Why the kernel cannot run with a tile, or is wrong with it."""
        try:
            with tiles.override(self.kernel, tile), _poisoned(self.work.written):
                results = self.work.launch(0)
            return check_beside(results, self._peer, self._truth, self.problem.dtype)
        except Exception as error:  # the compiler and the driver have many ways to refuse a tile
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@contextlib.contextmanager
def _poisoned(written: Sequence[Tensor]) -> Iterator[None]:
    """NaN in what is about to be written or allocated: what stays unwritten shows."""
    for tensor in written:
        tensor.fill_(math.nan)
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def seconds_a_launch(
    launches: Sequence[Callable[[], object]], device: torch.device
) -> Callable[[], float]:
    """Enqueue launches; the result, once the GPU is through, tells how long one took on average.

    The GPU is kept busy until all are in its queue, so the processor's time does not count.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for launch in launches:
            launch()
        elapsed = (time.perf_counter() - start) / len(launches)
        return lambda: elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SLEEP_CYCLES_A_LAUNCH * (1 + len(launches)))
    begin.record()
    for launch in launches:
        launch()
    end.record()
    return lambda: begin.elapsed_time(end) / 1e3 / len(launches)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(checked: Checked, candidates: Sequence[Tile], run: Run) -> dict[Tile, list[float]]:
    """Seconds a launch of every candidate, a figure a round; the order rotates."""
    samples: dict[Tile, list[float]] = {tile: [] for tile in candidates}
    names = [str(i) for i in range(len(candidates))]
    work = checked.work
    turn = itertools.count()  # a launch never finds its inputs where the last one left them
    for number in range(run.settings.rounds):
        if number >= 3 and run.over():
            break
        results = []
        for name in order(names, number):
            tile = candidates[int(name)]
            launches = [
                functools.partial(work.launch, next(turn) % work.copies)
                for _ in range(run.settings.launches)
            ]
            with tiles.override(checked.kernel, tile):
                results.append((tile, seconds_a_launch(launches, run.device)))
        _wait(run.device)
        for tile, result in results:
            samples[tile].append(result())
    return samples


def ratios(times: Sequence[dict[Tile, list[float]]], tile: Tile, best: Tile) -> list[float]:
    """By round, a tile's time over the best one's: the geometric mean over the shapes."""
    by_shape = [
        [a / b for a, b in zip(of_shape[tile], of_shape[best], strict=True)] for of_shape in times
    ]
    return [math.exp(statistics.fmean(map(math.log, r))) for r in zip(*by_shape, strict=False)]


def wins(by_round: Sequence[float]) -> bool:
    """Whether a tile is faster by more than noise: in four rounds of five."""
    return sorted(by_round)[math.ceil(0.8 * len(by_round)) - 1] < 1 - _GAIN


def tune(job: Job, run: Run) -> tuple[Tile, Tile, float]:
    """Climb from the table's tile; the tile before, the best one, and its time over the first's."""
    row = read_table(run.table)[run.architecture][job.kernel][str(job.dtype.itemsize)]
    first = best = Tile(*row[str(job.columns)])
    settings = run.settings

    def problem(shape: Shape, columns: int) -> Checked:
        made = Problem(shape, columns, job.dtype, run.device, settings.cold_bytes)
        return Checked(job.kernel, made)

    timed = [problem(shape, job.classes[0]) for shape in settings.shapes]
    # The widest adapter that the entry serves must run too; how fast does not count.
    smallest = min(settings.shapes)
    gates = [*timed, *(problem(smallest, c) for c in job.classes[-1:] if c != job.classes[0])]
    wrong = next(filter(None, (gate.why_wrong(best) for gate in gates)), None)
    if wrong is not None:
        raise RuntimeError(f"{job}: the table's own tile {best.row()} fails: {wrong}")
    tried, total = {best}, 1.0
    for _ in range(settings.steps):
        candidates = []
        for tile in neighbours(job.kernel, best)[: settings.most_neighbours]:
            fit = fits(job.kernel, tile, job.dtype.itemsize, job.columns, run.shared_bytes)
            if tile in tried or not fit or run.over():
                continue
            tried.add(tile)
            wrong = next(filter(None, (gate.why_wrong(tile) for gate in gates)), None)
            if wrong is None:
                candidates.append(tile)
            else:
                _record(run, job, tile, gate="failed", error=wrong)
        if not candidates:
            break
        times = [interleaved(checked, [best, *candidates], run) for checked in timed]
        winner, gain = best, 1.0
        for tile in [best, *candidates]:
            by_round = ratios(times, tile, best)
            for checked, of_shape in zip(timed, times, strict=True):
                p = percentiles(of_shape[tile])
                _record(
                    run, job, tile,
                    gate="passed", shape=checked.problem.shape, rounds=len(by_round),
                    device_ms_p20=p.p20, device_ms_p50=p.p50, device_ms_p80=p.p80,
                    compared_with=best.row(), ratio=statistics.median(by_round),
                )  # fmt: skip
            if tile != best and wins(by_round) and statistics.median(by_round) < gain:
                winner, gain = tile, statistics.median(by_round)
        if winner == best:
            break
        best, total = winner, total * gain
    return first, best, total


def _record(run: Run, job: Job, tile: Tile, **values: Any) -> None:
    run.record(
        kernel=job.kernel,
        dtype=str(job.dtype).removeprefix("torch."),
        columns=job.columns,
        tile=tile.row(),
        **values,
    )


def measure_rates(run: Run) -> dict[str, Any]:
    """An entry of `gpu_rates.json` for the device."""
    device, settings = run.device, run.settings
    T, n, m = settings.product

    def median(launches: Sequence[Callable[[], object]]) -> float:
        seconds_a_launch(launches, device)  # warms up
        _wait(device)
        samples = []
        for _ in range(min(5, settings.rounds)):
            result = seconds_a_launch(launches, device)
            _wait(device)
            samples.append(result())
        return statistics.median(samples)

    source = torch.zeros(settings.big, dtype=torch.bfloat16, device=device)
    target = torch.zeros_like(source)
    copy = median([functools.partial(target.copy_, source)] * settings.launches)
    moved = 2 * source.numel() * source.itemsize
    del source, target

    flops: dict[str, float] = {}
    for name, dtype, tf32 in (
        ("16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        x, weight = (torch.randn(s, n, device=device).to(dtype) for s in (T, m))
        with _tf32(tf32):
            seconds = median([functools.partial(F.linear, x, weight)] * settings.launches)
        flops[name] = 2 * T * n * m / seconds / 1e12

    problem = Problem(settings.product, 16, torch.bfloat16, device, 0)
    out, weight = problem.empty(T, m), problem.draw(m, n)
    x = problem.draw(T, n)
    from dcft_kernels.triton.fused_linear import fused_linear

    fused = median([lambda: fused_linear(x, weight, problem.adapter, out)] * settings.launches)
    call = cost_model.Call(
        T, problem.geometry, torch.bfloat16, torch.float32, run.architecture, backward=False
    )
    fused_flops = cost_model.kernels("fused", call)[0][0].flops

    tiny = torch.zeros(1, device=device)
    many = [lambda: tiny.add_(1.0)] * 100
    gap = median(many)
    _wait(device)
    start = time.perf_counter()
    for launch in many:
        launch()
    host = (time.perf_counter() - start) / len(many)
    _wait(device)

    described = environment.describe(device.type)
    entry = {
        "architecture": gpu_rates.identify(device).architecture or run.architecture,
        "multiprocessors": tiles.multiprocessors(device),
        "terabytes_per_second": _digits(moved / copy / 1e12),
        "teraflops": {name: _digits(value) for name, value in flops.items()},
        "triton_gemm": _digits(fused_flops / fused / 1e12 / flops["16"]),
        "launch_microseconds": _digits(gap * 1e6),
        "host_microseconds": _digits(host * 1e6),
        "source": f"measured {described.device}, torch {described.torch}, "
        f"triton {described.triton}",
    }
    run.record(kernel="rates", **{key: value for key, value in entry.items() if key != "source"})
    return entry


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tuner; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":
            return _interpreted(sys.argv[1:] if arguments is None else arguments)
    elif not torch.cuda.is_available():
        parser.error(
            "no GPU: PyTorch finds none to measure; --dry-run tries the program out on the CPU"
        )
    run = _run(options, parser)
    print(f"{environment.describe(run.device.type).device} ({run.architecture}), rows: {run.rows}")
    name = "dry run" if options.dry_run else torch.cuda.get_device_name(run.device)
    entry = measure_rates(run)
    store_rates(run.rates, name, entry)
    print(f"rates: {json.dumps(entry)}")
    # The interpreter multiplies the bits of bfloat16 as if they were integers.
    known = DTYPES | ({"bf16": torch.float16} if options.dry_run else {})
    dtypes = [known[dtype] for dtype in options.dtypes]
    pending = jobs(read_table(run.table), run.architecture, options.kernels, dtypes)
    failed = 0
    for number, job in enumerate(pending):
        if run.over():
            print(f"the budget is spent; not tuned: {', '.join(map(str, pending[number:]))}")
            break
        try:
            first, best, ratio = tune(job, run)
        except Exception as error:  # the next entry may do better
            failed += 1
            run.record(kernel=job.kernel, columns=job.columns, error=str(error))
            print(f"{job}: failed: {error}", file=sys.stderr)
            continue
        if best == first:
            print(f"{job}: {first.row()} stays")
        else:
            store_tile(run.table, job, run.architecture, best)
            if job.kernel == "fused_linear" and job[1:3] == (torch.bfloat16, min(ADAPTERS)):
                with tiles.override("fused_linear", best):  # the rates hold its speed
                    store_rates(run.rates, name, measure_rates(run))
            print(f"{job}: {first.row()} -> {best.row()}, {ratio:.2f} of the time")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description="Measure tiles and rates on a GPU and write them into the package's tables.",
    )
    for option, names in (("--kernels", list(KERNELS)), ("--dtypes", list(DTYPES))):
        parser.add_argument(
            option, nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
        )
    parser.add_argument(
        "--budget", type=float, default=480.0, metavar="SECONDS", help="stop after this time (480)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for tune.jsonl (benchmarks/results/<device>; .benchmarks/tune for a dry run)",
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help=f"tiles to rewrite ({tiles.TABLE.name})"
    )
    parser.add_argument(
        "--rates", type=Path, metavar="FILE", help=f"rates to rewrite ({gpu_rates.TABLE.name})"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="all of it on the CPU, tiny shapes under Triton's interpreter, into copies of the "
        "tables beside the rows",
    )
    return parser


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Run:
    device = torch.device("cpu" if options.dry_run else "cuda")
    described = environment.describe(device.type)
    if options.out is None:
        options.out = (
            environment.ROOT / ".benchmarks" / "tune"
            if options.dry_run
            else environment.ROOT / "benchmarks" / "results" / described.slug
        )
    paths: dict[str, Path] = {}
    for option, shipped in (("table", tiles.TABLE), ("rates", gpu_rates.TABLE)):
        path: Path | None = getattr(options, option)
        if path is None:
            path = options.out / shipped.name if options.dry_run else shipped
        if options.dry_run and path.exists() and path.samefile(shipped):
            parser.error(f"--{option}: a dry run must not write the shipped table, got {path}")
        if not path.exists() or (options.dry_run and getattr(options, option) is None):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shipped, path)
        paths[option] = path
    shared = None
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", None)
    return Run(
        device,
        tiles.architecture(device),
        shared,
        DRY if options.dry_run else Settings(),
        time.monotonic() + options.budget,
        paths["table"],
        paths["rates"],
        options.out / "tune.jsonl",
    )


def _interpreted(arguments: Sequence[str]) -> int:
    """Run again under Triton's interpreter, which has to be known before Triton is imported."""
    paths = [str(environment.ROOT), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    return subprocess.call([sys.executable, "-m", "benchmarks.tune", *arguments], env=variables)


if __name__ == "__main__":
    sys.exit(main())
