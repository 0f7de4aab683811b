"""A launch that was prepared is the one that Triton would have made."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted are not launched", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from benchmarks import absent_gpu, host, host_rows  # noqa: E402
from benchmarks.absent_gpu import Dropped  # noqa: E402
from dcft_kernels import DCFTLinear, dispatch  # noqa: E402
from dcft_kernels.adapter import Adapter  # noqa: E402
from dcft_kernels.adapter import Geometry  # noqa: E402
from dcft_kernels.triton import launching, tiles  # noqa: E402
from dcft_kernels.triton.backward import backward  # noqa: E402
from dcft_kernels.triton.expand import expand, expand_backward  # noqa: E402
from dcft_kernels.triton.fused_backward import fused_backward  # noqa: E402
from dcft_kernels.triton.fused_linear import fused_linear  # noqa: E402
from dcft_kernels.triton.shrink_expand import shrink_expand  # noqa: E402

N, M = 64, 32


def tokens(count: int, features: int, *, offset: int = 0) -> Tensor:
    """bfloat16 `[count, features]`, `offset` elements behind an aligned address."""
    return torch.zeros(count * features + offset, dtype=torch.bfloat16)[offset:].view(
        count, features
    )


def adapter(rank: int = 1, scaling: float = 0.5, seed: Tensor | None = None) -> Adapter:
    geometry = Geometry.build(N, M, rank, (8, 8), (8, 8))
    A, B, C = (torch.zeros(s) for s in (geometry.shape_A, geometry.shape_B, geometry.shape_C))
    return Adapter(A, B, C, scaling, geometry, 0.5, seed)


def forward(count: int = 20, offset: int = 0, **kind: Any) -> None:
    x, u, y = tokens(count, N, offset=offset), tokens(count, 8), tokens(count, M)
    shrink_expand(x, adapter(**kind), u=u, bias=tokens(1, M)[0], y=y)


def gradients(count: int = 20, **kind: Any) -> None:
    backward(
        adapter(**kind), g=tokens(count, M), x=tokens(count, N), u=tokens(count, 8),
        gx=tokens(count, N),
        needs_A=True, needs_B=True, needs_C=True,
    )  # fmt: skip


def gradient_of_x(**kind: Any) -> None:
    backward(adapter(**kind), g=tokens(20, M), gx=tokens(20, N))


def fused(count: int = 20, **kind: Any) -> None:
    x, y = tokens(count, N), tokens(count, M)
    fused_linear(x, tokens(M, N), adapter(**kind), y, u=tokens(count, 8))


def fused_gradient(**kind: Any) -> None:
    fused_linear(tokens(20, M), tokens(M, N), adapter(**kind), tokens(20, N), grad_input=True)


def fused_gradients(count: int = 20, **kind: Any) -> None:
    fused_backward(
        tokens(count, M), tokens(count, N), tokens(count, 8), tokens(M, N), adapter(**kind),
        tokens(count, N),
        needs_A=True, needs_B=True, needs_C=True,
    )  # fmt: skip


def merge(**kind: Any) -> None:
    weight = tokens(M, N)
    expand(adapter(**kind), out=weight, weight=weight)


def merge_gradient(**kind: Any) -> None:
    expand_backward(tokens(M, N), adapter(**kind), True, True, True)


LAUNCHERS: list[Callable[..., None]] = [
    forward, gradients, gradient_of_x, fused, fused_gradient, fused_gradients, merge,
    merge_gradient,
]  # fmt: skip


def launched(call: Callable[[], object]) -> list[Dropped]:
    """What a call launches on an H100 that is not there."""
    dropped: list[Dropped] = []
    with absent_gpu.dropping("sm_90", dropped.append):
        call()
    return dropped


def kinds(launch: Dropped) -> list[object]:
    """The arguments, but for addresses and descriptors of tensors, which every call has anew."""
    return [kind(a) for a in launch.arguments if not isinstance(a, TensorDescriptor)]


def kind(argument: object) -> object:
    address = argument.data_ptr() if isinstance(argument, Tensor) else argument
    return "address" if isinstance(address, int) and address > 1 << 32 else address


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
def test_the_second_launch_is_the_first_without_a_look_at_its_arguments(
    launcher: Callable[..., None],
) -> None:
    ways: list[bool] = []
    inside = launching._compiled

    def calls() -> None:
        for _ in range(3):
            launcher()

    def compiled(kernel: Any) -> Any:
        ways.append(True)
        return inside(kernel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "_compiled", compiled)
        dropped = launched(calls)
    count = len(dropped) // 3
    assert count * 3 == len(dropped) > 0
    assert len(ways) == count  # through Triton once for each launch, and never again
    for first, second, third in zip(
        dropped[:count], dropped[count : 2 * count], dropped[2 * count :], strict=True
    ):
        assert first.kernel == second.kernel == third.kernel
        assert first.grid == second.grid == third.grid
        # What is None to Triton is no argument of the compiled kernel.
        same = [a if a is not None else b for a, b in zip(kinds(first), kinds(second), strict=True)]
        assert same == kinds(second) == kinds(third)
        assert any(isinstance(a, Tensor) for a in first.arguments)
        assert not any(isinstance(a, Tensor) for a in second.arguments)


def test_pointers_and_numbers_are_this_call_s() -> None:
    x, y = [tokens(20, N) for _ in range(2)], [tokens(20, M) for _ in range(2)]
    u = tokens(20, 8)

    def calls() -> None:
        for i in (0, 0, 1):
            shrink_expand(x[i], adapter(scaling=2.5 + i), u=u, y=y[i])

    _, second, third = launched(calls)
    assert second.arguments[0] == x[0].data_ptr()
    assert third.arguments[0] == x[1].data_ptr()
    assert y[0].data_ptr() in second.arguments
    assert y[1].data_ptr() in third.arguments
    assert u.data_ptr() in third.arguments
    assert (2.5 in second.arguments, 3.5 in second.arguments) == (True, False)
    assert (2.5 in third.arguments, 3.5 in third.arguments) == (False, True)


@pytest.mark.parametrize(
    "other",
    [
        lambda: forward(offset=1),
        lambda: forward(count=5000),
        lambda: forward(rank=2),
        lambda: shrink_expand(
            tokens(20, 2 * N)[:, ::2], adapter(), u=tokens(20, 8), bias=tokens(1, M)[0],
            y=tokens(20, M),
        ),
        lambda: shrink_expand(
            tokens(20, N).float(), adapter(), u=tokens(20, 8).float(), y=tokens(20, M).float()
        ),
        lambda: shrink_expand(tokens(20, N), adapter(), u=tokens(20, 8), y=tokens(20, M)),
        lambda: shrink_expand(
            tokens(20, N).half(), adapter(), u=tokens(20, 8).half(), bias=tokens(1, M)[0].half(),
            y=tokens(20, M).half(),
        ),
        lambda: forward(seed=torch.tensor(3)),
        lambda: shrink_expand(
            tokens(20, N), adapter(), u=tokens(20, 8), bias=tokens(1, M)[0], base=tokens(20, M),
            y=tokens(20, M),
        ),
    ],
    ids=[
        "unaligned", "more tokens", "another rank", "strided", "float32", "no bias", "float16",
        "dropout", "base",
    ],
)  # fmt: skip
def test_another_kind_of_call_is_another_kernel(other: Callable[[], object]) -> None:
    def calls() -> None:
        forward()
        forward()
        other()
        forward()

    first, second, third, fourth = launched(calls)
    assert first.kernel == second.kernel == fourth.kernel != third.kernel
    assert first.grid == fourth.grid


def test_tf32_is_another_kernel() -> None:
    def in_float32() -> None:
        u, y = tokens(20, 8).float(), tokens(20, M).float()
        shrink_expand(tokens(20, N).float(), adapter(), u=u, y=y)

    def calls() -> None:
        in_float32()
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            in_float32()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        in_float32()

    first, second, third = launched(calls)
    assert first.kernel == third.kernel != second.kernel


@pytest.mark.parametrize("launcher", [forward, gradients, fused, fused_gradients])
def test_every_number_of_tokens_is_served_by_a_few_launches(launcher: Callable[..., None]) -> None:
    """Triton looks at the arguments of a few, for the heights of tiles, and at no others."""
    looked: list[bool] = []
    inside = launching._compiled

    def compiled(kernel: Any) -> Any:
        looked.append(True)
        return inside(kernel)

    counts = [*range(1, 40), 100, 1000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "_compiled", compiled)
        dropped = launched(lambda: [launcher(count) for count in counts])
    of_each = len(dropped) // len(counts)
    assert of_each * len(counts) == len(dropped)
    assert len(looked) <= 5 * of_each
    blocks = [launch.grid[0] for launch in dropped[::of_each]]
    assert blocks == sorted(blocks)
    for count, launch in zip(counts, dropped[::of_each], strict=True):
        assert count in [argument for argument in launch.arguments if type(argument) is int]


def test_unaligned_tensors_go_through_triton_every_time() -> None:
    first, second = launched(lambda: [forward(offset=1) for _ in range(2)])
    assert first.kernel == second.kernel
    assert all(isinstance(launch.arguments[0], Tensor) for launch in (first, second))


def test_a_profiler_s_hooks_are_called() -> None:
    entered: list[str] = []

    def calls() -> None:
        forward()
        forward()
        hook = triton.knobs.runtime.launch_enter_hook
        note = entered.append
        hook.add(lambda metadata: note(metadata.get()["name"]))
        try:
            forward()
        finally:
            hook.calls.clear()
        forward()

    dropped = launched(calls)
    assert entered == ["_shrink_expand_kernel"]
    through_triton = [isinstance(launch.arguments[0], Tensor) for launch in dropped]
    assert through_triton == [True, False, True, False]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_in_place_of_a_chain_is_called(monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    called: list[object] = []

    def calls() -> None:
        forward()
        monkeypatch.setattr(triton.knobs.runtime, hook, called.append)
        forward()
        monkeypatch.setattr(triton.knobs.runtime, hook, None)
        forward()
        monkeypatch.undo()

    dropped = launched(calls)
    assert len(called) == 1
    through_triton = [isinstance(launch.arguments[0], Tensor) for launch in dropped]
    assert through_triton == [True, True, False]


def test_untried_versions_of_triton_look_at_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_IS_TRIED", False)
    dropped = launched(lambda: [forward() for _ in range(3)])
    assert all(isinstance(launch.arguments[0], Tensor) for launch in dropped)


def test_this_version_is_one_that_was_tried() -> None:
    """Or what is asked of Triton here has to be looked at again, and the version be added."""
    assert launching._IS_TRIED


def test_other_tiles_are_other_launches() -> None:
    grids: list[tuple[int, int, int]] = []

    def calls() -> None:
        forward(count=512)
        forward(count=512)
        tile = tiles.lookup("sm_90", "shrink_expand", 2, 16)
        with tiles.override("shrink_expand", tile._replace(tokens=128, warps=8)):
            forward(count=512)
        forward(count=512)

    grids = [launch.grid for launch in launched(calls)]
    assert grids[0] == grids[1] == grids[3]
    assert grids[2] == (4, 1, 1) != grids[0]


def test_constants_out_of_order_are_an_error() -> None:
    class Kernel:
        arg_names = ("x_ptr", "BLOCK", "FLAG")

    with pytest.raises(TypeError, match="constants: expected BLOCK, FLAG in this order, got FLAG"):
        launching.Launch(Kernel(), torch.device("cpu"), [launching.TENSOR], {}, FLAG=True, BLOCK=16)


@pytest.mark.parametrize(
    ("strategy", "forwards", "backwards"), [("row_block", 1, 2), ("fused", 1, 2)]
)
def test_a_layer_launches_what_its_strategy_says(
    strategy: str, forwards: int, backwards: int
) -> None:
    """And the same again for the same input."""
    layer = DCFTLinear.from_linear(torch.nn.Linear(N, M, dtype=torch.bfloat16), strategy=strategy)
    x = tokens(20, N).requires_grad_()
    dropped: list[Dropped] = []
    seen: list[int] = []
    with absent_gpu.dropping("sm_90", dropped.append):
        for _ in range(2):
            y = layer(x)
            seen.append(len(dropped))
            y.backward(torch.zeros_like(y))
            seen.append(len(dropped))
    total = forwards + backwards
    assert seen == [forwards, total, total + forwards, 2 * total]


def test_nothing_is_left_behind() -> None:
    layer = DCFTLinear(N, M, device="cpu")
    with absent_gpu.dropping("sm_90"):
        with torch.no_grad():
            layer(torch.zeros(4, N))
        assert dispatch.why_not_triton(adapter(), torch.float32) is None
    assert dispatch.why_not_triton(adapter(), torch.float32) is not None
    x = torch.ones(4, N)
    dense = layer.weight + layer.delta_weight()
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, dense, layer.bias))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would load in place of the real driver")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles a driver to stand in: needs gcc")
def test_the_driver_gets_the_same_words(tmp_path: Path) -> None:
    """Through Triton's own compiled launcher: which takes pointers as integers, and None as 0."""
    library = tmp_path / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("stand_in_driver.c")
    build = ["gcc", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)]
    subprocess.run(build, check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    places = {name: str(tmp_path) for name in ("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH")}
    compared = subprocess.run(
        [sys.executable, "-m", "tests.launched_words", str(tmp_path)],
        env={**os.environ, **places, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    print(compared.stdout, compared.stderr)
    assert compared.returncode == 0
    assert compared.stdout.count("the same") == len(LAUNCHERS)


def test_the_processor_s_share_is_measured_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    providers = ("frozen", "dcft_row_block")
    arguments = ["--out", str(tmp_path), "--rounds", "1", "--providers", *providers]
    before = (torch.get_num_threads(), gc.isenabled())
    assert host.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / host_rows.FILE).read_text().splitlines()]
    assert [row["provider"] for row in rows] == list(providers) * 6
    assert {row["direction"] for row in rows} == set(host.DIRECTIONS)
    assert all(row["microseconds"] > 0 and row["architecture"] == "sm_90" for row in rows)
    printed = capsys.readouterr().out
    assert all(f"| {label} |" in printed for label in ("frozen nn.Linear", "DCFT, row_block"))
    assert (torch.get_num_threads(), gc.isenabled()) == before


def test_the_processor_s_share_is_the_least_of_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 2.0, 5.0, 5.0, 6.0, 6.0, 10.0])  # a 2, b 3, then b 1, a 4
    monkeypatch.setattr(host.time, "process_time", lambda: next(now))
    monkeypatch.setattr(host, "_CALLS", 1)
    assert host.seconds({"a": lambda: None, "b": lambda: None}, 2) == {"a": 2.0, "b": 1.0}


def test_no_rounds_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host.main(["--rounds", "0"])
    assert "--rounds: expected at least 1, got 0" in capsys.readouterr().err
