"""The one error of the interface: a sentence that names the thing, the value, the limit and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Refused(ValueError):
    """An error that the user can correct; shown as one sentence without a traceback; the exit code is 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
