"""Rules between the flags of training, and what they need on this machine, before torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import TypeVar

from lowrank.config.command_line import Parsed
from lowrank.config.effects import without_effect
from lowrank.config.flag import pairs
from lowrank.config.flags_training import Network
from lowrank.config.optimizers import check_optimizer, check_optimizer_installed
from lowrank.config.train import TrainOptions
from lowrank.errors import Refused, joined, reasons_of
from lowrank.files import existing_file, existing_folder

T = TypeVar("T")
FOLDERS = ("train_data_dir", "reg_data_dir", "instance_data_dir")
FILES = ("network_weights", "lycoris_config", "base_weights", "dataset_config", "sample_prompts")
PARTS = ("clip_l", "t5xxl", "ae")  # of FLUX; a file, or for --ae a folder
SOURCES = ("dataset_config", "in_json", "train_data_dir", "instance_data_dir")
_REPLACED = ("in_json", "train_data_dir", "reg_data_dir")  # --dataset_config replaces these
LORA_INIT_METHODS = {"triu_deltaR": "delta_r_triu", "deltaR": "delta_r", "qr": "qrlora"}


def adapter_module(network: Network, unnamed: str = "networks.delta_r_triu") -> str:
    """The module that --network_module or --lora_init_method names; `unnamed` without either."""
    if network.network_module:
        return network.network_module
    if network.lora_init_method:
        return f"networks.{LORA_INIT_METHODS[network.lora_init_method]}"
    return unnamed


def gathered(
    parsed: Parsed[T], rules: Iterable[Callable[[Parsed[T]], Iterable[str] | None]]
) -> Iterator[str]:
    """Yield the notes of all rules; raises all that they refuse together."""
    problems: list[str] = []
    for rule in rules:
        try:
            yield from rule(parsed) or ()
        except Refused as error:
            problems += reasons_of(error)
    if problems:
        raise joined(f"{parsed.prog} cannot run with these flags", problems)


def check_training(parsed: Parsed[TrainOptions]) -> Iterator[str]:
    """The rules of every trainer; raises `Refused`, yields notes."""
    yield from gathered(parsed, _RULES)


def _check_model(parsed: Parsed[TrainOptions]) -> None:
    if not parsed.options.model.pretrained_model_name_or_path:
        raise Refused("no base model; give --pretrained_model_name_or_path FOLDER_OR_HUB_ID")


def _check_saving(parsed: Parsed[TrainOptions]) -> None:
    saving = parsed.options.saving
    if saving.save_model_as != "safetensors":
        raise Refused(
            f"--save_model_as {saving.save_model_as} would be a pickle, which can run code when it is "
            "loaded; use safetensors"
        )
    if saving.upcast_before_saving and saving.save_precision in ("fp16", "bf16"):
        raise Refused(
            f"--upcast_before_saving and --save_precision {saving.save_precision} exclude each other; "
            "give one of them"
        )


def check_machine(parsed: Parsed[TrainOptions]) -> None:
    """Raise `Refused` for files and folders that do not exist, and for packages that are not installed."""
    rules = (_check_package, _check_tracker, _check_parts)
    for _ in gathered(parsed, (*rules, *map(_existing, FOLDERS), *map(_existing, FILES))):
        pass


def _check_package(parsed: Parsed[TrainOptions]) -> None:
    check_optimizer_installed(parsed.options.optimizer)


def _check_tracker(parsed: Parsed[TrainOptions]) -> None:
    """Refuse a tracker whose package is not installed."""
    tracker = parsed.options.logging.log_with
    if tracker in ("wandb", "all") and find_spec("wandb") is None:
        raise Refused(
            f"{parsed.flag('log_with')} {tracker} needs the package wandb; run `pip install wandb`, or give "
            "--log_with tensorboard"
        )


def _check_parts(parsed: Parsed[TrainOptions]) -> None:
    missing = [
        f"{parsed.flag(name)} {path} does not exist; correct the path"
        for name in PARTS
        if name in parsed.specs and (path := parsed.value(name)) and not os.path.exists(path)
    ]
    if missing:
        raise joined("files of the model do not exist", missing)


def _existing(name: str) -> Callable[[Parsed[TrainOptions]], None]:
    """The check of a flag that names a folder or files; a folder that is not read is not checked."""

    def check(parsed: Parsed[TrainOptions]) -> None:
        data, value = parsed.options.data, parsed.value(name)
        if name in FOLDERS:
            read = name != "reg_data_dir" or (data.train_data_dir and not data.in_json)
            if value and read and not data.dataset_config:
                existing_folder(value, name)
            return
        for file in value if isinstance(value, tuple) else (value,) if value else ():
            try:
                existing_file(file)
            except Refused as refused:
                raise Refused(f"{parsed.flag(name)}: {refused}") from refused

    return check


def _check_data(parsed: Parsed[TrainOptions]) -> Iterator[str]:
    data, prior, augmentation = parsed.options.data, parsed.options.prior, parsed.options.augmentation
    sources = [n for n in SOURCES if getattr(data, n)]
    unread = [n for n in _REPLACED if data.dataset_config and getattr(data, n)]
    sources = [n for n in sources if n not in unread]
    if data.in_json and "train_data_dir" in sources:
        sources.remove("train_data_dir")  # where the images of --in_json are
    if len(sources) != 1:
        given = " and ".join(parsed.flag(name) for name in sources) or "none"
        raise Refused(
            f"one source of pictures is needed, not {given}; give --instance_data_dir FOLDER with "
            "--instance_prompt TEXT, --train_data_dir FOLDER, or --dataset_config FILE"
        )
    if data.reg_data_dir and sources[0] in ("in_json", "instance_data_dir"):
        unread.append("reg_data_dir")
    if data.dataset_repeats != 1 and sources[0] == "train_data_dir":
        unread.append("dataset_repeats")
    if unread:
        yield f"{', '.join(map(parsed.flag, unread))}: no effect with {parsed.flag(sources[0])}"
    if data.instance_prompt and "instance_data_dir" not in sources:
        raise Refused("--instance_prompt belongs to --instance_data_dir; captions come from files here")
    if prior.with_prior_preservation:
        for name in ("class_data_dir", "class_prompt"):
            if not getattr(prior, name):
                raise Refused(f"--with_prior_preservation needs --{name}")
        if sources[0] != "instance_data_dir":
            raise Refused("--with_prior_preservation belongs to --instance_data_dir; use --reg_data_dir here")
    if data.center_crop and augmentation.random_crop:
        raise Refused("--center_crop and --random_crop exclude each other; give one")
    for name, given in (("color_aug", augmentation.color_aug), ("random_crop", augmentation.random_crop)):
        if parsed.options.caches_latents and given:
            raise Refused(
                f"--{name} changes images every epoch, but cached latents do not change; drop one of them"
            )
    buckets = parsed.options.buckets
    if buckets.min_bucket_reso > buckets.max_bucket_reso:
        raise Refused(
            f"{parsed.flag('min_bucket_reso')} {buckets.min_bucket_reso} exceeds "
            f"{parsed.flag('max_bucket_reso')} {buckets.max_bucket_reso}; swap or correct them"
        )


def _check_masks(parsed: Parsed[TrainOptions]) -> None:
    data, masks = parsed.options.data, parsed.options.masks
    if data.dataset_config:  # its own keys decide
        return
    if data.masked_loss and not (masks.alpha_mask or masks.conditioning_data_dir):
        raise Refused("--masked_loss has no masks; give --conditioning_data_dir FOLDER or --alpha_mask")


def _check_network(parsed: Parsed[TrainOptions]) -> None:
    network = parsed.options.network
    optimizer = parsed.options.optimizer
    pairs(parsed.flag("network_args"), network.network_args)
    pairs(parsed.flag("optimizer_args"), optimizer.optimizer_args)
    pairs(parsed.flag("lr_scheduler_args"), optimizer.lr_scheduler_args)
    if network.lora_init_method and network.network_module:
        module = LORA_INIT_METHODS[network.lora_init_method]
        if network.network_module.rpartition(".")[2] != module:
            raise Refused(
                f"--lora_init_method {network.lora_init_method} means networks.{module}, but "
                f"--network_module is {network.network_module}; give one of them"
            )
    if network.dim_from_weights and not network.network_weights:
        raise Refused("--dim_from_weights needs --network_weights FILE")
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        raise Refused(
            "--network_train_unet_only and --network_train_text_encoder_only exclude each other; give one"
        )
    if len(network.base_weights_multiplier) > len(network.base_weights):
        raise Refused(
            f"--base_weights_multiplier has {len(network.base_weights_multiplier)} numbers for "
            f"{len(network.base_weights)} --base_weights; give one for each file"
        )


def _check_memory(parsed: Parsed[TrainOptions]) -> None:
    memory = parsed.options.memory
    if memory.text_encoders_on_cpu and parsed.options.trains_text:
        raise Refused(
            "--text_encoders_on_cpu cannot be used while text encoders are trained; add "
            "--network_train_unet_only, or leave it out"
        )
    implied = "fp8_scaled" if memory.fp8_scaled else "fp8"
    if memory.base_storage and memory.fp8_flag and memory.base_storage != implied:
        raise Refused(
            f"--base_storage {memory.base_storage} and --{memory.fp8_flag}, which is --base_storage "
            f"{implied}, exclude each other; give one of them"
        )


def _check_abm(parsed: Parsed[TrainOptions]) -> None:
    abm = parsed.options.abm
    if abm.abm_enabled and abm.abm_teacher != "base":
        existing_file(abm.abm_teacher, f"give {parsed.flag('abm_teacher')} an adapter file, or the word base")


def _check_schedule(parsed: Parsed[TrainOptions]) -> Iterator[str]:
    optimizer, train, sampling = parsed.options.optimizer, parsed.options.train, parsed.options.sampling
    if "max_train_steps" in parsed.given and parsed.flag("max_train_epochs") == "--num_train_epochs":
        raise Refused(
            f"--num_train_epochs {train.max_train_epochs} and --max_train_steps {train.max_train_steps} both "
            "set the length of training, and scripts differ in which has precedence; give one"
        )
    if optimizer.lr_scheduler == "constant" and not optimizer.lr_scheduler_type and optimizer.lr_warmup_steps:
        raise Refused(
            f"{parsed.flag('lr_warmup_steps')} {optimizer.lr_warmup_steps:g} has no effect with "
            "--lr_scheduler constant; use constant_with_warmup, or 0"
        )
    every = sampling.sample_every_n_steps or sampling.sample_every_n_epochs
    if sampling.sample_prompts and not every:
        yield (
            f"{parsed.flag('sample_prompts')} is drawn only at the end of training; give "
            "--sample_every_n_epochs 1 to draw it while training"
        )


_RULES = (
    *(_check_model, _check_saving, _check_data, _check_masks, _check_network, _check_memory, _check_abm),
    *(_check_schedule, check_optimizer, without_effect),
)
