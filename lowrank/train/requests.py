"""What is asked of a running process: to stop, by a signal or a file, or to save now, by a file.

`touch OUTPUT_DIR/SAVE` writes a checkpoint after the current step; `touch OUTPUT_DIR/STOP` also ends the run,
as SIGTERM and Ctrl-C do. All processes of a run act after the same step.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)

SAVE, STOP = "SAVE", "STOP"


class Asked(NamedTuple):
    """What is due after a step, apart from what the options ask for."""

    save: bool
    stop: bool


def remove_requests(folder: Path, when: str) -> None:
    """Remove files that were made `when` no run was there to obey them."""
    for path in (folder / SAVE, folder / STOP):
        if _take(path):
            logger.warning("removed %s, which was made %s", path, when)


def _take(path: Path) -> bool:
    """Whether a file was there; it is removed, so that it is obeyed once."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:  # e.g. a folder of that name
        logger.warning("%s cannot be removed (%s) and is ignored", path, error)
        return False
    return True


class Requests:
    """The signals of this process and the files in the output folder; the main process reads the files."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self._folder, self._accelerator = folder, accelerator
        self._signalled = False

    def after_step(self) -> Asked:
        """What is asked for now. Every process must call this after every step; all get the same answer."""
        main = self._accelerator.is_main_process
        save, stop = (main and _take(self._folder / name) for name in (SAVE, STOP))
        asked = Asked(save, stop or self._signalled)
        if self._accelerator.num_processes == 1:
            return asked
        # signals reach the processes at different steps, and the disk may not be shared
        flags = torch.tensor([float(flag) for flag in asked], device=self._accelerator.device)
        total: torch.Tensor = self._accelerator.reduce(flags, "sum")  # pyright: ignore[reportAssignmentType]
        return Asked(*(count > 0 for count in total.tolist()))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """End the run at the first signal after its step, with a checkpoint; at the second at once."""

        def stop(number, _frame):
            if self._signalled:
                raise KeyboardInterrupt
            self._signalled = True
            logger.warning(
                "stopping after this step with a checkpoint; press Ctrl-C again to stop without one"
            )

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
