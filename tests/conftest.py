"""What holds for every test: one thread, fixed seeds, no network, GPU tests skipped by name."""

from __future__ import annotations

import os

import pytest
import torch

# Nothing here may reach a hub; cuBLAS is deterministic only with a fixed workspace.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The oracle's gradients on a GPU, see dcft_kernels.reference.materialised.
torch.backends.cudnn.allow_tf32 = False
torch.set_num_threads(1)
# This also fills uninitialised memory with NaN, so an element that nothing wrote shows.
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
