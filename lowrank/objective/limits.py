"""What the options of an objective may be; the fields of its record are the flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.errors import Refused, nearest


def check_record(
    record: Any,
    *,
    choices: Mapping[str, Sequence[str]],
    positive: Sequence[str],
    not_negative: Sequence[str],
) -> None:
    """Raise `Refused` for an unknown choice or a number outside; None is a number that is off, and so 0."""
    for option, known in choices.items():
        value = getattr(record, option)
        if value not in known:
            raise Refused(
                f"--{option} {value!r} is unknown{nearest(value, known)}; choose one of {', '.join(known)}"
            )
    for option in positive:
        if not getattr(record, option) > 0:
            raise Refused(f"--{option} {getattr(record, option)} must be above 0")
    for option in not_negative:
        if not (getattr(record, option) or 0) >= 0:
            raise Refused(f"--{option} {getattr(record, option)} must not be negative")
