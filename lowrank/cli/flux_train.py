"""FLUX training from the command line."""

from __future__ import annotations

from lowrank.cli.early import checks_of
from lowrank.cli.launching import start_missing_processes
from lowrank.config.flux import FLUX_TRAIN


def main(argv: list[str] | None = None) -> int:
    """Train an adapter for FLUX, and return the exit code. Raises `Refused`."""
    parsed = FLUX_TRAIN.parse(argv, checks_of("networks.delta_r_triu"))
    start_missing_processes()
    from lowrank.cli import train_jobs  # imports torch, which takes seconds: only for a sound command line

    return train_jobs.launch(train_jobs.flux_job(parsed))
