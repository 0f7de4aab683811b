"""A fifth of `make torture`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and resource limits")
def test_saving_and_loading_under_adverse_conditions():
    command = [sys.executable, "-m", "tests.torture", "--scale", "0.2"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
