"""The command lines of SD 1.x, 2.x and SDXL training: kohya's train_network.py and sdxl_train_network.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowrank.config.checks import check_training, gathered
from lowrank.config.command_line import CommandLine, Parsed
from lowrank.config.flag import option, path
from lowrank.config.flags_output import DRAWN
from lowrank.config.flags_training import example
from lowrank.config.objective import DiffusionOptions
from lowrank.config.train import TrainOptions
from lowrank.config.unsupported import ACCEPTED, IGNORED, REFUSED, REFUSED_BY_SD, ways_out
from lowrank.errors import Refused

LENGTHS = {"75": None, "150": 150, "225": 225}
SAMPLERS = (
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a"),
    *("dpmsolver", "dpmsolver++", "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)


def token_length(text: str) -> int | None:
    """The number of tokens of a caption, 150 or 225; None for 75, which an encoder reads at once."""
    if text not in LENGTHS and text.lower() != "none":
        raise Refused(f"{text!r} is not one of 75, 150, 225; a caption is read in pieces of 75 tokens")
    return LENGTHS.get(text)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Stable Diffusion 1 and 2"""

    v2: bool = option(False, "the base model is SD 2.x")
    clip_skip: int | None = option(
        None,
        "condition on the text encoder's n-th last layer (unset: 1, the last; SD 2.x has another default)",
        low=1,
        high=12,
        metadata=True,
    )


@dataclass(frozen=True, kw_only=True)
class SdModel:
    """Stable Diffusion"""

    vae: str | None = path(None, "VAE in place of the model's own: a folder or a file")
    tokenizer_cache_dir: str | None = path(
        None, "folder of tokenizers for a model in a single file, each in <folder>/<hub id with / as _>"
    )
    max_token_length: int | None = option(
        None,
        "largest number of tokens of a caption: 75 (unset), 150 or 225",
        convert=token_length,
        metadata=True,
    )
    weighted_captions: bool = option(False, "read (word:1.3), (word) and [word] in captions as weights")
    xformers: bool = option(False, "compute attention with xformers if it is installed, else with torch")
    sdpa: bool = option(False, "compute attention with torch's own kernels; this is also the default")
    mem_eff_attn: bool = option(
        False,
        "compute attention with torch's own kernels, some of them memory-efficient; this is also the default",
    )
    sample_sampler: str = option(
        "ddim",
        "sampler of the pictures drawn while training",
        choices=SAMPLERS,
        acts_with=(DRAWN,),
    )


@dataclass(frozen=True, kw_only=True)
class SdxlTrainOptions(TrainOptions):
    """The options of SDXL training"""

    sd_model: SdModel
    objective: DiffusionOptions

    @property
    def xformers(self) -> bool:
        """Whether xformers computes attention where it can."""
        return self.sd_model.xformers

    @property
    def sampler(self) -> str | None:
        """Sampler of pictures drawn while training."""
        return self.sd_model.sample_sampler

    @property
    def samplers(self) -> tuple[str, ...]:
        """The samplers that a prompt can name."""
        return SAMPLERS


@dataclass(frozen=True, kw_only=True)
class SdTrainOptions(SdxlTrainOptions):
    """The options of SD 1.x and 2.x training"""

    generation: Generation

    @property
    def encoder_layer(self) -> int | None:
        """--clip_skip."""
        return self.generation.clip_skip


def check_sd(parsed: Parsed[SdxlTrainOptions]) -> Iterator[str]:
    """Rules between flags of SD training; raises `Refused`, yields notes."""
    yield from gathered(parsed, (check_training, _check_output, _check_cached_text, _check_objective))


def _check_output(parsed: Parsed[SdxlTrainOptions]) -> None:
    if not parsed.options.saving.output_dir:
        raise Refused("no output folder; give --output_dir FOLDER")


def _check_cached_text(parsed: Parsed[SdxlTrainOptions]) -> None:
    data = parsed.options.data
    to_disk = data.cache_text_encoder_outputs_to_disk
    if (to_disk or data.cache_text_encoder_outputs) and parsed.options.trains_text:
        raise Refused(
            f"--cache_text_encoder_outputs{'_to_disk' * to_disk} keeps the outputs of the text encoders, and "
            "adapters would change them; give --network_train_unet_only, or drop it"
        )


def _check_objective(parsed: Parsed[SdxlTrainOptions]) -> Iterator[str]:
    objective = parsed.options.objective
    if objective.zero_terminal_snr and not objective.v_parameterization:
        yield (
            "--zero_terminal_snr without --v_parameterization: the last timestep is pure noise, so a "
            "prediction of the noise learns nothing there"
        )
    if parsed.options.sd_model.mem_eff_attn:
        yield "--mem_eff_attn: torch's own attention chooses a memory-efficient kernel where there is one"


_DEFAULTS = {"train_text_encoder": True}  # as kohya's scripts do

SD_TRAIN = CommandLine(
    prog="train_network_ABM.py",
    description="Train an adapter for SD 1.x or 2.x: any of networks/, or any module of kohya's contract.",
    options=SdTrainOptions,
    example=example("train_network_ABM.py", "v1-5-pruned-emaonly.safetensors", 512),
    defaults=_DEFAULTS,
    ignored_by="Stable Diffusion",
    off_at_zero=True,
    ignored=tuple(IGNORED.split()),
    accepted=ways_out(ACCEPTED),
    refused=ways_out(REFUSED, REFUSED_BY_SD),
    check=check_sd,
)

SDXL_TRAIN = CommandLine(
    prog="sdxl_train_network_ABM.py",
    description="Train an adapter for SDXL: any of networks/, or any module of kohya's contract.",
    options=SdxlTrainOptions,
    example=example("sdxl_train_network_ABM.py", "sd_xl_base_1.0.safetensors", 1024),
    defaults={**_DEFAULTS, "resolution": (1024, 1024)},
    ignored_by="SDXL",
    off_at_zero=True,
    ignored=(*IGNORED.split(), "clip_skip"),  # SDXL always takes the layer before the last
    accepted=ways_out(ACCEPTED),
    refused=ways_out(REFUSED, REFUSED_BY_SD, "v2: SDXL is not SD 2.x; use train_network_ABM.py for that"),
    check=check_sd,
)
