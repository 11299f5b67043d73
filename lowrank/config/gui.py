"""Files of kohya_ss, the interface of bmaltais: its JSON in the words of kohya's flags, and its own keys.

Facts from kohya_ss of July 2026 (kohya_gui/lora_gui.py), and from JSON files of its earlier versions. The
interface computes flags from its settings before it starts kohya's script; `translate` does the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Settings of the interface itself, of accelerate's launch, and of its other tabs: no effect on LoRA training.
_OWN = """
    LoRA_type LyCORIS_preset additional_parameters bypass_mode constrain constraint decompose_both dora_wd
    epoch enable_all_linear extra_accelerate_launch_args factor file_path flux1_cache_text_encoder_outputs
    flux1_cache_text_encoder_outputs_to_disk flux1_checkbox sd3_checkbox sdxl sdxl_cache_text_encoder_outputs
    sdxl_no_half_vae gpu_ids headless logging_dir_list lora_network_weights lowvram lr_warmup
    main_process_port max_resolution mem_eff_save model_list multi_gpu no_token_padding noise_offset_type
    num_cpu_threads_per_process num_machines num_processes optimizer print_only rank_dropout_scale rescaled
    save_as save_as_bool show_timesteps show_timesteps_resolution single_blocks_to_swap double_blocks_to_swap
    stop_text_encoder_training_pct t5xxl_lr train_lora_ggpo train_norm train_on_input unit use_cp use_scalar
    use_shell use_tucker use_wandb dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph conv_alphas conv_dims
    clip_g clip_g_dropout_rate clip_l_dropout_rate enable_scaled_pos_embed pos_emb_random_crop_rate save_clip
    save_t5xxl t5_dropout_rate t5xxl_device t5xxl_dtype sd3_cache_text_encoder_outputs
    sd3_cache_text_encoder_outputs_to_disk sd3_fused_backward_pass sd3_clip_l sd3_clip_l_dropout_rate
    sd3_disable_mmap_load_safetensors sd3_enable_scaled_pos_embed sd3_t5_dropout_rate sd3_t5xxl
    sd3_text_encoder_batch_size hunyuan_image_checkbox anima_checkbox lumina_checkbox
"""
OWN_KEYS = frozenset(_OWN.split())
OTHER_TABS = ("anima_", "hunyuan_", "lumina_")  # beginnings of keys of models that are not trained here
# network arguments that the JSON has as keys, by the kind of network
_BLOCKS = (
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "block_dims"),
    *("block_alphas", "conv_block_dims", "conv_block_alphas", "rank_dropout", "module_dropout"),
)
_FLUX = (
    *(
        "img_attn_dim",
        "img_mlp_dim",
        "img_mod_dim",
        "single_dim",
        "txt_attn_dim",
        "txt_mlp_dim",
        "txt_mod_dim",
    ),
    *("single_mod_dim", "in_dims", "train_double_block_indices", "train_single_block_indices", "split_qkv"),
    *("train_t5xxl", "train_blocks", "rank_dropout", "module_dropout"),
)
_GGPO = ("ggpo_beta", "ggpo_sigma")
_LORAPLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_LYCORIS = (
    *("conv_dim", "conv_alpha", "use_tucker", "use_cp", "use_scalar", "rank_dropout", "module_dropout"),
    *("rank_dropout_scale", "dora_wd", "bypass_mode", "decompose_both", "factor", "rescaled", "train_norm"),
)
_ALGORITHMS = {
    "LoCon": "locon",
    "LyCORIS/LoCon": "locon",
    "LyCORIS/LoHa": "loha",
    "LyCORIS/LoKr": "lokr",
    "LyCORIS/GLoRA": "glora",
    "LyCORIS/DyLoRA": "dylora",
    "LyCORIS/iA3": "ia3",
    "LyCORIS/Diag-OFT": "diag-oft",
    "LyCORIS/BOFT": "boft",
    "LyCORIS/Native Fine-Tuning": "full",
}
ARGUMENTS = frozenset((*_BLOCKS, *_FLUX, *_GGPO, *_LORAPLUS, *_LYCORIS))
# keys of every JSON that the interface passes on for one model only
_SD3 = ("logit_mean", "logit_std", "mode_scale", "weighting_scheme")
_ONLY_FLUX = (
    *("ae", "clip_l", "t5xxl", "model_type", "discrete_flow_shift", "model_prediction_type", "split_mode"),
    *("timestep_sampling", "t5xxl_max_token_length", "guidance_scale", "apply_t5_attn_mask", "fp8_base_unet"),
    *("cpu_offload_checkpointing", "blocks_to_swap", "flux_fused_backward_pass"),
)
_NUMBERS_OFF = (  # numbers whose 0 means unset there
    *(
        "seed",
        "vae_batch_size",
        "clip_skip",
        "min_snr_gamma",
        "min_timestep",
        "max_timestep",
        "ip_noise_gamma",
    ),
    *("noise_offset", "adaptive_noise_scale", "multires_noise_iterations", "v_pred_like_loss", "unet_lr"),
    *("max_train_steps", "max_train_epochs", "text_encoder_lr", "network_dropout", "lr_warmup_steps"),
)


class Translated(NamedTuple):
    """Keys of kohya's scripts and their values, keys without effect, and what cannot be translated."""

    values: dict[str, Any]
    unused: list[str]
    problems: list[str]
    words: list[str]  # flags of additional_parameters


def is_interface_json(values: Mapping[str, Any]) -> bool:
    """Whether a JSON file holds the settings of kohya_ss, and not flags of kohya's scripts."""
    return "LoRA_type" in values or "max_resolution" in values


def is_own_key(key: str) -> bool:
    """Whether a key belongs to the interface and not to kohya's scripts."""
    return key in OWN_KEYS or key in ARGUMENTS or key.startswith(OTHER_TABS)


def translate(settings: Mapping[str, Any], family: str) -> Translated:
    """Return the settings of a JSON file of kohya_ss as flags of kohya's script for `family`.

    `family` is "Stable Diffusion", "SDXL" or "FLUX".
    """
    if "LoRA_type" not in settings:
        problem = "the file is of a tab of kohya_ss that trains whole models; save one of its LoRA tab"
        return Translated({}, [], [problem], [])
    given = {key: value for key, value in settings.items() if value not in ("", None)}
    others = (*_SD3, "train_inpainting") if family == "FLUX" else (*_SD3, *_ONLY_FLUX)
    given = {key: value for key, value in given.items() if key not in others}
    given = {k: v for k, v in given.items() if not (k in _NUMBERS_OFF and _number(v) == 0)}
    problems = list(_wrong_script(given, family))
    values = {key: value for key, value in given.items() if not is_own_key(key)}
    values |= _renamed(given) | _length(given) | _rates(given)
    _drop_noise(given, values)
    attention = values.pop("xformers", None)
    if attention in ("xformers", "sdpa", True):
        values["sdpa" if attention == "sdpa" else "xformers"] = True
    for tab, on in (("sdxl", family == "SDXL"), ("flux1", family == "FLUX")):
        for name in ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "no_half_vae"):
            if on and given.get(f"{tab}_{name}") in (True, 1):
                values[name] = True
    if prompts := values.pop("sample_prompts", None):
        lines = [line.strip() for line in str(prompts).splitlines()]
        values["sample_prompt_lines"] = [line for line in lines if line and not line.startswith("#")]
    for name in ("optimizer_args", "lr_scheduler_args"):
        if isinstance(values.get(name), str):
            values[name] = values[name].replace('"', "").split()
    words = shlex.split(str(given.get("additional_parameters", "")))
    values |= _network(given, problems)
    used = {
        "LoRA_type",
        "optimizer",
        "max_resolution",
        "lr_warmup",
        "epoch",
        "t5xxl_lr",
        "sdxl",
        "flux1_checkbox",
    }
    unused = [key for key in given if is_own_key(key) and key not in used and key not in ARGUMENTS]
    return Translated(values, unused, problems, words)


def _number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


def _wrong_script(given: Mapping[str, Any], family: str) -> Iterator[str]:
    wanted = "FLUX" if given.get("flux1_checkbox") else "SDXL" if given.get("sdxl") else "Stable Diffusion"
    scripts = {
        "FLUX": "flux_train_qrlora.py",
        "SDXL": "sdxl_train_network_ABM.py",
        "Stable Diffusion": "train_network_ABM.py",
    }
    other = next(
        (key for key in given if key.endswith("_checkbox") and key != "flux1_checkbox" and given[key]), None
    )
    if other:
        yield f"{other} is on: that model is not trained here; the file needs kohya's scripts"
    elif wanted != family:
        yield f"the settings are for {wanted}; use {scripts[wanted]}"


def _renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    words = {
        "optimizer": "optimizer_type",
        "max_resolution": "resolution",
        "lora_network_weights": "network_weights",
    }
    return {flag: given[key] for key, flag in words.items() if key in given}


def _length(given: Mapping[str, Any]) -> dict[str, Any]:
    """Epochs where no steps are given, as the interface computes them; warm-up in percent as a share."""
    values: dict[str, Any] = {}
    if "epoch" in given and "max_train_steps" not in given and "max_train_epochs" not in given:
        values["max_train_epochs"] = given["epoch"]
    if (share := _number(given.get("lr_warmup", 0))) and "lr_warmup_steps" not in given:
        values["lr_warmup_steps"] = f"{share:g}%"
    return values


def _rates(given: Mapping[str, Any]) -> dict[str, Any]:
    """Which parts are trained: a rate of 0 leaves a part out."""
    text, t5 = _number(given.get("text_encoder_lr", 0)), _number(given.get("t5xxl_lr", 0))
    values: dict[str, Any] = {}
    if text and t5:
        values["text_encoder_lr"] = [text, t5]
    if not text and "unet_lr" in given:
        values["network_train_unet_only"] = True
    if text and "unet_lr" not in given:
        values["network_train_text_encoder_only"] = True
    return values


def _drop_noise(given: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Drop the noise options that noise_offset_type switches off."""
    original = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
    multires = ("multires_noise_iterations", "multires_noise_discount")
    for name in multires if given.get("noise_offset_type", "Original") == "Original" else original:
        values.pop(name, None)
    if "noise_offset" not in values:
        values.pop("adaptive_noise_scale", None)


def _network(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The network module and its arguments that LoRA_type means."""
    kind, preset = str(given["LoRA_type"]), given.get("LyCORIS_preset", "full")
    arguments: dict[str, Any] = {}
    if kind in ("Standard", "Kohya LoCon"):
        module, names = "networks.lora", _BLOCKS
        if kind == "Kohya LoCon":
            names = (*names, "conv_dim", "conv_alpha")
    elif kind == "Flux1":
        module, names = "networks.lora_flux", (*_FLUX, *(_GGPO if given.get("train_lora_ggpo") else ()))
    elif kind in _ALGORITHMS:
        module, names = "lycoris.kohya", _LYCORIS
        arguments = {"algo": _ALGORITHMS[kind], "preset": preset}
        arguments |= {"constraint": given["constrain"]} if given.get("constrain") else {}
        arguments |= {"block_size": given.get("unit", 1)} if kind == "LyCORIS/DyLoRA" else {}
    else:
        problems.append(f"LoRA_type {kind!r} is not here; choose Standard, Kohya LoCon, Flux1 or LyCORIS/…")
        return {}
    for name in (*names, *_LORAPLUS):
        value = given.get(name)
        if value and _number(value) != 0 and not (name == "train_blocks" and value == "all"):
            arguments[name] = value
    if kind == "LyCORIS/iA3":
        arguments = {k: v for k, v in arguments.items() if k in ("algo", "preset", "conv_dim", "conv_alpha")}
        arguments["train_on_input"] = given.get("train_on_input", True)
    return {"network_module": module, "network_args": [f"{key}={value}" for key, value in arguments.items()]}
