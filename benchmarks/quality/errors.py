"""Errors that the caller can fix; the command line shows them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QualityError(Exception):
    """A wrong argument, file or model."""


class DivergedError(QualityError):
    """A loss, output or parameter that is not finite."""


def unknown(argument: str, name: str, known: Iterable[str]) -> QualityError:
    """The error for a name that is not one of `known`."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return QualityError(f"{argument}: expected one of {', '.join(known)}, got {name!r}{hint}")
