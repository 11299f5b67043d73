"""Images to latents and back, for every family whose VAE is an AutoencoderKL."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor

from lowrank.errors import Refused
from lowrank.models.family import Models, latent_scale


def check_sides(height: int, width: int, step: int, what: str) -> None:
    """Raise `Refused` for an image whose sides are not multiples of `step`; `what` names the image."""
    if height % step or width % step:
        raise Refused(
            f"{what} of {width}×{height} does not fit this model: both sides must be multiples of {step}; "
            "use --enable_bucket, or another --resolution"
        )


@torch.no_grad()
def encode_images(models: Models, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [−1, 1] → the VAE's moments (B, 2C, h, w), mean and log-variance, fp32 on its device.

    Raises `Refused` when a side does not fit the latents, or when the VAE overflows (half precision).
    """
    height, width = pixels.shape[-2:]
    check_sides(height, width, latent_scale(models), "an image")
    moments = models.vae.encode(pixels.to(models.vae.device, models.vae.dtype)).latent_dist.parameters.float()
    if not torch.isfinite(moments).all():
        raise Refused(
            f"the VAE gives NaN or infinite latents in {models.vae.dtype}; run it with --no_half_vae"
        )
    return moments


def latents(models: Models, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Moments (B, 2C, h, w) → latents (B, C, h, w) = (mean + e^{logvar/2} ξ − shift) · scale, ξ per sample.

    `generator` is on the CPU; None takes the mean. Only configurations are read, so the VAE may be released.
    """
    facts = models.configs["vae"]
    mean, logvar = moments.float().chunk(2, dim=1)
    if generator is not None:
        xi = torch.stack([torch.randn(mean.shape[1:], generator=generator) for _ in mean]).to(mean)
        mean = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * xi
    return (mean - (facts.get("shift_factor") or 0)) * facts["scaling_factor"]


@torch.no_grad()
def decode(models: Models, z: Tensor) -> Tensor:
    """Latents (B, C, h, w) → images (B, 3, H, W) about [−1, 1] in fp32, on the VAE's device."""
    facts = models.configs["vae"]
    z = z.float() / facts["scaling_factor"] + (facts.get("shift_factor") or 0)
    return models.vae.decode(z.to(models.vae.device, models.vae.dtype)).sample.float()


def to_pil(models: Models, z: Tensor) -> list[Image]:
    """Latents (B, C, h, w) → B PIL images."""
    processor: Any = VaeImageProcessor(vae_scale_factor=latent_scale(models))
    return processor.postprocess(decode(models, z).cpu(), output_type="pil")
