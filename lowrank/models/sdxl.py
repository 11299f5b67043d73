"""SDXL as a `Family`: SD's U-Net with two text encoders, a pooled text, and the sizes of the picture.

What differs from SD: both encoders give their last hidden state but one, without normalisation; the second
one's pooled projection and six numbers (original size, crop, target size) are added to the timestep. Facts:
kohya sd-scripts' SDXL trainer, diffusers' StableDiffusionXLPipeline.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from lowrank.models import clip_text
from lowrank.models.family import Family, Models
from lowrank.models.samplers import build_sampler as sampler_of
from lowrank.models.sd import PLAIN, SD15, SdOptions, encode_text, sample
from lowrank.models.sd_load import load_xl, model_hash_xl

_LAYER = 2  # the last layer but one; SDXL has no --clip_skip


def conditions(models: Models, captions: Sequence[str], options: SdOptions = PLAIN) -> dict[str, Tensor]:
    """`context` (B, 75·n + 2, D₁ + D₂) and `pooled` (B, P), with gradient where an encoder is trained."""
    states = []
    pooled = torch.empty(0)
    for encoder, tokenizer in zip(models.text_encoders, models.tokenizers, strict=True):
        tokens = [
            clip_text.tokenize(tokenizer, caption, options.chunks, options.weighted_captions)
            for caption in captions
        ]
        state, pooled = clip_text.hidden(encoder, tokens, _LAYER, final_norm=False)
        states.append(state)
    return {"context": torch.cat(states, dim=-1), "pooled": pooled}


def size_conditions(originals: Tensor, crops: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """`time_ids` (B, 6): the original's height and width, the crop's top and left, the target's sides."""
    return {"time_ids": torch.cat([originals, crops, targets], dim=1)}


def pipeline(models: Models, sampler: str | None = None) -> StableDiffusionXLPipeline:
    """The stock StableDiffusionXLPipeline around the present denoiser, for cached text."""
    nothing: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        scheduler=sampler_of(sampler, models.configs["scheduler"]),
        vae=models.vae,
        unet=models.denoiser,
        **nothing,
        add_watermarker=False,
    )


SDXL: Family[SdOptions] = dataclasses.replace(
    SD15,
    name="sdxl",
    implementation="https://github.com/Stability-AI/generative-models",
    base_model_version=lambda models: "sdxl_base_v1-0",
    architecture=lambda models: "stable-diffusion-xl-v1-base",
    load=load_xl,
    encode_text=functools.partial(encode_text, encode=conditions),
    trained_text=conditions,
    size_conditions=size_conditions,
    pipeline=pipeline,
    sample=functools.partial(sample, build=pipeline),  # `text` has the image's size conditions
    model_hash=model_hash_xl,
)
