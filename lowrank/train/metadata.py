"""Metadata of the files a run writes: kohya's `ss_*` keys, Stability's modelspec, our own facts."""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank import __version__
from lowrank.config.command_line import Parsed
from lowrank.data import summary
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.files import sha256
from lowrank.models.family import Family, Models

# Options that are written as ss_<name>, by kohya's own list (train_network.py).
_OPTIONS = (
    "learning_rate",
    "text_encoder_lr",
    "unet_lr",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "max_train_steps",
    "lr_warmup_steps",
    "lr_scheduler",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "mixed_precision",
    "full_fp16",
    "full_bf16",
    "seed",
    "output_name",
    "cache_latents",
    "training_comment",
    "max_grad_norm",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "prior_loss_weight",
    "scale_weight_norms",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "loss_type",
    "huber_schedule",
    "huber_scale",
    "huber_c",
    "fp8_base",
    "fp8_base_unet",
    "model_type",
    "apply_t5_attn_mask",
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "guidance_scale",
    "timestep_sampling",
    "sigmoid_scale",
    "model_prediction_type",
    "discrete_flow_shift",
    "resize_interpolation",
    "clip_skip",
    "max_token_length",
    "noise_offset",
    "noise_offset_random_strength",
    "adaptive_noise_scale",
    "multires_noise_iterations",
    "multires_noise_discount",
    "zero_terminal_snr",
    "min_snr_gamma",
    "validation_seed",
    "validation_split",
    "max_validation_steps",
    "validate_every_n_epochs",
    "validate_every_n_steps",
)
_FOLDER_OPTIONS = (
    "color_aug",
    "flip_aug",
    "random_crop",
    "shuffle_caption",
    "enable_bucket",
    "bucket_no_upscale",
    "min_bucket_reso",
    "max_bucket_reso",
    "keep_tokens",
)
# What kohya's list has and a script or this trainer lacks: told as kohya tells it when it is off.
_OFF = {
    **dict.fromkeys(
        ("clip_skip", "max_token_length", "noise_offset", "multires_noise_iterations", "min_snr_gamma")
    ),
    **dict.fromkeys(("adaptive_noise_scale", "face_crop_aug_range", "vae_name", "vae_hash", "new_vae_hash")),
    **dict.fromkeys(
        ("lowram", "noise_offset_random_strength", "zero_terminal_snr", "debiased_estimation"), False
    ),
    "multires_noise_discount": 0.3,
}
_SPOKEN = (
    *("author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase"),
    *("preprocessor", "is_negative_embedding"),
)
MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)


def of_run(
    parsed: Parsed,
    family: Family,
    models: Models,
    loader: Loader,
    held: Loader | None,
    *,
    optimizer: str,
    steps: int,
    epochs: int,
    network: Mapping[str, Any],
    arguments: Mapping[str, str],
    base_hash: str,
    seed: int,
) -> dict[str, str]:
    """All that is known when training begins; `network` gives network_module, network_dim, network_alpha."""
    values: dict[str, Any] = _OFF | {name: parsed.value(name) for name in _OPTIONS if name in parsed.specs}
    values["cache_latents"] = parsed.value("cache_latents") or parsed.value("cache_latents_to_disk")
    values["text_encoder_lr"] = list(parsed.value("text_encoder_lr") or ()) or None
    counts = summary.dataset_summary(loader)
    values |= dict(network) | {
        "session_id": uuid.uuid4().int % 2**31,
        "training_started_at": time.time(),
        "optimizer": optimizer,
        "seed": seed,
        "num_train_images": counts["num_train_images"],
        "num_validation_images": 0 if held is None else len(held.placed),
        "num_reg_images": counts["num_reg_images"],
        "num_batches_per_epoch": len(loader),
        "num_epochs": epochs,
        "max_train_steps": steps,
        "v2": family.base_model_version(models).startswith("sd_v2"),
        "base_model_version": family.base_model_version(models),
        "sd_scripts_commit_hash": f"lowrank {__version__}",
        "batch_size_per_device": parsed.value("train_batch_size"),
        "tag_frequency": json.dumps(summary.tag_frequency(loader)),
        "dataset_dirs": json.dumps(summary.dataset_dirs(loader)),
        **_named("sd_model", models.source.path, base_hash),
    }
    if "debiased_estimation_loss" in parsed.specs:
        values["debiased_estimation"] = parsed.value("debiased_estimation_loss")
    if models.source.vae:
        values |= _named("vae", models.source.vae, family.model_hash(models, "vae"))
    if arguments:
        values["network_args"] = json.dumps(dict(arguments))
    if parsed.value("dataset_config"):
        values["datasets"] = json.dumps(summary.metadata_datasets(loader))
    else:
        values |= {name: parsed.value(name) for name in _FOLDER_OPTIONS}
        together = parsed.value("gradient_accumulation_steps") * loader.world
        values["total_batch_size"] = parsed.value("train_batch_size") * together
        values |= {
            "resolution": str(loader.datasets[0].resolution),
            "bucket_info": json.dumps(summary.bucket_info(loader)),
            "reg_dataset_dirs": json.dumps(summary.dataset_dirs(loader, reg=True)),
        }
    told = {f"ss_{name}": str(value) for name, value in values.items()}
    if parsed.value("no_metadata"):
        told = {name: value for name, value in told.items() if name in MINIMUM}
    own = {
        "lowrank.version": __version__,
        "lowrank.base_hash": base_hash,
        "lowrank.base_model": values["sd_model_name"],
    }
    if not parsed.value("no_metadata"):
        own["lowrank.command"] = parsed.command
    return told | _modelspec(parsed, family, models, loader) | own


def _named(role: str, where: str, known: str) -> dict[str, str]:
    """Name and hashes of a base: of one file kohya's two (old: 64 KiB at 1 MiB), of a folder ours."""
    path = Path(where)
    name, old, new = path.name if path.exists() else where, known[:8], known
    if path.is_file():
        with open(path, "rb") as file:
            file.seek(0x100000)
            old = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        new = sha256(path)
    return {f"{role}_name": name, f"{role}_hash": old, f"new_{role}_hash": new}


def _modelspec(parsed: Parsed, family: Family, models: Models, loader: Loader) -> dict[str, str]:
    width, height = loader.datasets[0].resolution
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family.architecture(models)}/lora",
        "implementation": family.implementation,
        "resolution": f"{width}x{height}",
        "title": parsed.value("metadata_title")
        or parsed.value("output_name")
        or f"LoRA@{time.strftime('%Y%m%d%H%M%S')}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    told = family.prediction(models)
    if told != "flow":
        spec["prediction_type"] = "v" if told == "v_prediction" else told
    range_ = [parsed.value(name) for name in ("min_timestep", "max_timestep") if name in parsed.specs]
    if any(value is not None for value in range_):
        low, high = range_
        spec["timestep_range"] = f"{low or 0},{1000 if high is None else high}"
    if "clip_skip" in parsed.specs:
        spec["encoder_layer"] = parsed.value("clip_skip")
    for name in _SPOKEN:
        spec[name] = parsed.value(f"metadata_{name}")
    if parsed.value("metadata_thumbnail"):
        spec["thumbnail"] = _data_url(parsed.value("metadata_thumbnail"))
    return {f"modelspec.{name}": str(value) for name, value in spec.items() if value is not None}


def _data_url(path: str) -> str:
    kind = mimetypes.guess_type(path)[0] or "image/png"
    try:
        return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
    except OSError as error:
        raise Refused(
            f"--metadata_thumbnail {path} cannot be read ({error.strerror}); name a picture"
        ) from error


def at_save(metadata: Mapping[str, str], *, step: int, epoch: int, minimum: bool) -> dict[str, str]:
    """The metadata of a file written at this step."""
    if minimum:
        return dict(metadata)
    return {
        **metadata,
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_training_finished_at": str(time.time()),
    }
