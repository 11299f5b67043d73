"""What is predicted: denoising diffusion, x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε, with ε or the velocity v as target.

`Diffusion` is the record of SD 1.x, 2.x and SDXL beside `target.Flow`, with the same two verbs.
Sources: DDPM (arXiv 2006.11239), v-prediction (arXiv 2202.00512), zero terminal SNR (arXiv 2305.08891,
algorithm 1) and kohya sd-scripts' trainers, whose options these are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.objective import noise
from lowrank.objective.flow import Draw, column
from lowrank.objective.limits import check_record
from lowrank.objective.weight import (
    LOSSES,
    SCHEDULES,
    debiased,
    elementwise,
    huber_width,
    min_snr,
    noise_like,
    per_sample,
)

STEPS = 1000
BETAS = (0.00085, 0.012)  # √β is linear between them


def alpha_bars() -> Tensor:
    """ᾱ_t = Π (1 − β_s) of the training schedule that SD 1.x, 2.x and SDXL share, (1000,) in float64."""
    roots = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, STEPS, dtype=torch.float64)
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


@dataclass(frozen=True)
class Diffusion:
    """The objective of SD 1.x, 2.x and SDXL; every field is the command-line option of that name.

    Raises `Refused` on a value outside, and on options that belong to the other target. 0 switches an option
    off, as None does. The SNR of the loss weights is that of the schedule before `zero_terminal_snr`, as in
    kohya's trainers; a random strength is drawn for each sample, where kohya's draw it for each batch.
    """

    v_parameterization: bool = False
    zero_terminal_snr: bool = False
    min_timestep: int | None = None
    max_timestep: int | None = None
    noise_offset: float | None = None
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float = 0.0
    ip_noise_gamma_random_strength: bool = False
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False

    def __post_init__(self) -> None:
        check_record(
            self,
            choices={"loss_type": LOSSES, "huber_schedule": SCHEDULES},
            positive=("huber_c", "huber_scale"),
            not_negative=(
                *("noise_offset", "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma"),
                *("min_snr_gamma", "v_pred_like_loss"),
            ),
        )
        low, high = self.range
        if not 0 <= low <= high <= STEPS or low == STEPS:
            raise Refused(
                f"--min_timestep {low} and --max_timestep {high} leave no timestep; they hold "
                f"0 ≤ min ≤ max ≤ {STEPS}, and max itself is not drawn"
            )
        if self.adaptive_noise_scale and not self.noise_offset:
            raise Refused("--adaptive_noise_scale changes the noise offset; give --noise_offset too")
        if self.scale_v_pred_loss_like_noise_pred and not self.v_parameterization:
            raise Refused(
                "--scale_v_pred_loss_like_noise_pred is for velocities; give --v_parameterization, or drop it"
            )
        if self.v_pred_like_loss and self.v_parameterization:
            raise Refused(
                "--v_pred_like_loss is for noise predictions, and --v_parameterization predicts velocities; "
                "drop one of both"
            )

    @property
    def prediction(self) -> str:
        """What the model predicts, in the words of diffusers' schedulers."""
        return "v_prediction" if self.v_parameterization else "epsilon"

    @property
    def range(self) -> tuple[int, int]:
        """Least timestep, and the one behind the greatest."""
        high = STEPS if self.max_timestep is None else self.max_timestep
        return self.min_timestep or 0, high

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """ᾱ of whole timesteps (B,), in float64 on the CPU; with zero terminal SNR where it is asked for."""
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
        chosen, clean, seen = [], [], []
        for sample in x0:
            if at is not None:
                t = low + int(at * (high - low))
            else:
                t = low if low == high else noise.timestep(low, high, generator)
            chosen.append(min(t, STEPS - 1))
            epsilon = self._noise(sample.cpu(), generator)
            clean.append(epsilon)
            gamma, random = self.ip_noise_gamma, self.ip_noise_gamma_random_strength
            seen.append(noise.perturbed(epsilon, gamma, random, generator))
        timesteps = torch.tensor(chosen, dtype=torch.float32)
        alpha_bar = self.alpha_bar(timesteps)
        epsilon = torch.stack(clean).to(x0)
        noisy = add_noise(x0, torch.stack(seen).to(x0), alpha_bar)
        target = v_target(x0, epsilon, alpha_bar) if self.v_parameterization else epsilon
        sigma = (1 - alpha_bar).sqrt().float().to(x0.device)
        return Draw(noisy, target, sigma, timesteps.to(x0.device))

    def _noise(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """ε of one sample (C, h, w), with its offset, at all its resolutions."""
        epsilon = noise.gaussian(x0.shape, generator).to(x0.dtype)
        epsilon = noise.offset(
            epsilon,
            x0,
            self.noise_offset or 0.0,
            self.noise_offset_random_strength,
            self.adaptive_noise_scale,
            generator,
        )
        levels = self.multires_noise_iterations or 0
        return noise.pyramid(epsilon, levels, self.multires_noise_discount, generator)

    def losses(
        self, prediction: Tensor, drawn: Draw, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample (B,): elementwise in fp32 (or float64), × mask, mean, × `weight` × w(t).

        `prediction` (B, C, h, w) is what the model says of the target, in any dtype; `mask` (B, 1, h, w);
        `weight` (B,), 1 or the prior loss weight.
        """
        width = None
        if self.loss_type in ("huber", "smooth_l1"):
            width = self._width(drawn.timesteps)
        error = elementwise(self.loss_type, prediction.to(drawn.target.dtype), drawn.target, width)
        return per_sample(error, mask, weight) * self.weight(drawn.timesteps).to(error)

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
