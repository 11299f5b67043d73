"""The command lines of SD 1.x, 2.x and SDXL training: kohya's train_network.py and sdxl_train_network.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowrank.config.checks import OFF_AT_ZERO, check_training, trains_text
from lowrank.config.command_line import CommandLine, ConfigFile, Parsed, option
from lowrank.config.flag import path
from lowrank.config.flags_data import Buckets, Captions, Data, Masks, Prior
from lowrank.config.flags_output import Hub, Logging, Sampling, Saving, Validation
from lowrank.config.flags_training import Abm, Loss, Model, Network, Optimizer, Train
from lowrank.config.unsupported import IGNORED, REFUSED, REFUSED_BY_SD, ways_out
from lowrank.errors import Refused

LENGTHS = {"75": None, "150": 150, "225": 225}
SAMPLERS = (
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a"),
    *("dpmsolver", "dpmsolver++", "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)


def token_length(text: str) -> int | None:
    """75 (also None), 150 or 225 tokens of a caption; 75 is what an encoder takes at once."""
    if text not in LENGTHS and text.lower() != "none":
        raise Refused(f"{text!r} is not one of 75, 150, 225; a caption is read in pieces of 75 tokens")
    return LENGTHS.get(text)


@dataclass(frozen=True)
class Generation:
    """Stable Diffusion 1 and 2"""

    v2: bool = option(False, "the base is SD 2.x")
    clip_skip: int | None = option(
        None,
        "take the text encoder's n-th last layer (unset: 1, the last; SD 2.x has its own)",
        low=1,
        high=12,
    )


@dataclass(frozen=True)
class Diffusion:
    """Stable Diffusion"""

    v_parameterization: bool = option(False, "the base predicts velocities")
    vae: str | None = path(None, "VAE in place of the model's own: a folder or a file")
    tokenizer_cache_dir: str | None = path(
        None, "folder of tokenizers for a model in a single file, each in <folder>/<hub id with / as _>"
    )
    max_token_length: int | None = option(
        None, "most tokens of a caption: 75 (unset), 150 or 225", convert=token_length
    )
    weighted_captions: bool = option(False, "read (word:1.3), (word) and [word] in captions as weights")
    xformers: bool = option(False, "attention by xformers, where it is installed; else by torch")
    sdpa: bool = option(False, "attention by torch's own kernels, which is the rule")
    mem_eff_attn: bool = option(False, "the same: torch chooses among its kernels, memory-efficient ones too")
    sample_sampler: str = option("ddim", "sampler of the pictures made while training", choices=SAMPLERS)


@dataclass(frozen=True)
class Noise:
    """Noise"""

    zero_terminal_snr: bool = option(False, "rescale the noise schedule so that the last step is pure noise")
    min_timestep: int | None = option(None, "least timestep that is drawn (unset: 0)", low=0, high=1000)
    max_timestep: int | None = option(None, "the one behind the greatest (unset: 1000)", low=0, high=1000)
    noise_offset: float | None = option(None, "strength of noise that moves mean colours", low=0)
    noise_offset_random_strength: bool = option(False, "draw its strength between 0 and --noise_offset")
    adaptive_noise_scale: float | None = option(
        None, "add this × the mean of the latents to --noise_offset; may be negative"
    )
    multires_noise_iterations: int | None = option(
        None, "levels of noise of lower resolution; 6 to 10 are usual", low=0
    )
    multires_noise_discount: float = option(0.3, "strength of each level relative to the one before", low=0)


@dataclass(frozen=True)
class Weights:
    """Weights of the loss"""

    min_snr_gamma: float | None = option(None, "min-SNR weighting; 5 is usual", low=0)
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "weigh the loss of velocities as that of noise, with --v_parameterization"
    )
    v_pred_like_loss: float | None = option(
        None, "add this × the loss of the velocity, without --v_parameterization", low=0
    )
    debiased_estimation_loss: bool = option(False, "weigh the loss by 1/√SNR, or 1/(SNR + 1) for velocities")


def check_sd(parsed: Parsed) -> Iterator[str]:
    """Rules between flags of SD training; raises `Refused`, yields notes."""
    yield from check_training(parsed)
    if not parsed.saving.output_dir:
        raise Refused("no folder for what is trained; give --output_dir FOLDER")
    cached = [
        n for n in ("cache_text_encoder_outputs_to_disk", "cache_text_encoder_outputs") if parsed.value(n)
    ]
    if cached and trains_text(parsed):
        raise Refused(
            f"--{cached[0]} keeps what the text encoders say, and adapters would change it; give "
            "--network_train_unet_only, or drop it"
        )
    if parsed.value("zero_terminal_snr") and not parsed.value("v_parameterization"):
        yield "--zero_terminal_snr without --v_parameterization: pure noise tells a noise prediction nothing"
    if parsed.value("mem_eff_attn"):
        yield "--mem_eff_attn: torch's own attention chooses a memory-efficient kernel where there is one"


_REST = (Data, Buckets, Captions, Masks, Prior, Network, Abm, Train, Optimizer, Noise, Loss, Weights)
_OUTPUT = (Saving, Sampling, Validation, Logging, Hub)
_DEFAULTS = {"resolution": (512, 512), "train_text_encoder": True}  # as kohya's scripts train them

SD_TRAIN = CommandLine(
    prog="train_network_ABM.py",
    description="Train an adapter for SD 1.x or 2.x: any of networks/, or any module of kohya's contract.",
    groups=(ConfigFile, Model, Generation, Diffusion, *_REST, *_OUTPUT),
    defaults=_DEFAULTS,
    ignored_by="Stable Diffusion",
    off_at_zero=OFF_AT_ZERO,
    ignored=tuple(IGNORED.split()),
    refused=ways_out(REFUSED, REFUSED_BY_SD),
    check=check_sd,
)

SDXL_TRAIN = CommandLine(
    prog="sdxl_train_network_ABM.py",
    description="Train an adapter for SDXL: any of networks/, or any module of kohya's contract.",
    groups=(ConfigFile, Model, Diffusion, *_REST, *_OUTPUT),
    defaults={**_DEFAULTS, "resolution": (1024, 1024)},
    ignored_by="SDXL",
    off_at_zero=OFF_AT_ZERO,
    ignored=(*IGNORED.split(), "clip_skip"),  # SDXL always takes the layer before the last
    refused=ways_out(REFUSED, REFUSED_BY_SD, "v2: SDXL is not SD 2.x; use train_network_ABM.py for that"),
    check=check_sd,
)
