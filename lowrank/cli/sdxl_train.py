"""SDXL training from the command line: `sd_train` with SDXL's flags and family."""

from __future__ import annotations

from lowrank.cli import sd_train
from lowrank.models.sdxl import SDXL
from lowrank.surfaces.sd import SDXL_TRAIN


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code. Raises `Refused`."""
    return sd_train.main(argv, SDXL_TRAIN, SDXL)
