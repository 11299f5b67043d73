"""A training job: what a script asks for as typed records, and the same once this machine has checked it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

from accelerate import Accelerator
from torch import nn

from lowrank.config.command_line import Parsed
from lowrank.config.train import TrainOptions
from lowrank.files import sha256
from lowrank.models.family import Family, FamilyOptions, Source
from lowrank.objective.objective import Objective
from lowrank.train import network_module
from lowrank.train.checkpoints import Checkpoint, Names
from lowrank.train.network_module import KohyaNetwork
from lowrank.train.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class Script:
    """What distinguishes one training script from another, besides its options and its family."""

    tracker: str  # the log folder's name
    unnamed: str  # stem of the last file without --output_name
    prompt: Prompt  # defaults of a prompt for pictures


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What to train. `source` gets its precision and device when the run starts."""

    options: TrainOptions
    script: Script
    family: Family
    source: Source
    switches: FamilyOptions
    objective: Objective
    command: str  # the shell line, without secrets
    config: str  # every option as TOML, for --config_file
    notes: tuple[str, ...] = ()


def train_job(
    parsed: Parsed[TrainOptions],
    script: Script,
    family: Family,
    source: Source,
    switches: FamilyOptions,
    objective: Objective,
) -> TrainJob:
    """The job of a parsed command line."""
    return TrainJob(
        options=parsed.options,
        script=script,
        family=family,
        source=source,
        switches=switches,
        objective=objective,
        command=parsed.command,
        config=parsed.toml(),
        notes=parsed.notes,
    )


@dataclass(frozen=True, kw_only=True)
class RunningJob(TrainJob):
    """A job that was checked as far as options alone allow. `resumed` is the checkpoint of --resume."""

    accelerator: Accelerator
    names: Names
    networks: ModuleType
    arguments: dict[str, str]
    seed: int
    resumed: Checkpoint | None

    @property
    def base_weights(self) -> list[tuple[str, float]]:
        """The files of --base_weights and their strengths."""
        network = self.options.network
        strengths = (*network.base_weights_multiplier, *[1.0] * len(network.base_weights))
        return list(zip(network.base_weights, strengths, strict=False))

    @cached_property
    def base_weight_hashes(self) -> list[tuple[str, float]]:
        """What --base_weights change the model by: each file's SHA-256 and its strength."""
        return [(sha256(path), strength) for path, strength in self.base_weights]

    def create(self, denoiser: nn.Module, encoders: list[nn.Module], weights: str | None) -> KohyaNetwork:
        """The network on a denoiser; on the meta device it has shapes and no values."""
        network = self.options.network
        return network_module.create(
            self.networks,
            denoiser,
            encoders,
            rank=network.network_dim,
            alpha=network.network_alpha,
            dropout=network.network_dropout,
            arguments=self.arguments,
            weights=weights,
            dim_from_weights=bool(weights) and network.dim_from_weights,
            train_denoiser=not network.network_train_text_encoder_only,
        )
