"""FLUX training from the command line."""

from __future__ import annotations

from lowrank.cli.launching import start_missing_processes
from lowrank.config.checks import check_machine
from lowrank.config.flux import FLUX_TRAIN


def main(argv: list[str] | None = None) -> int:
    """Train an adapter for FLUX, and return the exit code. Raises `Refused`."""
    parsed = FLUX_TRAIN.parse(argv, check_machine)
    start_missing_processes()
    from lowrank.cli import train_jobs  # imports torch, which takes seconds: only for a sound command line

    return train_jobs.launch(train_jobs.flux_job(parsed))
