"""Rules between flags that every training script holds."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank.config.command_line import Parsed, pairs
from lowrank.config.flags_training import Network
from lowrank.errors import Refused
from lowrank.tensors import existing_file

SOURCES = ("dataset_config", "in_json", "train_data_dir", "instance_data_dir")
_TOLD_BY_CONFIG = ("in_json", "train_data_dir", "reg_data_dir")  # --dataset_config replaces these
LORA_INIT_METHODS = {"triu_deltaR": "delta_r_triu", "deltaR": "delta_r", "qr": "qrlora"}


# Settings whose 0 is how launchers write that they are off.
OFF_AT_ZERO = (
    *("max_train_epochs", "save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio"),
    *("save_last_n_epochs", "save_last_n_steps", "save_last_n_epochs_state", "save_last_n_steps_state"),
    *("sample_every_n_steps", "sample_every_n_epochs", "scale_weight_norms"),
    *("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "abm_batch_size"),
)


def adapter_module(network: Network, unnamed: str = "networks.delta_r_triu") -> str:
    """The module that --network_module and --lora_init_method ask for; without either `unnamed`."""
    if network.network_module:
        return network.network_module
    if network.lora_init_method:
        return f"networks.{LORA_INIT_METHODS[network.lora_init_method]}"
    return unnamed


def trains_text(parsed: Parsed) -> bool:
    """Whether text encoders are adapted: not where only the denoiser is trained, or their rate is 0."""
    network, rates = parsed.network, parsed.optimizer.text_encoder_lr
    if network.network_train_text_encoder_only:
        return True
    if network.network_train_unet_only or (rates and not any(rates)):
        return False
    return network.train_text_encoder


def check_training(parsed: Parsed) -> Iterator[str]:
    """The rules of every trainer; raises `Refused`, yields notes."""
    if not parsed.model.pretrained_model_name_or_path:
        raise Refused("no base model; give --pretrained_model_name_or_path FOLDER_OR_HUB_ID")
    if parsed.saving.save_model_as != "safetensors":
        raise Refused(
            f"--save_model_as {parsed.saving.save_model_as} would be a pickle, which can run code when it is "
            "loaded; use safetensors"
        )
    yield from _check_data(parsed)
    yield from _check_held_out(parsed)
    if parsed.value("log_prefix") and not parsed.value("logging_dir"):
        yield "--log_prefix has no effect without --logging_dir"
    _check_network(parsed)
    yield from _check_abm(parsed)
    if parsed.saving.upcast_before_saving and parsed.saving.save_precision in ("fp16", "bf16"):
        raise Refused(
            f"--upcast_before_saving and --save_precision {parsed.saving.save_precision} exclude each other"
        )
    _check_schedule(parsed)


def _check_data(parsed: Parsed) -> Iterator[str]:
    data, prior = parsed.data, parsed.prior
    sources = [n for n in SOURCES if getattr(data, n)]
    unread = [n for n in _TOLD_BY_CONFIG if data.dataset_config and getattr(data, n)]
    sources = [n for n in sources if n not in unread]
    if data.in_json and "train_data_dir" in sources:
        sources.remove("train_data_dir")  # where the images of --in_json are
    if len(sources) != 1:
        told = " and ".join(parsed.flag(name) for name in sources) or "none"
        raise Refused(
            f"one source of pictures is needed, not {told}; give --instance_data_dir FOLDER with "
            "--instance_prompt TEXT, --train_data_dir FOLDER, or --dataset_config FILE"
        )
    if data.reg_data_dir and sources[0] in ("in_json", "instance_data_dir"):
        unread.append("reg_data_dir")
    if data.dataset_repeats != 1 and sources[0] == "train_data_dir":
        unread.append("dataset_repeats")
    if unread:
        yield f"{', '.join(map(parsed.flag, unread))} without effect beside {parsed.flag(sources[0])}"
    if data.instance_prompt and "instance_data_dir" not in sources:
        raise Refused("--instance_prompt belongs to --instance_data_dir; captions come from files here")
    if prior.with_prior_preservation:
        for name in ("class_data_dir", "class_prompt"):
            if not getattr(prior, name):
                raise Refused(f"--with_prior_preservation needs --{name}")
        if sources[0] != "instance_data_dir":
            raise Refused("--with_prior_preservation belongs to --instance_data_dir; use --reg_data_dir here")
    elif prior.class_data_dir or prior.class_prompt:
        yield "--class_data_dir and --class_prompt have no effect without --with_prior_preservation"
    if data.center_crop and data.random_crop:
        raise Refused("--center_crop and --random_crop are both given; give one")
    cached = data.cache_latents or data.cache_latents_to_disk
    for name in ("color_aug", "random_crop"):
        if cached and getattr(data, name):
            raise Refused(f"--{name} changes images every epoch, but cached latents stay; drop one of both")
    buckets = parsed.buckets
    if buckets.min_bucket_reso > buckets.max_bucket_reso:
        raise Refused(
            f"{parsed.flag('min_bucket_reso')} {buckets.min_bucket_reso} exceeds "
            f"{parsed.flag('max_bucket_reso')} {buckets.max_bucket_reso}; swap or correct them"
        )


def _check_held_out(parsed: Parsed) -> Iterator[str]:
    data, masks, validation = parsed.data, parsed.masks, parsed.validation
    if data.dataset_config:  # may say it all itself
        return
    if masks.masked_loss and not (masks.alpha_mask or masks.conditioning_data_dir):
        raise Refused("--masked_loss has no masks; give --conditioning_data_dir FOLDER or --alpha_mask")
    if masks.conditioning_data_dir and not masks.masked_loss:
        yield "--conditioning_data_dir has no effect without --masked_loss"
    every = [name for name in parsed.given if name.startswith("validate_every") and parsed.value(name)]
    if every and not validation.validation_split:
        yield f"--{every[0]} has no effect without --validation_split"


def _check_network(parsed: Parsed) -> None:
    network = parsed.network
    for name in ("network_args", "optimizer_args", "lr_scheduler_args"):
        pairs(parsed.flag(name), parsed.value(name))
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
        raise Refused("--network_train_unet_only and --network_train_text_encoder_only exclude each other")
    if len(network.base_weights_multiplier) > len(network.base_weights):
        raise Refused(
            f"--base_weights_multiplier has {len(network.base_weights_multiplier)} numbers for "
            f"{len(network.base_weights)} --base_weights; give one for each file"
        )


def _check_abm(parsed: Parsed) -> Iterator[str]:
    if not parsed.abm.abm_enabled:
        known = [name for name in parsed.given if name.startswith("abm_")]
        given = [name for name in known if parsed.value(name) != parsed.specs[name].default]
        if given:  # a run's own config.toml has all of them
            yield f"{', '.join(map(parsed.flag, given))} without effect, since --abm_enabled is not given"
        return
    if parsed.abm.abm_teacher != "base":
        existing_file(
            parsed.abm.abm_teacher, f"give {parsed.flag('abm_teacher')} an adapter file, or the word base"
        )


def _check_schedule(parsed: Parsed) -> None:
    optimizer, train, sampling = parsed.optimizer, parsed.train, parsed.sampling
    if "max_train_steps" in parsed.given and parsed.flag("max_train_epochs") == "--num_train_epochs":
        raise Refused(
            f"--num_train_epochs {train.max_train_epochs} and --max_train_steps {train.max_train_steps} both "
            "say how long to train, and scripts disagree which wins; give one"
        )
    if optimizer.lr_scheduler == "constant" and not optimizer.lr_scheduler_type and optimizer.lr_warmup_steps:
        raise Refused(
            f"{parsed.flag('lr_warmup_steps')} {optimizer.lr_warmup_steps:g} has no effect with "
            "--lr_scheduler constant; use constant_with_warmup, or 0"
        )
    every = [n for n in ("sample_every_n_steps", "sample_every_n_epochs") if getattr(sampling, n)]
    if (every or sampling.sample_at_first) and not (sampling.sample_prompts or sampling.validation_prompt):
        raise Refused(
            f"--{(every or ['sample_at_first'])[0]} has nothing to draw; give --sample_prompts FILE or "
            "--validation_prompt TEXT"
        )
    hub = [n for n in ("huggingface_path_in_repo", "async_upload") if parsed.value(n)]
    if hub and not parsed.hub.huggingface_repo_id:
        raise Refused(f"--{hub[0]} needs --huggingface_repo_id OWNER/NAME")
