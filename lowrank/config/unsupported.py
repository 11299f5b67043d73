"""Flags of kohya's and diffusers' scripts that are not here: without effect, or refused with a way out."""

from __future__ import annotations

import re

# They change nothing here: what they ask for is so already, or another tool's business.
IGNORED = """
    diffusers_xformers sample_batch_size local_rank persistent_data_loader_workers lowram highvram
    dynamo_backend console_log_simple
"""

# They change nothing in FLUX training, there as here.
IGNORED_BY_FLUX = """
    v2 v_parameterization vae clip_skip max_token_length weighted_captions sample_sampler
    xformers sdpa mem_eff_attn
    noise_offset noise_offset_random_strength adaptive_noise_scale min_timestep max_timestep
    multires_noise_iterations multires_noise_discount zero_terminal_snr min_snr_gamma
    scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss
"""

# They would change something, and are not here.
REFUSED = """
    dataset_name dataset_config_name image_column caption_column dataset_class: pictures come from a folder;
        give --instance_data_dir, --train_data_dir or --dataset_config
    cache_info: image sizes are read from file heads, which is quick; drop it
    skip_cache_check: caches are found by content and need no check; drop it
    debug_dataset: use --dry_run
    face_crop_aug_range: use --random_crop, or crop the pictures beforehand
    disable_mmap_load_safetensors: drop it
    controlnet_model_name_or_path: no ControlNet is trained here
    torch_compile: nothing is compiled here; --mixed_precision bf16 is what makes steps short
    fused_backward_pass blockwise_fused_optimizers fused_optimizer_groups: it is for training whole models
    initial_epoch initial_step skip_until_initial_step: --resume goes on at the right step and image by itself
    ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph: `accelerate launch` sets up processes; drop it
    deepspeed zero_stage zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients
        offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path: it
        shares out what an adapter has little of; use `accelerate launch --num_processes N`, and --fp8_base
        for memory
    abm_optimizer_type abm_optimizer_args: ABM has an AdamW of its own, with --abm_lr; drop it
    block_lr learning_rate_te learning_rate_te1 learning_rate_te2: use --text_encoder_lr and --unet_lr
    stop_text_encoder_training: use --network_train_unet_only, or two runs with --network_weights
    adam_weight_decay_text_encoder: --adam_weight_decay is for every part
    push_to_hub: give --huggingface_repo_id OWNER/NAME
    save_state_to_huggingface: upload the state folder with the Hugging Face command line
    resume_from_huggingface: download the state folder and give --resume FOLDER
    log_config: the options are always written to the run's folder; drop it
    log_tracker_config: use --log_tracker_name, --wandb_run_name and the tracker's environment variables
"""

REFUSED_BY_FLUX = """
    blocks_to_swap split_mode: use --fp8_base with --gradient_checkpointing, which halves the base's memory
    cpu_offload_checkpointing: use --gradient_checkpointing, then --fp8_base if that is too little
"""

REFUSED_BY_SD = """
    train_inpainting: no inpainting model is trained here
    cpu_offload_checkpointing: use --gradient_checkpointing, then --fp8_base if that is too little
"""


def ways_out(*tables: str) -> dict[str, str]:
    """The way out by flag, from lines `flag flag: way out` whose continuation is indented further."""
    found = {}
    for table in tables:
        for entry in re.sub(r"\n {5,}", " ", table).strip().splitlines():
            names, _, way_out = entry.partition(": ")
            found |= dict.fromkeys(names.split(), way_out)
    return found
