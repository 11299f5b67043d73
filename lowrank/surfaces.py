"""The command line of each script: its groups of flags, and what becomes of the flags of kohya and diffusers
that it lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lowrank.errors import Refused
from lowrank.fields import comma_floats, path
from lowrank.flags import (
    Buckets,
    Captions,
    Data,
    Hub,
    Logging,
    Loss,
    Model,
    Network,
    Optimizer,
    Prior,
    Sampling,
    Saving,
    Train,
)
from lowrank.options import ConfigFile, Parsed, Surface, option, pairs

LORA_INIT_METHODS = {"triu_deltaR": "delta_r_triu", "deltaR": "delta_r", "qr": "qrlora"}


@dataclass(frozen=True)
class FluxModel:
    """FLUX"""

    model_type: str = option("flux", "architecture", choices=("flux",))
    clip_l: str | None = path(None, "CLIP-L text encoder in place of the model's own")
    t5xxl: str | None = path(None, "T5 text encoder in place of the model's own")
    ae: str | None = path(None, "autoencoder in place of the model's own")
    t5xxl_max_token_length: int | None = option(
        None,
        "length of T5 captions (unset: 512, schnell 256)",
        aliases=("--max_sequence_length",),
        low=1,
        high=512,
    )
    apply_t5_attn_mask: bool = option(False, "mask T5's padding in T5 and in the transformer")
    guidance_scale: float = option(
        3.5, "guidance told to a guidance-distilled model in training; 1.0 is usual too", low=0
    )
    tokenizer_cache_dir: str | None = path(
        None, "folder of tokenizers for a model in single files, each in <folder>/<hub id with / as _>"
    )


@dataclass(frozen=True)
class Flow:
    """Flow matching"""

    timestep_sampling: str = option(
        "sigma", "how sigma is drawn", choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift")
    )
    sigmoid_scale: float = option(1.0, "spread of sigmoid, shift and flux_shift", above=0)
    discrete_flow_shift: float = option(
        3.0, "shift of sigma and shift; 1.0 is none, as in the published QR-LoRA", above=0
    )
    model_prediction_type: str = option(
        "raw",
        "what is compared with the target; kohya's default is sigma_scaled, which does not match the target",
        choices=("raw", "additive", "sigma_scaled"),
    )
    weighting_scheme: str = option(
        "uniform",
        "density of sigma and weight of the loss",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
    )
    logit_mean: float = option(0.0, "mean of logit_normal")
    logit_std: float = option(1.0, "standard deviation of logit_normal", above=0)
    mode_scale: float = option(1.29, "scale of mode")


@dataclass(frozen=True)
class Residual:
    """Residual file"""

    model_path: str | None = path(None, "folder of a diffusers FLUX, or its hub id", required=True)
    output_dir: str | None = path(None, "folder of flux_residual_weights.safetensors", required=True)
    rank: int = option(64, "rank of the adapters it is for", low=1)
    dtype: str = option("fp16", "precision of the residual", choices=("fp32", "fp16", "bf16"))
    device: str | None = option(None, "where bases are computed (unset: the GPU if there is one)")
    basis_cache_dir: str | None = path(None, "folder where bases are kept")


@dataclass(frozen=True)
class Merge:
    """Merging and sampling"""

    model_path: str | None = path(None, "folder of a diffusers FLUX, or its hub id", required=True)
    style_lora_path: str | None = path(None, "adapter of the style", required=True)
    content_lora_path: str | None = path(None, "adapter of the content", required=True)
    residual_path: str | None = path(None, "residual file; not needed, but checked when given")
    output_dir: str | None = path(None, "folder for images and merged adapters", required=True)
    prompt: str | None = option(None, "what to draw; needed unless --skip_images")
    style_weights: tuple[float, ...] = option(
        (1.0,), "comma list of style strengths", convert=comma_floats, low=-1e6, high=1e6
    )
    content_weights: tuple[float, ...] = option(
        (1.0,),
        "comma list of content strengths; every pair of both lists is drawn",
        convert=comma_floats,
        low=-1e6,
        high=1e6,
    )
    num_inference_steps: int = option(50, "denoising steps", low=1)
    guidance_scale: float = option(3.5, "guidance told to the model", low=0)
    height: int | None = option(None, "height of the images (unset: the model's own)", unit="pixels", low=16)
    width: int | None = option(None, "width of the images (unset: the model's own)", unit="pixels", low=16)
    num_images: int = option(1, "images for each pair of strengths", low=1, high=10_000)
    max_sequence_length: int | None = option(
        None, "length of T5 prompts (unset: 512, schnell 256)", low=1, high=512
    )
    seed: int = option(
        0, "seed of the first image, the same for every pair of strengths", low=0, high=2**63 - 1
    )
    dtype: str = option("fp32", "precision of the model", choices=("fp32", "fp16", "bf16"))
    device: str | None = option(None, "where to draw (unset: the GPU if there is one)")
    save_merged: bool = option(False, "write the merged adapter of each pair too")
    skip_images: bool = option(False, "draw nothing, for --save_merged alone")


@dataclass(frozen=True)
class Similarity:
    """Adapters to compare"""

    lora1_path: str | None = path(None, "first adapter file", required=True)
    lora2_path: str | None = path(None, "second adapter file", required=True)
    lora1_name: str = option("style", "name of the first in plots and summary")
    lora2_name: str = option("content", "name of the second in plots and summary")
    output_dir: str = path("deltaR_similarity_analysis", "folder for plots, JSON and summary")
    fixed_scale: bool = option(
        False, "without effect: plots of fixed and of automatic scale are both written"
    )


def adapter_module(network: Network) -> str:
    """The module that --network_module and --lora_init_method ask for; without either ΔR-triu."""
    if network.network_module:
        return network.network_module
    return f"networks.{LORA_INIT_METHODS[network.lora_init_method or 'triu_deltaR']}"


def check_flux(parsed: Parsed) -> Iterator[str]:
    """Rules between flags of FLUX training; raises `Refused`, yields notes."""
    if not parsed.model.pretrained_model_name_or_path:
        raise Refused("no base model; give --pretrained_model_name_or_path FOLDER_OR_HUB_ID")
    if parsed.saving.save_model_as != "safetensors":
        raise Refused(
            f"--save_model_as {parsed.saving.save_model_as} would be a pickle, which can run code when it is "
            "loaded; use safetensors"
        )
    yield from _check_data(parsed)
    network = parsed.network
    if parsed.optimizer.text_encoder_lr and not (
        network.train_text_encoder or network.network_train_text_encoder_only
    ):
        yield "--text_encoder_lr has no effect without --train_text_encoder, which adapts CLIP-L too"
    _check_network(parsed)
    _check_precision(parsed)
    _check_schedule(parsed)


def _check_data(parsed: Parsed) -> Iterator[str]:
    data, prior = parsed.data, parsed.prior
    sources = [n for n in ("dataset_config", "train_data_dir", "instance_data_dir") if getattr(data, n)]
    if len(sources) != 1:
        told = " and ".join(parsed.flag(name) for name in sources) or "none"
        raise Refused(
            f"one source of pictures is needed, not {told}; give --instance_data_dir FOLDER with "
            "--instance_prompt TEXT, --train_data_dir FOLDER, or --dataset_config FILE"
        )
    if data.instance_prompt and "instance_data_dir" not in sources:
        raise Refused("--instance_prompt belongs to --instance_data_dir; captions come from files here")
    if prior.with_prior_preservation:
        for name in ("class_data_dir", "class_prompt"):
            if not getattr(prior, name):
                raise Refused(f"--with_prior_preservation needs --{name}")
        if sources[0] != "instance_data_dir":
            raise Refused("--with_prior_preservation belongs to --instance_data_dir; use --reg_data_dir here")
    elif prior.class_data_dir or prior.class_prompt:
        yield "--class_data_dir and --class_prompt have no effect without --with_prior_preservation"
    if data.center_crop and data.random_crop:
        raise Refused("--center_crop and --random_crop are both given; give one")
    cached = data.cache_latents or data.cache_latents_to_disk
    for name in ("color_aug", "random_crop"):
        if cached and getattr(data, name):
            raise Refused(f"--{name} changes images every epoch, but cached latents stay; drop one of both")
    buckets = parsed.buckets
    if buckets.min_bucket_reso > buckets.max_bucket_reso:
        raise Refused(
            f"{parsed.flag('min_bucket_reso')} {buckets.min_bucket_reso} exceeds "
            f"{parsed.flag('max_bucket_reso')} {buckets.max_bucket_reso}; swap or correct them"
        )


def _check_network(parsed: Parsed) -> None:
    network = parsed.network
    for name in ("network_args", "optimizer_args", "lr_scheduler_args"):
        pairs(parsed.flag(name), parsed.value(name))
    if network.lora_init_method and network.network_module:
        module = LORA_INIT_METHODS[network.lora_init_method]
        if network.network_module.rpartition(".")[2] != module:
            raise Refused(
                f"--lora_init_method {network.lora_init_method} means networks.{module}, but "
                f"--network_module is {network.network_module}; give one of them"
            )
    if network.dim_from_weights and not network.network_weights:
        raise Refused("--dim_from_weights needs --network_weights FILE")
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        raise Refused("--network_train_unet_only and --network_train_text_encoder_only exclude each other")
    if network.train_text_encoder and network.network_train_unet_only:
        raise Refused("--train_text_encoder and --network_train_unet_only exclude each other; give one")
    if len(network.base_weights_multiplier) > len(network.base_weights):
        raise Refused(
            f"--base_weights_multiplier has {len(network.base_weights_multiplier)} numbers for "
            f"{len(network.base_weights)} --base_weights; give one for each file"
        )


def _check_precision(parsed: Parsed) -> None:
    train, saving = parsed.train, parsed.saving
    for flag, needed in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(train, flag) and train.mixed_precision != needed:
            raise Refused(f"--{flag} needs --mixed_precision {needed}, not {train.mixed_precision}")
    if (train.fp8_base or train.fp8_base_unet) and train.mixed_precision == "no":
        raise Refused("--fp8_base needs --mixed_precision fp16 or bf16, since nothing is computed in fp8")
    if saving.upcast_before_saving and saving.save_precision in ("fp16", "bf16"):
        raise Refused(
            f"--upcast_before_saving and --save_precision {saving.save_precision} exclude each other"
        )


def _check_schedule(parsed: Parsed) -> None:
    optimizer, train, sampling = parsed.optimizer, parsed.train, parsed.sampling
    if "max_train_steps" in parsed.given and parsed.flag("max_train_epochs") == "--num_train_epochs":
        raise Refused(
            f"--num_train_epochs {train.max_train_epochs} and --max_train_steps {train.max_train_steps} both "
            "say how long to train, and scripts disagree which wins; give one"
        )
    if optimizer.lr_scheduler == "constant" and not optimizer.lr_scheduler_type and optimizer.lr_warmup_steps:
        raise Refused(
            f"{parsed.flag('lr_warmup_steps')} {optimizer.lr_warmup_steps:g} has no effect with "
            "--lr_scheduler constant; use constant_with_warmup, or 0"
        )
    every = [n for n in ("sample_every_n_steps", "sample_every_n_epochs") if getattr(sampling, n)]
    if (every or sampling.sample_at_first) and not (sampling.sample_prompts or sampling.validation_prompt):
        raise Refused(
            f"--{(every or ['sample_at_first'])[0]} has nothing to draw; give --sample_prompts FILE or "
            "--validation_prompt TEXT"
        )
    hub = [n for n in ("huggingface_path_in_repo", "async_upload") if parsed.value(n)]
    if hub and not parsed.hub.huggingface_repo_id:
        raise Refused(f"--{hub[0]} needs --huggingface_repo_id OWNER/NAME")


def check_merge(parsed: Parsed) -> Iterator[str]:
    """A prompt unless no image is drawn; nothing to do is an error too."""
    merge = parsed.merge
    if merge.skip_images and not merge.save_merged:
        raise Refused("--skip_images without --save_merged leaves nothing to do; give --save_merged")
    if not merge.prompt and not merge.skip_images:
        raise Refused("no prompt; give --prompt TEXT, or --skip_images with --save_merged")
    yield from ()


# Flags of kohya's scripts that change nothing in FLUX training, there as here.
_IGNORED = """
    v2 v_parameterization vae clip_skip max_token_length weighted_captions sample_sampler local_rank
    xformers sdpa mem_eff_attn diffusers_xformers sample_batch_size
    persistent_data_loader_workers lowram highvram dynamo_backend console_log_simple
    noise_offset noise_offset_random_strength adaptive_noise_scale min_timestep max_timestep
    multires_noise_iterations multires_noise_discount zero_terminal_snr min_snr_gamma
    scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss
"""

# Flags that would change something and are not here, with the way out.
_REFUSED = """
    dataset_name dataset_config_name image_column caption_column dataset_class: pictures come from a folder;
        give --instance_data_dir, --train_data_dir or --dataset_config
    in_json: put the captions beside the images and give --train_data_dir or --dataset_config
    cache_info: image sizes are read from file heads, which is quick; drop it
    skip_cache_check: caches are found by content and need no check; drop it
    debug_dataset: use --dry_run
    face_crop_aug_range: use --random_crop, or crop the pictures beforehand
    alpha_mask masked_loss conditioning_data_dir: there is no masked loss; crop the pictures instead
    disable_mmap_load_safetensors: drop it
    controlnet_model_name_or_path: no ControlNet is trained here
    blocks_to_swap split_mode: use --fp8_base with --gradient_checkpointing, which halves the base's memory
    cpu_offload_checkpointing: use --gradient_checkpointing, then --fp8_base if that is too little
    torch_compile: start with `accelerate launch --dynamo_backend inductor`
    fused_backward_pass blockwise_fused_optimizers fused_optimizer_groups: it is for training whole models
    initial_epoch initial_step skip_until_initial_step: --resume goes on at the right step and image by itself
    ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph: `accelerate launch` sets up processes; drop it
    deepspeed zero_stage zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients
        offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path: set
        DeepSpeed up with `accelerate config`
    block_lr learning_rate_te learning_rate_te1 learning_rate_te2: use --text_encoder_lr and --unet_lr
    stop_text_encoder_training: use --network_train_unet_only, or two runs with --network_weights
    adam_weight_decay_text_encoder: --adam_weight_decay is for every part
    push_to_hub: give --huggingface_repo_id OWNER/NAME
    save_state_to_huggingface: upload the state folder with the Hugging Face command line
    resume_from_huggingface: download the state folder and give --resume FOLDER
    log_config: the options are always written to the run's folder; drop it
    log_tracker_config: use --log_tracker_name, --wandb_run_name and the tracker's environment variables
    metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor
        metadata_is_negative_embedding: use --metadata_description
    validation_split validation_seed validate_every_n_steps validate_every_n_epochs max_validation_steps:
        there is no held-out loss; use --validation_prompt or --sample_prompts
"""


def _ways_out(table: str) -> dict[str, str]:
    """The way out by flag, from lines `flag flag: way out` whose continuation is indented further."""
    found = {}
    for entry in re.sub(r"\n {5,}", " ", table).strip().splitlines():
        names, _, way_out = entry.partition(": ")
        found |= dict.fromkeys(names.split(), way_out)
    return found


FLUX_TRAIN = Surface(
    prog="flux_train_qrlora.py",
    description="Train an adapter for FLUX: ΔR, ΔR-triu, QR-LoRA, LoRA, or any module of kohya's contract.",
    groups=(
        ConfigFile,
        Model,
        FluxModel,
        Data,
        Buckets,
        Captions,
        Prior,
        Network,
        Train,
        Optimizer,
        Flow,
        Loss,
        Saving,
        Sampling,
        Logging,
        Hub,
    ),
    defaults={
        "learning_rate": 1e-4,  # diffusers' FLUX script; kohya's 2e-6 is for whole models
        "resolution": (512, 512),
        "log_with": "tensorboard",
        "output_dir": "flux-dreambooth-lora",
        "huber_schedule": "constant",  # kohya's snr has no meaning for a flow
    },
    ignored_by="FLUX",
    off_at_zero=(
        *("max_train_epochs", "save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio"),
        *("save_last_n_epochs", "save_last_n_steps", "save_last_n_epochs_state", "save_last_n_steps_state"),
        *("sample_every_n_steps", "sample_every_n_epochs", "scale_weight_norms"),
    ),
    ignored=tuple(_IGNORED.split()),
    refused=_ways_out(_REFUSED),
    check=check_flux,
)

SAVE_RESIDUAL = Surface(
    "save_flux_residual.py", "Write W − QR of every adapted layer, for tools that want it.", (Residual,)
)

INFERENCE_MERGE = Surface(
    "inference_merge.py",
    "Draw a style and a content adapter together, in every pair of strengths.",
    (Merge,),
    check=check_merge,
)

VISUALIZE_SIMILARITY = Surface(
    "visualize_similarity.py",
    "Compare two adapters layer by layer: plots, JSON and a text summary.",
    (Similarity,),
)
