"""What a run was doing when its memory ran out: one sentence with a setting to change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lowrank.errors import Refused, shortened

# What torch's allocators and libraries raise as a plain RuntimeError, in their words
_WORDS = ("can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the computer's or the GPU's memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


@contextlib.contextmanager
def phase(
    doing: str,
    change: str,
    last_checkpoint: Callable[[], Path | None] | None = None,
    prediction: Callable[[], str] | None = None,
) -> Iterator[None]:
    """Raise `Refused` where memory runs out in a block.

    `doing` names the block ("encoding the captions"), `change` the settings that lower its peak, `prediction`
    what was planned for it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(shortened(str(error).strip() or "no more could be allocated", 300).split())
        kept = last_checkpoint() if last_checkpoint else None
        checkpoint = f"; the last checkpoint is {kept}, continue from it with --resume" if kept else ""
        planned = f"; {text}" if prediction and (text := prediction()) else ""
        raise Refused(f"out of memory while {doing} ({reason}){planned}; {change}{checkpoint}") from error
