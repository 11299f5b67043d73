"""The command line of FLUX training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowrank.config.checks import OFF_AT_ZERO, check_training
from lowrank.config.command_line import CommandLine, ConfigFile, Parsed, option
from lowrank.config.flag import path
from lowrank.config.flags_data import Buckets, Captions, Data, Masks, Prior
from lowrank.config.flags_output import Hub, Logging, Sampling, Saving, Validation
from lowrank.config.flags_training import Abm, Loss, Model, Network, Optimizer, Train
from lowrank.config.unsupported import IGNORED, IGNORED_BY_FLUX, REFUSED, REFUSED_BY_FLUX, ways_out
from lowrank.errors import Refused


@dataclass(frozen=True)
class FluxModel:
    """FLUX"""

    model_type: str = option("flux", "architecture", choices=("flux",))
    clip_l: str | None = path(None, "CLIP-L text encoder in place of the model's own")
    t5xxl: str | None = path(None, "T5 text encoder in place of the model's own")
    ae: str | None = path(None, "autoencoder in place of the model's own")
    t5xxl_max_token_length: int | None = option(
        None,
        "length of T5 captions (unset: 512, schnell 256)",
        aliases=("--max_sequence_length",),
        low=1,
        high=512,
    )
    apply_t5_attn_mask: bool = option(False, "mask T5's padding in T5 and in the transformer")
    guidance_scale: float = option(
        3.5, "guidance told to a guidance-distilled model in training; 1.0 is usual too", low=0
    )
    tokenizer_cache_dir: str | None = path(
        None, "folder of tokenizers for a model in single files, each in <folder>/<hub id with / as _>"
    )


@dataclass(frozen=True)
class Flow:
    """Flow matching"""

    timestep_sampling: str = option(
        "sigma", "how sigma is drawn", choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift")
    )
    sigmoid_scale: float = option(1.0, "spread of sigmoid, shift and flux_shift", above=0)
    discrete_flow_shift: float = option(
        3.0, "shift of sigma and shift; 1.0 is none, as in the published QR-LoRA", above=0
    )
    model_prediction_type: str = option(
        "raw",
        "what is compared with the target; kohya's default is sigma_scaled, which does not match the target",
        choices=("raw", "additive", "sigma_scaled"),
    )
    weighting_scheme: str = option(
        "uniform",
        "density of sigma and weight of the loss",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
    )
    logit_mean: float = option(0.0, "mean of logit_normal")
    logit_std: float = option(1.0, "standard deviation of logit_normal", above=0)
    mode_scale: float = option(1.29, "scale of mode")


def check_flux(parsed: Parsed) -> Iterator[str]:
    """Rules between flags of FLUX training; raises `Refused`, yields notes."""
    yield from check_training(parsed)
    network = parsed.network
    if network.train_text_encoder and network.network_train_unet_only:
        raise Refused("--train_text_encoder and --network_train_unet_only exclude each other; give one")
    if parsed.optimizer.text_encoder_lr and not (
        network.train_text_encoder or network.network_train_text_encoder_only
    ):
        yield "--text_encoder_lr has no effect without --train_text_encoder, which adapts CLIP-L too"


FLUX_TRAIN = CommandLine(
    prog="flux_train_qrlora.py",
    description="Train an adapter for FLUX: ΔR, ΔR-triu, QR-LoRA, LoRA, or any module of kohya's contract.",
    groups=(
        ConfigFile,
        Model,
        FluxModel,
        Data,
        Buckets,
        Captions,
        Masks,
        Prior,
        Network,
        Abm,
        Train,
        Optimizer,
        Flow,
        Loss,
        Saving,
        Sampling,
        Validation,
        Logging,
        Hub,
    ),
    defaults={
        "learning_rate": 1e-4,  # diffusers' FLUX script; kohya's 2e-6 is for whole models
        "resolution": (512, 512),
        "log_with": "tensorboard",
        "output_dir": "flux-dreambooth-lora",
        "huber_schedule": "constant",  # kohya's snr has no meaning for a flow
    },
    ignored_by="FLUX",
    off_at_zero=OFF_AT_ZERO,
    ignored=(*IGNORED.split(), *IGNORED_BY_FLUX.split()),
    refused=ways_out(REFUSED, REFUSED_BY_FLUX),
    check=check_flux,
)
