"""Was it faster before? Two runs of the benchmark suite, benchmark by benchmark.

    python -m benchmarks.compare BEFORE.json AFTER.json

The files are pytest-benchmark's, with every sample. The samples of one round were taken in turn, so
a provider's time over the frozen layer's in the same round says how fast the provider is and leaves
out how fast the machine was just then. That quotient is what is compared wherever both files have
it. An interval around the ratio comes from a bootstrap over the rounds: it holds what varies within
a run. What varies from run to run, such as where memory lies, is what `--noise` is for.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

# A median of fewer rounds moves with a single one of them, and a bootstrap cannot tell by how much.
ENOUGH_ROUNDS = 5

FASTER, SLOWER, WITHIN_NOISE = "faster", "slower", "within noise"
TOO_FEW_ROUNDS = "too few rounds"
# The frozen layer over itself is always 1: its own times are shown and nothing is concluded.
THE_BASELINE = "the baseline"
VERDICTS = (SLOWER, FASTER, WITHIN_NOISE, TOO_FEW_ROUNDS, THE_BASELINE)

# What must be equal for a difference to be the code's.
_SAME = ("device", "torch", "dtype")

_DRAWN_AT_ONCE = 1 << 20  # numbers, so that long runs and many draws need no more memory

_EXPECTED = (
    "expected what `pytest benchmarks --benchmark-only --benchmark-json FILE` writes "
    "(rows.jsonl holds no samples)"
)


@dataclass(frozen=True)
class Settings:
    """How a verdict is reached."""

    confidence: float = 0.95
    draws: int = 10_000
    seed: int = 0
    noise: float = 0.01


class Samples(NamedTuple):
    """Seconds by one clock, round by round, NaN where a round has none."""

    own: Floats  # [rounds]
    baseline: Floats | None  # [rounds], of the frozen layer

    def rounds(self, *, paired: bool) -> Samples:
        """The rounds that were measured; with `paired`, those where the baseline was as well."""
        if not paired or self.baseline is None:
            return Samples(self.own[~np.isnan(self.own)], None)
        both = ~np.isnan(self.own) & ~np.isnan(self.baseline)
        return Samples(self.own[both], self.baseline[both])

    def logarithms(self) -> Floats:
        """What is compared: the logarithm of the seconds, over the baseline's if there is one."""
        own = np.log(self.own)
        return own if self.baseline is None else own - np.log(self.baseline)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of one file."""

    key: str  # with the path of its test: the same in two runs
    name: str
    clocks: Mapping[str, Samples]  # "wall", and "device" on a GPU
    info: Mapping[str, Any]  # its row, see benchmarks/rows.py

    @property
    def is_baseline(self) -> bool:
        """Whether it is the frozen layer itself."""
        wall = self.clocks["wall"]
        # pytest-benchmark's times are differences of a clock: the last digits are rounded away.
        return wall.baseline is not None and np.allclose(wall.own, wall.baseline, 1e-6, 0.0)

    def has(self, clock: str, *, paired: bool) -> bool:
        if clock not in self.clocks:
            return False
        if paired and (self.is_baseline or self.clocks[clock].baseline is None):
            return False
        return self.clocks[clock].rounds(paired=paired).own.size > 0


@dataclass(frozen=True)
class Run:
    """What one file holds."""

    path: Path
    benchmarks: Mapping[str, Benchmark]  # by key
    commit: str | None  # as pytest-benchmark found it


@dataclass(frozen=True)
class Comparison:
    """What came out for one benchmark. Ratios are B over A; more than 1 is slower."""

    name: str
    clock: str
    paired: bool
    rounds: tuple[int, int]
    milliseconds: tuple[float, float]  # medians by `clock`
    ratio: float
    interval: tuple[float, float] | None  # none of too few rounds
    verdict: str


def load(path: Path) -> Run:
    """Read one file.

    Raises:
        ValueError: the file is missing, or not what pytest-benchmark writes with all samples; one
            line that names the file and says what to do.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {_EXPECTED}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; {_EXPECTED}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; {_EXPECTED}") from error
    entries = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: not pytest-benchmark's: no list `benchmarks`; {_EXPECTED}")
    if not entries:
        raise ValueError(f"{path}: no benchmarks in it; measure with a `-k` that selects some")
    benchmarks: dict[str, Benchmark] = {}
    for entry in entries:
        benchmark = _benchmark(path, entry)
        if benchmark.key in benchmarks:
            raise ValueError(f"{path}: {benchmark.key} is in it twice; measure it once a file")
        benchmarks[benchmark.key] = benchmark
    commit_info = content.get("commit_info")
    commit = commit_info.get("id") if isinstance(commit_info, dict) else None
    return Run(path, benchmarks, commit[:7] if isinstance(commit, str) else None)


def _benchmark(path: Path, entry: Any) -> Benchmark:
    stats = entry.get("stats") if isinstance(entry, dict) else None
    key = entry.get("fullname") if isinstance(entry, dict) else None
    if not isinstance(stats, dict) or not isinstance(key, str):
        raise ValueError(
            f"{path}: not pytest-benchmark's: an entry without `fullname` or `stats`; {_EXPECTED}"
        )
    if not stats.get("data"):
        raise ValueError(
            f"{path}: no samples of {key}; --benchmark-json stores them, --benchmark-save and "
            "--benchmark-autosave only together with --benchmark-save-data"
        )
    info = entry.get("extra_info")
    info = info if isinstance(info, dict) else {}
    where = f"{path}: {key}"
    wall = _seconds(where, "stats.data", stats["data"])
    if np.isnan(wall).any():
        raise ValueError(f"{where}: stats.data: expected a time for every round, got null")

    def more(name: str) -> Floats | None:
        values = info.get(name)
        return None if values is None else _seconds(where, f"extra_info.{name}", values, len(wall))

    clocks = {"wall": Samples(wall, more("baseline_seconds"))}
    device = more("device_seconds")
    if device is not None:
        clocks["device"] = Samples(device, more("baseline_device_seconds"))
    name = entry.get("name")
    return Benchmark(key, name if isinstance(name, str) else key, clocks, info)


def _seconds(where: str, name: str, values: Any, rounds: int | None = None) -> Floats:
    """A list of seconds as an array, null as NaN."""
    if not isinstance(values, list):
        raise ValueError(f"{where}: {name}: expected a list of seconds, got {values!r}")
    if rounds is not None and len(values) != rounds:
        raise ValueError(
            f"{where}: {name}: expected {rounds} values, one for each in stats.data, "
            f"got {len(values)}; measure again"
        )
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0.0 < value < math.inf):
            raise ValueError(f"{where}: {name}: expected seconds above 0, got {value!r}")
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def compare(a: Benchmark, b: Benchmark, settings: Settings | None = None) -> Comparison:
    """Whether `b` is faster or slower than `a`, the same benchmark of an earlier run.

    The ratio is that of the medians, over the rounds, of the time over the frozen layer's in the
    same round; without a frozen layer in both, of the times themselves. Its interval is the
    percentile bootstrap's: rounds are drawn with replacement, each with its baseline, in either
    run. A change has to be clear (the interval leaves out 1) and to matter (the interval reaches
    beyond the noise).
    """
    settings = settings or Settings()
    paired, clock = _measure(a, b)
    samples = [benchmark.clocks[clock].rounds(paired=paired) for benchmark in (a, b)]
    before, after = (s.logarithms() for s in samples)
    interval = None
    if min(before.size, after.size) >= ENOUGH_ROUNDS:
        # The name goes in, so that what else is in the files changes nothing.
        generator = np.random.default_rng([settings.seed, zlib.crc32(a.key.encode())])
        medians = [_medians(values, settings.draws, generator) for values in (before, after)]
        tail = (1.0 - settings.confidence) / 2.0
        low, high = np.exp(np.quantile(medians[1] - medians[0], (tail, 1.0 - tail)))
        interval = (float(low), float(high))
    found = verdict(interval, settings.noise)
    if a.is_baseline or b.is_baseline:
        found = THE_BASELINE
    return Comparison(
        name=a.name,
        clock=clock,
        paired=paired,
        rounds=(before.size, after.size),
        milliseconds=(
            float(np.median(samples[0].own)) * 1e3,
            float(np.median(samples[1].own)) * 1e3,
        ),
        ratio=float(np.exp(np.median(after) - np.median(before))),
        interval=interval,
        verdict=found,
    )


def _measure(a: Benchmark, b: Benchmark) -> tuple[bool, str]:
    """Whether pairs are compared, and by which clock: the best that both have."""
    measures = ((paired, clock) for paired in (True, False) for clock in ("device", "wall"))
    return next(  # the last one always is: no file is read without wall times
        (paired, clock)
        for paired, clock in measures
        if a.has(clock, paired=paired) and b.has(clock, paired=paired)
    )


def _medians(values: Floats, draws: int, generator: np.random.Generator) -> Floats:
    """Medians of as many values, drawn with replacement, `draws` times."""
    at_once = max(1, _DRAWN_AT_ONCE // values.size)
    parts = []
    for begin in range(0, draws, at_once):
        count = min(at_once, draws - begin)
        drawn = values[generator.integers(values.size, size=(count, values.size))]
        parts.append(np.median(drawn, axis=1))
    return np.concatenate(parts)


def verdict(interval: tuple[float, float] | None, noise: float) -> str:
    """What an interval of the ratio B over A says."""
    if interval is None:
        return TOO_FEW_ROUNDS
    low, high = interval
    if low > 1.0 and high > 1.0 + noise:
        return SLOWER
    if high < 1.0 and low < 1.0 / (1.0 + noise):
        return FASTER
    return WITHIN_NOISE


def compare_runs(a: Run, b: Run, settings: Settings | None = None) -> list[Comparison]:
    """All benchmarks that both runs have, in the order of the first.

    Raises:
        ValueError: they have none in common.
    """
    common = _common(a, b)
    if not common:
        first, other = (next(iter(run.benchmarks)) for run in (a, b))
        raise ValueError(
            f"{a.path} and {b.path} have no benchmark in common (A has {first}, B has {other}); "
            "measure both with the same `-k`"
        )
    return [compare(before, after, settings) for before, after in common]


def _common(a: Run, b: Run) -> list[tuple[Benchmark, Benchmark]]:
    return [(a.benchmarks[key], b.benchmarks[key]) for key in a.benchmarks if key in b.benchmarks]


def warnings(a: Run, b: Run) -> list[str]:
    """What else than the code differs between the two, a line each."""
    found = []
    for field in _SAME:
        different = [
            (before.info.get(field), after.info.get(field))
            for before, after in _common(a, b)
            if before.info.get(field) != after.info.get(field)
        ]
        if different:
            of_a, of_b = (_distinct(values) or "unknown" for values in zip(*different, strict=True))
            found.append(f"not the same {field}: A {of_a}, B {of_b}")
    return found


def provenance(run: Run) -> str:
    """Device, versions, commits and days of a run, in a line."""
    infos = [benchmark.info for benchmark in run.benchmarks.values()]

    def values(field: str) -> str:
        return _distinct(info.get(field) for info in infos)

    parts = [values("device") or "unknown device"]
    parts += [f"{name} {values(name)}" for name in ("torch", "triton", "peft") if values(name)]
    parts.append(f"commit {values('commit') or run.commit or 'unknown'}")
    days = _distinct(str(info["time"])[:10] for info in infos if info.get("time"))
    return "; ".join([*parts, days] if days else parts)


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(sorted({str(value) for value in values if value is not None}))


def report(a: Run, b: Run, comparisons: Sequence[Comparison], settings: Settings) -> str:
    """Everything there is to say, for a terminal."""
    lines = [f"{label}: {run.path}: {provenance(run)}" for label, run in (("A", a), ("B", b))]
    lines += [f"warning: {text}" for text in warnings(a, b)]
    lines += ["", *_table(comparisons, settings), ""]
    for label, run, other in (("A", a, b), ("B", b, a)):
        alone = [x.name for key, x in run.benchmarks.items() if key not in other.benchmarks]
        lines += [f"only in {label}: {name}" for name in alone]
    if any(c.paired for c in comparisons):
        lines.append(
            "paired: each time over the frozen layer's in the same round; ratio is B over A of that"
        )
    if not all(c.paired for c in comparisons):
        lines.append(
            "unpaired: not over a frozen layer's time, so how fast the machine was at the time is "
            "in the ratio"
        )
    counts = Counter(c.verdict for c in comparisons)
    lines.append(", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name]))
    return "\n".join(lines)


def _table(comparisons: Sequence[Comparison], settings: Settings) -> list[str]:
    level = f"{100 * settings.confidence:g}% interval"
    table: list[tuple[str, ...]] = [
        ("benchmark", "A ms", "B ms", "ratio", level, "measure", "verdict")
    ]
    for c in comparisons:
        few = f" ({c.rounds[0]} and {c.rounds[1]})" if c.interval is None else ""
        table.append(
            (
                c.name,
                *(f"{value:,.3f}" for value in c.milliseconds),
                f"{c.ratio:.3f}",
                "-" if c.interval is None else "{:.3f} to {:.3f}".format(*c.interval),
                f"{'paired' if c.paired else 'unpaired'}, {c.clock}",
                c.verdict + few,
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = "<>>>><<"
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)
        ).rstrip()
        for row in table
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; the exit status is 1 if `--fail-if-slower` finds something, 2 for bad input."""
    options = _parser().parse_args(arguments)
    settings = Settings(options.confidence, options.draws, options.seed, options.noise)
    try:
        a, b = load(options.a), load(options.b)
        comparisons = compare_runs(a, b, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(a, b, comparisons, settings))
    slower = any(c.verdict == SLOWER for c in comparisons)
    return 1 if options.fail_if_slower and slower else 0


_DESCRIPTION = """\
Tell, benchmark by benchmark, whether run B is faster or slower than run A.

Both files are pytest-benchmark's, with samples, as this suite writes them:

    pytest benchmarks --benchmark-only --benchmark-json A.json
"""

_EPILOG = """\
verdicts:
  faster, slower   the interval of the ratio B over A leaves out 1 and reaches beyond the noise
  within noise     anything else; a wide interval may hide a change that more rounds would show
  too few rounds   fewer than 5 in A or in B; more come with a larger --budget
  the baseline     the frozen layer itself, which the others are divided by: not judged

Of many benchmarks that did not change, an interval of 95% still calls a few percent faster or
slower. A check that must not cry wolf wants --confidence 0.999 and some twenty rounds.

exit status: 0; with --fail-if-slower, 1 if any is slower; 2 for bad input
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Settings()
    parser.add_argument("a", type=Path, metavar="A.json", help="the run to compare with")
    parser.add_argument("b", type=Path, metavar="B.json", help="the run that is judged")
    parser.add_argument(
        "--confidence",
        type=_confidence,
        default=defaults.confidence,
        metavar="SHARE",
        help=f"of the bootstrap that the interval holds ({defaults.confidence:g})",
    )
    parser.add_argument(
        "--draws",
        type=_draws,
        default=defaults.draws,
        metavar="NUMBER",
        help=f"of the bootstrap ({defaults.draws})",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=defaults.seed,
        metavar="NUMBER",
        help=f"the same seed draws the same ({defaults.seed})",
    )
    parser.add_argument(
        "--noise",
        type=_noise,
        default=defaults.noise,
        metavar="SHARE",
        help="a change whose interval stays within this share is none, "
        f"however clear it is ({defaults.noise:g})",
    )
    parser.add_argument(
        "--fail-if-slower", action="store_true", help="exit status 1 if any benchmark is slower"
    )
    return parser


def _confidence(text: str) -> float:
    value = _number(text)
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def _noise(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0 or a positive number, got {text}")
    return value


def _draws(text: str) -> int:
    if not text.isdecimal() or int(text) < 100:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 100, got {text}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 0, got {text}")
    return int(text)


def _number(text: str) -> float:
    """A number, or NaN, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    sys.exit(main())
