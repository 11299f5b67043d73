"""What all objectives share: their interface, plain noise, elementwise losses and the mean of each sample.

Sources: kohya sd-scripts' loss (pseudo-Huber forms and schedules, masked loss, prior loss weight) and input
perturbation (arXiv 2301.11706). Randomness comes only from the generator passed in. It is on the CPU, so that
one seed gives equal numbers on every device; the caller moves the results.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """What is predicted, and how wrong a prediction is: a frozen record of options with two functions.

    drawn = objective.draw(latents, generator)                 # noisy input, target, σ, timesteps
    prediction = denoise(…, drawn.noisy, drawn.timesteps, …)
    losses = objective.losses(prediction, drawn, weight=…)     # (B,), to be averaged and logged by component
    """

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
        """Least timestep and greatest + 1; None where neither option is given."""
        ...

    def draw(self, latents: Tensor, generator: torch.Generator, at: float | None = None) -> Draw:
        """Noisy samples of `latents` and what the model should predict from them."""
        ...

    def compared(self, prediction: Tensor, drawn: Draw) -> Tensor:
        """A prediction of the model in the form that is compared with the target."""
        ...

    def losses(
        self, prediction: Tensor, drawn: Draw, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample (B,)."""
        ...


class Draw(NamedTuple):
    """One step's noisy samples and what the model should predict from them."""

    noisy: Tensor  # (B, C, h, w)
    target: Tensor  # (B, C, h, w)
    sigma: Tensor  # (B,) fp32, 0 = image, 1 = noise
    timesteps: Tensor  # (B,) fp32 in 0..1000


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """ε ~ N(0, 1) of one sample's shape (C, h, w), fp32 on the CPU."""
    return torch.randn(shape, generator=generator)


def perturbed(noise: Tensor, gamma: float, random_strength: bool, generator: torch.Generator) -> Tensor:
    """ε + γ ξ, ξ ~ N(0, 1): the noise of the input, while the target keeps ε (arXiv 2301.11706).

    With `random_strength`, γ is scaled by U(0, 1). γ = 0 draws nothing, so that switching it off changes no
    seed.
    """
    if gamma == 0:
        return noise
    if random_strength:
        gamma = gamma * torch.rand((), generator=generator).item()
    return noise + gamma * gaussian(noise.shape, generator)


def huber_width(
    schedule: str, timesteps: Tensor, huber_c: float, huber_scale: float, alpha_bar: Tensor | None = None
) -> Tensor:
    """c(t) for timesteps in 0..1000, tight where there is much noise.

    `constant`: c·scale. `exponential`: e^{ln(c)·t/1000}·scale. `snr`: (1 − c)/(1 + σ)² + c with
    σ = √((1 − ᾱ)/ᾱ), which needs `alpha_bar` (B,), so that only diffusion has it; `Flow` refuses it.
    """
    if schedule == "constant":
        return torch.full_like(timesteps, huber_c * huber_scale)
    if schedule == "exponential":
        return torch.exp(math.log(huber_c) * timesteps / 1000) * huber_scale
    if alpha_bar is None:
        raise ValueError("the schedule 'snr' needs ᾱ")
    # 1/(1 + σ)² without the infinite σ of ᾱ = 0
    near = alpha_bar / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt()).square()
    return (1 - huber_c) * near + huber_c


def elementwise(kind: str, prediction: Tensor, target: Tensor, width: Tensor | None = None) -> Tensor:
    """The loss of each element d = prediction − target; `width` c (B,) is read by the two pseudo-Huber forms.

    l1: |d|. l2: d². huber: 2c(√(d² + c²) − c), which is d² for small d. smooth_l1: 2(√(d² + c²) − c), which
    is 2|d| for large d.
    """
    d = prediction - target
    if kind == "l1":
        return d.abs()
    if kind == "l2":
        return d.square()
    if width is None:
        raise ValueError(f"the loss {kind!r} needs a width")
    c = column(width, d)
    # d²/(√(d² + c²) + c) is √(d² + c²) − c without the cancellation
    root = d.square() / (torch.sqrt(d.square() + c.square()) + c)
    return 2 * c * root if kind == "huber" else 2 * root


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1) in the dtype and on the device of `like`."""
    return values.to(like).reshape(-1, *(1,) * (like.dim() - 1))


def per_sample(loss: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """(B, C, h, w) → (B,): the mean over C, h, w of loss × mask, times each sample's weight.

    `mask` (B, 1, h, w) in [0, 1] is not divided out: a half-masked sample counts half, as in kohya. `weight`
    (B,) is 1, or the prior loss weight for pictures of the class.
    """
    if mask is not None:
        loss = loss * mask.to(loss)
    loss = loss.flatten(1).mean(1)
    return loss if weight is None else loss * weight.to(loss)
