"""SD 1.x, SD 2.x and SDXL training from the command line: options to records, then one run."""

from __future__ import annotations

from lowrank.cli.options import record, with_network
from lowrank.models.family import Family
from lowrank.models.sd import SD15, SdOptions
from lowrank.objective.ddpm import Diffusion
from lowrank.options import Surface
from lowrank.surfaces.sd import SD_TRAIN
from lowrank.train.adapt import Script
from lowrank.train.launch import launch
from lowrank.train.prompts import Prompt
from lowrank.train.state import KOHYAS

SCRIPT = Script("network_train", KOHYAS, Prompt("", sample_steps=30, scale=7.5, guidance_scale=None))


def main(argv: list[str] | None = None, surface: Surface = SD_TRAIN, family: Family = SD15) -> int:
    """Train, and return the exit code. Raises `Refused`."""
    parsed = with_network(surface.parse(argv), "networks.lora")
    return launch(parsed, family, record(Diffusion, parsed), record(SdOptions, parsed), SCRIPT)
