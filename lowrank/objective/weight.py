"""How wrong a prediction is: elementwise losses, their weights, and the mean of each sample.

Sources: kohya sd-scripts' loss (pseudo-Huber forms and schedules, masked loss, prior loss weight,
weights of v-prediction), Stable Diffusion 3 (arXiv 2403.03206: the weights behind `sigma_sqrt` and `cosmap`),
min-SNR-γ (arXiv 2303.09556, in its ε and v forms) and debiased estimation (arXiv 2310.08442).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flow_weight(scheme: str, sigma: Tensor) -> Tensor:
    """w(σ) in σ's shape: σ⁻² for `sigma_sqrt`, 2/(π(1 − 2σ + 2σ²)) for `cosmap`, else 1."""
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def huber_width(
    schedule: str, timesteps: Tensor, huber_c: float, huber_scale: float, alpha_bar: Tensor | None = None
) -> Tensor:
    """c(t) for timesteps in 0..1000, tight where there is much noise.

    `constant`: c·scale. `exponential`: e^{ln(c)·t/1000}·scale. `snr`: (1 − c)/(1 + σ)² + c with
    σ = √((1 − ᾱ)/ᾱ), which needs `alpha_bar` (B,) and so belongs to diffusion; `Flow` refuses it.
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


LARGEST_SNR = 1000.0  # ᾱ/(1 − ᾱ) is held below it in all weights but min-SNR's, as in kohya's


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
    rest = d.square() / (torch.sqrt(d.square() + c.square()) + c)
    return 2 * c * rest if kind == "huber" else 2 * rest


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
