"""Training: base model, adapter, length and precision, optimizer and learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.config.flag import SCHEDULERS, SEEDS, comma_words, option, path, scheduler, steps_or_share

PRECISIONS = ("no", "fp16", "bf16")
STEPS = 10**9  # most steps


@dataclass(frozen=True, kw_only=True)
class Model:
    """Base model"""

    pretrained_model_name_or_path: str | None = path(
        None, "checkpoint file, folder of a diffusers model, or its hub id", essential=True
    )
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    variant: str | None = option(None, "file variant of a hub model, such as fp16")
    cache_dir: str | None = path(None, "folder where hub downloads are kept")
    no_half_vae: bool = option(False, "run the VAE in fp32")


@dataclass(frozen=True, kw_only=True)
class Network:
    """Adapter"""

    network_module: str | None = path(
        None,
        "module of the adapter: networks.delta_r, short delta_r, or any module with kohya's create_network",
        metadata=True,
        essential=True,
    )
    lora_init_method: str | None = option(
        None,
        "adapter by its name in the published QR-LoRA code: triu_deltaR is networks.delta_r_triu, "
        "deltaR is networks.delta_r, qr is networks.qrlora (unset, without --network_module: "
        "triu_deltaR)",
        choices=("triu_deltaR", "deltaR", "qr"),
    )
    network_dim: int | None = option(
        None,
        "rank of the adapter (unset: the module's default, 4)",
        aliases=("--rank",),
        low=1,
        metadata=True,
        resume=True,
        essential=True,
    )
    network_alpha: float | None = option(
        None,
        "alpha of the adapter, whose update is multiplied by alpha / rank (unset: the rank for delta_r, "
        "delta_r_triu, qrlora and tlora, 1 for others, as kohya; 0: the rank)",
        low=0,
        metadata=True,
        resume=True,
    )
    network_dropout: float | None = option(
        None,
        "probability of dropping each element of the rank-wide projection D x in the adapter",
        low=0,
        below=1,
        metadata=True,
        resume=True,
    )
    network_args: tuple[str, ...] = option(
        (), "arguments of the network module, as key=value: rank_dropout=0.1 target=attn"
    )
    lycoris_config: str | None = path(
        None,
        "JSON file of LyCORIS, or SimpleTuner's config.json that names one; it sets method, rank, "
        "alpha, arguments and layers",
    )
    network_weights: str | None = path(None, "adapter file whose weights training starts from")
    dim_from_weights: bool = option(False, "take rank and alpha from --network_weights")
    lora_layers: tuple[str, ...] | None = option(
        None, "comma list of module names to adapt instead of the usual ones", convert=comma_words
    )
    use_zero_init: bool | None = option(
        None,
        "start ΔR at zero, which is the base model (unset: yes); --no-use_zero_init starts with a random ΔR",
    )
    delta_scale: float | None = option(None, "standard deviation of a random ΔR (unset: 0.01)", low=0)
    basis_cache_dir: str | None = path(None, "folder that caches the QR bases of the base model's layers")
    save_basis: str | None = option(
        None,
        "frozen factors to save in the adapter file (unset: full): full saves Q and the base's R, q "
        "saves Q alone, none saves neither, and reading the file then needs the base model",
        choices=("full", "q", "none"),
    )
    train_text_encoder: bool = option(
        False, "adapt the text encoders too", resume=True, acts_with=("not network_train_unet_only",)
    )
    network_train_unet_only: bool = option(False, "adapt the U-Net or transformer alone")
    network_train_text_encoder_only: bool = option(False, "adapt the text encoders alone", resume=True)
    scale_weight_norms: float | None = option(
        None,
        "largest norm of a layer's update; larger ones are scaled down",
        above=0,
        metadata=True,
        off_at_zero=True,
    )
    base_weights: tuple[str, ...] = path((), "adapter files that are merged into the base before training")
    strict: bool = option(
        False,
        "refuse --network_weights and --base_weights with tensors that are not used, instead of a warning",
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (), "strengths of the --base_weights files, in order; 1 for files beyond the end of the list"
    )


@dataclass(frozen=True, kw_only=True)
class Abm:
    """Activation boundary matching (ABM) before training"""

    abm_enabled: bool = option(
        False, "before training, bring the signs of the adapter's pre-activations to those of a teacher"
    )
    abm_steps: int = option(
        500, "optimizer steps of the ABM stage", low=1, high=STEPS, acts_with=("abm_enabled",)
    )
    abm_lr: float = option(1e-4, "learning rate of the ABM stage", above=0, acts_with=("abm_enabled",))
    abm_margin: float = option(
        0.5,
        "ABM: how far beyond zero a pre-activation should be, in the unit of --abm_margin_mode",
        low=0,
        acts_with=("abm_enabled",),
    )
    abm_weight_strategy: str = option(
        "uniform",
        "ABM: weight of layer l of L: uniform is 1, linear is (l+1)/L, quadratic is the square of linear, "
        "as in the paper",
        choices=("uniform", "linear", "quadratic"),
        acts_with=("abm_enabled",),
    )
    abm_batch_size: int | None = option(
        None,
        "samples of a batch that ABM uses (unset: network argument abm_batch_size, else all)",
        low=1,
        off_at_zero=True,
        acts_with=("abm_enabled",),
    )
    abm_teacher: str = path(
        "base",
        "teacher of ABM: an adapter file, or the word base, from which a fresh adapter cannot learn anything",
        acts_with=("abm_enabled",),
    )
    abm_margin_mode: str = option(
        "relative",
        "unit of --abm_margin: relative is the layer's median |pre-activation| of the teacher, absolute is 1",
        choices=("relative", "absolute"),
        acts_with=("abm_enabled",),
    )
    abm_layers: float = option(
        1.0,
        "share of the layers that ABM uses, counted from the last layer",
        above=0,
        high=1,
        acts_with=("abm_enabled",),
    )
    abm_guard: bool = option(
        True,
        "skip ABM if the base as teacher has nothing to teach; undo ABM if it raises the loss on fixed "
        "noise by over 0.5 % or lowers the share of equal signs",
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """Training"""

    train_batch_size: int = option(
        1, "images per process and micro-batch", low=1, resume=True, essential=True
    )
    max_train_steps: int = option(
        1600,
        "optimizer steps to train",
        low=1,
        high=STEPS,
        metadata=True,
        acts_with=("not max_train_epochs",),
        essential=True,
    )
    max_train_epochs: int | None = option(
        None,
        "epochs to train; has precedence over --max_train_steps",
        aliases=("--num_train_epochs",),
        low=1,
        high=STEPS,
        off_at_zero=True,
    )
    gradient_accumulation_steps: int = option(
        1,
        "micro-batches per optimizer step; counting continues across epochs",
        low=1,
        metadata=True,
        resume=True,
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", metadata=True
    )
    mixed_precision: str | None = option(
        None,
        "precision of computation (unset: the precision in accelerate's configuration, else no)",
        choices=PRECISIONS,
        metadata=True,
        essential=True,
    )
    full_fp16: bool = option(
        False, "adapter and gradients in fp16; needs --mixed_precision fp16", metadata=True
    )
    full_bf16: bool = option(
        False, "adapter and gradients in bf16; needs --mixed_precision bf16", metadata=True
    )
    seed: int | None = option(
        None,
        "seed of all random numbers (unset: a random seed, which is recorded)",
        low=0,
        high=SEEDS,
        metadata=True,
    )
    allow_tf32: bool = option(False, "let matrix products on the GPU use TF32")
    ema_decay: float = option(
        0.0,
        "decay per step of an exponential moving average (EMA) of the adapter, which is saved in place "
        "of the adapter; 0 is off",
        low=0,
        below=1,
        resume=True,
    )
    resume: str | None = path(
        None,
        "folder of a saved state, its name in --output_dir, or 'latest'",
        aliases=("--resume_from_checkpoint",),
    )
    dry_run: bool = option(
        False,
        "show data, adapter, step plan and memory, and exit",
        aliases=("--debug_dataset",),
        saved=False,
        essential=True,
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer and learning rate"""

    optimizer_type: str = option(
        "",
        "optimizer: a name such as AdamW8bit, Lion or Prodigy in any case, a class of torch.optim, or a "
        "dotted class (unset: AdamW)",
        aliases=("--optimizer",),
        resume=True,
        essential=True,
    )
    optimizer_args: tuple[str, ...] = option(
        (),
        "arguments of the optimizer as key=value with Python literals: weight_decay=0.01 betas=0.9,0.99",
        resume=True,
    )
    use_8bit_adam: bool = option(False, "use AdamW8bit from bitsandbytes", resume=True)
    use_lion_optimizer: bool = option(False, "use the optimizer Lion")
    adam_beta1: float | None = option(
        None, "first beta of the optimizer (unset: the optimizer's default)", low=0, below=1
    )
    adam_beta2: float | None = option(
        None, "second beta of the optimizer (unset: the optimizer's default)", low=0, below=1
    )
    adam_weight_decay: float | None = option(
        None,
        "weight decay of the optimizer (unset: the optimizer's default, 0.01 for AdamW; diffusers' "
        "script has 1e-4)",
        low=0,
    )
    adam_epsilon: float | None = option(
        None, "epsilon of the optimizer (unset: the optimizer's default)", low=0
    )
    prodigy_beta3: float | None = option(None, "beta3 of Prodigy", low=0, below=1)
    prodigy_decouple: bool | None = option(
        None, "argument decouple of Prodigy (unset: Prodigy's default, True)"
    )
    prodigy_use_bias_correction: bool | None = option(
        None,
        "argument use_bias_correction of Prodigy (unset: Prodigy's default, False; diffusers' script "
        "has True)",
    )
    prodigy_safeguard_warmup: bool | None = option(
        None,
        "argument safeguard_warmup of Prodigy (unset: Prodigy's default, False; diffusers' script has True)",
    )
    learning_rate: float = option(
        2e-6,
        "learning rate of every part without --unet_lr or --text_encoder_lr; kohya's default is 2e-6",
        low=0,
        metadata=True,
        resume=True,
        acts_with=("a part at the base rate",),
        essential=True,
    )
    unet_lr: float | None = option(
        None,
        "learning rate of the U-Net or transformer; 0 leaves it untrained",
        low=0,
        metadata=True,
        resume=True,
        acts_with=("a trained denoiser",),
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        None,
        "learning rate of the text encoders, one number for all or one for each",
        low=0,
        metadata=True,
        resume=True,
        acts_with=("a trained text encoder",),
    )
    scale_lr: bool = option(False, "multiply --learning_rate by accumulation steps × batch size × processes")
    max_grad_norm: float = option(
        1.0, "clip the norm of the gradient to this number; 0 is off", low=0, metadata=True
    )
    lr_scheduler: str = option(
        "constant",
        "learning-rate schedule: " + ", ".join(SCHEDULERS) + ", adafactor:RATE",
        convert=scheduler,
        metadata=True,
        resume=True,
        acts_with=("a schedule by name",),
    )
    lr_warmup_steps: float = option(
        0,
        "steps of learning-rate warm-up; a number below 1 or with % is a share of all steps",
        low=0,
        convert=steps_or_share,
        metadata=True,
    )
    lr_decay_steps: float = option(
        0,
        "steps of decay in the schedule warmup_stable_decay; a number below 1 or with % is a share of "
        "all steps",
        low=0,
        convert=steps_or_share,
        acts_with=("a schedule by name", "lr_scheduler=warmup_stable_decay"),
    )
    lr_scheduler_num_cycles: int = option(
        1,
        "restarts of the schedule cosine_with_restarts",
        aliases=("--lr_num_cycles",),
        low=1,
        acts_with=(
            "a schedule by name",
            "lr_scheduler=cosine_with_restarts|cosine_with_min_lr|warmup_stable_decay",
        ),
    )
    lr_scheduler_power: float = option(
        1.0,
        "power of the schedule polynomial",
        aliases=("--lr_power",),
        above=0,
        acts_with=("a schedule by name", "lr_scheduler=polynomial"),
    )
    lr_scheduler_timescale: int | None = option(
        None,
        "time scale of the schedule inverse_sqrt (unset: the warm-up, or 10,000)",
        low=1,
        acts_with=("a schedule by name", "lr_scheduler=inverse_sqrt"),
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "lowest learning rate in the schedules cosine_with_min_lr and warmup_stable_decay, as a share "
        "of --learning_rate",
        low=0,
        high=1,
        acts_with=("a schedule by name", "lr_scheduler=cosine_with_min_lr|warmup_stable_decay"),
    )
    lr_scheduler_type: str = option(
        "",
        "schedule: a class of torch.optim.lr_scheduler, or a dotted class; has precedence over "
        "--lr_scheduler",
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), "arguments of --lr_scheduler_type as key=value with Python literals: T_max=100"
    )


def example(prog: str, model: str, side: int) -> str:
    """A call of a training script for its short help."""
    return (
        f"  accelerate launch {prog} --pretrained_model_name_or_path {model} \\\n"
        f"    --train_data_dir my/pictures --caption_extension .txt --resolution {side},{side} \\\n"
        "    --network_module networks.lora --network_dim 16 --learning_rate 1e-4 --max_train_steps 1500 \\\n"
        "    --mixed_precision bf16 --vram auto --output_dir out/cat --dry_run"
    )
