"""A training job: the typed records of a command line, and the job once its options are checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

from accelerate import Accelerator
from torch import nn

from lowrank.config.train import TrainOptions
from lowrank.files import sha256
from lowrank.models.family import Family, FamilyOptions, Source
from lowrank.objective.objective import Objective
from lowrank.train import network_module
from lowrank.train.checkpoints import Checkpoint, Names
from lowrank.train.network_module import KohyaNetwork
from lowrank.train.processes import Sharding


@dataclass(frozen=True, kw_only=True)
class Script:
    """What differs between training scripts besides options and model family."""

    tracker: str  # the log folder's name
    unnamed: str  # stem of the final file without --output_name


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What to train. The run sets the precision and device of `source` when it starts."""

    options: TrainOptions
    script: Script
    family: Family
    source: Source
    switches: FamilyOptions
    objective: Objective
    command: str  # the shell line, without secrets
    config: Callable[[TrainOptions], str]  # every option as TOML, for --config_file
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunningJob(TrainJob):
    """A job whose options have been checked, with its devices. `resumed` is the checkpoint of --resume."""

    accelerator: Accelerator
    names: Names
    networks: ModuleType
    arguments: dict[str, str]
    seed: int
    resumed: Checkpoint | None
    sharding: Sharding | None  # of the base over several processes

    @property
    def base_weights(self) -> list[tuple[str, float]]:
        """The files of --base_weights and their strengths."""
        network = self.options.network
        strengths = (*network.base_weights_multiplier, *[1.0] * len(network.base_weights))
        return list(zip(network.base_weights, strengths, strict=False))

    @cached_property
    def base_weight_hashes(self) -> list[tuple[str, float]]:
        """The SHA-256 of each --base_weights file, and its strength."""
        return [(sha256(path), strength) for path, strength in self.base_weights]

    def create(
        self, denoiser: nn.Module, encoders: list[nn.Module], weights: str | None, report: bool = False
    ) -> KohyaNetwork:
        """Create the network and attach it; a denoiser on the meta device gives a network without values.

        With `report`, tensors of `weights` that are not used are listed, or refused with --strict.
        """
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
            report=report,
            strict=network.strict,
        )
