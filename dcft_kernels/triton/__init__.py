"""Triton kernels for DCFT. This release ships none yet; `why_unavailable` says so.

The folder shadows the name `triton` only for scripts run from inside it: kernels import the
compiler absolutely (`import triton`), and the package never binds this module at its top level.
"""

from __future__ import annotations


def why_unavailable() -> str:
    """The reason why `backend="triton"` cannot run here."""
    return "this release of dcft_kernels has no Triton kernels yet"
