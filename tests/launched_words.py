"""What Triton's compiled launcher hands to the driver, on a machine without a GPU.

    python -m tests.launched_words FOLDER      # of stand_in_driver.c, compiled to libcuda.so.1

Runs every launcher of `test_launching` three times on the same tensors: the first goes through
Triton, the others are prepared. What is compared is the kernel, its grid, and the lower word of
every parameter. Prints, and returns as exit status, how many hand over other words.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from benchmarks.absent_gpu import AbsentDriver, standing_in
from tests import test_launching

# Parameters that a tensor descriptor becomes: itself, two sizes, two strides.
_OF_A_DESCRIPTOR = 5
_MOST_WORDS = 1 << 16


class Replay:
    """Hands out what the first of several equal runs made, so that addresses are the same."""

    def __init__(self) -> None:
        self._made: list[Any] = []
        self._turn = 0

    def begin(self) -> None:
        self._turn = 0

    def of(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, **options: Any) -> Any:
            if self._turn == len(self._made):
                self._made.append(make(*arguments, **options))
            self._turn += 1
            return self._made[self._turn - 1]

        return made


class Driver(AbsentDriver):
    """Triton's own utilities and launcher, over the stand-in."""

    def __init__(self, architecture: str, library: Any) -> None:
        super().__init__(architecture)
        self.utils = CudaUtils()
        self._library = library

    def get_current_device(self) -> Any:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kinds = [str(kind) for kind in source.signature.values() if kind != "constexpr"]
        count = sum(_OF_A_DESCRIPTOR if k.startswith("tensordesc") else 1 for k in kinds)
        launcher = CudaLauncher(source, metadata)

        def launch(*arguments: Any) -> None:
            self._library.expect_parameters(count)
            launcher(*arguments)

        return launch


def main(folder: Path) -> int:
    """Compare; how many launchers differ."""
    library = ctypes.CDLL(str(folder / "libcuda.so.1"))
    buffer = (ctypes.c_uint * _MOST_WORDS)()
    makers = (
        (test_launching, "tokens", test_launching.tokens),
        (test_launching, "adapter", test_launching.adapter),
        (Tensor, "new_empty", Tensor.new_empty),
    )
    different = 0
    with standing_in(Driver("sm_90", library), "sm_90"):
        for launcher in test_launching.LAUNCHERS:
            replay, runs = Replay(), []
            for owner, name, make in makers:
                setattr(owner, name, replay.of(make))
            for _ in range(3):
                replay.begin()
                launcher()
                runs.append(buffer[: library.take_words(buffer)])
            for owner, name, make in makers:
                setattr(owner, name, make)
            same = runs[0] == runs[1] == runs[2]
            different += not same or not runs[0]
            print(f"{launcher.__name__}: {len(runs[0])} words, {'the same' if same else runs}")
    return different


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
