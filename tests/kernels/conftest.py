"""The kernels' tests run twice: on CPU tensors under Triton's interpreter, and on a GPU.

`TRITON_INTERPRET=1` must be set before Triton is imported, so the interpreter's run is a process of
its own: `make test` runs both. Without it the tests in this folder need a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests.kernels.interpreter import repair

    repair()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/kernels/" in item.path.as_posix():
            item.add_marker(pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu)
            if not INTERPRETED and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the CPU under the interpreter, else the GPU."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that runs `seeded`; under the interpreter, its tiles on two multiprocessors.

    The Gluon kernel runs in `gluon_interpreter`, which also checks how its loads, products and
    stores synchronise, and that it waits for the launch before it.
    """
    if not INTERPRETED:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a GPU of compute capability 9.0")
        yield
        return
    from dcft_kernels import functional
    from dcft_kernels.triton import gemm, tiles
    from tests.kernels.gluon_interpreter import Interpreter

    kernel = Interpreter(gemm._gemm_kernel, late=("u", "spread"))
    monkeypatch.setattr(gemm, "_gemm_kernel", kernel)
    monkeypatch.setattr(functional, "_checked_calls", {})
    with tiles.as_architecture("sm_90"):
        yield
