"""The flags that training scripts share, group by group: kohya's names, types, defaults and meanings.

Names of the user's documents and of diffusers' scripts are aliases. Where one script's default differs from
the one written here, `surfaces.py` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.fields import (
    SCHEDULERS,
    comma_words,
    file_name,
    option,
    path,
    resolution,
    scheduler,
    steps_or_share,
)

PRECISIONS = ("no", "fp16", "bf16")
SEEDS = 2**63 - 2**32  # largest seed: torch's limit, with room for one per image
STEPS = 10**9  # most steps


@dataclass(frozen=True)
class Logging:
    """Logs and trackers"""

    logging_dir: str | None = path(None, "folder for tracker logs (unset: logs/ in --output_dir)")
    log_with: str | None = option(
        None, "tracker", aliases=("--report_to",), choices=("tensorboard", "wandb", "all", "none")
    )
    log_prefix: str | None = option(None, "put before the time stamp that names a run's log folder")
    log_tracker_name: str | None = option(None, "name of the run's project in the tracker")
    wandb_run_name: str | None = option(None, "name of the run in wandb")
    wandb_api_key: str | None = option(None, "key for wandb; never logged or saved", secret=True)
    console_log_level: str = option(
        "INFO", "least level of the log", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    )
    console_log_file: str | None = path(None, "write the log to this file instead of stderr")


@dataclass(frozen=True)
class Model:
    """Base model"""

    pretrained_model_name_or_path: str | None = path(None, "folder of a diffusers model, or its hub id")
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    variant: str | None = option(None, "file variant of a hub model, such as fp16")
    cache_dir: str | None = path(None, "folder where hub downloads are kept")
    no_half_vae: bool = option(False, "run the VAE in fp32")


@dataclass(frozen=True)
class Data:
    """Pictures"""

    train_data_dir: str | None = path(
        None, "parent of folders named <repeats>_<class>, captions beside the images"
    )
    reg_data_dir: str | None = path(None, "as --train_data_dir, for regularisation images")
    dataset_config: str | None = path(None, "TOML or JSON file that describes datasets and their folders")
    instance_data_dir: str | None = path(None, "plain folder of images that all have --instance_prompt")
    instance_prompt: str | None = option(None, "caption of the images in --instance_data_dir")
    dataset_repeats: int = option(
        1,
        "how often an epoch shows each image of --instance_data_dir",
        aliases=("--repeats",),
        low=1,
        high=10**6,
    )
    skip_bad_images: bool = option(
        False, "leave out images that cannot be read, and list them, instead of stopping"
    )
    resolution: tuple[int, int] | None = option(
        None, "image size, '512' or 'width,height'", unit="pixels", low=1, convert=resolution
    )
    center_crop: bool = option(False, "crop the middle, which is the rule without --random_crop")
    random_crop: bool = option(False, "crop anywhere")
    flip_aug: bool = option(False, "mirror every second image", aliases=("--random_flip",))
    color_aug: bool = option(False, "vary hue and gamma of every third image")
    resize_interpolation: str | None = option(
        None,
        "filter for resizing (unset: area to shrink, lanczos to enlarge)",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    )
    cache_latents: bool = option(False, "encode each image once and keep its latents in memory")
    cache_latents_to_disk: bool = option(False, "keep the latents on disk too; implies --cache_latents")
    vae_batch_size: int = option(1, "images encoded at once", low=1)
    cache_text_encoder_outputs: bool = option(False, "encode each caption once and free the text encoders")
    cache_text_encoder_outputs_to_disk: bool = option(False, "keep them on disk too; implies the flag before")
    text_encoder_batch_size: int | None = option(
        None, "captions encoded at once (unset: --train_batch_size)", low=1
    )
    max_data_loader_n_workers: int = option(
        8,
        "processes that read images, at most one per CPU; 0 reads in the main one",
        aliases=("--dataloader_num_workers",),
        low=0,
    )


@dataclass(frozen=True)
class Buckets:
    """Aspect-ratio buckets"""

    enable_bucket: bool = option(
        False, "keep the aspect ratio: train in sizes of about the area of --resolution"
    )
    min_bucket_reso: int = option(256, "least side of a bucket", unit="pixels", low=1)
    max_bucket_reso: int = option(1024, "largest side of a bucket", unit="pixels", low=1)
    bucket_reso_steps: int = option(64, "a side is a multiple of this", unit="pixels", low=1)
    bucket_no_upscale: bool = option(False, "never enlarge an image; buckets come from the images")


@dataclass(frozen=True)
class Captions:
    """Captions"""

    caption_extension: str | None = option(
        None,
        "ending of caption files (unset: .caption, and with --instance_data_dir caption files are not "
        "looked for)",
        aliases=("--caption_extention",),
    )
    caption_separator: str = option(",", "text between tags")
    shuffle_caption: bool = option(False, "shuffle the tags of a caption")
    keep_tokens: int = option(0, "leading tags that are never shuffled or dropped", low=0)
    keep_tokens_separator: str = option(
        "", "tags before this text stay in place, and those after a second one"
    )
    secondary_separator: str | None = option(None, "tags joined by this text stay together")
    enable_wildcard: bool = option(False, "choose from {a|b}, and one line of a caption file with several")
    caption_prefix: str | None = option(None, "put before every caption, with a blank")
    caption_suffix: str | None = option(None, "put after every caption, with a blank")
    caption_dropout_rate: float = option(0.0, "share of captions that are emptied", low=0, high=1)
    caption_dropout_every_n_epochs: int = option(
        0, "empty all captions of every n-th epoch; 0 is never", low=0
    )
    caption_tag_dropout_rate: float = option(0.0, "share of tags that are dropped", low=0, high=1)
    token_warmup_min: int = option(1, "tags used at the first step, with --token_warmup_step", low=0)
    token_warmup_step: float = option(
        0.0, "step at which all tags are used; below 1 a share of all steps", low=0
    )


@dataclass(frozen=True)
class Prior:
    """Prior preservation"""

    with_prior_preservation: bool = option(
        False, "train on class images too, so that the class is not forgotten"
    )
    class_data_dir: str | None = path(None, "folder of class images; missing ones are generated")
    class_prompt: str | None = option(None, "caption of the class images, and what generates them")
    num_class_images: int = option(100, "class images there shall be", low=1)
    prior_generation_precision: str | None = option(
        None, "precision of that generation (unset: that of training)", choices=("no", "fp32", "fp16", "bf16")
    )
    prior_loss_weight: float = option(1.0, "weight of the loss of class or regularisation images", low=0)


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
        "scale × rank (unset: the rank for delta_r, delta_r_triu and qrlora, 1 for others, as kohya)",
        above=0,
    )
    network_dropout: float | None = option(None, "dropout in the adapter", low=0, below=1)
    network_args: tuple[str, ...] = option((), "key=value for the module")
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
class Saving:
    """Saving"""

    output_dir: str | None = path(None, "folder for everything that is written")
    output_name: str | None = option(None, "name of the adapter files, without ending", convert=file_name)
    save_model_as: str = option("safetensors", "file format", choices=("safetensors", "ckpt", "pt"))
    save_precision: str | None = option(
        None, "precision of adapter files (unset: that of training)", choices=("float", "fp16", "bf16")
    )
    upcast_before_saving: bool = option(False, "the same as --save_precision float")
    checkpointing_steps: int | None = option(
        None, "every n steps a folder checkpoint-N with the adapter and all that --resume needs", low=1
    )
    checkpoints_total_limit: int | None = option(
        None, "delete the oldest of these folders beyond this number", low=1
    )
    save_every_n_epochs: int | None = option(None, "an adapter file every n epochs", low=1)
    save_every_n_steps: int | None = option(None, "an adapter file every n steps", low=1)
    save_n_epoch_ratio: int | None = option(None, "about this many adapter files over all epochs", low=1)
    save_last_n_epochs: int | None = option(
        None, "keep the epoch files of the last n × --save_every_n_epochs epochs", low=1
    )
    save_last_n_steps: int | None = option(None, "keep the step files of the last n steps", low=1)
    save_last_n_epochs_state: int | None = option(None, "likewise for states (unset: as the files)", low=1)
    save_last_n_steps_state: int | None = option(None, "likewise for states (unset: as the files)", low=1)
    save_state: bool = option(False, "a state folder for --resume beside every adapter file")
    save_state_on_train_end: bool = option(False, "a state folder at the end")
    no_metadata: bool = option(False, "keep only the metadata that reading the file needs")
    training_comment: str | None = option(None, "comment in the metadata")
    metadata_title: str | None = option(None, "title in the metadata (unset: --output_name)")
    metadata_author: str | None = option(None, "author in the metadata")
    metadata_description: str | None = option(None, "description in the metadata")
    metadata_license: str | None = option(None, "licence in the metadata")
    metadata_tags: str | None = option(None, "tags in the metadata")


@dataclass(frozen=True)
class Hub:
    """Upload"""

    huggingface_repo_id: str | None = option(
        None, "OWNER/NAME where adapter files are uploaded", aliases=("--hub_model_id",)
    )
    huggingface_repo_type: str | None = option(
        None, "type of that repository", choices=("model", "dataset", "space")
    )
    huggingface_path_in_repo: str | None = option(None, "folder in it")
    huggingface_token: str | None = option(
        None, "token; never logged or saved", aliases=("--hub_token",), secret=True
    )
    huggingface_repo_visibility: str | None = option(
        None, "of a repository that is made", choices=("private", "public")
    )
    async_upload: bool = option(False, "upload while training goes on")


@dataclass(frozen=True)
class Sampling:
    """Pictures while training"""

    validation_prompt: str | None = option(None, "prompt of pictures made while training and at the end")
    validation_epochs: int = option(50, "make them every n epochs", low=1)
    num_validation_images: int = option(4, "how many of them", low=1)
    sample_prompts: str | None = path(
        None, "file of prompts (.txt, .toml, .json), a line as 'a cat --w 512 --s 20'"
    )
    sample_every_n_steps: int | None = option(None, "make them every n steps", low=1)
    sample_every_n_epochs: int | None = option(None, "make them every n epochs; wins over steps", low=1)
    sample_at_first: bool = option(False, "make them before the first step too")
