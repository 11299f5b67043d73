"""What a run needs before its first step, made from its options."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from lowrank.adapters.network import AdapterNetwork
from lowrank.config.command_line import Parsed
from lowrank.data.loader import Loader
from lowrank.data.summary import dataset_summary
from lowrank.errors import Refused, nearest
from lowrank.models.family import DTYPES, Family, Models, Source, move
from lowrank.train.data import draw_picture
from lowrank.train.prompts import Prompt, read_prompts
from lowrank.train.text_conditions import Text
from lowrank.train.validation import ValidationLoss
from lowrank.train.watch import Preview

logger = logging.getLogger(__name__)


def accelerator(parsed: Parsed, folder: Path) -> Accelerator:
    """accelerate's record of processes, device and precision.

    Raises `Refused` for a GPU that is named and not there, and for switches that need another precision.
    """
    logs = folder / "logs"
    trackers = parsed.value("log_with")
    if parsed.value("logging_dir"):
        trackers = trackers or "tensorboard"
        logs = Path(parsed.value("logging_dir")) / (
            (parsed.value("log_prefix") or "") + time.strftime("%Y%m%d%H%M%S")
        )
    if trackers in ("wandb", "all"):
        if find_spec("wandb") is None:
            raise Refused(
                f"--log_with {trackers} needs the package wandb; run pip install wandb, or give --log_with "
                "tensorboard"
            )
        import wandb  # pyright: ignore[reportMissingImports]  # only when asked for

        if parsed.value("wandb_api_key"):
            wandb.login(key=parsed.value("wandb_api_key"))
    accelerator = Accelerator(
        mixed_precision=_precision(parsed),
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
    used = accelerator.mixed_precision
    for flag, needed in (
        ("full_fp16", ("fp16",)),
        ("full_bf16", ("bf16",)),
        ("fp8_base", ("fp16", "bf16")),
        ("fp8_base_unet", ("fp16", "bf16")),
    ):
        if parsed.value(flag) and used not in needed:
            raise Refused(
                f"--{flag} needs --mixed_precision {' or '.join(needed)}, and it is {used}; set both or none"
            )
    if parsed.value("full_fp16") and accelerator.scaler is not None:
        scale_fp16_gradients(accelerator.scaler)
    return accelerator


def _precision(parsed: Parsed) -> str | None:
    """--mixed_precision; fp16, which accelerate offers on GPUs alone, is fp32 where there is none."""
    asked = parsed.value("mixed_precision")
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if gpu and os.environ.get("ACCELERATE_USE_CPU") != "true":
        return asked
    if (asked or os.environ.get("ACCELERATE_MIXED_PRECISION")) != "fp16" or parsed.value("full_fp16"):
        return asked
    logger.warning("there is no GPU, and mixed precision fp16 needs one: this run computes in fp32")
    return "no"


def scale_fp16_gradients(scaler: Any) -> None:
    """Let a gradient scaler unscale gradients of fp16 parameters, which torch forbids unless told so."""
    unscale = scaler._unscale_grads_
    scaler._unscale_grads_ = lambda optimizer, scale, found, _allow_fp16: unscale(
        optimizer, scale, found, True
    )


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
    """Where the base model is, and how it is loaded."""
    names = ("revision", "variant", "cache_dir", "vae", "clip_l", "t5xxl", "ae", "tokenizer_cache_dir")
    names += ("v2", "v_parameterization")
    given = {name: parsed.value(name) for name in names if name in parsed.specs}
    dtype = DTYPES[accelerator.mixed_precision]
    return Source(
        parsed.value("pretrained_model_name_or_path"),
        dtype=dtype,
        device=accelerator.device,
        vae_dtype=torch.float32 if parsed.value("no_half_vae") else None,
        **given,
    )


def check_prediction(objective: Any, family: Family, models: Models) -> None:
    """The base must predict what the objective compares; one that says otherwise is refused, or warned of."""
    if getattr(objective, "zero_terminal_snr", False):  # pictures are then drawn on that schedule too
        models.configs["scheduler"] = {**models.configs["scheduler"], "rescale_betas_zero_snr": True}
    told = family.prediction(models)
    if told == objective.prediction:
        return
    if told == "v_prediction":
        raise Refused(
            f"{models.source.path} says that it predicts velocities (v_prediction), and --v_parameterization "
            "is missing; give it, or correct the model's scheduler configuration"
        )
    logger.warning(
        "%s says that it predicts %s, and the target is %s", models.source.path, told, objective.prediction
    )


def prompts(parsed: Parsed, family: Family, models: Models, default: Prompt) -> list[Prompt]:
    """What to draw while training; `default` says what a prompt line leaves open."""
    width, height = parsed.value("resolution") or (default.width, default.height)
    default, found = replace(default, width=width, height=height), []
    if parsed.value("sample_prompts"):
        found = read_prompts(parsed.value("sample_prompts"), default, family.bucket_step(models))
    elif parsed.value("validation_prompt"):
        found = [replace(default, prompt=parsed.value("validation_prompt"))]
    own = parsed.specs.get("sample_sampler")
    for prompt in found:
        name = prompt.sample_sampler
        known = (own.flag.choices or ()) if own else ()
        if name is not None and name not in known:
            way_out = f"give one of {', '.join(known)}" if known else "this model has its own; leave it out"
            raise Refused(f"the sampler {name!r} of a prompt is unknown{nearest(name, known)}; {way_out}")
    return found


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
    sampler = parsed.value("sample_sampler") if "sample_sampler" in parsed.specs else None

    def picture(prompt: Prompt, seed: int) -> Image.Image:
        if models.vae is not None:
            move(models, ("vae",), accelerator.device)
        return draw_picture(family, models, options, text, prompt, seed)

    by_file = bool(parsed.value("sample_prompts"))
    epochs = parsed.value("sample_every_n_epochs") or (
        None if by_file or parsed.value("sample_every_n_steps") else parsed.value("validation_epochs")
    )
    return Preview(
        [replace(prompt, sample_sampler=prompt.sample_sampler or sampler) for prompt in prompts],
        picture,
        folder / "sample",
        parsed.value("output_name") or "",
        per_prompt=1 if by_file else parsed.value("num_validation_images"),
        seed=parsed.value("seed"),
        every_epochs=epochs,
        every_steps=parsed.value("sample_every_n_steps"),
    )


def held_out(parsed: Parsed, loader: Loader | None, losses: Any, seed: int) -> ValidationLoss | None:
    """What is measured, and when; None where nothing is held out."""
    if loader is None:
        return None
    options = parsed.validation
    return ValidationLoss(
        loader,
        losses,
        seed if options.validation_seed is None else options.validation_seed,
        options.validate_every_n_steps,
        options.validate_every_n_epochs,
        options.max_validation_steps,
    )


def announce(loader: Loader, plan: Any, parsed: Parsed, network: Any, accelerator: Accelerator) -> None:
    """The facts of the run in kohya's wording, which GUIs read."""
    if not accelerator.is_main_process:
        return
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    counts = dataset_summary(loader)
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
