"""SD 1.x and SD 2.x as a `Family`, on diffusers' and transformers' own classes.

One U-Net with cross-attention to one text encoder; it predicts ε or v, as the scheduler's configuration
states. Latents are the VAE's, times its scaling factor. Facts: kohya sd-scripts, diffusers'
StableDiffusionPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn

from lowrank.config.sd import Generation, SdModel
from lowrank.models import clip_text
from lowrank.models.family import Family, FamilyOptions, Models, TokenCounts, latent_scale
from lowrank.models.pictures import check_sides, decode, encode_images, latents, to_pil
from lowrank.models.samplers import build_sampler as sampler_of
from lowrank.models.sd_load import add_sd_components, empty_text, is_v2, load_sd, model_hash

STEP = 8  # diffusers' pipelines draw sides that are multiples of it


@dataclass(frozen=True)
class SdOptions(FamilyOptions):
    """Options of the text; each is the command-line option of its name."""

    clip_skip: int | None = Generation.clip_skip  # n-th layer from the end; unused by SDXL
    max_token_length: int | None = SdModel.max_token_length  # 75 (None), 150 or 225
    weighted_captions: bool = SdModel.weighted_captions

    @property
    def chunks(self) -> int:
        """Pieces of 75 tokens in which a caption is encoded."""
        return (self.max_token_length or 75) // 75


PLAIN = SdOptions()


def prediction(models: Models) -> str:
    """ "epsilon" or "v_prediction": from the scheduler's configuration or --v_parameterization."""
    return models.configs["scheduler"].get("prediction_type", "epsilon")


# ---------- text


def conditions(models: Models, captions: Sequence[str], options: SdOptions = PLAIN) -> dict[str, Tensor]:
    """`context` (B, 75·n + 2, D), with gradient where an encoder is trained."""
    tokens = [
        clip_text.tokenize(models.tokenizers[0], caption, options.chunks, options.weighted_captions)
        for caption in captions
    ]
    return {
        "context": clip_text.hidden(models.text_encoders[0], tokens, options.clip_skip, final_norm=True)[0]
    }


def token_counts(models: Models, captions: Sequence[str], options: SdOptions = PLAIN) -> TokenCounts:
    """The tokens of each caption, and the limit of --max_token_length."""
    return clip_text.token_counts(models.tokenizers[0], captions, options.chunks, options.weighted_captions)


@torch.no_grad()
def encode_text(
    models: Models,
    captions: Sequence[str],
    options: SdOptions = PLAIN,
    encode: Callable[[Models, Sequence[str], SdOptions], dict[str, Tensor]] = conditions,
) -> list[dict[str, Tensor]]:
    """One CPU dictionary per caption: the tensors of `encode` without B, in the encoders' dtype.

    Captions are encoded one by one, so that what is cached does not depend on its neighbours.
    """
    return [
        {key: value[0].cpu() for key, value in encode(models, [caption], options).items()}
        for caption in captions
    ]


def keep_trained_text(models: Models, options: SdOptions = PLAIN) -> list[nn.Module]:
    """The text encoders that adapters can train: all of them."""
    return list(models.text_encoders)


# ---------- denoising


def empty(models: Models) -> UNet2DConditionModel:
    """The denoiser on the meta device: shapes and names without weights."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(models.configs["denoiser"]))
        return unet


def denoise(
    denoiser: Any,  # the class of diffusers
    noisy: Tensor,
    timesteps: Tensor,
    text: Mapping[str, Tensor],
    options: SdOptions = PLAIN,
) -> Tensor:
    """What the U-Net predicts (B, C, h, w), ε or v, in its own dtype.

    `noisy` (B, C, h, w), `timesteps` (B,) in 0..999; `text` of B captions or of one for all, for SDXL with
    `pooled` and with the `time_ids` of the pictures.
    """
    device, B = noisy.device, len(noisy)
    added = {}
    if "pooled" in text:
        added["added_cond_kwargs"] = {
            "text_embeds": text["pooled"].to(device, denoiser.dtype).expand(B, -1),
            "time_ids": text["time_ids"].to(device).expand(B, -1),
        }
    return denoiser(
        noisy.to(denoiser.dtype),
        timesteps.to(device),
        encoder_hidden_states=text["context"].to(device, denoiser.dtype).expand(B, -1, -1),
        **added,
        return_dict=False,
    )[0]


# ---------- sampling


def pipeline(models: Models, sampler: str | None = None) -> StableDiffusionPipeline:
    """The stock StableDiffusionPipeline around the present denoiser, for cached text."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    )
    return StableDiffusionPipeline(
        scheduler=sampler_of(sampler, models.configs["scheduler"]),
        vae=models.vae,
        unet=models.denoiser,
        **nothing,
        requires_safety_checker=False,
    )


@torch.no_grad()
def sample(
    models: Models,
    text: Mapping[str, Tensor],
    options: SdOptions = PLAIN,
    *,
    height: int,
    width: int,
    steps: int,
    generator: torch.Generator,
    negative: Mapping[str, Tensor] | None = None,
    scale: float = 7.5,
    guidance: float | None = None,
    sampler: str | None = None,
    build: Callable[[Models, str | None], Any] = pipeline,
) -> list[Image]:
    """One PIL image per caption of `text`, through the stock pipeline with kohya's `sampler` (ddim).

    CFG of strength `scale` against the encoded `negative` text; without one, or with a scale of 1 or less,
    none. `guidance` is of other families. The VAE may be on another device or in another dtype than the
    denoiser; `generator` lives on the CPU, so that a seed gives the same noise on every device. `build` makes
    the pipeline.
    """
    check_sides(height, width, bucket_step(models), "a sample")
    return to_pil(
        models, _drawn(build(models, sampler), text, negative, scale, height, width, steps, generator)
    )


def _drawn(
    pipe: Any,
    text: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None,
    scale: float,
    height: int,
    width: int,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Latents (B, C, h, w) from a stock pipeline of one or two text encoders."""
    pipe.set_progress_bar_config(disable=True)
    B = len(text["context"])
    guided = negative is not None and scale > 1
    names = {"context": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    given = {}
    for key, name in names.items():
        if key in text:
            given[name] = text[key].to(pipe.unet.device, pipe.unet.dtype)
            if negative is not None and guided:
                other = negative[key].to(pipe.unet.device, pipe.unet.dtype)
                given[f"negative_{name}"] = other.expand(B, *other.shape[1:])
    return pipe(
        **given,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=scale if guided else 1.0,
        generator=generator,
        output_type="latent",
    ).images


# ---------- facts


def bucket_step(models: Models) -> int:
    """What sides of pictures are multiples of: a latent pixel, and what diffusers' pipelines draw."""
    return max(STEP, latent_scale(models))


def base_model_version(models: Models) -> str:
    """kohya's name of the base, as files carry it."""
    if not is_v2(models):
        return "sd_v1"
    return "sd_v2_v" if prediction(models) == "v_prediction" else "sd_v2"


def architecture(models: Models) -> str:
    """modelspec's name of the base."""
    if not is_v2(models):
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if prediction(models) == "v_prediction" else "stable-diffusion-v2-512"


SD15: Family[SdOptions] = Family(
    name="sd",
    implementation="diffusers",
    options=SdOptions,
    prediction=prediction,
    bucket_step=bucket_step,
    base_model_version=base_model_version,
    architecture=architecture,
    load=load_sd,
    add=add_sd_components,
    encode_images=encode_images,
    latents=latents,
    decode=decode,
    encode_text=encode_text,
    token_counts=token_counts,
    keep_trained_text=keep_trained_text,
    trained_text=conditions,
    empty=empty,
    empty_text=empty_text,
    denoise=denoise,
    pipeline=pipeline,
    sample=sample,
    model_hash=model_hash,
)
