"""Flags of kohya's and diffusers' trainers that this project lacks: ignored, or refused with a way out."""

from __future__ import annotations

import re

# Ignored: they have no effect on what is trained here.
IGNORED = """
    diffusers_xformers sample_batch_size local_rank persistent_data_loader_workers console_log_simple
"""

# Accepted without effect, each with a reason.
ACCEPTED = """
    cache_info: image sizes are read from the heads of the files, which is fast
    skip_cache_check: caches are found by their content and need no check
    disable_mmap_load_safetensors: weights are read from a mapped file, which is faster
    initial_epoch initial_step skip_until_initial_step: --resume continues at the right step and image
    ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph: `accelerate launch` sets up processes
    log_config: every option is always written to config.toml in --output_dir
"""

# Ignored by FLUX training, in kohya's script too.
IGNORED_BY_FLUX = """
    v2 v_parameterization vae clip_skip max_token_length weighted_captions sample_sampler
    xformers sdpa mem_eff_attn
    noise_offset noise_offset_random_strength adaptive_noise_scale min_timestep max_timestep
    multires_noise_iterations multires_noise_discount zero_terminal_snr min_snr_gamma
    scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss
"""

# Refused: they would change the result. Each line has flags, a colon, and what to do instead.
REFUSED = """
    dataset_name dataset_config_name image_column caption_column dataset_class: pictures come from a folder;
        give --instance_data_dir, --train_data_dir or --dataset_config
    face_crop_aug_range: use --random_crop, or crop the pictures beforehand
    controlnet_model_name_or_path: no ControlNet is trained here; drop it
    fused_backward_pass blockwise_fused_optimizers fused_optimizer_groups: it is for training whole models;
        drop it
    deepspeed zero_stage zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients
        offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path:
        adapters have little optimizer state to shard; use `accelerate launch --num_processes N`, and
        --fp8_base to save memory
    abm_optimizer_type abm_optimizer_args: the ABM stage always uses AdamW with --abm_lr; drop it
    block_lr learning_rate_te learning_rate_te1 learning_rate_te2: use --text_encoder_lr and --unet_lr
    stop_text_encoder_training: use --network_train_unet_only, or two runs with --network_weights
    adam_weight_decay_text_encoder: --adam_weight_decay applies to every part; drop it
    push_to_hub: give --huggingface_repo_id OWNER/NAME
    save_state_to_huggingface: upload the state folder with the Hugging Face command line
    resume_from_huggingface: download the state folder and give --resume FOLDER
    log_tracker_config: use --log_tracker_name, --wandb_run_name and the tracker's environment variables
"""

REFUSED_BY_FLUX = """
    split_mode: use --blocks_to_swap 18, which keeps as many blocks in host memory
"""

REFUSED_BY_SD = """
    train_inpainting: no inpainting model is trained here; drop it
"""


def ways_out(*tables: str) -> dict[str, str]:
    """What to do instead, by flag, from lines `flag flag: text` whose continuation is indented further."""
    advice: dict[str, str] = {}
    for table in tables:
        for entry in re.sub(r"\n {5,}", " ", table).strip().splitlines():
            names, _, text = entry.partition(": ")
            advice |= dict.fromkeys(names.split(), text)
    return advice
