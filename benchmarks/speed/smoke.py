"""Is it right on this GPU? `python -m benchmarks.speed.smoke --out DIR`.

Every strategy at the project's two goal shapes: forward and all gradients against float64, the
first call and later ones bitwise equal, and the replay of a CUDA graph bitwise equal to eager. Each
result is a line of `smoke.jsonl` as soon as it is known; a check that fails leaves its traceback
there, a strategy that does not take a case its reason, and the next one runs. The exit status is 1
if anything failed.

    TRITON_INTERPRET=1 python -m benchmarks.speed.smoke --tiny --out DIR     # on a CPU
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, rows
from benchmarks.speed import gate, methods
from benchmarks.speed.cases import Case
from benchmarks.speed.levels.layer import LayerProblem, LayerStep
from benchmarks.speed.methods import STRATEGIES, LayerMethod
from benchmarks.speed.provider import why_unavailable
from benchmarks.speed.timing import Replay

SMOKE_FILE = "smoke.jsonl"
SHAPES = ((8192, 4096, 4096), (4096, 768, 768))
TINY_SHAPES = ((32, 64, 48),)
_REPEATS = 3

Results = dict[str, Tensor | None]


def _step(problem: LayerProblem, method: LayerMethod) -> LayerStep:
    problem.generator.manual_seed(0)  # the same adapter every time
    adapted = method.build(problem.base(), problem.generator)
    return LayerStep(problem, adapted, adapted.layer, repeatable=True)


def _run(step: LayerStep) -> Results:
    step.prepare()
    step.run()
    return {name: None if v is None else v.clone() for name, v in step.results().items()}


def correctness(case: Case, device: torch.device, method: LayerMethod) -> dict[str, Any]:
    """Errors relative to float64, and what exceeds its budget or differs between repeats."""
    problem = LayerProblem(case, device)
    step = _step(problem, method)
    runs = [_run(step) for _ in range(_REPEATS)]
    reason = gate.check_layer(problem.given, step.adapted, step.results())
    wrong = [] if reason is None else [reason]
    for name, value in runs[0].items():
        if any(not _equal(value, run[name]) for run in runs[1:]):
            wrong.append(f"{name}: repeats are not bitwise equal")
    errors = {
        name: float(f"{((value.double() - expected).norm() / expected.norm()).item():.2g}")
        for name, expected in gate.expected_results(problem.given, step.adapted)
        if (value := runs[0][name]) is not None
    }
    return {"wrong": wrong, "relative_error": errors}


def graph_replay(case: Case, device: torch.device, method: LayerMethod) -> dict[str, Any]:
    """Results of a CUDA graph that are not bitwise equal to eager ones."""
    eager = _run(_step(LayerProblem(case, device), method))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step = _step(LayerProblem(case, device), method)
    graph = Replay(step, stream)
    captured = step.results()
    for value in captured.values():
        if value is not None:
            value.fill_(torch.nan)
    graph.run()
    torch.cuda.synchronize()
    differing = [name for name, value in eager.items() if not _equal(value, captured[name])]
    return {"wrong": [f"{name}: replay is not bitwise equal to eager" for name in differing]}


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def run(out: Path, device: torch.device, chosen: Sequence[LayerMethod], *, tiny: bool) -> int:
    """Run all checks and store their rows; how many failed."""
    gpu = device.type == "cuda"
    dtype = "bf16" if gpu else "fp32"  # bf16 is wrong under the interpreter
    checks = {"correctness": correctness} | ({"graph_replay": graph_replay} if gpu else {})
    described = vars(environment.describe(device.type))
    failures = 0
    shapes = TINY_SHAPES if tiny else SHAPES
    for shape, method, (name, check) in itertools.product(shapes, chosen, checks.items()):
        try:
            found = check(Case("layer", shape[0], shape[1], shape[2], dtype), device, method)
        except Exception as error:  # the next check may still have something to say
            refused = why_unavailable(error)
            found = {"wrong": ["failed"], "traceback": traceback.format_exc()}
            found = found if refused is None else {"wrong": [], "refused": refused}
        failures += bool(found["wrong"])
        row = {"check": name, "shape": shape, "provider": method.name, **found}
        print(json.dumps(row), flush=True)
        rows.append_line(out / SMOKE_FILE, row | described)
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"for {SMOKE_FILE}")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, also on a CPU")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU: PyTorch finds none; --tiny runs on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = methods.by_name(*(f"dcft_{name}" for name in options.strategies))
    return 1 if run(options.out, device, chosen, tiny=options.tiny) else 0


if __name__ == "__main__":
    sys.exit(main())
