"""The network module that a trainer's options mean, and its arguments from flags and --lycoris_config."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from lowrank.adapters.targets import ends_with
from lowrank.cli.lycoris_config import translate
from lowrank.config.checks import adapter_module
from lowrank.config.command_line import Parsed
from lowrank.config.flag import pairs
from lowrank.config.flags_training import Network
from lowrank.config.train import TrainOptions
from lowrank.errors import Refused
from lowrank.train.network_module import facade_of, find_module

T = TypeVar("T", bound=TrainOptions)
ENDING = ".safetensors"
# flags that are arguments of the network module, by the argument's name
_ARGUMENTS = {
    "use_zero_init": "use_zero_init",
    "delta_scale": "delta_scale",
    "basis_cache": "basis_cache_dir",
    "save_basis": "save_basis",
}


def with_network(parsed: Parsed[T], unnamed: str) -> Parsed[T]:
    """The options with the module's name resolved and the module's own flags among its arguments.

    Where no module is named it is `unnamed`, or what --lycoris_config asks for.
    """
    parsed = _with_lycoris(_with_plain_name(parsed))
    network = parsed.options.network
    name = adapter_module(network, unnamed)
    facade = facade_of(find_module(name))
    arguments = pairs(parsed.flag("network_args"), network.network_args)
    for argument, flag in _ARGUMENTS.items():
        if flag not in parsed.given:
            continue
        if facade is None or argument not in facade.known:
            raise Refused(f"{parsed.flag(flag)} is not for {name}; leave it out or choose networks.delta_r")
        arguments.setdefault(argument, str(parsed.value(flag)))
    if network.lora_layers:
        if facade is None:
            raise Refused(f"--lora_layers is not for {name}; use its own arguments in --network_args")
        arguments.setdefault("target", ends_with(network.lora_layers))
    return _replaced(
        parsed,
        dataclasses.replace(
            network,
            network_module=name,
            network_args=tuple(f"{key}={value}" for key, value in arguments.items()),
        ),
    )


def check_arguments(parsed: Parsed[TrainOptions], unnamed: str) -> None:
    """Raise `Refused` for network arguments that the module does not take, all of them together."""
    network = with_network(parsed, unnamed).options.network
    facade = facade_of(find_module(network.network_module or ""))
    if facade is not None:
        facade.check(pairs("--network_args", network.network_args))


def _with_plain_name(parsed: Parsed[T]) -> Parsed[T]:
    """The options with --output_name without the ending of adapter files, which is added to every name."""
    saving = parsed.options.saving
    if not (saving.output_name or "").endswith(ENDING):
        return parsed
    plain = (saving.output_name or "").removesuffix(ENDING) or None
    note = f"{parsed.flag('output_name')} {saving.output_name}: the name is {plain}, and files get the ending"
    options = dataclasses.replace(parsed.options, saving=dataclasses.replace(saving, output_name=plain))
    return dataclasses.replace(parsed, options=options, notes=(*parsed.notes, note))


def _replaced(parsed: Parsed[T], network: Network, notes: tuple[str, ...] = ()) -> Parsed[T]:
    options = dataclasses.replace(parsed.options, network=network)
    return dataclasses.replace(parsed, options=options, notes=(*parsed.notes, *notes))


def _with_lycoris(parsed: Parsed[T]) -> Parsed[T]:
    """The options with those of --lycoris_config. Raises `Refused` where flags differ from the file."""
    network = parsed.options.network
    if not network.lycoris_config:
        return parsed
    file, label = translate(network.lycoris_config), parsed.flag("lycoris_config")
    module = find_module(file.module)
    for flag, value in (
        ("network_module", file.module),
        ("network_dim", file.rank),
        ("network_alpha", file.alpha),
    ):
        given = parsed.value(flag)
        same = given == value or (flag == "network_module" and given and find_module(given) is module)
        if flag in parsed.given and not same:
            raise Refused(
                f"{parsed.flag(flag)} is {given}, and {file.path} of {label} means {value}; give one of them"
            )
    for flag in ("lora_init_method", "lora_layers", "dim_from_weights", "network_train_text_encoder_only"):
        if parsed.value(flag):
            raise Refused(
                f"{parsed.flag(flag)} and {label} both choose what is adapted, and how; give one of them"
            )
    arguments = pairs(parsed.flag("network_args"), network.network_args)
    if "dropout" in file.arguments and network.network_dropout is not None:
        arguments.setdefault("dropout", f"{network.network_dropout:g}")
    for name, value in file.arguments.items():
        if arguments.setdefault(name, value) != value:
            raise Refused(
                f"--network_args {name}={arguments[name]}, and {file.path} of {label} means {name}={value}; "
                "give one of them"
            )
    notes = list(file.notes)
    alone = "train_text_encoder" not in parsed.given
    if alone and network.train_text_encoder:
        notes.append(f"{label} is for the denoiser alone; --train_text_encoder adapts the text encoders too")
    network = dataclasses.replace(
        network,
        network_module=file.module,
        network_dim=file.rank,
        network_alpha=file.alpha,
        network_args=tuple(f"{key}={value}" for key, value in arguments.items()),
        network_train_unet_only=network.network_train_unet_only or alone,
    )
    return _replaced(parsed, network, tuple(notes))
