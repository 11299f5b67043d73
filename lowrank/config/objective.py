"""Options of the objectives; `objective.flow.Flow` and `objective.diffusion.Diffusion` add mathematics."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.config.flag import check_fields, option
from lowrank.errors import Refused

TIMESTEPS = 1000  # of the noise schedule that SD 1.x, 2.x and SDXL share
LOSSES = ("l1", "l2", "huber", "smooth_l1")
PSEUDO_HUBER = ("huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
PREDICTIONS = ("raw", "additive", "sigma_scaled")
SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Loss and noise that every objective has"""

    loss_type: str = option("l2", "distance between prediction and target", choices=LOSSES, metadata=True)
    huber_schedule: str = option(
        "snr",
        "how the Huber threshold follows the timestep",
        choices=HUBER_SCHEDULES,
        metadata=True,
        acts_with=("loss_type=huber|smooth_l1",),
    )
    huber_c: float = option(
        0.1, "threshold of the Huber loss", above=0, metadata=True, acts_with=("loss_type=huber|smooth_l1",)
    )
    huber_scale: float = option(
        1.0,
        "factor of the threshold of the Huber loss",
        above=0,
        metadata=True,
        acts_with=("loss_type=huber|smooth_l1",),
    )
    ip_noise_gamma: float = option(
        0.0, "strength of input perturbation, which adds noise to the noise; 0 is off", low=0, metadata=True
    )
    ip_noise_gamma_random_strength: bool = option(
        False,
        "draw the strength of input perturbation between 0 and --ip_noise_gamma",
        metadata=True,
        acts_with=("ip_noise_gamma",),
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class FlowOptions(LossOptions):
    """Flow matching and loss

    Raises `Refused` on a value outside its limits, and where the loss needs an ᾱ that a flow has not.
    """

    huber_schedule: str = option(
        "constant",  # kohya's snr has no meaning for a flow
        "how the Huber threshold follows the timestep; snr has no meaning for FLUX",
        choices=HUBER_SCHEDULES,
        metadata=True,
        acts_with=("loss_type=huber|smooth_l1",),
    )
    timestep_sampling: str = option(
        "sigma", "distribution of the noise level sigma", choices=SAMPLINGS, metadata=True
    )
    sigmoid_scale: float = option(
        1.0,
        "spread of the noise levels of --timestep_sampling sigmoid, shift and flux_shift",
        above=0,
        metadata=True,
        acts_with=("timestep_sampling=sigmoid|shift|flux_shift",),
    )
    discrete_flow_shift: float = option(
        3.0,
        "shift of the noise levels of --timestep_sampling sigma and shift; 1.0 is no shift, as in the "
        "published "
        "QR-LoRA",
        above=0,
        metadata=True,
        acts_with=("timestep_sampling=sigma|shift",),
    )
    model_prediction_type: str = option(
        "raw",
        "form in which the prediction is compared with the target; kohya's default is sigma_scaled, "
        "which does not match the target",
        choices=PREDICTIONS,
        metadata=True,
    )
    weighting_scheme: str = option(
        "uniform",
        "density of the noise levels of --timestep_sampling sigma, and weight of the loss",
        choices=SCHEMES,
        metadata=True,
        acts_with=("timestep_sampling=sigma or weighting_scheme=sigma_sqrt|cosmap|none|uniform",),
    )
    logit_mean: float = option(
        0.0,
        "mean of --weighting_scheme logit_normal",
        metadata=True,
        acts_with=("weighting_scheme=logit_normal", "timestep_sampling=sigma"),
    )
    logit_std: float = option(
        1.0,
        "standard deviation of --weighting_scheme logit_normal",
        above=0,
        metadata=True,
        acts_with=("weighting_scheme=logit_normal", "timestep_sampling=sigma"),
    )
    mode_scale: float = option(
        1.29,
        "scale of --weighting_scheme mode",
        metadata=True,
        acts_with=("weighting_scheme=mode", "timestep_sampling=sigma"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type in PSEUDO_HUBER and self.huber_schedule == "snr":
            raise Refused(
                f"--loss_type {self.loss_type} with --huber_schedule snr has no meaning for a flow model, "
                "which has no ᾱ; pass --huber_schedule constant or exponential"
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(LossOptions):
    """Noise and loss

    Raises `Refused` on a value outside its limits, and on options that belong to the other target. 0 switches
    an option off, as None does.
    """

    v_parameterization: bool = option(False, "the base model predicts velocity instead of noise")
    zero_terminal_snr: bool = option(
        False, "rescale the noise schedule so that its last step is pure noise", metadata=True
    )
    min_timestep: int | None = option(
        None, "smallest timestep that is drawn (unset: 0)", low=0, high=TIMESTEPS
    )
    max_timestep: int | None = option(
        None, "exclusive upper limit of the timesteps that are drawn (unset: 1000)", low=0, high=TIMESTEPS
    )
    noise_offset: float | None = option(
        None,
        "strength of noise that is constant over a channel of an image, so that mean colours can change",
        low=0,
        metadata=True,
    )
    noise_offset_random_strength: bool = option(
        False,
        "draw the strength of the noise offset between 0 and --noise_offset",
        metadata=True,
        acts_with=("noise_offset",),
    )
    adaptive_noise_scale: float | None = option(
        None, "add this × the mean of the latents to --noise_offset; may be negative", metadata=True
    )
    multires_noise_iterations: int | None = option(
        None, "number of levels of noise of lower resolution; 6 to 10 are usual", low=0, metadata=True
    )
    multires_noise_discount: float = option(
        0.3,
        "strength of each level of --multires_noise_iterations relative to the previous level",
        low=0,
        metadata=True,
        acts_with=("multires_noise_iterations",),
    )
    min_snr_gamma: float | None = option(
        None, "γ of min-SNR weighting of the loss; 5 is usual", low=0, metadata=True
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "weight the loss of a velocity like the loss of a noise; needs --v_parameterization"
    )
    v_pred_like_loss: float | None = option(
        None,
        "add this × the loss of the velocity to the loss of the noise; not with --v_parameterization",
        low=0,
    )
    debiased_estimation_loss: bool = option(
        False,
        "weight the loss by 1/√SNR, or by 1/(SNR + 1) with --v_parameterization",
        metadata="debiased_estimation",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.min_timestep or 0, TIMESTEPS if self.max_timestep is None else self.max_timestep
        if not low <= high or low == TIMESTEPS:
            raise Refused(
                f"--min_timestep {low} and --max_timestep {high} leave no timestep; they hold "
                f"0 ≤ min ≤ max ≤ {TIMESTEPS}, and max itself is not drawn"
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
