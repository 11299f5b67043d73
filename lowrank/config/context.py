"""The command line of the script that measures a base's curvature for LaLoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowrank.config.command_line import CommandLine, Parsed
from lowrank.config.flag import SEEDS, ending, option, path, resolution
from lowrank.config.flags_data import Buckets
from lowrank.config.flags_training import PRECISIONS
from lowrank.config.sd import token_length
from lowrank.errors import Refused


@dataclass(frozen=True, kw_only=True)
class BaseModelFlags:
    """Base model"""

    pretrained_model_name_or_path: str = path(
        "", "folder of a diffusers FLUX, SD or SDXL, its hub id, or a checkpoint file", required=True
    )
    tokenizer_cache_dir: str | None = path(None, "folder of tokenizers for a model in a single file")
    vae: str | None = path(None, "VAE in place of the model's own: a folder or a file")
    no_half_vae: bool = option(False, "run the VAE in fp32")
    mixed_precision: str = option("fp16", "precision of the model", choices=PRECISIONS)
    fp8_base: bool = option(False, "base weights in fp8; needs --mixed_precision fp16 or bf16")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    xformers: bool = option(False, "compute attention with xformers if it is installed, else with torch")
    device: str | None = option(None, "device for the computation (unset: the GPU if there is one)")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Source pictures: what the model must not forget"""

    source_data_dir: str | None = path(
        None, "folder of pictures, or parent of folders named <repeats>_<class>; captions beside the images"
    )
    source_prompts: str | None = path(
        None,
        "file of prompts (.txt, .toml, .json) that the base model draws into --source_data_dir, or if "
        "that is unset into <output_path without its ending>_source",
    )
    images_per_prompt: int = option(
        1, "number of pictures that are drawn of each prompt in --source_prompts", low=1, high=10_000
    )
    train_data_dir: str | None = path(
        None, "folder of the later training pictures; a source that contains them is refused"
    )
    force: bool = option(False, "accept a source that contains the pictures of --train_data_dir")
    resolution: tuple[int, int] | None = option(
        None,
        "size of the pictures, '512' or 'width,height' (unset: the model's own)",
        unit="pixels",
        low=1,
        convert=resolution,
    )
    caption_extension: str | None = option(
        None,
        "ending of caption files (unset: .txt if there are any, else .caption)",
        aliases=("--caption_extention", "--captions_ext"),
        convert=ending,
    )
    skip_bad_images: bool = option(False, "leave out images that cannot be read, and list them")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured"""

    output_path: str = path("", "context file to write; it ends in .safetensors", required=True)
    curvature: str = option(
        "kfac_lr",
        "kfac: S and G in full; kfac_lr: their largest eigenpairs and a diagonal; diag: diagonals; "
        "lora_diag: for a penalty of a LoRA's up factor alone, rank by rank",
        choices=("kfac", "kfac_lr", "diag", "lora_diag"),
    )
    kfac_rank: int = option(16, "number of eigenpairs kept of each of S and G", low=1, high=4096)
    batch_size: int = option(4, "pictures per batch; it affects only speed and memory", low=1)
    max_steps: int = option(100, "largest number of batches that are measured", low=1)
    num_samples: int | None = option(
        None,
        "number of pictures, each with its own noise and timestep (unset: --max_steps × --batch_size); "
        "if there are fewer pictures, they are repeated with new noise",
        low=1,
    )
    seed: int = option(0, "seed of captions, noise and timesteps", low=0, high=SEEDS)
    network_train_unet_only: bool = option(
        False, "measure the U-Net or transformer alone, without text encoders"
    )
    target: str | None = option(
        None, "regular expression over paths of layers to measure, like --network_args target=…"
    )
    exclude: str | None = option(
        None, "regular expression over paths of layers to leave out, like --network_args exclude=…"
    )
    conv: bool = option(False, "measure a U-Net's convolutional blocks too, like --network_args conv_dim=…")
    v_parameterization: bool = option(False, "the base model predicts velocity instead of noise")
    min_snr_gamma: float | None = option(
        None, "γ of min-SNR weighting of the loss; give the value of the training", low=0
    )
    clip_skip: int | None = option(
        None,
        "condition on the text encoder's n-th last layer, as in training; for SD 1.x and 2.x",
        low=1,
        high=12,
    )
    max_token_length: int | None = option(
        None,
        "largest number of tokens of a caption: 75 (unset), 150 or 225; not for FLUX",
        convert=token_length,
    )
    multiplier: float = option(1.0, "no effect: no adapter takes part in the measurement")
    basis_path: str | None = path(
        None,
        "no effect on the result, but the file is checked: the curvature is that of the weights, for "
        "any basis",
    )


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """The options of a context's measurement"""

    base_model: BaseModelFlags
    sources: Sources
    measure: Measure
    buckets: Buckets


def check_context(parsed: Parsed[ContextOptions]) -> Iterator[str]:
    """Rules between flags; raises `Refused`, yields notes."""
    sources, measure = parsed.options.sources, parsed.options.measure
    if not sources.source_data_dir and not sources.source_prompts:
        raise Refused(
            "no source pictures; give --source_data_dir FOLDER with pictures of what the model must not "
            "forget, or --source_prompts FILE, from which the base model draws them"
        )
    if not str(measure.output_path).endswith(".safetensors"):
        raise Refused(f"--output_path {measure.output_path} does not end in .safetensors; give such a name")
    if sources.images_per_prompt > 1 and not sources.source_prompts:
        yield "--images_per_prompt has no effect without --source_prompts"
    for name, given in (("multiplier", measure.multiplier != 1), ("basis_path", measure.basis_path)):
        if given:
            yield (
                f"{parsed.flag(name)} has no effect: the curvature is that of the weights, for any adapter"
            )
    if not sources.train_data_dir:
        yield (
            "without --train_data_dir it is not checked whether the source contains training pictures; a "
            "context of training pictures penalises what they teach"
        )


CALC_CONTEXT = CommandLine(
    "calc_lalora_context.py",
    "Measure how much the base's loss rises with a change of each layer, on pictures of what to keep.",
    ContextOptions,
    defaults={"enable_bucket": True},
    check=check_context,
)
