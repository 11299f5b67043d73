"""The demo FLUX: flow matching on tokens of 2×2 latents, then guidance distillation, as in FLUX.1-dev.

Rectified flow (arXiv 2209.03003) with logit-normal noise levels (2403.03206). Distillation (2210.03142): the
student learns v(∅) + g (v(c) − v(∅)) for a guidance g from 1 to 5; at g = 1 the target is v(c).
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowrank.models.flux import image_ids, pack
from tools.glyph_world import text
from tools.glyph_world.autoencoder import CHANNELS
from tools.glyph_world.training import Plan, at_step, fit
from tools.make_tiny_flux import scheduler

WIDTH = 96  # of both text encoders
PLAN = Plan(steps=6500, lr=1e-3, warmup=300, decay=0.999)
DISTILLATION = Plan(steps=1000, lr=4e-4, warmup=100, decay=0.995, seed=1)
# from the weights of an earlier model
FURTHER = Plan(steps=1800, lr=6e-4, warmup=100, decay=0.998, seed=10)
FURTHER_DISTILLATION = Plan(steps=400, lr=3e-4, warmup=50, decay=0.99, seed=11)
BATCH = 32
# T5 lengths and their probabilities: the stock pipeline pads to 512 by default, and attends to the padding
LENGTHS, SHARES = (24, 32, 48, 96, 256, 512), (0.60, 0.26, 0.08, 0.04, 0.01, 0.01)


def transformer() -> Any:
    """Return a FluxTransformer2DModel of 2 double and 4 single blocks, with 4 heads of 32."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )


class Parts:
    """The trained modules, their tokenizers, and the forward pass from captions and latents."""

    def __init__(self, folder: Path, device: str):
        self.tokenizer = text.clip_tokenizer(folder / "tokenizer")
        self.tokenizer_2 = text.t5_tokenizer(folder / "tokenizer_2")
        self.modules = {
            "transformer": transformer(),
            "text_encoder": text.clip(self.tokenizer, WIDTH, 32),
            "text_encoder_2": text.t5(self.tokenizer_2, WIDTH),
        }
        for module in self.modules.values():
            module.to(device)
        self.device = device

    def encode(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Encode captions: pooled (B, D) and sequence (B, L, D)."""
        pooled = self.modules["text_encoder"](
            text.causal(self.tokenizer, captions, self.device)
        ).pooler_output
        ids = text.tokens(self.tokenizer_2, captions, length, self.device)
        return pooled, self.modules["text_encoder_2"](ids).last_hidden_state

    def velocity(
        self, noisy: Tensor, sigma: Tensor, pooled: Tensor, sequence: Tensor, guidance: Tensor
    ) -> Tensor:
        """Predict the velocity (B, tokens, 4C) of noisy tokens (B, tokens, 4C)."""
        side = 2 * int(noisy.shape[1] ** 0.5)
        return self.modules["transformer"](
            hidden_states=noisy,
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            txt_ids=torch.zeros(sequence.shape[1], 3, device=self.device),
            img_ids=image_ids(side, side, torch.device(self.device)),
            return_dict=False,
        )[0]

    def pipeline(self, vae: Any) -> Any:
        """Return a stock FluxPipeline with these modules."""
        from diffusers import FluxPipeline

        return FluxPipeline(
            scheduler=scheduler(),
            vae=vae,
            text_encoder=self.modules["text_encoder"],
            tokenizer=self.tokenizer,
            text_encoder_2=self.modules["text_encoder_2"],
            tokenizer_2=self.tokenizer_2,
            transformer=self.modules["transformer"],
        )


def _fast(device: str) -> contextlib.ExitStack:
    """Return a context with bf16 autocast and, on a CPU, math attention, whose backward is faster here."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(torch.device(device).type, torch.bfloat16))
    if torch.device(device).type == "cpu":
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def _draw(latents: np.ndarray, captions, plan: Plan, step: int, device: str):
    """Draw a batch: clean and noisy tokens, noise, σ, captions, T5 length, and the step's generator."""
    rng, generator = at_step(plan.seed, step)
    chosen = rng.integers(len(latents), size=BATCH)
    x = pack(torch.from_numpy(latents[chosen]).to(device).float())
    words = [captions(int(i), rng) for i in chosen]
    noise = torch.randn(x.shape, generator=generator).to(device)
    sigma = torch.sigmoid(0.2 + 1.1 * torch.randn(BATCH, generator=generator)).to(device)
    noisy = torch.lerp(x, noise, sigma[:, None, None])
    return x, noisy, noise, sigma, words, int(rng.choice(LENGTHS, p=SHARES)), generator


def train(
    parts: Parts, plan: Plan, latents: np.ndarray, captions, folder: Path, minutes: float | None = None
) -> dict:
    """Train with flow matching, text encoders included; `captions(i, rng)` is a caption of picture i."""
    ones = torch.ones(BATCH, device=parts.device)

    def loss(step: int) -> dict[str, Tensor]:
        x, noisy, noise, sigma, words, length, _ = _draw(latents, captions, plan, step, parts.device)
        with _fast(parts.device):
            v = parts.velocity(noisy, sigma, *parts.encode(words, length), ones)
        return {"loss": F.mse_loss(v.float(), noise - x)}

    return fit("flux", plan, parts.modules, loss, folder, minutes)


def distil(
    parts: Parts, plan: Plan, latents: np.ndarray, captions, folder: Path, minutes: float | None = None
) -> dict:
    """Distil guidance: the transformer learns to predict in one pass the guided result of two passes."""
    teacher = copy.copy(parts)
    teacher.modules = {**parts.modules, "transformer": copy.deepcopy(parts.modules["transformer"])}
    ones = torch.ones(BATCH, device=parts.device)

    def loss(step: int) -> dict[str, Tensor]:
        _, noisy, _, sigma, words, length, generator = _draw(latents, captions, plan, step, parts.device)
        guidance = 1 + 4 * torch.rand(BATCH, generator=generator).to(parts.device)
        guidance[: BATCH // 4] = 1.0
        with _fast(parts.device):
            with torch.no_grad():
                conditions = parts.encode(words, length)
                pooled, sequence = (text.rows(c, noisy) for c in parts.encode([""], length))
                v = teacher.velocity(noisy, sigma, *conditions, ones)
                v0 = teacher.velocity(noisy, sigma, pooled, sequence, ones)
            target = v0 + guidance[:, None, None] * (v - v0)
            prediction = parts.velocity(noisy, sigma, *conditions, guidance)
        error = (prediction.float() - target.float()).square().mean((1, 2))
        return {"loss": (error / guidance).mean()}

    return fit("flux_guidance", plan, {"transformer": parts.modules["transformer"]}, loss, folder, minutes)
