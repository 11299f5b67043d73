"""The demo SD 1.5 and SDXL: small U-Nets, ε-prediction with SD's scaled-linear schedule.

The loss is the squared error of ε times 1/ᾱ, limited to WEIGHT_LIMIT. Without the limit it would be the
squared error of the velocity √ᾱ ε − √(1−ᾱ) x₀ (arXiv 2202.00512), which weights high noise, where contents
are decided, as much as low noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.glyph_world import text
from tools.glyph_world.autoencoder import CHANNELS, SCALE
from tools.glyph_world.training import Plan, at_step, fit
from tools.glyph_world.world import SIZE

BATCH = 32
WEIGHT_LIMIT = 20.0


@dataclass(frozen=True)
class Kind:
    """The configuration of a small SD 1.5 or SDXL."""

    name: str
    unet: dict[str, Any]
    widths: tuple[int, ...]  # of the text encoders
    plan: Plan
    further: Plan  # from the weights of an earlier model

    @property
    def two(self) -> bool:
        """Whether it has two text encoders."""
        return len(self.widths) == 2


SD15 = Kind(
    "sd15",
    {
        "block_out_channels": (64, 64, 64, 64),
        "norm_num_groups": 16,  # 4 channels per group; SD has 10 at its first level
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "attention_head_dim": 2,  # diffusers' name for the number of heads
        "cross_attention_dim": 128,
    },
    (128,),
    Plan(steps=4500, lr=1e-3, warmup=300, decay=0.999, seed=2),
    Plan(steps=1500, lr=6e-4, warmup=100, decay=0.998, seed=12),
)
SDXL = Kind(
    "sdxl",
    {
        "block_out_channels": (64, 64, 64),
        "norm_num_groups": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 1,  # heads of 64
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 16 + 64,
    },
    (64, 64),
    Plan(steps=4500, lr=1e-3, warmup=300, decay=0.999, seed=3),
    Plan(steps=2400, lr=6e-4, warmup=100, decay=0.998, seed=13),
)


def scheduler() -> Any:
    """Return a scheduler with SD's noise schedule, whose sampling starts at the last training timestep."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="trailing",
    )


class Parts:
    """The trained modules, their tokenizers, and the forward pass from captions and latents."""

    def __init__(self, kind: Kind, folder: Path, device: str):
        from diffusers import UNet2DConditionModel

        self.kind, self.device = kind, device
        self.tokenizers = [
            text.clip_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")[: len(kind.widths)]
        ]
        self.modules: dict[str, Any] = {
            "unet": UNet2DConditionModel(
                sample_size=SIZE // SCALE,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                layers_per_block=1,
                **kind.unet,
            ),
            "text_encoder": text.clip(self.tokenizers[0], kind.widths[0]),
        }
        if kind.two:
            self.modules["text_encoder_2"] = text.clip(self.tokenizers[1], kind.widths[1], projected=True)
        for module in self.modules.values():
            module.to(device)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        """Encode captions: sequence (B, 77, D) and, for SDXL, pooled (B, D)."""
        ids = [text.tokens(tokenizer, captions, 77, self.device) for tokenizer in self.tokenizers]
        if not self.kind.two:
            return self.modules["text_encoder"](ids[0]).last_hidden_state, None
        first = self.modules["text_encoder"](ids[0], output_hidden_states=True).hidden_states[-2]
        second = self.modules["text_encoder_2"](ids[1], output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds

    def epsilon(
        self, noisy: Tensor, timesteps: Tensor, sequence: Tensor, pooled: Tensor | None, sizes: Tensor
    ) -> Tensor:
        """Predict the noise (B, C, h, w)."""
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        return self.modules["unet"](noisy, timesteps, sequence, added_cond_kwargs=added).sample

    def pipeline(self, vae: Any) -> Any:
        """Return a stock StableDiffusionPipeline or StableDiffusionXLPipeline with these modules."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        if not self.kind.two:
            return StableDiffusionPipeline(
                vae=vae,
                tokenizer=self.tokenizers[0],
                scheduler=scheduler(),
                **self.modules,
                safety_checker=None,  # pyright: ignore[reportArgumentType]
                feature_extractor=None,  # pyright: ignore[reportArgumentType]
                requires_safety_checker=False,
            )
        first, second = self.tokenizers
        return StableDiffusionXLPipeline(
            vae=vae,
            tokenizer=first,
            tokenizer_2=second,
            scheduler=scheduler(),
            **self.modules,
            add_watermarker=False,
        )


def train(
    parts: Parts, plan: Plan, latents: np.ndarray, captions, folder: Path, minutes: float | None = None
) -> dict:
    """Train with ε-prediction, text encoders included; `captions(i, rng)` is a caption of picture i."""
    device = parts.device
    alphas = scheduler().alphas_cumprod.to(device)  # ᾱ by timestep

    def loss(step: int) -> dict[str, Tensor]:
        rng, generator = at_step(plan.seed, step)
        chosen = rng.integers(len(latents), size=BATCH)
        x = torch.from_numpy(latents[chosen]).to(device).float()
        sequence, pooled = parts.encode([captions(int(i), rng) for i in chosen])
        noise = torch.randn(x.shape, generator=generator).to(device)
        t = torch.randint(1000, (BATCH,), generator=generator).to(device)
        alpha = alphas[t][:, None, None, None]
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        error = (parts.epsilon(noisy, t, sequence, pooled, _sizes(rng, device)) - noise).square()
        return {"loss": (error * (1 / alpha).clamp(max=WEIGHT_LIMIT)).mean(), "epsilon": error.mean()}

    return fit(parts.kind.name, plan, parts.modules, loss, folder, minutes)


def _sizes(rng: np.random.Generator, device: str) -> Tensor:
    """Return SDXL's original size, crop and target size (B, 6); one in five rows is random, to be ignored."""
    usual = np.tile([SIZE, SIZE, 0, 0, SIZE, SIZE], (BATCH, 1))
    other = np.concatenate(
        [rng.integers(32, 1025, (BATCH, 2)), rng.integers(0, 33, (BATCH, 2)), usual[:, 4:]], axis=1
    )
    return torch.from_numpy(np.where(rng.random((BATCH, 1)) < 0.2, other, usual)).float().to(device)
