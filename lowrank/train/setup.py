"""What a run needs before its first step, made from its options."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from lowrank.adapters.network import AdapterNetwork
from lowrank.data.loader import Loader
from lowrank.data.summary import summary
from lowrank.errors import Refused
from lowrank.models.family import DTYPES, Family, Models, Source, move
from lowrank.options import Parsed
from lowrank.train.inputs import Text
from lowrank.train.prompts import Prompt, read_prompts
from lowrank.train.watch import Preview

logger = logging.getLogger(__name__)


def accelerator(parsed: Parsed, folder: Path) -> Accelerator:
    trackers = parsed.value("log_with") or "tensorboard"
    logs = folder / "logs"
    if parsed.value("logging_dir"):
        logs = Path(parsed.value("logging_dir")) / (
            (parsed.value("log_prefix") or "") + time.strftime("%Y%m%d%H%M%S")
        )
    if parsed.value("wandb_api_key"):
        import wandb  # pyright: ignore[reportMissingImports]  # only when asked for

        wandb.login(key=parsed.value("wandb_api_key"))
    accelerator = Accelerator(
        mixed_precision=parsed.value("mixed_precision"),
        log_with=None if trackers == "none" else trackers,
        gradient_accumulation_steps=parsed.value("gradient_accumulation_steps"),
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(logs)),
    )
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if named and accelerator.device.type == "cpu" and not os.environ.get("ACCELERATE_USE_CPU") == "true":
        raise Refused(
            f"CUDA_VISIBLE_DEVICES={named} names a GPU, and torch finds none to use here; give `cpu` for the "
            "GPU_ID, or check the driver and torch's CUDA build"
        )
    for flag, needed in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if parsed.value(flag) and accelerator.mixed_precision != needed:
            raise Refused(
                f"--{flag} needs --mixed_precision {needed}, and it is {accelerator.mixed_precision}; set "
                "both or none"
            )
    return accelerator


def start_trackers(parsed: Parsed, accelerator: Accelerator, default: str) -> None:
    """Begin TensorBoard or wandb; the folder is kohya's with --logging_dir, else `default`."""
    name = parsed.value("log_tracker_name") or ("network_train" if parsed.value("logging_dir") else default)
    run = parsed.value("wandb_run_name")
    try:
        accelerator.init_trackers(name, init_kwargs={"wandb": {"name": run}} if run else {})
    except OSError as error:
        raise Refused(f"the log folder cannot be written to ({error}); name another --logging_dir") from error


def quiet(accelerator: Accelerator, parsed: Parsed) -> None:
    level = parsed.value("console_log_level") if accelerator.is_main_process else "ERROR"
    try:
        logging.basicConfig(format="%(message)s", filename=parsed.value("console_log_file"))
    except OSError as error:
        raise Refused(f"--console_log_file cannot be written ({error}); name another file") from error
    logging.getLogger().setLevel(level)
    for noisy in ("httpx", "huggingface_hub", "PIL", "matplotlib", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if accelerator.is_main_process:
        for note in parsed.notes:
            logger.warning("%s", note)


def source(parsed: Parsed, accelerator: Accelerator) -> Source:
    if not parsed.value("pretrained_model_name_or_path"):
        raise Refused("--pretrained_model_name_or_path is missing; name a model folder or a hub id")
    names = ("revision", "variant", "cache_dir", "vae", "clip_l", "t5xxl", "ae", "tokenizer_cache_dir")
    given = {name: parsed.value(name) for name in names if name in parsed.specs}
    dtype = DTYPES[accelerator.mixed_precision]
    return Source(
        parsed.value("pretrained_model_name_or_path"),
        dtype=dtype,
        device=accelerator.device,
        vae_dtype=torch.float32 if parsed.value("no_half_vae") else None,
        **given,
    )


def prompts(parsed: Parsed) -> list[Prompt]:
    width, height = parsed.value("resolution") or (512, 512)
    default = Prompt("", width=width, height=height)
    if parsed.value("sample_prompts"):
        return read_prompts(parsed.value("sample_prompts"), default)
    return (
        [Prompt(parsed.value("validation_prompt"), width=width, height=height)]
        if parsed.value("validation_prompt")
        else []
    )


def preview(
    parsed: Parsed,
    prompts: list[Prompt],
    folder: Path,
    family: Family,
    models: Models,
    options: Any,
    text: Text,
    accelerator: Accelerator,
) -> Preview:
    def draw(prompt: Prompt, seed: int):
        sampled = replace(options, guidance_scale=prompt.guidance_scale)
        if models.vae is not None:
            move(models, ("vae",), accelerator.device)
        return family.sample(
            models,
            text((prompt.prompt,)),
            sampled,
            height=prompt.height,
            width=prompt.width,
            steps=prompt.sample_steps,
            generator=torch.Generator().manual_seed(seed),
        )[0]

    by_file = bool(parsed.value("sample_prompts"))
    epochs = parsed.value("sample_every_n_epochs") or (
        None if by_file or parsed.value("sample_every_n_steps") else parsed.value("validation_epochs")
    )
    return Preview(
        prompts,
        draw,
        folder / "sample",
        parsed.value("output_name") or "",
        per_prompt=1 if by_file else parsed.value("num_validation_images"),
        seed=parsed.value("seed"),
        every_epochs=epochs,
        every_steps=parsed.value("sample_every_n_steps"),
    )


def announce(loader: Loader, plan: Any, parsed: Parsed, network: Any, accelerator: Accelerator) -> None:
    """The facts of the run in kohya's wording, which GUIs read."""
    if not accelerator.is_main_process:
        return
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    counts = summary(loader)
    print(
        f"running training\n  num train images * repeats: {counts['num_train_images']}"
        f"\n  num reg images: {counts['num_reg_images']}"
        f"\n  num batches per epoch: {len(loader)}\n  num epochs: {plan.epochs}"
        f"\n  batch size per device: {parsed.value('train_batch_size')}"
        f"\n  gradient accumulation steps = {parsed.value('gradient_accumulation_steps')}"
        f"\n  device: {accelerator.device}, precision: {accelerator.mixed_precision}"
        f"\n  total optimization steps: {plan.steps}\n  trained parameters: {trained:,}",
        flush=True,
    )


def network_facts(parsed: Parsed, network: Any) -> dict[str, Any]:
    sizes = {
        "network_module": parsed.value("network_module"),
        "network_dim": parsed.value("network_dim"),
        "network_alpha": parsed.value("network_alpha"),
    }
    if isinstance(network, AdapterNetwork) and (layers := network.layers()):
        sizes |= {"network_dim": layers[0].rank, "network_alpha": float(layers[0].alpha)}
    return sizes


def rate(parsed: Parsed, accelerator: Accelerator) -> float:
    rate = parsed.value("learning_rate")
    if parsed.value("scale_lr"):
        rate *= (
            parsed.value("gradient_accumulation_steps")
            * parsed.value("train_batch_size")
            * accelerator.num_processes
        )
    return rate
