"""Shared by every test: one thread, fixed seeds, no network, GPU tests skipped by name."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# No test may reach a hub; cuBLAS is deterministic only with a fixed workspace.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The oracle's gradients on a GPU, see dcft_kernels.reference.
torch.backends.cudnn.allow_tf32 = False
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)
# Also fills uninitialised memory with NaN, so that an unwritten element shows.
torch.use_deterministic_algorithms(True)

# The same examples in every run, in any order; a failing one is printed.
hypothesis.settings.register_profile("dcft", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.load_profile("dcft")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
