"""A job and what it does to the model: freeze it, merge into it, put the network on it, free the rest."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowrank import adapter_file
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import as_passed
from lowrank.config.command_line import Parsed
from lowrank.errors import Refused
from lowrank.models import memory
from lowrank.models.family import DTYPES, Family, Models, move, release
from lowrank.tensors import read_metadata
from lowrank.train import network_module
from lowrank.train.base_weights import base_weights
from lowrank.train.checkpoints import Names
from lowrank.train.prompts import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Script:
    """What tells one training script from another, besides its options and its family."""

    tracker: str  # the log folder's name
    unnamed: str  # stem of the last file without --output_name
    prompt: Prompt  # what a prompt for pictures leaves open


@dataclass(frozen=True)
class Job:
    """What a run is asked to do, once it has been checked as far as options alone allow."""

    parsed: Parsed
    script: Script
    family: Family
    options: Any  # the family's switches
    objective: Any
    accelerator: Accelerator
    names: Names
    networks: ModuleType
    arguments: dict[str, str]
    seed: int

    def value(self, name: str) -> Any:
        return self.parsed.value(name)

    def create(self, denoiser: nn.Module, encoders: list[nn.Module], weights: str | None) -> Any:
        """The network on a denoiser; on the meta device it has shapes and no values."""
        return network_module.create(
            self.networks,
            denoiser,
            encoders,
            rank=self.value("network_dim"),
            alpha=self.value("network_alpha"),
            dropout=self.value("network_dropout"),
            arguments=self.arguments,
            weights=weights,
            dim_from_weights=bool(weights) and self.value("dim_from_weights"),
            train_denoiser=not self.value("network_train_text_encoder_only"),
        )


def keep_vae(models: Models, encoded: bool, draws: bool) -> None:
    """Let go of the VAE once latents are encoded, or keep it aside where pictures are drawn."""
    if encoded and draws:
        move(models, ("vae",), "cpu")
    elif encoded:
        release(models, ("vae",))


def merge_base_weights(job: Job, models: Models) -> None:
    """Merge --base_weights into the denoiser and the text encoders that are loaded, trained or not."""
    passed = as_passed(models.text_encoders, models.denoiser)
    for path, strength in base_weights(job.parsed):
        other, state = job.networks.create_network_from_weights(
            strength, path, None, passed, models.denoiser, for_inference=True
        )
        logger.info("merging module: %s with multiplier %s", path, strength)
        other.merge_to(passed, models.denoiser, state, None, next(models.denoiser.parameters()).device)


def adapt(job: Job, models: Models, encoders: list[nn.Module]) -> Any:
    """Freeze the denoiser and put the network on it."""
    models.denoiser.requires_grad_(False).eval()
    choose_attention(job.value("xformers") if "xformers" in job.parsed.specs else False, models.denoiser)
    if job.value("fp8_base") or job.value("fp8_base_unet"):
        memory.store_in_fp8(models.denoiser, DTYPES[job.accelerator.mixed_precision])
    torch.manual_seed(job.seed)
    network = job.create(models.denoiser, encoders, job.value("network_weights"))
    for encoder in encoders if job.value("gradient_checkpointing") else ():
        memory.checkpoint_text(encoder)
    _prepare_network(job.parsed, network, models, encoders, job.accelerator)
    return network


def check_base(job: Job, models: Models, path: str) -> None:
    """Refuse an adapter with a basis of another base; warn of a plain one of another base."""
    adapter_file.check_base(
        path,
        read_metadata(path),
        lambda: job.family.model_hash(models, "denoiser"),
        "train on it, or start without the file",
    )


def choose_attention(xformers: bool, denoiser: Any) -> None:
    """xformers' kernels where they are asked for and can be had; else torch's own."""
    if not xformers:
        return
    if importlib.util.find_spec("xformers") and denoiser.device.type == "cuda":
        memory.attention(denoiser, "xformers")
    else:
        logger.warning("xformers is not installed, or there is no GPU; torch's own attention is used")


def _prepare_network(
    parsed: Parsed, network: Any, models: Models, encoders: list[nn.Module], accelerator: Accelerator
) -> None:
    own = isinstance(network, AdapterNetwork)
    if parsed.value("gradient_checkpointing"):
        memory.checkpoint_blocks(models.denoiser, network.clock.now if own else contextlib.nullcontext)
        for encoder in encoders:
            memory.checkpoint_text(encoder)
        network.enable_gradient_checkpointing()
    if own:
        network.cast_frozen(DTYPES[accelerator.mixed_precision])
    network.to(accelerator.device)
    if parsed.value("full_fp16") or parsed.value("full_bf16"):
        network.to(DTYPES[accelerator.mixed_precision])
    if parsed.value("scale_weight_norms") and not hasattr(network, "apply_max_norm_regularization"):
        raise Refused("--scale_weight_norms is not offered by this network module; leave it out")
