"""Denoising diffusion, x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε, with ε or the velocity v as target.

`Diffusion` is the objective of SD 1.x, 2.x and SDXL. Sources: DDPM (arXiv 2006.11239), v-prediction (arXiv
2202.00512), zero terminal SNR (arXiv 2305.08891, algorithm 1), min-SNR-γ (arXiv 2303.09556, in its ε and v
forms), debiased estimation (arXiv 2310.08442), noise offset (N. Guttenberg, "Diffusion with Offset Noise"),
pyramid noise (J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training") and kohya sd-scripts'
trainers, which have the same options.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.config.objective import PSEUDO_HUBER, TIMESTEPS, DiffusionOptions
from lowrank.objective.objective import (
    Draw,
    column,
    elementwise,
    gaussian,
    huber_width,
    per_sample,
    perturbed,
)

BETAS = (0.00085, 0.012)  # √β is linear between them
LARGEST_SNR = 1000.0  # bound of ᾱ/(1 − ᾱ) in all weights but min-SNR's, as in kohya's


def alpha_bars() -> Tensor:
    """ᾱ_t = Π (1 − β_s) of the training schedule that SD 1.x, 2.x and SDXL share, (1000,) in float64."""
    roots = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TIMESTEPS, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0)


def zero_terminal(alpha_bar: Tensor) -> Tensor:
    """√ᾱ shifted and scaled, so that the last is 0 and the first stays (arXiv 2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)).square()


def add_noise(x0: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = √ᾱ x₀ + √(1 − ᾱ) ε; ᾱ is (B,)."""
    return column(alpha_bar.sqrt(), x0) * x0 + column((1 - alpha_bar).sqrt(), x0) * epsilon


def v_target(x0: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = √ᾱ ε − √(1 − ᾱ) x₀; ᾱ is (B,)."""
    return column(alpha_bar.sqrt(), x0) * epsilon - column((1 - alpha_bar).sqrt(), x0) * x0


def offset_noise(
    noise: Tensor,
    x0: Tensor,
    strength: float,
    random_strength: bool,
    adaptive: float | None,
    generator: torch.Generator,
) -> Tensor:
    """ε + o·η, η ~ N(0, 1) one number for each channel: noise that also moves a picture's mean colour.

    `noise` and `x0` are one sample (C, h, w). o is `strength`, scaled by U(0, 1) with `random_strength`; with
    `adaptive` s it is max(0, o + s·|mean of x0 over h, w|) of each channel. Strength 0 draws nothing.
    """
    if strength == 0:
        return noise
    if random_strength:
        strength = strength * torch.rand((), generator=generator).item()
    o: Tensor | float = strength
    if adaptive is not None:
        mean = x0.mean((-2, -1), keepdim=True).abs()  # (C, 1, 1)
        o = (strength + adaptive * mean).clamp(min=0).to(noise)
    return noise + o * gaussian((noise.shape[0], 1, 1), generator).to(noise)


def pyramid_noise(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """(ε + Σᵢ dⁱ·up(ηᵢ)) / its standard deviation: noise of several resolutions; one sample (C, h, w).

    ηᵢ ~ N(0, 1) has sides max(1, ⌊h/rⁱ⌋) × max(1, ⌊w/rⁱ⌋) with a new r ~ U(2, 4) for each level i, and is
    enlarged bilinearly; after a level with a side of 1 there is no further one. 0 iterations draw nothing.
    """
    if iterations == 0:
        return noise
    channels, h, w = noise.shape
    for level in range(iterations):
        r = 2 + 2 * torch.rand((), generator=generator, dtype=torch.float64).item()
        size = (max(1, int(h / r**level)), max(1, int(w / r**level)))
        coarse = gaussian((1, channels, *size), generator).to(noise)
        noise = noise + discount**level * torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")[0]
        if 1 in size:
            break
    return noise / noise.std()


def min_snr(snr: Tensor, gamma: float, v: bool) -> Tensor:
    """min(SNR, γ)/SNR for a noise prediction, min(SNR, γ)/(SNR + 1) for a velocity; in SNR's shape."""
    return snr.clamp(max=gamma) / (snr + 1 if v else snr)


def noise_like(snr: Tensor) -> Tensor:
    """SNR/(SNR + 1): a velocity's loss weighed by it is the loss of the noise it implies."""
    snr = snr.clamp(max=LARGEST_SNR)
    return snr / (snr + 1)


def debiased(snr: Tensor, v: bool) -> Tensor:
    """1/√SNR for a noise prediction, 1/(SNR + 1) for a velocity."""
    snr = snr.clamp(max=LARGEST_SNR)
    return 1 / (snr + 1) if v else snr.rsqrt()


@dataclass(frozen=True)
class Diffusion(DiffusionOptions):
    """The objective of SD 1.x, 2.x and SDXL; every field is the command-line option of that name.

    The SNR of the loss weights is that of the schedule before `zero_terminal_snr`, as in kohya's trainers; a
    random strength is drawn for each sample, where kohya's draw it for each batch.
    """

    @property
    def prediction(self) -> str:
        """What the model predicts, in the words of diffusers' schedulers."""
        return "v_prediction" if self.v_parameterization else "epsilon"

    @property
    def range(self) -> tuple[int, int]:
        """Least timestep and greatest + 1."""
        return self.min_timestep or 0, TIMESTEPS if self.max_timestep is None else self.max_timestep

    @property
    def timestep_range(self) -> tuple[int, int] | None:
        """Least timestep and greatest + 1; None where neither option is given."""
        return None if (self.min_timestep, self.max_timestep) == (None, None) else self.range

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """ᾱ of whole timesteps (B,), in float64 on the CPU; rescaled with `zero_terminal_snr`."""
        table = zero_terminal(alpha_bars()) if self.zero_terminal_snr else alpha_bars()
        return table[timesteps.long().cpu()]

    def snr(self, timesteps: Tensor) -> Tensor:
        """ᾱ/(1 − ᾱ) of whole timesteps (B,) in float64 on the CPU, always of the unscaled schedule."""
        alpha_bar = alpha_bars()[timesteps.long().cpu()]
        return alpha_bar / (1 - alpha_bar)

    def draw(self, latents: Tensor, generator: torch.Generator, at: float | None = None) -> Draw:
        """One timestep and one ε per sample of `latents` (B, C, h, w); `generator` lives on the CPU.

        `at` in [0, 1] fixes the place in the range of timesteps, for validation. Samples are drawn one after
        the other, so that a batch of B is B batches of one. Half-precision latents are computed in fp32;
        float64 stays float64.
        """
        x0 = latents if latents.dtype == torch.float64 else latents.float()
        low, high = self.range
        chosen, clean, inputs = [], [], []
        for sample in x0:
            if at is not None:
                t = low + int(at * (high - low))
            else:
                t = low if low == high else int(torch.randint(low, high, (), generator=generator))
            chosen.append(min(t, TIMESTEPS - 1))
            # only the adaptive offset reads the values of the latents, and then the host waits for them
            epsilon = self._noise(sample.cpu() if self.adaptive_noise_scale else sample, generator)
            clean.append(epsilon)
            gamma, random = self.ip_noise_gamma, self.ip_noise_gamma_random_strength
            inputs.append(perturbed(epsilon, gamma, random, generator))
        timesteps = torch.tensor(chosen, dtype=torch.float32)
        alpha_bar = self.alpha_bar(timesteps)
        epsilon = torch.stack(clean).to(x0)
        noisy = add_noise(x0, torch.stack(inputs).to(x0), alpha_bar)
        target = v_target(x0, epsilon, alpha_bar) if self.v_parameterization else epsilon
        sigma = (1 - alpha_bar).sqrt().float().to(x0.device)
        return Draw(noisy, target, sigma, timesteps.to(x0.device))

    def _noise(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """ε of one sample (C, h, w), with its offset, at all its resolutions."""
        epsilon = gaussian(x0.shape, generator).to(x0.dtype)
        epsilon = offset_noise(
            epsilon,
            x0,
            self.noise_offset or 0.0,
            self.noise_offset_random_strength,
            self.adaptive_noise_scale,
            generator,
        )
        levels = self.multires_noise_iterations or 0
        return pyramid_noise(epsilon, levels, self.multires_noise_discount, generator)

    def compared(self, prediction: Tensor, drawn: Draw) -> Tensor:
        """A prediction of the model in the form that is compared with the target: as it is."""
        return prediction.to(drawn.target.dtype)

    def losses(
        self, prediction: Tensor, drawn: Draw, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample (B,): elementwise in fp32 (or float64), × mask, mean, × `weight` × w(t).

        `prediction` (B, C, h, w) is the model's prediction of the target, in any dtype; `mask` (B, 1, h, w);
        `weight` (B,), 1 or the prior loss weight.
        """
        width = None
        if self.loss_type in PSEUDO_HUBER:
            width = self._width(drawn.timesteps)
        error = elementwise(self.loss_type, self.compared(prediction, drawn), drawn.target, width)
        loss = per_sample(error, mask, weight)
        # the weights are computed on the CPU, so the host waits for the timesteps: only if there is a weight
        return loss * self.weight(drawn.timesteps).to(error) if self._weighted else loss

    @property
    def _weighted(self) -> bool:
        """Whether w(t) differs from 1."""
        options = (self.min_snr_gamma, self.scale_v_pred_loss_like_noise_pred, self.v_pred_like_loss)
        return any(options) or bool(self.debiased_estimation_loss)

    def _width(self, timesteps: Tensor) -> Tensor:
        alpha_bar, t = self.alpha_bar(timesteps), timesteps.cpu().double()
        return huber_width(self.huber_schedule, t, self.huber_c, self.huber_scale, alpha_bar)

    def weight(self, timesteps: Tensor) -> Tensor:
        """w(t) (B,) in float64 on the CPU: the product of the weights that are switched on."""
        snr, v = self.snr(timesteps), self.v_parameterization
        factor = torch.ones_like(snr)
        if self.min_snr_gamma:
            factor = factor * min_snr(snr, self.min_snr_gamma, v)
        if self.scale_v_pred_loss_like_noise_pred:
            factor = factor * noise_like(snr)
        if self.v_pred_like_loss:  # L + k·L/noise_like
            factor = factor * (1 + self.v_pred_like_loss / noise_like(snr))
        if self.debiased_estimation_loss:
            factor = factor * debiased(snr, v)
        return factor
