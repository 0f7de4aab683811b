"""The benchmarks' calls of the strategy `seeded`: each is right by its own gate, where it runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.speed.cases import Case
from benchmarks.speed.levels import kernel
from benchmarks.speed.provider import UnavailableError
from tests.kernels.conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("the benchmarks run their gates on a GPU", allow_module_level=True)


def workload_of(name: str):
    case = Case("kernel", 140, 264, 328, "bf16")
    return kernel._workload(kernel.KernelProblem(case, torch.device("cpu")), name)


@pytest.mark.parametrize("name", kernel.SEEDED)
def test_kernels_of_seeded_pass_their_gates(name: str, hopper) -> None:
    workload = workload_of(name)
    workload.step.prepare()
    workload.step.run()
    assert workload.check() is None
    for result in workload.step.results.values():
        before = result.clone()
        result.zero_()
        assert workload.check() is not None
        result.copy_(before)


@pytest.mark.parametrize("name", kernel.SEEDED)
def test_other_architectures_say_why_not(name: str) -> None:
    with pytest.raises(UnavailableError, match=r"needs a GPU of compute capability 9\.0"):
        workload_of(name)
