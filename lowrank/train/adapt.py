"""A job and what it does to the model: freeze it, merge into it, put the network on it, free the rest."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowrank.adapters.network import AdapterNetwork
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.models import memory
from lowrank.models.family import DTYPES, Family, Models, move, release
from lowrank.options import Parsed
from lowrank.tensors import read_metadata
from lowrank.train import inputs, module

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a run is asked to do, once it has been checked as far as options alone allow."""

    parsed: Parsed
    family: Family
    options: Any  # the family's switches
    accelerator: Accelerator
    folder: Path
    networks: ModuleType
    arguments: dict[str, str]
    seed: int

    def value(self, name: str) -> Any:
        return self.parsed.value(name)

    def create(self, denoiser: nn.Module, encoders: list[nn.Module], weights: str | None) -> Any:
        """The network on a denoiser; on the meta device it has shapes and no values."""
        return module.create(
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


def keep_encoders(
    job: Job, models: Models, text: inputs.Text, loader: Loader, draws: bool
) -> list[nn.Module]:
    """Let go of what has done its work; the text encoders that are trained, if any, are returned."""
    trains = job.value("train_text_encoder") or job.value("network_train_text_encoder_only")
    if trains and text.live:
        raise Refused(
            "--train_text_encoder needs captions that can be listed; leave out --shuffle_caption, "
            "--caption_tag_dropout_rate, --enable_wildcard and --token_warmup_step"
        )
    encoders = job.family.keep_trained_text(models) if trains else []
    text.trained = bool(trains)
    if not trains and not text.live:
        release(models, ("text",))
    if loader.encoded:
        if draws:
            move(models, ("vae",), "cpu")
        else:
            release(models, ("vae",))
    return encoders


def adapt(job: Job, models: Models, encoders: list[nn.Module]) -> Any:
    """Freeze the denoiser, merge --base_weights, put the network on it."""
    models.denoiser.requires_grad_(False).eval()
    if job.value("fp8_base") or job.value("fp8_base_unet"):
        memory.store_in_fp8(models.denoiser, DTYPES[job.accelerator.mixed_precision])
    torch.manual_seed(job.seed)
    for path in filter(None, (*job.value("base_weights"), job.value("network_weights"))):
        _check_base(job, models, path)
    _merge_base_weights(job.parsed, job.networks, models)
    network = job.create(models.denoiser, encoders, job.value("network_weights"))
    _prepare_network(job.parsed, network, models, job.accelerator)
    return network


def _check_base(job: Job, models: Models, path: str) -> None:
    """An adapter with a basis of another base is refused; a plain one of another base is said."""
    facts = read_metadata(path)
    there = facts.get("lowrank.base_hash")
    if not there or there == (here := job.family.model_hash(models, "denoiser")):
        return
    told = (
        f"{path} was made on {facts.get('lowrank.base_model')} ({there[:12]}), and this base is {here[:12]}"
    )
    if facts.get("lowrank.basis_hash"):
        raise Refused(f"{told}; its basis belongs to that base, so train on it, or start without the file")
    logger.warning("%s; it goes on from there all the same", told)


def _merge_base_weights(parsed: Parsed, networks: Any, models: Models) -> None:
    strengths = parsed.value("base_weights_multiplier")
    for index, path in enumerate(parsed.value("base_weights")):
        strength = strengths[index] if index < len(strengths) else 1.0
        other, state = networks.create_network_from_weights(
            strength, path, None, [], models.denoiser, for_inference=True
        )
        logger.info("merging module: %s with multiplier %s", path, strength)
        other.merge_to([], models.denoiser, state, None, next(models.denoiser.parameters()).device)


def _prepare_network(parsed: Parsed, network: Any, models: Models, accelerator: Accelerator) -> None:
    own = isinstance(network, AdapterNetwork)
    if parsed.value("gradient_checkpointing"):
        memory.checkpoint_blocks(models.denoiser, network.clock.now if own else contextlib.nullcontext)
        network.enable_gradient_checkpointing()
    if own:
        network.cast_frozen(DTYPES[accelerator.mixed_precision])
    network.to(accelerator.device)
    if parsed.value("full_fp16") or parsed.value("full_bf16"):
        network.to(DTYPES[accelerator.mixed_precision])
    if parsed.value("scale_weight_norms") and not hasattr(network, "apply_max_norm_regularization"):
        raise Refused("--scale_weight_norms is not offered by this network module; leave it out")
