"""FLUX.1 (dev, schnell and their descendants) as a `Family`, on diffusers' and transformers' own classes.

What FLUX needs that others do not: latents are packed 2×2 into tokens, position ids are shared by the batch,
a guidance scale is an input of dev (not of schnell), text is CLIP-L's pooled vector and T5's sequence. Facts:
kohya sd-scripts' FLUX trainer, diffusers' FluxPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL.Image import Image
from torch import Tensor, nn

from lowrank.config.flux import FluxModel
from lowrank.errors import Refused
from lowrank.models.family import Family, FamilyOptions, Models, TokenCounts, latent_scale
from lowrank.models.flux_load import add_flux_components, empty_text, load_flux, model_hash
from lowrank.models.pictures import check_sides, decode, encode_images, latents, to_pil


@dataclass(frozen=True)
class FluxOptions(FamilyOptions):
    """Options of text and denoiser; each is the command-line option of its name."""

    guidance_scale: float = FluxModel.guidance_scale  # only models with a guidance embedder use it
    t5xxl_max_token_length: int | None = FluxModel.t5xxl_max_token_length  # None: see `text_length`
    apply_t5_attn_mask: bool = FluxModel.apply_t5_attn_mask  # hide T5's padding in T5 and in the denoiser
    trains_t5: bool = False  # adapters can change T5 too


# ---------- text


def text_length(models: Models, options: FluxOptions) -> int:
    """Tokens of T5: the option, else 512 with a guidance embedder (dev) or 256; at most the tokenizer's."""
    length = options.t5xxl_max_token_length or (512 if models.configs["denoiser"]["guidance_embeds"] else 256)
    return min(length, models.tokenizers[1].model_max_length)


@torch.no_grad()
def encode_text(
    models: Models, captions: Sequence[str], options: FluxOptions = FluxOptions()
) -> list[dict[str, Tensor]]:
    """One CPU dictionary per caption: `pooled` (D,), `t5` (L, D₂) in the encoders' dtype, `t5_mask` (L,)
    bool.

    Captions are encoded one by one, so that what is cached does not depend on its neighbours. A caption
    longer than T5's length is cut.
    """
    encoded = []
    for caption in captions:
        hidden, mask = _t5(models, [caption], options)
        pooled = _pooled(models.text_encoders[0], models.tokenizers[0], [caption])
        encoded.append({"pooled": pooled[0].cpu(), "t5": hidden[0].cpu(), "t5_mask": mask[0].cpu()})
    return encoded


def token_counts(
    models: Models, captions: Sequence[str], options: FluxOptions = FluxOptions()
) -> TokenCounts:
    """The tokens of each caption for T5, with the end token, and T5's limit; CLIP-L's 77 give one vector."""
    tokenizer, limit = models.tokenizers[1], text_length(models, options)
    counts = [len(tokenizer(caption, verbose=False).input_ids) for caption in captions]
    return TokenCounts("T5", limit, counts, "give --t5xxl_max_token_length 512" if limit < 512 else "")


def _t5(models: Models, captions: Sequence[str], options: FluxOptions) -> tuple[Tensor, Tensor]:
    """T5's output (B, L, D₂) and the mask of its tokens (B, L) bool."""
    t5, tokenizer, length = models.text_encoders[1], models.tokenizers[1], text_length(models, options)
    tokens = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    hide = tokens.attention_mask.to(t5.device) if options.apply_t5_attn_mask else None
    hidden = t5(tokens.input_ids.to(t5.device), attention_mask=hide).last_hidden_state
    return hidden, tokens.attention_mask.bool()


def _pooled(clip: Any, tokenizer: Any, captions: Sequence[str]) -> Tensor:
    ids = tokenizer(
        list(captions),
        padding="max_length",
        max_length=min(77, tokenizer.model_max_length),
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return clip(ids.to(clip.device)).pooler_output  # (B, D)


def keep_trained_text(models: Models, options: FluxOptions = FluxOptions()) -> list[nn.Module]:
    """Drop the text encoders that adapters cannot change, and return the others: CLIP-L, on request T5."""
    kept = 2 if options.trains_t5 else 1
    models.text_encoders, models.tokenizers = models.text_encoders[:kept], models.tokenizers[:kept]
    return list(models.text_encoders)


def trained_text(
    models: Models, captions: Sequence[str], options: FluxOptions = FluxOptions()
) -> dict[str, Tensor]:
    """The conditions that come from the trained encoders, with gradient: `pooled` (B, D), and those of T5."""
    conditions = {"pooled": _pooled(models.text_encoders[0], models.tokenizers[0], captions)}
    if options.trains_t5:
        conditions["t5"], conditions["t5_mask"] = _t5(models, captions, options)
    return conditions


def empty(models: Models) -> FluxTransformer2DModel:
    """The denoiser on the meta device: shapes and names without weights."""
    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel.from_config(dict(models.configs["denoiser"]))
        return transformer


# ---------- denoising


def pack(z: Tensor) -> Tensor:
    """Latents (B, C, h, w) → tokens (B, h/2·w/2, 4C): each 2×2 patch is one token."""
    return z.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`: (B, h/2·w/2, 4C) → (B, C, h, w)."""
    z = tokens.unflatten(1, (h // 2, w // 2)).unflatten(3, (-1, 2, 2))  # (B, h/2, w/2, C, 2, 2)
    return z.permute(0, 3, 1, 4, 2, 5).reshape(len(z), -1, h, w)


def image_ids(h: int, w: int, device: torch.device) -> Tensor:
    """Positions (0, row, column) of the tokens, (h/2·w/2, 3)."""
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    return ids.to(device, torch.float32)


def _attention(
    text: Mapping[str, Tensor], batch: int, tokens: int, options: FluxOptions, device
) -> dict | None:
    if not options.apply_t5_attn_mask:
        return None
    mask = text["t5_mask"].to(device).expand(batch, -1)
    mask = torch.cat([mask, mask.new_ones(batch, tokens)], dim=1)  # text first, as in the joint attention
    return {"attention_mask": mask[:, None, None, :]}  # (B, 1, 1, L + N)


def denoise(
    denoiser: Any,  # the class of diffusers
    noisy: Tensor,
    timesteps: Tensor,
    text: Mapping[str, Tensor],
    options: FluxOptions = FluxOptions(),
) -> Tensor:
    """The velocity (B, C, h, w) that the transformer predicts, in its own dtype.

    `noisy` (B, C, h, w), `timesteps` (B,) in 0..1000, `text` of B captions or of one for all. Position ids
    have no batch dimension: all samples share them.
    """
    B, _, h, w = noisy.shape
    if h % 2 or w % 2:
        raise Refused(
            f"latents of {h}×{w} cannot be packed 2×2; their sides must be even, so give another --resolution"
        )
    device, guidance = noisy.device, None
    if denoiser.config.guidance_embeds:
        guidance = torch.full((B,), options.guidance_scale, device=device, dtype=torch.float32)
    tokens = pack(noisy.to(denoiser.dtype))  # (B, N, 4C)
    t5 = text["t5"].to(device, denoiser.dtype).expand(B, -1, -1)  # (B, L, D₂)
    out = denoiser(
        hidden_states=tokens,
        timestep=timesteps / 1000,
        guidance=guidance,
        encoder_hidden_states=t5,
        pooled_projections=text["pooled"].to(device, denoiser.dtype).expand(B, -1),
        txt_ids=torch.zeros(t5.shape[1], 3, device=device),
        img_ids=image_ids(h, w, device),
        joint_attention_kwargs=_attention(text, B, tokens.shape[1], options, device),
        return_dict=False,
    )[0]
    return unpack(out, h, w)


# ---------- sampling


def pipeline(models: Models) -> FluxPipeline:
    """The stock FluxPipeline around the present denoiser, for cached text; its scheduler is a copy."""
    no_text: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(
        scheduler=type(models.scheduler).from_config(models.scheduler.config),
        vae=models.vae,
        **no_text,
        transformer=models.denoiser,
    )


@torch.no_grad()
def sample(
    models: Models,
    text: Mapping[str, Tensor],
    options: FluxOptions = FluxOptions(),
    *,
    height: int,
    width: int,
    steps: int,
    generator: torch.Generator,
    negative: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    guidance: float | None = None,
    sampler: str | None = None,
) -> list[Image]:
    """One PIL image per caption of `text`, through the stock pipeline.

    `guidance` replaces the options' distilled guidance; `scale` above 1 with a `negative` text is CFG besides
    it. The VAE may be on another device or in another dtype than the denoiser. `generator` lives on the CPU,
    so that a seed gives the same noise on every device. Raises `Refused` for a `sampler`: flows have one.
    """
    if sampler is not None:
        raise Refused(f"sampler {sampler!r} is not for FLUX, which has one of its own; leave it out")
    check_sides(height, width, bucket_step(models), "a sample")
    pipe: Any = pipeline(models)
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    h, w = height // latent_scale(models), width // latent_scale(models)
    B = len(text["t5"])
    against = {}
    if negative is not None and scale > 1:
        against = {
            "true_cfg_scale": scale,
            "negative_prompt_embeds": negative["t5"].to(model.device, model.dtype),
            "negative_pooled_prompt_embeds": negative["pooled"].to(model.device, model.dtype),
        }
    tokens = pipe(
        prompt_embeds=text["t5"].to(model.device, model.dtype),
        pooled_prompt_embeds=text["pooled"].to(model.device, model.dtype),
        **against,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=options.guidance_scale if guidance is None else guidance,
        generator=generator,
        joint_attention_kwargs=_attention(text, B, h * w // 4, options, model.device),
        output_type="latent",
    ).images
    return to_pil(models, unpack(tokens, h, w))


def architecture(models: Models) -> str:
    """modelspec's name of the base: dev has a guidance embedder, schnell has none."""
    return "flux-1-dev" if models.configs["denoiser"]["guidance_embeds"] else "flux-1-schnell"


def bucket_step(models: Models) -> int:
    """Picture pixels per token: the VAE's scale, twice, as latents are packed 2×2."""
    return 2 * latent_scale(models)


FLUX: Family[FluxOptions] = Family(
    name="flux",
    implementation="https://github.com/black-forest-labs/flux",
    options=FluxOptions,
    prediction=lambda models: "flow",
    bucket_step=bucket_step,
    base_model_version=lambda models: "flux1",
    architecture=architecture,
    load=load_flux,
    add=add_flux_components,
    encode_images=encode_images,
    latents=latents,
    decode=decode,
    encode_text=encode_text,
    token_counts=token_counts,
    keep_trained_text=keep_trained_text,
    trained_text=trained_text,
    empty=empty,
    empty_text=empty_text,
    denoise=denoise,
    pipeline=pipeline,
    sample=sample,
    model_hash=model_hash,
)
