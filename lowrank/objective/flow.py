"""What is predicted: rectified flow, x_t = (1 − σ) x₀ + σ ε with the velocity ε − x₀ as target (arXiv
2209.03003).

An objective is a frozen record of options with two verbs, and that is all the training loop knows of it:

    drawn = objective.draw(latents, generator)                 # noisy input, target, σ, timesteps
    prediction = denoise(…, drawn.noisy, drawn.timesteps, …)
    losses = objective.losses(prediction, drawn, weight=…)     # (B,), to be averaged and logged by component

`Flow` is FLUX's. `diffusion.Diffusion` (SD 1.x, 2.x, SDXL) is a second record of the same shape beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank.config.objective import PSEUDO_HUBER, FlowOptions
from lowrank.objective import noise
from lowrank.objective.weight import column, elementwise, flow_weight, huber_width, per_sample


class Objective(Protocol):
    """What the training loop knows of an objective."""

    @property
    def prediction(self) -> str:
        """What the model predicts, in the words of diffusers' schedulers."""
        ...

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the noise schedule is rescaled so that its last step is pure noise."""
        ...

    @property
    def timestep_range(self) -> tuple[int, int] | None:
        """Least timestep, and the one behind the greatest; None where neither was chosen."""
        ...

    def draw(self, latents: Tensor, generator: torch.Generator, at: float | None = None) -> Draw:
        """Noisy samples of `latents` and what the model should predict of them."""
        ...

    def losses(
        self, prediction: Tensor, drawn: Draw, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample (B,)."""
        ...


class Draw(NamedTuple):
    """One step's noisy samples and what the model should say about them."""

    noisy: Tensor  # (B, C, h, w)
    target: Tensor  # (B, C, h, w)
    sigma: Tensor  # (B,) fp32, 0 = picture, 1 = noise
    timesteps: Tensor  # (B,) fp32 in 0..1000


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
        """σ (count,) by these options; latent_hw in latent pixels."""
        return noise.sigmas(
            self.timestep_sampling,
            count,
            generator,
            latent_hw=latent_hw,
            sigmoid_scale=self.sigmoid_scale,
            shift=self.discrete_flow_shift,
            weighting_scheme=self.weighting_scheme,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            mode_scale=self.mode_scale,
        )

    def draw(self, latents: Tensor, generator: torch.Generator, at: float | None = None) -> Draw:
        """One σ and one ε per sample of `latents` (B, C, h, w); `generator` lives on the CPU.

        `at` in [0, 1] is the σ of all samples, for validation. Samples are drawn one after the other, so that
        a batch of B is B batches of one. Half-precision latents are computed in fp32; float64 stays float64.
        """
        x0 = latents if latents.dtype == torch.float64 else latents.float()
        levels, clean, seen = [], [], []
        for _ in range(len(x0)):
            fixed = at is not None
            shape = (x0.shape[-2], x0.shape[-1])
            levels.append(torch.tensor([at]) if fixed else self.sigmas(1, generator, shape))
            clean.append(noise.gaussian(x0.shape[1:], generator))
            gamma, random = self.ip_noise_gamma, self.ip_noise_gamma_random_strength
            seen.append(noise.perturbed(clean[-1], gamma, random, generator))
        sigma = torch.cat(levels).to(x0.device)
        noisy = interpolate(x0, torch.stack(seen).to(x0), sigma)
        return Draw(noisy, velocity(x0, torch.stack(clean).to(x0)), sigma, noise.STEPS * sigma)

    def losses(
        self, prediction: Tensor, drawn: Draw, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample (B,): elementwise in fp32 (or float64), × w(σ), × mask, mean, × `weight`.

        `prediction` (B, C, h, w) is the model's velocity in any dtype; `mask` (B, 1, h, w); `weight` (B,), 1
        or the prior loss weight.
        """
        v = prediction.to(drawn.target.dtype)
        seen = model_prediction(self.model_prediction_type, v, drawn.noisy, drawn.sigma)
        width = None
        if self.loss_type in PSEUDO_HUBER:
            width = huber_width(self.huber_schedule, drawn.timesteps, self.huber_c, self.huber_scale)
        loss = elementwise(self.loss_type, seen, drawn.target, width)
        if self.model_prediction_type != "additive":
            loss = loss * column(flow_weight(self.weighting_scheme, drawn.sigma), loss)
        return per_sample(loss, mask, weight)
