"""What is trained, and how: base model, adapter, optimizer, loss."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.config.flag import SCHEDULERS, comma_words, option, path, scheduler, steps_or_share

PRECISIONS = ("no", "fp16", "bf16")
SEEDS = 2**63 - 2**32  # largest seed: torch's limit, with room for one per image
STEPS = 10**9  # most steps


@dataclass(frozen=True)
class Model:
    """Base model"""

    pretrained_model_name_or_path: str | None = path(None, "folder of a diffusers model, or its hub id")
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    variant: str | None = option(None, "file variant of a hub model, such as fp16")
    cache_dir: str | None = path(None, "folder where hub downloads are kept")
    no_half_vae: bool = option(False, "run the VAE in fp32")


@dataclass(frozen=True)
class Network:
    """Adapter"""

    network_module: str | None = path(
        None, "networks.delta_r, bare delta_r, or any module that makes a kohya network"
    )
    lora_init_method: str | None = option(
        None,
        "the same by the names of the published code (unset, without --network_module: triu_deltaR)",
        choices=("triu_deltaR", "deltaR", "qr"),
    )
    network_dim: int | None = option(None, "rank (unset: the module's own, 4)", aliases=("--rank",), low=1)
    network_alpha: float | None = option(
        None,
        "scale × rank (unset: the rank for delta_r, delta_r_triu and qrlora, 1 for others, as kohya; 0: the "
        "rank)",
        low=0,
    )
    network_dropout: float | None = option(None, "dropout in the adapter", low=0, below=1)
    network_args: tuple[str, ...] = option((), "key=value for the module")
    lycoris_config: str | None = path(
        None,
        "LyCORIS' JSON file, or SimpleTuner's config.json that names one: method, rank, alpha, arguments and "
        "layers",
    )
    network_weights: str | None = path(None, "adapter file to go on from")
    dim_from_weights: bool = option(False, "take rank and alpha from --network_weights")
    lora_layers: tuple[str, ...] | None = option(
        None, "comma list of module names to adapt instead of the usual ones", convert=comma_words
    )
    use_zero_init: bool | None = option(
        None, "start ΔR at zero, the base model (unset: yes); --no-use_zero_init starts at random"
    )
    delta_scale: float | None = option(None, "standard deviation of a random ΔR (unset: 0.01)", low=0)
    basis_cache_dir: str | None = path(None, "folder where the bases of the base model's layers are kept")
    save_basis: str | None = option(
        None,
        "frozen factors in the adapter file (unset: full): Q and base R, Q alone, or none, which then needs "
        "the base model to be read",
        choices=("full", "q", "none"),
    )
    train_text_encoder: bool = option(False, "adapt the text encoders too")
    network_train_unet_only: bool = option(False, "adapt the U-Net or transformer alone")
    network_train_text_encoder_only: bool = option(False, "adapt the text encoders alone")
    scale_weight_norms: float | None = option(
        None, "largest norm of a layer's update; larger ones are scaled down", above=0
    )
    base_weights: tuple[str, ...] = path((), "adapter files that are merged into the base before training")
    base_weights_multiplier: tuple[float, ...] = option((), "their strengths; 1 where missing")


@dataclass(frozen=True)
class Abm:
    """Activation boundaries before step 0 (ABM)"""

    abm_enabled: bool = option(False, "first bring the signs of pre-activations to those of a teacher")
    abm_steps: int = option(500, "steps of that", low=1, high=STEPS)
    abm_lr: float = option(1e-4, "its learning rate", above=0)
    abm_margin: float = option(0.5, "how far beyond zero a pre-activation shall be", low=0)
    abm_weight_strategy: str = option(
        "uniform",
        "weight of layer l of L: 1, (l+1)/L, or its square, which is the paper's",
        choices=("uniform", "linear", "quadratic"),
    )
    abm_batch_size: int | None = option(
        None, "samples of a batch that are used (unset: network argument abm_batch_size, else all)", low=1
    )
    abm_teacher: str = path(
        "base", "adapter file whose activations are the aim, or base, which teaches a fresh adapter nothing"
    )
    abm_margin_mode: str = option(
        "relative",
        "margin as a multiple of the layer's median |pre-activation| of the teacher, or as it is",
        choices=("relative", "absolute"),
    )
    abm_layers: float = option(1.0, "last share of the layers that is used", above=0, high=1)
    abm_guard: bool = option(
        True,
        "leave the stage out where the base has nothing to teach, and undo it where it raises the loss on "
        "fixed noise by over 0.5 % or lowers the share of equal signs",
    )


@dataclass(frozen=True)
class Train:
    """Training"""

    train_batch_size: int = option(1, "images per process and micro-batch", low=1)
    max_train_steps: int = option(1600, "optimizer steps", low=1, high=STEPS)
    max_train_epochs: int | None = option(
        None,
        "passes over the data; wins over --max_train_steps",
        aliases=("--num_train_epochs",),
        low=1,
        high=STEPS,
    )
    gradient_accumulation_steps: int = option(
        1, "micro-batches per optimizer step, counted on across epochs", low=1
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    mixed_precision: str | None = option(
        None,
        "precision of computation (unset: that of accelerate's configuration, else no)",
        choices=PRECISIONS,
    )
    full_fp16: bool = option(False, "adapter and gradients in fp16; needs --mixed_precision fp16")
    full_bf16: bool = option(False, "adapter and gradients in bf16; needs --mixed_precision bf16")
    fp8_base: bool = option(False, "base weights in fp8; needs --mixed_precision fp16 or bf16")
    fp8_base_unet: bool = option(False, "as --fp8_base, for the denoiser alone")
    seed: int | None = option(
        None, "seed of everything random (unset: a random one, which is recorded)", low=0, high=SEEDS
    )
    allow_tf32: bool = option(False, "let matrix products on the GPU use TF32")
    ema_decay: float = option(
        0.0, "decay per step of an EMA of the adapter, which is then what is saved; 0 is off", low=0, below=1
    )
    resume: str | None = path(
        None,
        "folder of a saved state, its name in --output_dir, or 'latest'",
        aliases=("--resume_from_checkpoint",),
    )
    dry_run: bool = option(False, "show data, adapter, step plan and memory, and exit", saved=False)


@dataclass(frozen=True)
class Optimizer:
    """Optimizer and learning rate"""

    optimizer_type: str = option(
        "",
        "AdamW if unset; known name in any case, class of torch.optim, or dotted class",
        aliases=("--optimizer",),
    )
    optimizer_args: tuple[str, ...] = option(
        (), "key=value with Python literals, as weight_decay=0.01 betas=0.9,0.99"
    )
    use_8bit_adam: bool = option(False, "AdamW8bit from bitsandbytes")
    use_lion_optimizer: bool = option(False, "Lion")
    adam_beta1: float | None = option(None, "first of the optimizer's betas (unset: its own)", low=0, below=1)
    adam_beta2: float | None = option(
        None, "second of the optimizer's betas (unset: its own)", low=0, below=1
    )
    adam_weight_decay: float | None = option(
        None, "weight_decay (unset: the optimizer's own, 0.01 for AdamW; diffusers' script has 1e-4)", low=0
    )
    adam_epsilon: float | None = option(None, "eps (unset: the optimizer's own)", low=0)
    prodigy_beta3: float | None = option(None, "beta3 of Prodigy", low=0, below=1)
    prodigy_decouple: bool | None = option(None, "decouple of Prodigy (unset: its own, True)")
    prodigy_use_bias_correction: bool | None = option(
        None, "use_bias_correction of Prodigy (unset: its own, False; diffusers' script has True)"
    )
    prodigy_safeguard_warmup: bool | None = option(
        None, "safeguard_warmup of Prodigy (unset: its own, False; diffusers' script has True)"
    )
    learning_rate: float = option(2e-6, "rate of every part without its own; kohya's default is 2e-6", low=0)
    unet_lr: float | None = option(None, "rate of the U-Net or transformer; 0 leaves it untrained", low=0)
    text_encoder_lr: tuple[float, ...] | None = option(
        None, "rate of the text encoders, one for all or one for each", low=0
    )
    scale_lr: bool = option(False, "multiply --learning_rate by accumulation steps × batch size × processes")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0 is off", low=0)
    lr_scheduler: str = option(
        "constant", "schedule: " + ", ".join(SCHEDULERS) + ", adafactor:RATE", convert=scheduler
    )
    lr_warmup_steps: float = option(
        0, "steps of warm-up; below 1 or with % a share of all steps", low=0, convert=steps_or_share
    )
    lr_decay_steps: float = option(
        0, "steps of decay of warmup_stable_decay, given likewise", low=0, convert=steps_or_share
    )
    lr_scheduler_num_cycles: int = option(
        1, "restarts of cosine_with_restarts", aliases=("--lr_num_cycles",), low=1
    )
    lr_scheduler_power: float = option(1.0, "power of polynomial", aliases=("--lr_power",), above=0)
    lr_scheduler_timescale: int | None = option(
        None, "time scale of inverse_sqrt (unset: the warm-up, or 10,000)", low=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "lowest rate of cosine_with_min_lr and warmup_stable_decay, as a share", low=0, high=1
    )
    lr_scheduler_type: str = option(
        "", "class of torch.optim.lr_scheduler, or dotted class; wins over --lr_scheduler"
    )
    lr_scheduler_args: tuple[str, ...] = option((), "key=value for it with Python literals, as T_max=100")


@dataclass(frozen=True)
class Loss:
    """Loss"""

    loss_type: str = option("l2", "distance", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = option(
        "snr", "how the Huber threshold follows the timestep", choices=("constant", "exponential", "snr")
    )
    huber_c: float = option(0.1, "Huber threshold", above=0)
    huber_scale: float = option(1.0, "factor of the Huber threshold", above=0)
    ip_noise_gamma: float = option(0.0, "input perturbation: strength of noise on the noise; 0 is off", low=0)
    ip_noise_gamma_random_strength: bool = option(False, "draw its strength between 0 and --ip_noise_gamma")
