"""The one error of the interface: a sentence that names the thing, the value, the limit and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 1500  # letters of a message


class Refused(ValueError):
    """An error that the user can correct; shown as one sentence without a traceback; the exit code is 1.

    A message may quote a value from a file of any size, so the middle of a long message is left out.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(shortened(str(text)))


def shortened(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning and its end with … between them where it has more than `longest` letters."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 3]} … {text[-end:]}"


class SeveralRefused(Refused):
    """Several errors at once, in `reasons`; each is one sentence with its way out."""

    def __init__(self, title: str, reasons: Iterable[str]) -> None:
        self.title, self.reasons = title, tuple(reasons)
        super().__init__(f"{title}: " + "; ".join(self.reasons))


def reasons_of(error: Refused) -> tuple[str, ...]:
    """The reasons of an error: one, or several."""
    return error.reasons if isinstance(error, SeveralRefused) else (str(error),)


def joined(title: str, reasons: Iterable[str]) -> Refused:
    """Return one error with all reasons, of which there is at least one."""
    different = tuple(dict.fromkeys(reasons))
    return SeveralRefused(title, different) if len(different) > 1 else Refused("".join(different))


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name[:200], [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
