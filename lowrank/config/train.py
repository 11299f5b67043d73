"""The options of a training run as one typed record; each script adds the options of its model family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from lowrank.config.command_line import ConfigFile
from lowrank.config.flag import FlagSpec, fields_of
from lowrank.config.flags_data import Augmentation, Buckets, Captions, Data, Masks, Prior, Sizes
from lowrank.config.flags_memory import Memory
from lowrank.config.flags_output import Hub, Logging, Sampling, Saving, Validation
from lowrank.config.flags_training import Abm, Model, Network, Optimizer, Train
from lowrank.config.objective import LossOptions


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of every training script; properties of options that a family lacks are neutral here."""

    config_file: ConfigFile
    model: Model
    data: Data
    sizes: Sizes
    buckets: Buckets
    captions: Captions
    augmentation: Augmentation
    masks: Masks
    prior: Prior
    network: Network
    abm: Abm
    train: Train
    memory: Memory
    optimizer: Optimizer
    objective: LossOptions
    saving: Saving
    sampling: Sampling
    validation: Validation
    logging: Logging
    hub: Hub

    @property
    def trains_text(self) -> bool:
        """Whether text encoders are adapted: not if only the denoiser is trained, or if their rate is 0."""
        rates = self.optimizer.text_encoder_lr
        if self.network.network_train_text_encoder_only:
            return True
        if self.network.network_train_unet_only or (rates and not any(rates)):
            return False
        return self.network.train_text_encoder

    @property
    def uses_base_rate(self) -> bool:
        """Whether a part that is trained has no rate of its own and takes --learning_rate."""
        denoiser = not self.network.network_train_text_encoder_only and self.optimizer.unet_lr is None
        return denoiser or (self.trains_text and not self.optimizer.text_encoder_lr)

    @property
    def caches_latents(self) -> bool:
        """Whether latents are cached, in memory at least."""
        return self.data.cache_latents or self.data.cache_latents_to_disk

    @property
    def xformers(self) -> bool:
        """Whether xformers computes attention where it can."""
        return False

    @property
    def sampler(self) -> str | None:
        """Sampler of pictures drawn while training; None is the family's only one."""
        return None

    @property
    def samplers(self) -> tuple[str, ...]:
        """The samplers that a prompt can name."""
        return ()

    @property
    def encoder_layer(self) -> int | None:
        """The text encoder's layer, counted from the last, that conditions come from; None: the model's."""
        return None


def declared(options: TrainOptions) -> Iterator[tuple[FlagSpec, object]]:
    """Every option with its declaration."""
    for section in fields(options):
        group = getattr(options, section.name)
        for name, spec in fields_of(type(group), section.name).items():
            yield spec, getattr(group, name)
