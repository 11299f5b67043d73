"""Everything random in an objective: the noise level σ or timestep of a sample, and the noise itself.

Sources: kohya sd-scripts' trainers (`timestep_sampling`, the kinds of noise), Stable Diffusion 3 (arXiv
2403.03206, §3.1: logit-normal, mode and cosmap densities; §5.3.2: the shift), FLUX's sampling code (the shift
that grows with the picture), noise offset (N. Guttenberg, "Diffusion with Offset Noise") and pyramid noise
(J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training").

Randomness comes only from the generator passed in. It lives on the CPU, so that one seed gives the same
numbers on every device; the caller moves the results.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def density(
    scheme: str,
    count: int,
    generator: torch.Generator,
    *,
    logit_mean: float,
    logit_std: float,
    mode_scale: float,
) -> Tensor:
    """u (count,) in [0, 1]: the place in the σ table, drawn from the scheme's density (arXiv 2403.03206,
    §3.1).

    Only `logit_normal` and `mode` have a density of their own; the other schemes draw uniformly and may weigh
    the loss.
    """
    if scheme == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.randn(count, generator=generator))
    u = torch.rand(count, generator=generator)
    if scheme == "mode":
        return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def sigmas(
    sampling: str,
    count: int,
    generator: torch.Generator,
    *,
    latent_hw: tuple[int, int],
    sigmoid_scale: float,
    shift: float,
    weighting_scheme: str,
    logit_mean: float,
    logit_std: float,
    mode_scale: float,
) -> Tensor:
    """Noise levels σ (count,) in fp32, 0 = picture, 1 = noise, by one of the ways of `--timestep_sampling`.

    `sigma` looks ⌊1000 u⌋ up in the table shifted by `shift`, u from the weighting scheme's density; `shift`
    and `flux_shift` shift a sigmoid of a normal number by a constant or by the picture's size (`latent_hw`,
    latent pixels).
    """
    if sampling == "sigma":
        u = density(
            weighting_scheme,
            count,
            generator,
            logit_mean=logit_mean,
            logit_std=logit_std,
            mode_scale=mode_scale,
        )
        # u may be exactly 1, or leave [0, 1] for a large mode_scale: kohya's lookup would then fail or wrap
        # around
        return sigma_table(shift)[(u * STEPS).long().clamp(0, STEPS - 1)]
    if sampling == "uniform":
        return 1 - torch.rand(count, generator=generator)  # in (0, 1], so that a weight σ⁻² stays finite
    normal = torch.sigmoid(sigmoid_scale * torch.randn(count, generator=generator))
    if sampling == "sigmoid":
        return normal
    return shifted(normal, shift if sampling == "shift" else flux_shift(latent_hw))


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """ε ~ N(0, 1) of one sample's shape (C, h, w), fp32 on the CPU."""
    return torch.randn(shape, generator=generator)


def perturbed(noise: Tensor, gamma: float, random_strength: bool, generator: torch.Generator) -> Tensor:
    """ε + γ ξ, ξ ~ N(0, 1): the noise the input is made with, while the target keeps ε (arXiv 2301.11706).

    With `random_strength`, γ is scaled by U(0, 1). γ = 0 draws nothing, so that switching it off changes no
    seed.
    """
    if gamma == 0:
        return noise
    if random_strength:
        gamma = gamma * torch.rand((), generator=generator).item()
    return noise + gamma * gaussian(noise.shape, generator)


def offset(
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


def pyramid(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
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


def timestep(low: int, high: int, generator: torch.Generator) -> int:
    """A whole timestep, uniform in [low, high)."""
    return int(torch.randint(low, high, (), generator=generator))
