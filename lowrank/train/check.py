"""Checks before anything is cached: files, folders, the fit of network and model, the resumed run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.rates import decay_targets
from lowrank.adapters.targets import as_passed
from lowrank.config.train import TrainOptions, declared
from lowrank.data import images
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.files import sha256, writable_folder
from lowrank.models import blocks
from lowrank.models.family import Models
from lowrank.tensors import read_names
from lowrank.train import checkpoints, network_module, optim, setup
from lowrank.train.attach import check_base
from lowrank.train.checkpoints import KOHYAS, Checkpoint, Names
from lowrank.train.job import RunningJob
from lowrank.train.network_module import KohyaNetwork, report_unused

logger = logging.getLogger(__name__)

_CACHE_ARGUMENTS = ("basis_cache", "svd_cache_path")  # network arguments that name a cache folder


# ------------------------------------------------------------------ before the model is read


def check_paths(options: TrainOptions, names: Names) -> Checkpoint | None:
    """The checkpoint of --resume, if any.

    Raises `Refused` for files that cannot be read, and folders that cannot or must not be written to.
    """
    network, resume = options.network, options.train.resume
    weights = [("network_weights", network.network_weights)] if network.network_weights else []
    for name, path in (*weights, *(("base_weights", path) for path in network.base_weights)):
        try:
            read_names(path)
        except Refused as refused:
            raise Refused(f"--{name}: {refused}") from refused
    resumed = None
    if resume:
        resumed = checkpoints.find_checkpoint(resume, names.output_dir)
    if options.train.dry_run:
        return resumed
    writable_folder(names.output_dir)
    if options.logging.logging_dir:
        writable_folder(options.logging.logging_dir, "--logging_dir")
    if resumed is None:
        _refuse_to_overwrite(names)
    return resumed


def _refuse_to_overwrite(names: Names) -> None:
    """Refuse a folder with checkpoints of another run: they would be pruned or resumed by mistake.

    Adapter files with kohya's names are overwritten, as by kohya's trainers; others are refused too.
    """
    final, keeps = names.final(), names.output_name or names.unnamed == KOHYAS
    earlier = checkpoints.checkpoints(names.output_dir) or ([] if keeps else [final] * final.exists())
    if earlier:
        raise Refused(
            f"{names.output_dir} holds {earlier[-1].name} of an earlier run; continue with --resume latest, "
            "or give another --output_dir"
        )
    if final.exists():
        logger.warning("%s of an earlier run will be overwritten", final)


# ------------------------------------------------------------------ before weights are loaded


def rehearse(job: RunningJob, models: Models) -> tuple[nn.Module | None, KohyaNetwork | None]:
    """Create denoiser and network without values, and load every file that the options name into them.

    Raises `Refused` for a rank, a target, a file or a number of blocks that does not fit the model. Returns
    None for both with a foreign network module, which may need values.
    """
    weights, denoiser = job.options.network.network_weights, job.family.empty(models)
    blocks.swapped(denoiser, job.options.memory.blocks_to_swap)
    for path in (*(path for path, _ in job.base_weights), *([weights] if weights else [])):
        check_base(job, models, path)
    facade = network_module.facade_of(job.networks)
    if facade is None:
        return None, None
    trains_text = job.options.trains_text
    encoders: tuple[nn.Module, ...] = ()
    if job.base_weights or trains_text:
        encoders = tuple(encoder for encoder, _ in job.family.empty_text(models))
    for path, strength in job.base_weights:
        passed = as_passed(encoders, denoiser)
        other, _, _ = facade.from_file(strength, path, passed, denoiser)
        report_unused(path, other.load_weights(path).unexpected_keys, job.options.network.strict)
    kept = replace(models, text_encoders=encoders)
    trained = job.family.keep_trained_text(kept, job.switches) if trains_text else []
    network = job.create(denoiser, trained, weights, report=True)
    optimizer = job.options.optimizer
    rates = (optimizer.text_encoder_lr, optimizer.unet_lr, setup.base_rate(job))
    groups, _ = network_module.optimizer_groups(network, *rates)
    copies = isinstance(network, AdapterNetwork) and bool(decay_targets(network))
    optim.check_groups(groups, optimizer, copies)
    return denoiser, network


# ------------------------------------------------------------------ a resumed run


def run_fingerprint(job: RunningJob, loader: Loader, models: Models) -> dict[str, object]:
    """The settings that a resumed run must share with this one, in the form that JSON keeps.

    The optimizer's state is matched by position, and other differences would silently change the run or be
    ignored. The length of the run, and what it saves or draws, may change; so may the number of processes
    (`checkpoints.as_resumed`).
    """
    examples = [place.example for place in loader.placed]
    pictures = [
        (
            e.path.name,
            *(images.content_of(path)[1:] for path in (e.path, e.mask) if path),
            e.captions,
            e.repeats,
            e.is_reg,
        )
        for e in examples
    ]
    arguments = {k: _content(v) for k, v in job.arguments.items() if k not in _CACHE_ARGUMENTS}
    facts = {spec.name: value for spec, value in declared(job.options) if spec.flag.resume} | {
        "network_module": job.networks.__name__,
        "text_encoders_trained": job.options.trains_text,
        "network_args": arguments,
        "seed": job.seed,
        "base": job.family.model_hash(models, "denoiser"),
        "base_weights": job.base_weight_hashes or None,
        "pictures": hashlib.sha256(json.dumps(pictures).encode()).hexdigest()[:16],
        "batches_per_epoch": len(loader),
        "processes": job.accelerator.num_processes,
        "mixed_precision": job.accelerator.mixed_precision,
    }
    return json.loads(json.dumps(facts))


def _content(argument: str) -> str:
    """A network argument, or the hash of the file that it names: the file may move, but not change."""
    return checkpoints.CONTENT + sha256(argument) if os.path.isfile(argument) else argument


def check_resumed(job: RunningJob, fingerprint: Mapping[str, object], steps: int) -> None:
    """Raise `Refused` for a --resume of another run, or of a later step than this run's `steps`."""
    if job.resumed is None:
        return
    if job.options.data.skip_bad_images:  # bad images are only known after all are decoded
        unknown = ("pictures", "batches_per_epoch")
        fingerprint = {name: value for name, value in fingerprint.items() if name not in unknown}
    checkpoints.agree(job.resumed, fingerprint)
    refuse_ended(job, job.resumed.step, steps)


def refuse_ended(job: RunningJob, step: int, steps: int) -> None:
    """Raise `Refused` for a state past the last step, or at the last step of a run with its final files."""
    final, saving = job.names.final(), job.options.saving
    with_state = saving.save_state or saving.save_state_on_train_end
    whole = final.exists() and (not with_state or job.names.state(final).exists())
    if step > steps or (step == steps and whole):
        raise Refused(
            f"{job.options.train.resume} is at step {step} and the run ends at {steps}; raise "
            "--max_train_steps or --max_train_epochs to continue from it"
        )
