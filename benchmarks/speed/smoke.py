"""Is it right on this GPU? `python -m benchmarks.speed.smoke --out DIR`.

Every strategy at the project's two goal shapes: forward and all gradients against float64, repeats
bitwise equal, and the replay of a CUDA graph bitwise equal to eager. Each result is a line of
`smoke.jsonl` as soon as it is known; a part that fails leaves its traceback there, and the next one
runs. The exit status is 1 if anything failed.

    TRITON_INTERPRET=1 python -m benchmarks.speed.smoke --tiny --out DIR     # on a CPU
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import environment, rows
from benchmarks.speed import gate
from dcft_kernels import dcft_linear

FILE = "smoke.jsonl"
STRATEGIES = ("torch", "row_block")
SHAPES = ((8192, 4096, 4096), (4096, 768, 768))
TINY_SHAPES = ((32, 64, 48),)
_RANK, _KERNEL_SIZE = 1, 8
_REPEATS = 3
_ROUNDINGS = 4  # as for the layer level, see benchmarks.speed.methods.AdaptedLayer

Shape = tuple[int, int, int]
Results = dict[str, Tensor]


class Layer:
    """The input and parameters of one layer; the same values for the same shape and dtype."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        T, n, m = shape
        d, k = _KERNEL_SIZE, _RANK
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, std: float = 1.0) -> Tensor:
            return torch.randn(size, generator=generator, device=device) * std

        self.dtype = dtype
        self.x, self.g = draw(T, n).to(dtype), draw(T, m).to(dtype)
        self.weight, self.bias = draw(m, n, std=n**-0.5).to(dtype), draw(m).to(dtype)
        # An increment as large as the weight.
        self.A, self.B, self.C = draw(k, n // d), draw(m // d, k), draw(d, d, std=n**-0.5)
        for tensor in self.trained:
            tensor.requires_grad_()

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """What a step computes gradients of."""
        return self.x, self.A, self.B, self.C

    def step(self, strategy: str) -> Results:
        """Output and gradients."""
        on_kernels = strategy != "torch"
        y = dcft_linear(
            self.x,
            self.weight,
            self.bias,
            self.A,
            self.B,
            self.C,
            backend="triton" if on_kernels else "torch",
            strategy=strategy if on_kernels else "auto",
        )
        return _results(y, torch.autograd.grad(y, self.trained, self.g))

    def truth(self) -> Results:
        """The same in float64, by the factored identity and without `DW`."""
        x, A, B, C = (t.detach().double().requires_grad_() for t in self.trained)
        u = torch.einsum("tip,ki->tkp", x.unflatten(1, (-1, _KERNEL_SIZE)), A)
        update = torch.einsum("tkq,jk->tjq", u @ C.t(), B).flatten(1)
        y = F.linear(x, self.weight.double(), self.bias.double()) + update
        return _results(y, torch.autograd.grad(y, (x, A, B, C), self.g.double()))


def _results(y: Tensor, gradients: Sequence[Tensor]) -> Results:
    return dict(zip(("y", "gx", "gA", "gB", "gC"), (y.detach(), *gradients), strict=True))


def correctness(make: Callable[[], Layer], strategy: str) -> dict[str, Any]:
    """Errors relative to float64, and what exceeds the error budget or differs between repeats."""
    layer = make()
    truth = layer.truth()
    runs = [layer.step(strategy) for _ in range(_REPEATS)]
    T, n = layer.x.shape
    wrong = []
    for name, expected in truth.items():
        budgets = gate.budgets(layer.dtype, expected, T + n + layer.g.shape[1], _ROUNDINGS)
        reason = gate.difference(runs[0][name], expected, *budgets)
        if reason is not None:
            wrong.append(f"{name}: {reason}")
        if not all(torch.equal(runs[0][name], run[name]) for run in runs[1:]):
            wrong.append(f"{name}: repeats are not bitwise equal")
    errors = {
        name: float(f"{(runs[0][name].double() - t).norm().item() / t.norm().item():.2g}")
        for name, t in truth.items()
    }
    return {"wrong": wrong, "relative_error": errors}


def graph_replay(make: Callable[[], Layer], strategy: str) -> dict[str, Any]:
    """Results of a CUDA graph that are not bitwise equal to eager ones."""
    eager = make().step(strategy)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer = make()  # leaves used on another stream before could not be captured
        layer.step(strategy)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = layer.step(strategy)
    for tensor in captured.values():
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    differing = [name for name, value in eager.items() if not torch.equal(value, captured[name])]
    return {"wrong": [f"{name}: replay is not bitwise equal to eager" for name in differing]}


CHECKS = {"correctness": correctness, "graph_replay": graph_replay}


def run(out: Path, shapes: Sequence[Shape], strategies: Sequence[str], device: torch.device) -> int:
    """Run all checks and store their rows; how many failed."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32  # bf16 is wrong under the interpreter
    described = environment.describe(device.type)
    failures = 0
    for shape, strategy, (name, check) in itertools.product(shapes, strategies, CHECKS.items()):
        if name == "graph_replay" and not gpu:
            continue
        try:
            found = check(functools.partial(Layer, shape, dtype, device), strategy)
        except Exception:  # the next check may still have something to say
            found = {"wrong": ["failed"], "traceback": traceback.format_exc()}
        failures += bool(found["wrong"])
        row = {"part": name, "shape": shape, "strategy": strategy, **found}
        print(json.dumps(row), flush=True)
        rows.append_line(out / FILE, row | vars(described))
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"for {FILE}")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, also on a CPU")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU: PyTorch finds none; --tiny runs on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = TINY_SHAPES if options.tiny else SHAPES
    return 1 if run(options.out, shapes, options.strategies, device) else 0


if __name__ == "__main__":
    sys.exit(main())
