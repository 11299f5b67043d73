"""Rectified flow, x_t = (1 − σ) x₀ + σ ε with the velocity ε − x₀ as target (arXiv 2209.03003).

`Flow` is the objective of FLUX. Sources: kohya sd-scripts' trainers (`timestep_sampling`), Stable Diffusion 3
(arXiv 2403.03206, §3.1: logit-normal, mode and cosmap densities and weights; §5.3.2: the shift) and FLUX's
sampling code (the shift that grows with the image).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.config.objective import PSEUDO_HUBER, FlowOptions
from lowrank.objective.objective import (
    Draw,
    column,
    elementwise,
    gaussian,
    huber_width,
    per_sample,
    perturbed,
)

STEPS = 1000  # a timestep is 1000 σ


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """σ′ = s σ / (1 + (s − 1) σ): more noise for s > 1, unchanged for s = 1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_table(shift: float) -> Tensor:
    """The training σ (1000,) in fp32 from 1 downwards, shifted; the table of diffusers'
    FlowMatchEulerDiscreteScheduler.
    """
    return shifted(torch.arange(STEPS, 0, -1, dtype=torch.float32) / STEPS, shift)


def flux_shift(latent_hw: tuple[int, int]) -> float:
    """e^μ, with μ on the line through (256 tokens, 0.5) and (4096 tokens, 1.15); a token is 2×2 latent
    pixels.
    """
    tokens = (latent_hw[0] // 2) * (latent_hw[1] // 2)
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def density(options: FlowOptions, count: int, generator: torch.Generator) -> Tensor:
    """u (count,) in [0, 1]: places in the σ table, with the density of `weighting_scheme` (arXiv 2403.03206).

    The density is uniform for all schemes but `logit_normal` and `mode`; the others may weigh the loss.
    """
    if options.weighting_scheme == "logit_normal":
        return torch.sigmoid(options.logit_mean + options.logit_std * torch.randn(count, generator=generator))
    u = torch.rand(count, generator=generator)
    if options.weighting_scheme == "mode":
        return 1 - u - options.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def flow_weight(scheme: str, sigma: Tensor) -> Tensor:
    """w(σ) in σ's shape: σ⁻² for `sigma_sqrt`, 2/(π(1 − 2σ + 2σ²)) for `cosmap`, else 1."""
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def interpolate(x0: Tensor, epsilon: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 − σ) x₀ + σ ε; σ is (B,)."""
    s = column(sigma, x0)
    return (1 - s) * x0 + s * epsilon


def velocity(x0: Tensor, epsilon: Tensor) -> Tensor:
    """dx_t/dσ = ε − x₀."""
    return epsilon - x0


def model_prediction(kind: str, v: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """What is compared with the target: `raw` v, `additive` v + x_t, `sigma_scaled` x_t − σ v (kohya's three
    kinds).

    Only `raw` is the velocity that the target is; the other two are kohya's, and `sigma_scaled` (an estimate
    of x₀) is kohya's default.
    """
    if kind == "raw":
        return v
    return noisy + v if kind == "additive" else noisy - column(sigma, v) * v


@dataclass(frozen=True)
class Flow(FlowOptions):
    """FLUX's objective; every field is the command-line option of that name.

    The weight w(σ) of `weighting_scheme` is applied to `raw` (diffusers and QR-LoRA do; kohya leaves it out
    there without a warning) and to `sigma_scaled`, and not to `additive`. With `sigma` sampling,
    `discrete_flow_shift` 1 is the unshifted table that QR-LoRA trains FLUX.1-dev with, 3 is kohya's.
    """

    @property
    def zero_terminal_snr(self) -> bool:
        """False: a flow's last noise level is pure noise without rescaling."""
        return False

    @property
    def timestep_range(self) -> tuple[int, int] | None:
        """None: every noise level may be drawn."""
        return None

    @property
    def prediction(self) -> str:
        """What the model predicts, in the words of diffusers' schedulers."""
        return "flow"

    def sigmas(self, count: int, generator: torch.Generator, latent_hw: tuple[int, int]) -> Tensor:
        """Noise levels σ (count,) in fp32, 0 = image, 1 = noise, by `timestep_sampling`.

        `sigma` looks up ⌊1000 u⌋ in the shifted table, with u from the density of the weighting scheme;
        `shift` and `flux_shift` shift a sigmoid of a normal number by a constant or by the size of the image
        (`latent_hw`, latent pixels).
        """
        sampling = self.timestep_sampling
        if sampling == "sigma":
            # u may be exactly 1, or leave [0, 1] for a large mode_scale: kohya's lookup would then fail or
            # wrap around
            u = density(self, count, generator)
            return sigma_table(self.discrete_flow_shift)[(u * STEPS).long().clamp(0, STEPS - 1)]
        if sampling == "uniform":
            return 1 - torch.rand(count, generator=generator)  # in (0, 1], so that a weight σ⁻² stays finite
        normal = torch.sigmoid(self.sigmoid_scale * torch.randn(count, generator=generator))
        if sampling == "sigmoid":
            return normal
        return shifted(normal, self.discrete_flow_shift if sampling == "shift" else flux_shift(latent_hw))

    def draw(self, latents: Tensor, generator: torch.Generator, at: float | None = None) -> Draw:
        """One σ and one ε per sample of `latents` (B, C, h, w); `generator` lives on the CPU.

        `at` in [0, 1] is the σ of all samples, for validation. Samples are drawn one after the other, so that
        a batch of B is B batches of one. Half-precision latents are computed in fp32; float64 stays float64.
        """
        x0 = latents if latents.dtype == torch.float64 else latents.float()
        levels, clean, inputs = [], [], []
        for _ in range(len(x0)):
            fixed = at is not None
            shape = (x0.shape[-2], x0.shape[-1])
            levels.append(torch.tensor([at]) if fixed else self.sigmas(1, generator, shape))
            clean.append(gaussian(x0.shape[1:], generator))
            gamma, random = self.ip_noise_gamma, self.ip_noise_gamma_random_strength
            inputs.append(perturbed(clean[-1], gamma, random, generator))
        sigma = torch.cat(levels).to(x0.device)
        noisy = interpolate(x0, torch.stack(inputs).to(x0), sigma)
        return Draw(noisy, velocity(x0, torch.stack(clean).to(x0)), sigma, STEPS * sigma)

    def compared(self, prediction: Tensor, drawn: Draw) -> Tensor:
        """A velocity in the form that is compared with the target, by `model_prediction_type`."""
        v = prediction.to(drawn.target.dtype)
        return model_prediction(self.model_prediction_type, v, drawn.noisy, drawn.sigma)

    def losses(
        self, prediction: Tensor, drawn: Draw, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample (B,): elementwise in fp32 (or float64), × w(σ), × mask, mean, × `weight`.

        `prediction` (B, C, h, w) is the model's velocity in any dtype; `mask` (B, 1, h, w); `weight` (B,), 1
        or the prior loss weight.
        """
        compared = self.compared(prediction, drawn)
        width = None
        if self.loss_type in PSEUDO_HUBER:
            width = huber_width(self.huber_schedule, drawn.timesteps, self.huber_c, self.huber_scale)
        loss = elementwise(self.loss_type, compared, drawn.target, width)
        if self.model_prediction_type != "additive":
            loss = loss * column(flow_weight(self.weighting_scheme, drawn.sigma), loss)
        return per_sample(loss, mask, weight)
