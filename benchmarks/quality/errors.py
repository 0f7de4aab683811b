"""What the person who runs the harness can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QualityError(Exception):
    """A wrong argument, file or state; shown without a traceback."""


class DivergedError(QualityError):
    """A loss that is not a finite number; the message names the step, the layer, the checkpoint."""


def unknown(argument: str, name: str, known: Iterable[str]) -> QualityError:
    """The error for a name that is not one of `known`."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return QualityError(f"{argument}: expected one of {', '.join(known)}, got {name!r}{hint}")
