"""SD 1.x, SD 2.x and SDXL training from the command line: options to records, then one run."""

from __future__ import annotations

from lowrank.cli.resolve import record, with_network
from lowrank.config.command_line import CommandLine
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN
from lowrank.models.family import Family
from lowrank.models.sd import SD15, SdOptions
from lowrank.models.sdxl import SDXL
from lowrank.objective.diffusion import Diffusion
from lowrank.train.attach import Script
from lowrank.train.checkpoints import KOHYAS
from lowrank.train.prompts import Prompt
from lowrank.train.run import launch

SCRIPT = Script("network_train", KOHYAS, Prompt("", sample_steps=30, scale=7.5, guidance_scale=None))


def main(argv: list[str] | None = None, surface: CommandLine = SD_TRAIN, family: Family = SD15) -> int:
    """Train, and return the exit code. Raises `Refused`."""
    parsed = with_network(surface.parse(argv), "networks.lora")
    return launch(parsed, family, record(Diffusion, parsed), record(SdOptions, parsed), SCRIPT)


def main_sdxl(argv: list[str] | None = None) -> int:
    """Train an adapter for SDXL, and return the exit code. Raises `Refused`."""
    return main(argv, SDXL_TRAIN, SDXL)
