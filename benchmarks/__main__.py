"""Measure and store: `python -m benchmarks [--levels layer ...]`.

Every case is checked, timed and appended to `rows.jsonl` before the next one starts, so a run that
is cut off keeps what it has. A provider that cannot run gets a row with the reason.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import environment, rows
from benchmarks.speed.cases import DIRECTIONS, DTYPES, Case, Scope, parse_shape
from benchmarks.speed.levels import LEVELS
from benchmarks.speed.measure import Outcome, measure
from benchmarks.speed.models import MODELS
from benchmarks.speed.provider import BASELINE, DeviceLostError, Provider
from benchmarks.speed.timing import Plan

TINY_PLAN = Plan(budget_s=1.0, max_rounds=3)


def results_folder(chosen: Path | None, device_type: str, *, tiny: bool) -> Path:
    """Where rows go: `chosen`, or a folder named for the device."""
    if chosen is not None:
        return chosen
    root = environment.ROOT / ".benchmarks" / "tiny" if tiny else environment.RESULTS
    return root / environment.describe(device_type).slug


def measure_case(
    case: Case,
    providers: Sequence[Provider],
    file: Path,
    plan: Plan,
    device: torch.device,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Measure one case, store its rows, and print a summary."""
    # The published algorithm's transposed convolution would otherwise round its operands to tf32
    # and fail the gate.
    torch.backends.cudnn.allow_tf32 = False
    start = time.perf_counter()
    outcomes = measure(
        case,
        providers,
        lambda: LEVELS[case.level].problem(case, device),
        environment.describe(device.type),
        plan,
        device=device,
        record=lambda row: rows.append(file, row),
    )
    timed = [o.row for o in outcomes if o.row.rounds]
    rounds = max((row.rounds for row in timed), default=0)
    seconds = time.perf_counter() - start
    say(f"{case}: {len(timed)} of {len(outcomes)} providers, {rounds} rounds, {seconds:.0f} s")
    for outcome in outcomes:
        if outcome.row.error is not None and not outcome.skipped:
            say(f"  {outcome.key}: {outcome.row.error}")
    return outcomes


def selected(options: argparse.Namespace) -> list[tuple[Case, list[Provider]]]:
    """The cases and providers that the options select.

    Raises:
        ValueError: a bad shape, or a provider that no level has.
    """
    shapes = [parse_shape(text) for text in options.shapes]
    scope = Scope(options.device, options.tiny)
    cases: list[Case] = []
    for name in options.levels:
        proposed = LEVELS[name].cases(scope)
        if shapes and name in ("layer", "kernel"):
            dtypes = options.dtypes or ["bf16" if scope.gpu else "fp32"]
            directions = options.directions or ["fwd+bwd"]
            proposed = [
                Case(name, *shape, dtype, direction, sweep="asked")
                for shape in shapes
                for dtype in dtypes
                for direction in directions
            ]
        cases += proposed
    found: list[tuple[Case, list[Provider]]] = []
    known: dict[str, None] = {}
    for case in cases:
        if (
            (options.dtypes and case.dtype not in options.dtypes)
            or (options.directions and case.direction not in options.directions)
            or (options.sweeps and case.sweep not in options.sweeps)
            or (options.models and case.model is not None and case.model not in options.models)
        ):
            continue
        providers = list(LEVELS[case.level].providers(case))
        known |= dict.fromkeys(name for p in providers for name in (p.name, p.key))
        if options.providers:
            wanted = {BASELINE, *options.providers}
            providers = [p for p in providers if p.name in wanted or p.key in wanted]
        providers = [p for p in providers if p.key not in options.without]
        if providers:
            found.append((case, providers))
    unknown = [name for name in options.providers if name not in known]
    if found and unknown:
        raise ValueError(f"--providers: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status is 1 if a provider was wrong or failed, 3 if it broke the GPU."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    options.levels = options.levels or list(LEVELS)
    if options.device == "cuda" and not torch.cuda.is_available():
        command_line.error("--device: expected a GPU that PyTorch finds, and there is none")
    try:
        chosen = selected(options)
    except ValueError as error:
        command_line.error(str(error))
    if not chosen:
        command_line.error("nothing to measure: no case matches these options")
    described = environment.describe(options.device)
    file = results_folder(options.out, options.device, tiny=options.tiny) / rows.FILE
    plan = TINY_PLAN if options.tiny else Plan()
    if options.case_budget is not None:
        plan = replace(plan, budget_s=options.case_budget)
    _say(f"{described.device}, torch {described.torch}, commit {described.commit}")
    warning = environment.busy()
    if warning is not None:
        _say(warning)
    failures = 0
    start = time.monotonic()
    for number, (case, providers) in enumerate(chosen):
        spent = time.monotonic() - start
        if number and options.budget is not None and spent > options.budget:
            rest = "; ".join(str(c) for c, _ in chosen[number:])
            _say(f"the budget of {options.budget:.0f} s is spent; not measured: {rest}")
            break
        device = torch.device(options.device)
        try:
            outcomes = measure_case(case, providers, file, plan, device, _say)
        except DeviceLostError as error:
            _say(f"{case}: {error}; run again with --without {error.key}")
            return 3
        failures += sum(o.row.error is not None and not o.skipped for o in outcomes)
    _say(f"rows: {file}")
    return 1 if failures else 0


def _say(text: str) -> None:
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)

    def several(option: str, names: Sequence[str] | None, help_: str) -> None:
        found.add_argument(option, nargs="+", choices=names, default=[], metavar="NAME", help=help_)

    several("--levels", list(LEVELS), f"of {', '.join(LEVELS)} (all)")
    several("--sweeps", None, "main, tokens, kernel_size, rank, stride (all)")
    several("--providers", None, "names as in the rows; the frozen layer always runs (all)")
    several("--without", None, "providers to leave out, such as dcft-k4")
    several("--models", list(MODELS), "of the block, step and files levels (all)")
    several("--shapes", None, "for the layer and kernel levels, such as 4096x768x3072")
    several("--dtypes", list(DTYPES), f"of {', '.join(DTYPES)} (all)")
    several("--directions", [*DIRECTIONS, "merge", "unmerge", "save", "load", "step"], "(all)")
    found.add_argument("--tiny", action="store_true", help="tiny shapes: does it run at all")
    found.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(a GPU if there is one)",
    )
    found.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this")
    found.add_argument(
        "--case-budget", type=float, metavar="SECONDS", help="time for the rounds of a case (30)"
    )
    found.add_argument(
        "--out", type=Path, metavar="DIR", help=f"for {rows.FILE} (benchmarks/results/<device>)"
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
