"""Prepare the model of a run: load its components, merge files, freeze it, attach the network."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowrank import adapter_file
from lowrank.adapters.network import AdapterNetwork
from lowrank.errors import Refused
from lowrank.models import blocks, memory
from lowrank.models.family import DTYPES, Models, align, move, release
from lowrank.models.storage import plain_kind
from lowrank.naming.keys import is_text_encoder
from lowrank.tensors import read_metadata, read_names
from lowrank.train.job import RunningJob
from lowrank.train.network_module import KohyaNetwork, merge_file

logger = logging.getLogger(__name__)


def load_components(job: RunningJob, models: Models, roles: tuple[str, ...]) -> None:
    """Load components, aligned in memory so that equal weights of any file give equal bits.

    A denoiser that will be stored in another kind or swapped goes into host memory tensor by tensor, as no
    device may have room for all of it; `adapt` moves it. One that adapters are merged into, or that is
    sharded, is read there whole.
    """
    source, memory = models.source, job.options.memory
    stored = memory.storage or (plain_kind(source.dtype) if memory.blocks_to_swap else None)
    whole = job.sharding is not None or bool(stored and job.base_weights)
    places = {
        "text": replace(source, device="cpu") if memory.text_encoders_on_cpu else source,
        "vae": source,
        "denoiser": replace(source, device="cpu") if whole else replace(source, storage=stored),
    }
    for role in roles:
        models.source = places[role]
        job.family.add(models, (role,))
    models.source = source
    align(models)


def keep_vae(models: Models, encoded: bool, draws: bool) -> None:
    """Free the VAE after latents are encoded, or move it to the CPU if previews need it."""
    if encoded and draws:
        move(models, ("vae",), "cpu")
    elif encoded:
        release(models, ("vae",))


def changes_text(job: RunningJob) -> bool:
    """Whether --base_weights have layers of text encoders, so that captions are encoded after the merge."""
    return any(is_text_encoder(key) for path, _ in job.base_weights for key in read_names(path))


def merge_base_weights(job: RunningJob, models: Models) -> None:
    """Merge --base_weights into the denoiser and the text encoders that are loaded, trained or not."""
    encoders, strict = models.text_encoders, job.options.network.strict
    for path, strength in job.base_weights:
        merge_file(job.networks, path, strength, encoders, models.denoiser, strict)


def adapt(job: RunningJob, models: Models, encoders: list[nn.Module]) -> KohyaNetwork:
    """Freeze the denoiser and attach the network to it."""
    denoiser, kind, swap = models.denoiser, job.options.memory.storage, job.options.memory.blocks_to_swap
    denoiser.requires_grad_(False).eval()
    choose_attention(job.options.xformers, denoiser, job.accelerator.device)
    if kind or swap:
        blocks.freeze_base(denoiser)
    torch.manual_seed(job.seed)
    network = job.create(denoiser, encoders, job.options.network.network_weights)
    if kind or swap:  # after adapters have read what they need of the weights
        blocks.store_base(denoiser, kind, swap, job.accelerator.device)
        denoiser.to(job.accelerator.device)  # what is not swapped
    _prepare_network(job, network, models, encoders)
    if job.sharding is not None:  # after the network, which reads the weights
        job.sharding.shard(models.denoiser, job.accelerator.device)
    return network


def check_base(job: RunningJob, models: Models, path: str) -> None:
    """Refuse an adapter whose basis is of another base model; warn of a plain adapter of another base."""
    adapter_file.check_base(
        path,
        read_metadata(path),
        lambda: job.family.model_hash(models, "denoiser"),
        "train on it, or start without the file",
    )


def choose_attention(xformers: bool, denoiser: Any, device: torch.device) -> None:
    """Use the attention of xformers if it is requested and available; warn if it is not available."""
    if not xformers:
        return
    if importlib.util.find_spec("xformers") and device.type == "cuda":
        memory.attention(denoiser, "xformers")
    else:
        logger.warning("xformers is not installed, or there is no GPU; torch's own attention is used")


def _prepare_network(
    job: RunningJob, network: KohyaNetwork, models: Models, encoders: list[nn.Module]
) -> None:
    train, dtype = job.options.train, DTYPES[job.accelerator.mixed_precision]
    native = isinstance(network, AdapterNetwork)
    if train.gradient_checkpointing:
        memory.checkpoint_blocks(models.denoiser, network.clock.now if native else contextlib.nullcontext)
        for encoder in encoders:
            memory.checkpoint_text(encoder)
        network.enable_gradient_checkpointing()
    if native:
        network.cast_frozen(dtype)
    network.to(job.accelerator.device)
    if train.full_fp16 or train.full_bf16:
        network.to(dtype)
    if job.options.network.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
        raise Refused("this network module does not support --scale_weight_norms; leave it out")
