"""The autoencoder of all three families: 64×64×3 pictures to 16×16×8 latents with standard deviation 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.glyph_world.training import Plan, at_step, fit
from tools.glyph_world.world import SIZE

CHANNELS, SCALE = 8, 4
PLAN = Plan(steps=6000, lr=1.2e-3, weight_decay=0.0)
REFINEMENT = Plan(steps=4000, lr=8e-4, weight_decay=0.0, seed=4)
BATCH = 8
KL = 3e-4  # weight of the KL per latent number, relative to L1 per pixel value


def autoencoder() -> Any:
    """Return a diffusers AutoencoderKL of 0.69 M parameters, with 4 channels per norm group as in SD."""
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    return AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_tensor(pictures: np.ndarray, device="cpu") -> Tensor:
    """Convert (B, 64, 64, 3) uint8 to (B, 3, 64, 64) in [−1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(vae: Any, pictures: np.ndarray, folder: Path, device: str, minutes: float | None) -> dict:
    """Train with L1 and squared error on pixels, L1 on their differences, and a small KL term."""
    vae.to(device)

    def loss(step: int) -> dict[str, Tensor]:
        rng, generator = at_step(PLAN.seed, step)
        x = to_tensor(pictures[rng.integers(len(pictures), size=BATCH)], device)
        if rng.random() < 0.5:
            x = x.flip(-1)
        xi = torch.randn(BATCH, CHANNELS, SIZE // SCALE, SIZE // SCALE, generator=generator).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            error = vae.decode(posterior.mean + posterior.std * xi).sample - x
        flat, kl = error.abs().mean(), posterior.kl().mean() / posterior.mean[0].numel()
        slope = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return {"loss": flat + 0.25 * slope + 2 * error.square().mean() + KL * kl, "l1": flat, "kl": kl}

    return fit("vae", PLAN, {"vae": vae}, loss, folder, minutes)


def refine(vae: Any, pictures: np.ndarray, folder: Path, device: str, minutes: float | None) -> dict:
    """Train only the decoder further, mainly on squared error; the latents do not change."""
    vae.to(device).encoder.requires_grad_(False)

    def loss(step: int) -> dict[str, Tensor]:
        rng, generator = at_step(REFINEMENT.seed, step)
        x = to_tensor(pictures[rng.integers(len(pictures), size=BATCH)], device)
        if rng.random() < 0.5:
            x = x.flip(-1)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.sample(generator)
            error = vae.decode(z).sample - x
        return {"loss": error.square().mean() + 0.1 * error.abs().mean(), "mse": error.square().mean()}

    return fit("decoder", REFINEMENT, {"decoder": vae.decoder}, loss, folder, minutes)


@torch.no_grad()
def standardise(vae: Any, pictures: np.ndarray, device: str) -> None:
    """Set shift and scale so that the latents of `pictures` have mean 0 and spread 1."""
    means = torch.cat(
        [vae.encode(to_tensor(p, device)).latent_dist.mean for p in np.array_split(pictures, 16)]
    )
    vae.register_to_config(
        shift_factor=round(means.mean().item(), 4), scaling_factor=round(1 / means.std().item(), 4)
    )


@torch.no_grad()
def psnr(vae: Any, pictures: np.ndarray, device: str) -> float:
    """Return the mean peak signal-to-noise ratio, in dB, of pictures after encoding (mean) and decoding."""
    values = []
    for part in np.array_split(pictures, max(1, len(pictures) // 50)):
        x = to_tensor(part, device)
        decoded = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (decoded - x).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


@torch.no_grad()
def latents(vae: Any, pictures: np.ndarray, device: str) -> np.ndarray:
    """Return the scaled posterior means (N, C, h, w) of pictures, in half precision."""
    config, means = vae.config, []
    for part in np.array_split(pictures, max(1, len(pictures) // 100)):
        mean = vae.encode(to_tensor(part, device)).latent_dist.mean
        means.append(((mean - config.shift_factor) * config.scaling_factor).cpu().half().numpy())
    return np.concatenate(means)
