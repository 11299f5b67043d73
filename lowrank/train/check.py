"""What is refused before anything is cached: files and folders that are not there, a network that does not
fit the model, a state of another run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.adapters.targets import as_passed
from lowrank.config.checks import trains_text
from lowrank.config.command_line import Parsed
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.files import sha256, writable_folder
from lowrank.models.family import Models, align
from lowrank.tensors import read_names
from lowrank.train import checkpoints, network_module
from lowrank.train.attach import Job, check_base
from lowrank.train.base_weights import base_weights, merged_hashes
from lowrank.train.checkpoints import KOHYAS, Names

logger = logging.getLogger(__name__)

# What a resumed run must agree on: the optimizer's state is matched by position, and the rest would go on
# silently as it was or change the run. How long it is, and what it saves or draws, may change.
_RESUMED = (
    *("network_dim", "network_alpha", "network_dropout", "train_text_encoder"),
    *("network_train_text_encoder_only", "optimizer_type", "optimizer_args", "use_8bit_adam"),
    *("learning_rate", "unet_lr", "text_encoder_lr", "lr_scheduler", "train_batch_size"),
    *("gradient_accumulation_steps", "resolution", "ema_decay"),
)
_PLACES = ("basis_cache", "svd_cache_path")  # network arguments that say where something is kept
_BEGINNING = 1 << 16  # bytes of a picture that tell it from others, with its size


# ------------------------------------------------------------------ before the model is looked at


def check_paths(parsed: Parsed, names: Names) -> None:
    """Raise `Refused` for files that cannot be read, and folders that cannot or must not be written to."""
    for name in ("network_weights", "base_weights"):
        given = parsed.value(name) or ()
        for path in (given,) if isinstance(given, str) else given:
            try:
                read_names(path)
            except Refused as refused:
                raise Refused(f"{parsed.flag(name)}: {refused}") from refused
    if parsed.value("resume"):
        checkpoints.read_state(checkpoints.find_state(parsed.value("resume"), names.output_dir))
    if parsed.value("dry_run"):
        return
    writable_folder(names.output_dir)
    if parsed.value("logging_dir"):
        writable_folder(parsed.value("logging_dir"), "--logging_dir")
    if not parsed.value("resume"):
        _refuse_to_overwrite(names)


def _refuse_to_overwrite(names: Names) -> None:
    """A run's folder is its own: another run's checkpoints would be pruned or resumed by mistake.

    Adapter files with kohya's names are written over, as kohya's trainers do; others are kept.
    """
    final, keeps = names.final(), names.output_name or names.unnamed == KOHYAS
    there = checkpoints.checkpoints(names.output_dir) or ([] if keeps else [final] * final.exists())
    if there:
        raise Refused(
            f"{names.output_dir} holds {there[-1].name} of an earlier run; go on with --resume latest, or "
            "name another --output_dir"
        )
    if final.exists():
        logger.warning("%s of an earlier run will be written over", final)


# ------------------------------------------------------------------ before its weights do their work


def load_components(job: Job, models: Models, roles: tuple[str, ...]) -> None:
    """The named parts, in memory so that equal runs compute equal bits, whatever file they came from."""
    job.family.add(models, roles)
    align(models)


def rehearse(job: Job, models: Models) -> tuple[nn.Module | None, Any]:
    """(denoiser, network) without values, on which every file that the options name was tried.

    Raises `Refused` for a rank, a target or a file that does not fit the model. Of foreign modules, which may
    need values, both are None.
    """
    weights, bases = job.value("network_weights"), base_weights(job.parsed)
    for path in (*(path for path, _ in bases), *([weights] if weights else [])):
        check_base(job, models, path)
    if network_module.facade_of(job.networks) is None:
        return None, None
    denoiser = job.family.empty(models)
    if bases or trains_text(job.parsed):
        load_components(job, models, ("text",))
    for path, strength in bases:
        passed = as_passed(_shapes(models.text_encoders), denoiser)
        other, _ = job.networks.create_network_from_weights(
            strength, path, None, passed, denoiser, for_inference=True
        )
        other.load_weights(path)
    trained = job.family.keep_trained_text(replace(models)) if trains_text(job.parsed) else []
    return denoiser, job.create(denoiser, _shapes(trained), weights)


def _shapes(encoders: Any) -> list[Any]:
    """transformers' models again, without values."""
    with torch.device("meta"):
        return [type(encoder)(encoder.config) for encoder in encoders]


# ------------------------------------------------------------------ a resumed run


def run_fingerprint(job: Job, loader: Loader, models: Models) -> dict[str, Any]:
    """What a run that resumes from this one must agree on, as JSON keeps it."""
    examples = [one.example for one in loader.placed]
    pictures = [
        (e.path.name, *(_seen(path) for path in (e.path, e.mask) if path), e.captions, e.repeats, e.is_reg)
        for e in examples
    ]
    arguments = {k: _content(v) for k, v in job.arguments.items() if k not in _PLACES}
    told = {name: job.value(name) for name in _RESUMED} | {
        "network_module": job.networks.__name__,
        "text_encoders_trained": trains_text(job.parsed),
        "network_args": arguments,
        "seed": job.seed,
        "base": job.family.model_hash(models, "denoiser"),
        "base_weights": merged_hashes(job.parsed) or None,
        "pictures": hashlib.sha256(json.dumps(pictures).encode()).hexdigest()[:16],
        "batches_per_epoch": len(loader),
        "processes": job.accelerator.num_processes,
        "mixed_precision": job.accelerator.mixed_precision,
    }
    return json.loads(json.dumps(told))


def _seen(picture: Path) -> tuple[int, str]:
    """A picture's size in bytes and the hash of its beginning: quick for 100,000 of them."""
    return picture.stat().st_size, sha256(picture, _BEGINNING)


def _content(argument: str) -> str:
    """A network argument, or if it names a file what is in it: a file may move, and may not change."""
    return checkpoints.CONTENT + sha256(argument) if os.path.isfile(argument) else argument


def check_resumed(job: Job, loader: Loader, models: Models, steps: int) -> None:
    """Raise `Refused` for a --resume of another run, or of a later step than this run's `steps`."""
    own = run_fingerprint(job, loader, models)
    if job.value("skip_bad_images"):  # which these are is known when all were decoded
        own = {name: value for name, value in own.items() if name not in ("pictures", "batches_per_epoch")}
    folder = checkpoints.find_state(job.value("resume"), job.names.output_dir)
    told = checkpoints.read_state(folder)
    checkpoints.agree(folder, told["run"], own)
    refuse_ended(job, told["current_step"], steps)


def refuse_ended(job: Job, step: int, steps: int) -> None:
    """Raise `Refused` for a state behind the run's last step, or at it where the last file was written."""
    if step > steps or (step == steps and job.names.final().exists()):
        raise Refused(
            f"{job.value('resume')} is at step {step} and the run ends at {steps}; raise --max_train_steps "
            "or --max_train_epochs to go on from it"
        )
