"""Measure and store: `python -m benchmarks [--only REGEX]`.

A measurement has a name like `layer-main-2048x768->768-fp32-fwd+bwd-dcft`: level, sweep, shape,
dtype, direction, in the sweep `cpu` also threads and neighbour (`2t-busy`), and provider. Every
case is checked, timed and appended to `rows.jsonl` before the next one starts, so a run that is cut
off keeps what it has. A provider that cannot run gets a row with the reason.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import environment, rows
from benchmarks.speed.cases import DTYPES, Case, Scope, parse_shape
from benchmarks.speed.levels import LEVELS
from benchmarks.speed.measure import Outcome, count_launches, measure
from benchmarks.speed.provider import BASELINE, Provider
from benchmarks.speed.timing import Plan
from benchmarks.stored import CLOCKS

_LEAST_S = 5.0  # a case that is started at the end of the budget still has this for its first round
TINY_PLAN = Plan(budget_s=1.0, max_rounds=3)


def results_folder(chosen: Path | None, device_type: str, *, tiny: bool) -> Path:
    """Where rows go: `chosen`, or a folder named for the device."""
    if chosen is not None:
        return chosen
    root = environment.ROOT / ".benchmarks" / "tiny" if tiny else environment.RESULTS
    return root / environment.describe(device_type).slug


def measurement_name(case: Case, provider: Provider) -> str:
    """What `--only` and pytest's `-k` select by."""
    parts = (case.level, case.sweep, case.shape, case.dtype, case.direction)
    return "-".join((*parts, *case.conditions, provider.key))


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
        plan if case.threads is None else plan.brief(),
        device=device,
        record=lambda row: rows.append(file, row),
    )
    timed = [o.row for o in outcomes if o.row.rounds]
    rounds = max((row.rounds for row in timed), default=0)
    seconds = time.perf_counter() - start
    say(f"{case}: {len(timed)} of {len(outcomes)} providers, {rounds} rounds, {seconds:.0f} s")
    for outcome in outcomes:
        if device.type == "cuda" or (outcome.row.error is not None and not outcome.skipped):
            say(f"  {outcome.key}: {_in_short(outcome.row)}")
    return outcomes


def _in_short(row: rows.Row) -> str:
    """Medians in milliseconds, with the ratio to the baseline; or why there are none."""
    parts = []
    for clock in CLOCKS:
        median, ratio = row.milliseconds(clock), row.ratio(clock)
        if median is not None:
            parts.append(f"{clock} {median:.4f}" + ("" if ratio is None else f" ({ratio:.3f})"))
    return ", ".join([*parts, *filter(None, (row.error, row.graph_error))])


def add_launches(case: Case, outcomes: Sequence[Outcome], file: Path, device: torch.device) -> None:
    """Store the rows of a case again, with the launches of each provider."""
    count_launches(
        outcomes,
        lambda: LEVELS[case.level].problem(case, device),
        device,
        record=lambda row: rows.append(file, row),
    )


def selected(options: argparse.Namespace) -> list[tuple[Case, list[Provider]]]:
    """The cases and providers that the options select, each with the baseline.

    Raises:
        ValueError: a bad shape.
    """
    scope = Scope(options.device, options.tiny)
    cases = [case for level in LEVELS.values() for case in level.cases(scope)]
    if options.shapes:
        cases = [
            Case(level, *parse_shape(text), options.dtype or cases[0].dtype, sweep="asked")
            for level in ("layer", "kernel")
            for text in options.shapes
        ]
    found = []
    for case in cases:
        providers = LEVELS[case.level].providers(case)
        names = {p.key for p in providers if re.search(options.only, measurement_name(case, p))}
        if names and options.dtype in (None, case.dtype):
            found.append((case, [p for p in providers if p.key in {*names, BASELINE}]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status is 1 if a provider was wrong or failed, 3 if it broke the GPU."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        command_line.error("--device: expected a GPU that PyTorch finds, and there is none")
    try:
        chosen = selected(options)
    except ValueError as error:
        command_line.error(str(error))
    if not chosen:
        command_line.error("nothing to measure: no measurement has such a name")
    described = environment.describe(options.device)
    file = results_folder(options.out, options.device, tiny=options.tiny) / rows.ROWS_FILE
    plan = TINY_PLAN if options.tiny else Plan()
    if options.case_budget is not None:
        plan = replace(plan, budget_s=options.case_budget)
    _say(f"{described.device}, torch {described.torch}, commit {described.commit}")
    device = torch.device(options.device)
    failures = 0
    measured: list[tuple[Case, list[Outcome]]] = []
    start = time.monotonic()
    for number, (case, providers) in enumerate(chosen):
        left = options.budget - (time.monotonic() - start)
        if number and left < 0:
            rest = "; ".join(str(c) for c, _ in chosen[number:])
            _say(f"the budget of {options.budget:.0f} s is spent; not measured: {rest}")
            break
        limited = replace(plan, first_round_s=min(plan.first_round_s, max(left, _LEAST_S)))
        outcomes = measure_case(case, providers, file, limited, device, _say)
        measured.append((case, outcomes))
        failures += sum(o.row.error is not None and not o.skipped for o in outcomes)
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                _say(f"{case} broke the GPU's context, leave out what failed first: {error}")
                return 3
    for case, outcomes in measured:
        add_launches(case, outcomes, file, device)
    _say(f"rows: {file}")
    return 1 if failures else 0


def _say(text: str) -> None:
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    found.add_argument(
        "--only", default="", metavar="REGEX", help="measurements by name; the baseline always runs"
    )
    found.add_argument(
        "--shapes", nargs="+", default=[], metavar="TxNxM", help="for the layer and kernel levels"
    )
    found.add_argument("--dtype", choices=DTYPES, help="(all)")
    found.add_argument("--tiny", action="store_true", help="tiny shapes: does it run at all")
    found.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(a GPU if there is one)",
    )
    found.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="start no case and no provider after this",
    )
    found.add_argument(
        "--case-budget", type=float, metavar="SECONDS", help="time for the rounds of a case (30)"
    )
    found.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"for {rows.ROWS_FILE} (benchmarks/results/<device>)",
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
