"""Devices, trackers and log messages of a run, from its options."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from torch import nn

from lowrank.config.train import TrainOptions
from lowrank.data.loader import Loader
from lowrank.data.summary import dataset_summary, describe
from lowrank.errors import Refused
from lowrank.models.family import DTYPES, Family, Models, Source
from lowrank.objective.objective import Objective
from lowrank.train import processes
from lowrank.train.job import RunningJob, TrainJob
from lowrank.train.network_module import KohyaNetwork
from lowrank.train.overview import describe_layers, describe_memory
from lowrank.train.schedule import RunPlan

logger = logging.getLogger(__name__)


def run_accelerator(options: TrainOptions, folder: Path) -> Accelerator:
    """Create the Accelerator: processes, device and precision.

    Raises `Refused` for a named GPU that torch does not find, and for flags that need another precision.
    """
    train, memory = options.train, options.memory
    trackers, logs = _trackers(options, folder)
    processes.without_fsdp_of_accelerate()
    accelerator = Accelerator(
        mixed_precision=_precision(options),
        cpu=processes.on_cpu(),
        log_with=trackers,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(logs)),
    )
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if named and accelerator.device.type == "cpu" and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise Refused(
            f"CUDA_VISIBLE_DEVICES={named} names a GPU, but torch finds none; give `cpu` as "
            "GPU_ID, or check the driver and torch's CUDA build"
        )
    used = accelerator.mixed_precision
    for flag, given, needed in (
        ("full_fp16", train.full_fp16, ("fp16",)),
        ("full_bf16", train.full_bf16, ("bf16",)),
        ("fp8_base", memory.fp8_base, ("fp16", "bf16")),
        ("fp8_base_unet", memory.fp8_base_unet, ("fp16", "bf16")),
        ("fp8_scaled", memory.fp8_scaled, ("fp16", "bf16")),
    ):
        if given and used not in needed:
            raise Refused(
                f"--{flag} needs --mixed_precision {' or '.join(needed)}, and it is {used}; set both or none"
            )
    if train.full_fp16 and accelerator.scaler is not None:
        scale_fp16_gradients(accelerator.scaler)
    return accelerator


def _trackers(options: TrainOptions, folder: Path) -> tuple[str | None, Path]:
    """accelerate's name of the trackers and the folder of their logs; logs in to wandb."""
    logging = options.logging
    trackers, logs = logging.log_with, folder / "logs"
    if logging.logging_dir:
        trackers = trackers or "tensorboard"
        logs = Path(logging.logging_dir) / ((logging.log_prefix or "") + time.strftime("%Y%m%d%H%M%S"))
    if trackers in ("wandb", "all"):
        import wandb  # pyright: ignore[reportMissingImports]  # checked with the flags, and not required

        if logging.wandb_api_key:
            wandb.login(key=logging.wandb_api_key)
    return None if trackers == "none" else trackers, logs


def _precision(options: TrainOptions) -> str | None:
    """--mixed_precision, or "no" for fp16 without a GPU, where accelerate does not support it."""
    asked = options.train.mixed_precision
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if gpu and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return asked
    if (asked or os.environ.get("ACCELERATE_MIXED_PRECISION")) != "fp16" or options.train.full_fp16:
        return asked
    logger.warning("mixed precision fp16 needs a GPU and there is none: this run computes in fp32")
    return "no"


def _precision_notes(options: TrainOptions, used: str) -> list[str]:
    """A line that names the precision in use where accelerate has one and --mixed_precision has not."""
    if options.train.mixed_precision:
        return []
    computes = "fp32" if used == "no" else f"mixed precision {used}"
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return [f"--mixed_precision is not given: this run computes in {computes}, as accelerate launch asks"]
    file = Path(default_config_file)
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    match = re.search(r"mixed_precision[\"']?\s*:\s*[\"']?(\w+)", text)  # YAML or JSON
    if match is None or (configured := match[1]) == "no":
        return []
    return [
        f"--mixed_precision is not given: this run computes in {computes}. {file} has {configured}, which "
        f"only `accelerate launch` reads; give --mixed_precision {configured} to use it"
    ]


def scale_fp16_gradients(scaler: Any) -> None:
    """Allow a gradient scaler to unscale gradients of fp16 parameters, which torch forbids by default."""
    unscale = scaler._unscale_grads_
    scaler._unscale_grads_ = lambda optimizer, scale, found_inf, _allow_fp16: unscale(
        optimizer, scale, found_inf, True
    )


def start_trackers(job: RunningJob) -> None:
    """Start TensorBoard or wandb; the log folder has kohya's name with --logging_dir, else the script's."""
    logging = job.options.logging
    name = logging.log_tracker_name or ("network_train" if logging.logging_dir else job.script.tracker)
    run = logging.wandb_run_name
    try:
        job.accelerator.init_trackers(name, init_kwargs={"wandb": {"name": run}} if run else {})
    except OSError as error:
        raise Refused(f"the log folder cannot be written to ({error}); name another --logging_dir") from error


class _Once(logging.Filter):
    """Lets a message of a library through once; every message of this program."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, record.getMessage())
        new = key not in self._logged
        self._logged.add(key)
        return new or record.name.startswith(("lowrank", "networks"))


def start_log(job: TrainJob, accelerator: Accelerator) -> None:
    """Set the level and file of the log, silence libraries, and log the notes of the command line."""
    options = job.options.logging
    try:
        logging.basicConfig(format="%(message)s", filename=options.console_log_file)
    except OSError as error:
        raise Refused(f"--console_log_file cannot be written ({error}); name another file") from error
    logging.getLogger().setLevel(options.console_log_level if accelerator.is_main_process else "ERROR")
    for noisy in ("httpx", "huggingface_hub", "PIL", "matplotlib", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    once = _Once()
    for name in ("", "transformers", "diffusers", "accelerate", "bitsandbytes"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(once)
    if accelerator.is_main_process:
        for note in (*job.notes, *_precision_notes(job.options, accelerator.mixed_precision)):
            logger.warning("%s", note)


def run_source(job: RunningJob) -> Source:
    """The location of the base model, with the precision and device of the run."""
    return replace(
        job.source,
        dtype=DTYPES[job.accelerator.mixed_precision],
        device=job.accelerator.device,
        vae_dtype=torch.float32 if job.options.model.no_half_vae else None,
        weights=not job.options.train.dry_run,
    )


def check_prediction(objective: Objective, family: Family, models: Models) -> None:
    """Refuse a base with v-prediction if the target is noise; warn of other differences."""
    if objective.zero_terminal_snr:  # previews must use the same schedule
        models.configs["scheduler"] = {**models.configs["scheduler"], "rescale_betas_zero_snr": True}
    predicted = family.prediction(models)
    if predicted == objective.prediction:
        return
    if predicted == "v_prediction":
        raise Refused(
            f"the configuration of {models.source.path} is for velocities (v_prediction), and "
            "--v_parameterization is missing; give it, or correct the model's scheduler configuration"
        )
    logger.warning(
        "%s predicts %s, and the target is %s", models.source.path, predicted, objective.prediction
    )


def announce(
    job: RunningJob, loader: Loader, plan: RunPlan, network: KohyaNetwork, models: Sequence[nn.Module]
) -> None:
    """Print the sizes of the run in kohya's wording, which GUIs parse.

    `models` are the denoiser and the text encoders that are trained.
    """
    if not job.accelerator.is_main_process:
        return
    train, counts = job.options.train, dataset_summary(loader)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    memory = describe_memory(models[0], models[1:], network)
    print("\n".join([*describe(loader), *describe_layers(network), memory]))
    print(
        f"running training\n  num train images * repeats: {counts['num_train_images']}"
        f"\n  num reg images: {counts['num_reg_images']}"
        f"\n  num batches per epoch: {len(loader)}\n  num epochs: {plan.epochs}"
        f"\n  batch size per device: {train.train_batch_size}"
        f"\n  gradient accumulation steps = {train.gradient_accumulation_steps}"
        f"\n  device: {job.accelerator.device}, precision: {job.accelerator.mixed_precision}"
        f"\n  total optimization steps: {plan.steps}\n  trained parameters: {trained:,}",
        flush=True,
    )


def base_rate(job: RunningJob) -> float:
    """--learning_rate, multiplied with --scale_lr by the number of images in a step."""
    train, optimizer = job.options.train, job.options.optimizer
    if not optimizer.scale_lr:
        return optimizer.learning_rate
    pictures = train.gradient_accumulation_steps * train.train_batch_size * job.accelerator.num_processes
    return optimizer.learning_rate * pictures
