"""The diffusion objective against formulas written again in float64 with numpy, option by option."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from lowrank.errors import Refused
from lowrank.objective.diffusion import Diffusion, alpha_bars, zero_terminal
from lowrank.objective.flow import Flow
from lowrank.objective.objective import Draw

B, C, H, W = 3, 4, 8, 12
BARS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SNR = BARS / (1 - BARS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(seed: int = 7) -> torch.Tensor:
    return torch.randn(B, C, H, W, generator=seeded(seed), dtype=torch.float64)


def terminal() -> np.ndarray:
    root = np.sqrt(BARS)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


# ---------- the schedule


def test_alpha_bars_of_scheduler():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert np.abs(alpha_bars().numpy() - BARS).max() < 1e-12
    assert (alpha_bars() - theirs.alphas_cumprod.double()).abs().max() < 1e-6


def test_zero_terminal_snr_of_scheduler():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    ours = zero_terminal(alpha_bars())
    assert ours[-1] == 0 and abs(ours[0] - BARS[0]) < 1e-12
    assert (ours - theirs.alphas_cumprod.double()).abs().max() < 1e-6


# ---------- draw


def replay(objective: Diffusion, x0: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The same draws again: order and shapes of the random numbers as documented, arithmetic in numpy."""
    g = seeded(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g).double().numpy()

    low, high = objective.range
    steps, noises, seen = [], [], []
    for x in x0:
        steps.append(low if low == high else int(torch.randint(low, high, (), generator=g)))
        e = normal(C, H, W)
        if objective.noise_offset:
            o = objective.noise_offset
            if objective.noise_offset_random_strength:
                o = o * torch.rand((), generator=g).item()
            if objective.adaptive_noise_scale is not None:
                o = np.maximum(0, o + objective.adaptive_noise_scale * np.abs(x.mean((1, 2), keepdims=True)))
            e = e + o * normal(C, 1, 1)
        if objective.multires_noise_iterations:
            for i in range(objective.multires_noise_iterations):
                r = 2 + 2 * torch.rand((), generator=g, dtype=torch.float64).item()
                h, w = max(1, int(H / r**i)), max(1, int(W / r**i))
                e = e + objective.multires_noise_discount**i * bilinear(normal(1, C, h, w)[0])
                if h == 1 or w == 1:
                    break
            e = e / e.std(ddof=1)
        noises.append(e)
        gamma = objective.ip_noise_gamma
        if gamma and objective.ip_noise_gamma_random_strength:
            gamma = gamma * torch.rand((), generator=g).item()
        seen.append(e + gamma * normal(C, H, W) if gamma else e)
    bars = (terminal() if objective.zero_terminal_snr else BARS)[steps][:, None, None, None]
    e, noisy = np.stack(noises), np.sqrt(bars) * x0 + np.sqrt(1 - bars) * np.stack(seen)
    v = np.sqrt(bars) * e - np.sqrt(1 - bars) * x0
    return {"noisy": noisy, "target": v if objective.v_parameterization else e, "timesteps": np.array(steps)}


def bilinear(coarse: np.ndarray) -> np.ndarray:
    """(C, h, w) to (C, H, W) with pixel centres at half-integers and edges held."""

    def weights(size: int, of: int) -> np.ndarray:
        at = np.clip((np.arange(size) + 0.5) * of / size - 0.5, 0, of - 1)
        lower = np.minimum(at.astype(int), of - 1)
        upper = np.minimum(lower + 1, of - 1)
        matrix = np.zeros((size, of))
        matrix[np.arange(size), lower] += 1 - (at - lower)
        matrix[np.arange(size), upper] += at - lower
        return matrix

    return weights(H, coarse.shape[1]) @ coarse @ weights(W, coarse.shape[2]).T


DRAWS = {
    "plain": {},
    "v": {"v_parameterization": True},
    "zero terminal": {"v_parameterization": True, "zero_terminal_snr": True},
    "offset": {"noise_offset": 0.3},
    "offset, random": {"noise_offset": 0.3, "noise_offset_random_strength": True},
    "offset, adaptive": {"noise_offset": 0.1, "adaptive_noise_scale": 0.5},
    "offset, adaptive down": {"noise_offset": 0.05, "adaptive_noise_scale": -1.0},
    "multires": {"multires_noise_iterations": 6},
    "multires, discount": {"multires_noise_iterations": 2, "multires_noise_discount": 0.8},
    "offset and multires": {"noise_offset": 0.1, "multires_noise_iterations": 3},
    "ip": {"ip_noise_gamma": 0.2},
    "ip, random": {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True},
    "range": {"min_timestep": 100, "max_timestep": 105},
    "one timestep": {"min_timestep": 321, "max_timestep": 321},
}


@pytest.mark.parametrize("case", DRAWS)
def test_draw_equals_formula(case):
    objective, x0 = Diffusion(**DRAWS[case]), latents()
    drawn, told = objective.draw(x0, seeded(3)), replay(objective, x0.numpy(), 3)
    assert drawn.timesteps.tolist() == told["timesteps"].tolist()
    for name in ("noisy", "target"):
        ours = getattr(drawn, name)
        assert ours.dtype == torch.float64 and np.abs(ours.numpy() - told[name]).max() < 1e-6, name


@pytest.mark.parametrize("case", DRAWS)
def test_fp32_against_float64(case):
    objective = Diffusion(**DRAWS[case])
    exact, single = objective.draw(latents(), seeded(1)), objective.draw(latents().float(), seeded(1))
    assert single.noisy.dtype == torch.float32
    assert (exact.noisy - single.noisy).abs().max() < 2e-6


@pytest.mark.parametrize("case", DRAWS)
def test_batch_equals_single_samples(case):
    objective, g = Diffusion(**DRAWS[case]), seeded(2)
    together = objective.draw(latents(), seeded(2))
    single = [objective.draw(one[None], g) for one in latents()]
    for field in Draw._fields:
        assert torch.equal(getattr(together, field), torch.cat([getattr(one, field) for one in single]))


@pytest.mark.parametrize("objective", [Diffusion(noise_offset=0.1), Flow()], ids=["ddpm", "flow"])
def test_fixed_timestep(objective):
    drawn = objective.draw(latents(), seeded(), at=0.4)
    assert drawn.timesteps.tolist() == pytest.approx([400] * B)
    ranged = Diffusion(min_timestep=200, max_timestep=300).draw(latents(), seeded(), at=0.4)
    assert ranged.timesteps.tolist() == [240] * B
    assert Diffusion().draw(latents(), seeded(), at=1.0).timesteps.tolist() == [999] * B


def test_timesteps_are_uniform():
    objective = Diffusion(min_timestep=10, max_timestep=20)
    x0 = torch.zeros(4000, 1, 1, 1)
    seen = objective.draw(x0, seeded()).timesteps.long().bincount(minlength=20)
    assert seen[:10].sum() == 0 and len(seen) == 20
    assert ((seen[10:] - 400).abs() < 5 * 20).all()


def test_disabled_options_draw_no_random_numbers():
    off = Diffusion(noise_offset=0.0, multires_noise_iterations=0, ip_noise_gamma=0.0, min_snr_gamma=0.0)
    assert torch.equal(off.draw(latents(), seeded()).noisy, Diffusion().draw(latents(), seeded()).noisy)


# ---------- losses

V = {"v_parameterization": True}
LOSSES = {
    "mse": {},
    "l1": {"loss_type": "l1"},
    "min snr, eps": {"min_snr_gamma": 5.0},
    "min snr, v": {"min_snr_gamma": 5.0, **V},
    "min snr, v, zero terminal": {"min_snr_gamma": 5.0, "zero_terminal_snr": True, **V},
    "debiased, eps": {"debiased_estimation_loss": True},
    "debiased, v": {"debiased_estimation_loss": True, **V},
    "like noise": {"scale_v_pred_loss_like_noise_pred": True, **V},
    "like velocity": {"v_pred_like_loss": 0.7},
    "several": {"min_snr_gamma": 3.0, "debiased_estimation_loss": True, "v_pred_like_loss": 0.2},
    **{
        f"{kind}, {schedule}": {
            "loss_type": kind,
            "huber_schedule": schedule,
            "huber_c": 0.2,
            "huber_scale": 1.5,
        }
        for kind in ("huber", "smooth_l1")
        for schedule in ("constant", "exponential", "snr")
    },
    "huber, zero terminal": {"loss_type": "huber", "zero_terminal_snr": True, **V},
}
TIMES = [[0, 1, 2], [17, 250, 500], [640, 998, 999]]


def formula(o: Diffusion, prediction, target, t: int, mask, weight) -> float:
    """The loss of one sample, written from the documented table."""
    d = prediction - target
    bar = (terminal() if o.zero_terminal_snr else BARS)[t]
    sigma = math.sqrt((1 - bar) / bar) if bar > 0 else math.inf
    c = {
        "constant": o.huber_c * o.huber_scale,
        "exponential": math.exp(math.log(o.huber_c) * t / 1000) * o.huber_scale,
        "snr": (1 - o.huber_c) / (1 + sigma) ** 2 + o.huber_c,
    }[o.huber_schedule]
    root = np.sqrt(d**2 + c**2) - c
    error = {"l2": d**2, "l1": abs(d), "huber": 2 * c * root, "smooth_l1": 2 * root}[o.loss_type]
    loss, snr = (error * mask).mean() * weight, SNR[t]
    held = min(snr, 1000)
    if o.min_snr_gamma:
        loss *= min(snr, o.min_snr_gamma) / (snr + 1 if o.v_parameterization else snr)
    if o.scale_v_pred_loss_like_noise_pred:
        loss *= held / (held + 1)
    if o.v_pred_like_loss:
        loss += loss / (held / (held + 1)) * o.v_pred_like_loss
    if o.debiased_estimation_loss:
        loss *= 1 / (held + 1) if o.v_parameterization else 1 / math.sqrt(held)
    return loss


@pytest.mark.parametrize("times", TIMES, ids=str)
@pytest.mark.parametrize("case", LOSSES)
def test_losses_equal_formula(case, times):
    objective = Diffusion(**LOSSES[case])
    prediction, target = latents(1), latents(2)
    mask = torch.rand(B, 1, H, W, generator=seeded(4), dtype=torch.float64)
    weight = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    told = [
        formula(
            objective, *(x[i].numpy() for x in (prediction, target)), times[i], mask[i].numpy(), weight[i]
        )
        for i in range(B)
    ]
    t = torch.tensor(times, dtype=torch.float32)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        drawn = Draw(target.to(dtype), target.to(dtype), t, t)
        ours = objective.losses(prediction.to(dtype), drawn, mask=mask, weight=weight)
        assert ours.shape == (B,) and ours.dtype == dtype
        assert ours.tolist() == pytest.approx([float(x) for x in told], rel=tolerance, abs=1e-12)


def test_loss_of_true_prediction_is_zero():
    for case in LOSSES:
        drawn = Diffusion(**LOSSES[case]).draw(latents(), seeded())
        assert Diffusion(**LOSSES[case]).losses(drawn.target, drawn).abs().max() == 0


def test_weights_match_diffusers_snr():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.tensor(random.Random(0).sample(range(1000), 50))
    assert Diffusion().snr(t) == pytest.approx(compute_snr(theirs, t).double(), rel=2e-4)


# ---------- what does not go together


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adaptive_noise_scale": 0.1}, "give --noise_offset"),
        ({"scale_v_pred_loss_like_noise_pred": True}, "give --v_parameterization"),
        ({"v_pred_like_loss": 1.0, **V}, "drop one of both"),
        ({"min_timestep": 500, "max_timestep": 400}, "leave no timestep"),
        ({"min_timestep": 1000}, "leave no timestep"),
        ({"max_timestep": 1001}, "--max_timestep 1001 is above 1000"),
        ({"loss_type": "l3"}, "choose one of"),
        ({"huber_schedule": "snrr"}, "did you mean 'snr'"),
        ({"huber_c": 0.0}, "is not above 0"),
        ({"min_snr_gamma": -1.0}, "is below 0"),
    ],
)
def test_option_errors(options, said):
    with pytest.raises(Refused, match=said):
        Diffusion(**options)
