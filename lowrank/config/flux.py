"""The command line of FLUX training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.config.checks import check_training, gathered
from lowrank.config.command_line import CommandLine, Parsed
from lowrank.config.flag import option, path
from lowrank.config.flags_training import example
from lowrank.config.objective import FlowOptions
from lowrank.config.train import TrainOptions
from lowrank.config.unsupported import ACCEPTED, IGNORED, IGNORED_BY_FLUX, REFUSED, REFUSED_BY_FLUX, ways_out
from lowrank.errors import Refused


@dataclass(frozen=True, kw_only=True)
class FluxModel:
    """FLUX"""

    model_type: str = option(
        "flux", "architecture of the base model", choices=("flux", "chroma"), metadata=True
    )
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
    apply_t5_attn_mask: bool = option(False, "mask T5's padding in T5 and in the transformer", metadata=True)
    guidance_scale: float = option(
        3.5,
        "guidance that a guidance-distilled model is given in training; 1.0 is usual too",
        low=0,
        metadata=True,
    )
    tokenizer_cache_dir: str | None = path(
        None, "folder of tokenizers for a model in single files, each in <folder>/<hub id with / as _>"
    )


@dataclass(frozen=True, kw_only=True)
class FluxTrainOptions(TrainOptions):
    """The options of FLUX training"""

    flux_model: FluxModel
    objective: FlowOptions


KOHYA_MODULES = ("networks.lora_flux", "lora_flux")


def follow_module(given: Mapping[str, Any]) -> dict[str, object]:
    """The defaults of kohya's module: networks.lora_flux trains CLIP-L too."""
    kohya = given.get("network_module") in KOHYA_MODULES
    return {"train_text_encoder": True} if kohya and not given.get("network_train_unet_only") else {}


def check_flux(parsed: Parsed[FluxTrainOptions]) -> Iterator[str]:
    """Rules between flags of FLUX training; raises `Refused`, yields notes."""
    yield from gathered(parsed, (check_training, _check_architecture, _check_text, _check_defaults))


def _check_architecture(parsed: Parsed[FluxTrainOptions]) -> None:
    if parsed.options.flux_model.model_type == "chroma":
        raise Refused(
            "--model_type chroma: Chroma has no CLIP-L and no guidance embedding, and its modulation comes "
            "from another network; only FLUX.1 is trained here. Train it with kohya's flux_train_network.py, "
            "which can load the networks of this project"
        )


def _check_text(parsed: Parsed[FluxTrainOptions]) -> None:
    network = parsed.options.network
    if network.train_text_encoder and network.network_train_unet_only:
        raise Refused("--train_text_encoder and --network_train_unet_only exclude each other; give one")


def _check_defaults(parsed: Parsed[FluxTrainOptions]) -> Iterator[str]:
    """Name defaults that are not kohya's where kohya's module is trained."""
    if parsed.options.network.network_module in KOHYA_MODULES:
        for name, kohyas in (("learning_rate", "2e-6"), ("model_prediction_type", "sigma_scaled")):
            if name not in parsed.given:
                yield f"--{name} is {parsed.value(name)} if it is not given; kohya's default is {kohyas}"


FLUX_TRAIN = CommandLine(
    prog="flux_train_qrlora.py",
    description="Train an adapter for FLUX: ΔR, ΔR-triu, QR-LoRA, LoRA, or any module of kohya's contract.",
    options=FluxTrainOptions,
    defaults={
        "learning_rate": 1e-4,  # diffusers' FLUX script; kohya's 2e-6 is for whole models
        "log_with": "tensorboard",
        "output_dir": "flux-dreambooth-lora",
    },
    example=example("flux_train_qrlora.py", "black-forest-labs/FLUX.1-dev", 1024),
    ignored_by="FLUX",
    off_at_zero=True,
    ignored=(*IGNORED.split(), *IGNORED_BY_FLUX.split()),
    accepted=ways_out(ACCEPTED),
    refused=ways_out(REFUSED, REFUSED_BY_FLUX),
    check=check_flux,
    follow=follow_module,
)
