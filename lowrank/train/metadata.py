"""Metadata of the files of a run: kohya's `ss_*` keys, Stability's modelspec, and `lowrank.*`.

An option is written where its declaration has a `metadata` key (`config.flag.Flag`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from lowrank import __version__
from lowrank.adapters.network import AdapterNetwork
from lowrank.config.train import TrainOptions, declared
from lowrank.data import summary
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.files import sha256
from lowrank.models.family import Models
from lowrank.train.job import RunningJob
from lowrank.train.network_module import KohyaNetwork
from lowrank.train.schedule import RunPlan

# kohya's keys of options that a script or this trainer lacks, with kohya's value of the unset option.
_OFF = {
    **dict.fromkeys(
        ("clip_skip", "max_token_length", "noise_offset", "multires_noise_iterations", "min_snr_gamma")
    ),
    **dict.fromkeys(("adaptive_noise_scale", "face_crop_aug_range", "vae_name", "vae_hash", "new_vae_hash")),
    **dict.fromkeys(("noise_offset_random_strength", "zero_terminal_snr", "debiased_estimation"), False),
    "multires_noise_discount": 0.3,
}
MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)


def at_start(
    job: RunningJob,
    models: Models,
    network: KohyaNetwork,
    *,
    loader: Loader,
    held_out: Loader | None,
    plan: RunPlan,
    optimizer: str,
) -> dict[str, str]:
    """The metadata that are known when training begins; `optimizer` is kohya's text for its class."""
    family, options, minimal = job.family, job.options, job.options.saving.no_metadata
    base_hash = family.model_hash(models, "denoiser")
    base = _named("sd_model", models.source.path, base_hash)
    counts = summary.dataset_summary(loader)
    values = _OFF | _option_values(options) | _network_values(job, network) | base
    values |= {
        "session_id": uuid.uuid4().int % 2**31,
        "training_started_at": time.time(),
        "optimizer": optimizer.removesuffix("()"),
        "seed": job.seed,
        "num_train_images": counts["num_train_images"],
        "num_validation_images": 0 if held_out is None else len(held_out.placed),
        "num_reg_images": summary.count_regularisation(loader),
        "num_batches_per_epoch": len(loader),
        "num_epochs": plan.epochs,
        "max_train_steps": plan.steps,
        "v2": family.base_model_version(models).startswith("sd_v2"),
        "base_model_version": family.base_model_version(models),
        "sd_scripts_commit_hash": f"lowrank {__version__}",
        "batch_size_per_device": options.train.train_batch_size,
        "tag_frequency": json.dumps(summary.tag_frequency(loader)),
        "dataset_dirs": json.dumps(summary.dataset_dirs(loader)),
    }
    if models.source.vae:
        values |= _named("vae", models.source.vae, family.model_hash(models, "vae"))
    if job.arguments:
        values["network_args"] = json.dumps(job.arguments)
    if options.data.dataset_config:
        values["datasets"] = json.dumps(summary.metadata_datasets(loader))
    else:
        together = options.train.gradient_accumulation_steps * loader.world
        values |= {
            "total_batch_size": options.train.train_batch_size * together,
            "resolution": str(loader.datasets[0].resolution),
            "bucket_info": json.dumps(summary.bucket_info(loader)),
            "reg_dataset_dirs": json.dumps(summary.dataset_dirs(loader, reg=True)),
        }
    facts = {f"ss_{name}": str(value) for name, value in values.items()}
    if minimal:
        facts = {name: value for name, value in facts.items() if name in MINIMUM}
    facts |= _modelspec(job, models, loader)
    facts |= {
        "lowrank.version": __version__,
        "lowrank.base_hash": base_hash,
        "lowrank.base_model": base["sd_model_name"],
    }
    if (per_block := models.configs["denoiser"].get("layers_per_block", 2)) != 2:
        facts["lowrank.layers_per_block"] = str(per_block)  # which SDXL's original names depend on
    return facts if minimal else facts | {"lowrank.command": job.command}


def _option_values(options: TrainOptions) -> dict[str, object]:
    """The options with a metadata key, by that key without `ss_`."""
    values: dict[str, object] = {}
    for spec, value in declared(options):
        key, per_folder = spec.flag.metadata, spec.flag.per_folder
        if key and not (per_folder and options.data.dataset_config):
            values[spec.name if key is True else key] = value
    values["cache_latents"] = options.caches_latents
    rates = options.optimizer.text_encoder_lr or ()
    values["text_encoder_lr"] = (rates[0] if len(rates) == 1 else list(rates)) if rates else None
    values["ip_noise_gamma"] = options.objective.ip_noise_gamma or None
    return values


def _network_values(job: RunningJob, network: KohyaNetwork) -> dict[str, object]:
    """The values of the network as created, and the precision in use."""
    options = job.options.network
    rank, alpha = options.network_dim, options.network_alpha
    if isinstance(network, AdapterNetwork) and (layers := network.layers()):
        rank, alpha = layers[0].rank, float(layers[0].alpha)
    return {
        "network_module": options.network_module,
        "network_dim": rank,
        "network_alpha": alpha,
        "mixed_precision": job.accelerator.mixed_precision,
    }


def _named(role: str, location: str, model_hash: str) -> dict[str, str]:
    """Name and hashes of a model: for one file kohya's two (the old one of 64 KiB at 1 MiB), else ours."""
    path = Path(location)
    name, old, new = path.name if path.exists() else location, model_hash[:8], model_hash
    if path.is_file():
        with open(path, "rb") as file:
            file.seek(0x100000)
            old = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        new = sha256(path)
    return {f"{role}_name": name, f"{role}_hash": old, f"new_{role}_hash": new}


def _modelspec(job: RunningJob, models: Models, loader: Loader) -> dict[str, str]:
    """Stability's modelspec keys."""
    family, saving = job.family, job.options.saving
    width, height = loader.datasets[0].resolution
    spec: dict[str, object] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family.architecture(models)}/lora",
        "implementation": family.implementation,
        "resolution": f"{width}x{height}",
        "title": saving.metadata_title or saving.output_name or f"LoRA@{time.strftime('%Y%m%d%H%M%S')}",
        "implementation_version": f"lowrank/{__version__}",
        "encoder_layer": job.options.encoder_layer,
        "author": saving.metadata_author,
        "description": saving.metadata_description,
        "license": saving.metadata_license,
        "tags": saving.metadata_tags,
        "usage_hint": saving.metadata_usage_hint,
        "merged_from": saving.metadata_merged_from,
        "trigger_phrase": saving.metadata_trigger_phrase,
        "preprocessor": saving.metadata_preprocessor,
        "is_negative_embedding": saving.metadata_is_negative_embedding,
    }
    predicted = family.prediction(models)
    if predicted != "flow":
        spec["prediction_type"] = "v" if predicted == "v_prediction" else predicted
    if job.objective.timestep_range is not None:
        spec["timestep_range"] = ",".join(map(str, job.objective.timestep_range))
    if saving.metadata_thumbnail:
        spec["thumbnail"] = _data_url(saving.metadata_thumbnail)
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
    """The metadata of a file written at this step; `epoch` counts as `Saver` counts it."""
    dated = {**metadata, "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S")}
    if minimum:
        return dated
    return {
        **dated,
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_training_finished_at": str(time.time()),
    }
