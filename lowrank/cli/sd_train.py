"""SD 1.x, SD 2.x and SDXL training from the command line."""

from __future__ import annotations

from lowrank.cli.early import checks_of
from lowrank.cli.launching import start_missing_processes
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN


def main(argv: list[str] | None = None) -> int:
    """Train an adapter for SD 1.x or 2.x, and return the exit code. Raises `Refused`."""
    parsed = SD_TRAIN.parse(argv, checks_of("networks.lora"))
    start_missing_processes()
    from lowrank.cli import train_jobs  # imports torch, which takes seconds: only for a sound command line

    return train_jobs.launch(train_jobs.sd_job(parsed))


def main_sdxl(argv: list[str] | None = None) -> int:
    """Train an adapter for SDXL, and return the exit code. Raises `Refused`."""
    parsed = SDXL_TRAIN.parse(argv, checks_of("networks.lora"))
    start_missing_processes()
    from lowrank.cli import train_jobs  # imports torch, which takes seconds: only for a sound command line

    return train_jobs.launch(train_jobs.sdxl_job(parsed))
