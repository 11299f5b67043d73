"""FLUX training from the command line: options to records, then one run."""

from __future__ import annotations

from lowrank.cli.resolve import record, with_network
from lowrank.config.flux import FLUX_TRAIN
from lowrank.models.flux import FLUX, FluxOptions
from lowrank.objective.flow import Flow
from lowrank.train.attach import Script
from lowrank.train.checkpoints import DIFFUSERS
from lowrank.train.prompts import Prompt
from lowrank.train.run import launch

# the log folder's name in the user's documents
SCRIPT = Script("dreambooth-flux-dev-qrlora-deltaR", DIFFUSERS, Prompt(""))


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code. Raises `Refused`."""
    parsed = with_network(FLUX_TRAIN.parse(argv), "networks.delta_r_triu")
    return launch(parsed, FLUX, record(Flow, parsed), record(FluxOptions, parsed), SCRIPT)
