"""Measure and store: `python -m benchmarks.run [--levels layer ...] [--size main]`.

Every case is checked, timed and appended to `rows.jsonl` before the next one starts, so a run that
is cut off keeps what it has. What cannot run has a row that says why.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import environment, rows
from benchmarks.cases import DIRECTIONS, DTYPES, SIZES, Case, Scope, parse_shape
from benchmarks.entries import BASELINE, AnyEntry, DeviceLostError
from benchmarks.levels import LEVELS
from benchmarks.measure import Outcome, measure
from benchmarks.models import MODELS
from benchmarks.timing import Plan

TINY_RESULTS = environment.ROOT / ".benchmarks" / "tiny"

TINY_PLAN = Plan(budget_s=1.0, max_rounds=3)


def measure_case(
    case: Case,
    entries: Sequence[AnyEntry],
    file: Path,
    plan: Plan,
    device: torch.device,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Measure one case, store its rows, and say how it went."""
    level = LEVELS[case.level]
    start = time.perf_counter()
    outcomes = measure(
        case,
        entries,
        lambda: level.problem(case, device),
        environment.describe(device.type),
        plan,
        device=device,
        record=lambda row: rows.append(file, row),
    )
    timed = [o.row for o in outcomes if o.row.rounds]
    rounds = max((row.rounds for row in timed), default=0)
    say(
        f"{case}: {len(timed)} of {len(outcomes)} providers, {rounds} rounds, "
        f"{time.perf_counter() - start:.0f} s"
    )
    for outcome in outcomes:
        if outcome.row.error is not None and not outcome.skipped:
            say(f"  {outcome.key}: {outcome.row.error}")
    return outcomes


def prepare_torch() -> None:
    """Flags that every measurement runs with: float32 convolutions that are float32.

    The published algorithm's transposed convolution would round its operands to ten bits otherwise,
    and fail the gate.
    """
    torch.backends.cudnn.allow_tf32 = False


def selected(options: argparse.Namespace, scope: Scope) -> list[tuple[Case, list[AnyEntry]]]:
    """The cases and providers that the options leave.

    Raises:
        ValueError: a shape that is none, a model or provider that no level knows.
    """
    shapes = [parse_shape(text) for text in options.shapes]
    strange = [name for name in options.models if name not in MODELS]
    if strange:
        raise ValueError(f"--models: expected some of {', '.join(MODELS)}, got {strange[0]!r}")
    cases: list[Case] = []
    for name in options.levels:
        proposed = LEVELS[name].cases(scope)
        if shapes and name in ("layer", "kernel"):
            dtypes = options.dtypes or ([proposed[0].dtype] if proposed else ["fp32"])
            directions = options.directions or ["fwd+bwd"]
            proposed = [
                Case(name, *shape, dtype, direction, sweep="asked")
                for shape in shapes
                for dtype in dtypes
                for direction in directions
            ]
        elif not proposed and name == "kernel":
            proposed = [Case("kernel", 4096, 768, 768, "fp32")]  # rows that say why not
        cases += proposed
    found = []
    known: dict[str, None] = {}
    for case in cases:
        if options.dtypes and case.dtype not in options.dtypes:
            continue
        if options.directions and case.direction not in options.directions:
            continue
        if options.sweeps and case.sweep not in options.sweeps:
            continue
        if options.models and case.model is not None and case.model not in options.models:
            continue
        entries = list(LEVELS[case.level].entries(case))
        if options.label is not None:
            case = replace(case, sweep=options.label)
        for entry in entries:
            known |= {entry.name: None, entry.key: None}
        if options.providers:
            wanted = {BASELINE, *options.providers}
            chosen = [e for e in entries if e.name in wanted or e.key in wanted]
            if not any(e.name != BASELINE for e in chosen) and options.providers != [BASELINE]:
                continue
            entries = chosen
        # Cases stay, whatever is left of them, so that their numbers do.
        found.append((case, [entry for entry in entries if entry.key not in options.without]))
    unknown = [name for name in options.providers if name not in known]
    if unknown:
        raise ValueError(f"--providers: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status is 1 if a provider was wrong or broke, 0 otherwise."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    options.given = sys.argv[1:] if arguments is None else arguments
    options.levels = options.levels or list(LEVELS)
    if options.device == "cuda" and not torch.cuda.is_available():
        command_line.error(
            "--device: expected a GPU that PyTorch finds, got cuda and there is none"
        )
    scope = Scope(options.device, options.size)
    try:
        chosen = selected(options, scope)
    except ValueError as error:
        command_line.error(str(error))
    if not chosen:
        command_line.error(
            "nothing to measure: no case has these levels, dtypes, directions and sweeps"
        )
    prepare_torch()
    device = torch.device(options.device)
    described = environment.describe(device.type)
    folder = options.out or (TINY_RESULTS if scope.tiny else environment.RESULTS) / described.slug
    plan = TINY_PLAN if scope.tiny else Plan()
    if options.case_budget is not None:
        plan = replace(plan, budget_s=options.case_budget)
    _say(f"{described.device}, torch {described.torch}, commit {described.commit}")
    warning = environment.busy()
    if warning is not None:
        _say(warning)
    wrong = 0
    deadline = None if options.budget is None else time.monotonic() + options.budget
    for number, (case, entries) in enumerate(chosen):
        if number < options.first:
            continue
        if deadline is not None and time.monotonic() > deadline:
            rest = "; ".join(str(c) for c, _ in chosen[number:])
            _say(f"the budget of {options.budget:.0f} s is spent; not measured: {rest}")
            break
        try:
            outcomes = measure_case(case, entries, folder / rows.FILE, plan, device, _say)
        except DeviceLostError as error:
            _say(f"{case}: {error}")
            left = None if deadline is None else deadline - time.monotonic()
            _again(number, error.key, options, left)
        wrong += sum(o.row.error is not None and not o.skipped for o in outcomes)
    _say(f"rows: {folder / rows.FILE}")
    return 1 if wrong else 0


def _again(number: int, key: str, options: argparse.Namespace, left: float | None) -> None:
    """Go on in a new process, from this case on, without the provider that broke the device."""
    arguments = list(options.given)
    arguments += ["--first", str(number), "--without", *options.without, key]
    if left is not None:
        arguments += ["--budget", f"{max(0.0, left):.0f}"]
    _say(f"goes on in a new process without {key}")
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *arguments])


def _say(text: str) -> None:
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)

    def several(option: str, names: Sequence[str] | None, help_: str) -> None:
        found.add_argument(option, nargs="+", choices=names, default=[], metavar="NAME", help=help_)

    several("--levels", list(LEVELS), f"of {', '.join(LEVELS)} (all)")
    several("--sweeps", None, "what varies, such as main, tokens, kernel_size (all)")
    several("--providers", None, "names as in the rows; the frozen layer always runs (all)")
    several("--models", None, "of the block and step levels (all)")
    several("--shapes", None, "of the layer and kernel levels, such as 4096x768x3072")
    several("--dtypes", list(DTYPES), f"of {', '.join(DTYPES)} (all)")
    several("--directions", [*DIRECTIONS, "merge", "unmerge", "save", "load", "step"], "(all)")
    found.add_argument(
        "--size",
        choices=SIZES,
        default="main",
        help="tiny: does it run at all; main: minutes; full: every sweep (main)",
    )
    found.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="a GPU where there is one",
    )
    several("--without", None, "keys of providers to leave out, such as dcft-k4")
    found.add_argument(
        "--first", type=int, default=0, metavar="N", help="leave out the cases before this one"
    )
    found.add_argument(
        "--label", metavar="NAME", help="stored as the sweep, so as not to replace other rows"
    )
    found.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this")
    found.add_argument(
        "--case-budget", type=float, metavar="SECONDS", help="for the rounds of a case (30)"
    )
    found.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for {rows.FILE} (benchmarks/results/<device>)",
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
