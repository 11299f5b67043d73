"""Metadata of the files a run writes: kohya's `ss_*` keys, Stability's modelspec, our own facts.

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
from dataclasses import dataclass
from pathlib import Path

from lowrank import __version__
from lowrank.config.train import declared
from lowrank.data import summary
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.files import sha256
from lowrank.models.family import Models
from lowrank.train.job import RunningJob
from lowrank.train.schedule import RunPlan

# Keys of kohya's list that a script or this trainer lacks, with kohya's values of an unset option.
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
MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the metadata of a run are made of, besides the clock."""

    job: RunningJob
    models: Models
    loader: Loader
    held: Loader | None
    plan: RunPlan
    optimizer: str
    network: Mapping[str, object]  # network_module, network_dim, network_alpha, mixed_precision


def of_run(run: RunFacts) -> dict[str, str]:
    """All that is known when training begins."""
    job, family, loader = run.job, run.job.family, run.loader
    options, minimal = job.options, job.options.saving.no_metadata
    base_hash = family.model_hash(run.models, "denoiser")
    base = _named("sd_model", run.models.source.path, base_hash)
    counts = summary.dataset_summary(loader)
    values = _OFF | _option_values(run) | dict(run.network) | base
    values |= {
        "session_id": uuid.uuid4().int % 2**31,
        "training_started_at": time.time(),
        "optimizer": run.optimizer,
        "seed": job.seed,
        "num_train_images": counts["num_train_images"],
        "num_validation_images": 0 if run.held is None else len(run.held.placed),
        "num_reg_images": counts["num_reg_images"],
        "num_batches_per_epoch": len(loader),
        "num_epochs": run.plan.epochs,
        "max_train_steps": run.plan.steps,
        "v2": family.base_model_version(run.models).startswith("sd_v2"),
        "base_model_version": family.base_model_version(run.models),
        "sd_scripts_commit_hash": f"lowrank {__version__}",
        "batch_size_per_device": options.train.train_batch_size,
        "tag_frequency": json.dumps(summary.tag_frequency(loader)),
        "dataset_dirs": json.dumps(summary.dataset_dirs(loader)),
    }
    if run.models.source.vae:
        values |= _named("vae", run.models.source.vae, family.model_hash(run.models, "vae"))
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
    facts |= _modelspec(run)
    facts |= {
        "lowrank.version": __version__,
        "lowrank.base_hash": base_hash,
        "lowrank.base_model": base["sd_model_name"],
    }
    return facts if minimal else facts | {"lowrank.command": job.command}


def _option_values(run: RunFacts) -> dict[str, object]:
    """The options that are written, by their keys without `ss_`."""
    options, values = run.job.options, {}
    for spec, value in declared(options):
        key, per_folder = spec.flag.metadata, spec.flag.per_folder
        if key and not (per_folder and options.data.dataset_config):
            values[spec.name if key is True else key] = value
    values["cache_latents"] = options.caches_latents
    values["text_encoder_lr"] = list(options.optimizer.text_encoder_lr or ()) or None
    return values


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


def _modelspec(run: RunFacts) -> dict[str, str]:
    job, family, saving = run.job, run.job.family, run.job.options.saving
    width, height = run.loader.datasets[0].resolution
    spec: dict[str, object] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family.architecture(run.models)}/lora",
        "implementation": family.implementation,
        "resolution": f"{width}x{height}",
        "title": saving.metadata_title or saving.output_name or f"LoRA@{time.strftime('%Y%m%d%H%M%S')}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
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
    predicted = family.prediction(run.models)
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
    """The metadata of a file written at this step."""
    if minimum:
        return dict(metadata)
    return {
        **metadata,
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_training_finished_at": str(time.time()),
    }
