"""What every trainer's command line is turned into: the records of objective and family."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowrank.adapters.targets import ends_with
from lowrank.cli.lycoris_config import translate
from lowrank.config.checks import adapter_module
from lowrank.config.command_line import Parsed, pairs
from lowrank.errors import Refused
from lowrank.train.network_module import facade_of, find_module

# flags that are arguments of the network module, by the argument's name
_ARGUMENTS = {
    "use_zero_init": "use_zero_init",
    "delta_scale": "delta_scale",
    "basis_cache": "basis_cache_dir",
    "save_basis": "save_basis",
}


def record(kind: type, parsed: Parsed) -> Any:
    """A frozen record filled from the options of the same names; None keeps the record's default."""
    names = [field.name for field in dataclasses.fields(kind) if field.name in parsed.specs]
    return kind(**{name: parsed.value(name) for name in names if parsed.value(name) is not None})


def with_network(parsed: Parsed, unnamed: str) -> Parsed:
    """The options with the module's name resolved and the module's own flags among its arguments.

    Where no module is named it is `unnamed`, or what --lycoris_config asks for.
    """
    parsed = _with_lycoris(parsed)
    name = adapter_module(parsed.network, unnamed)
    facade = facade_of(find_module(name))
    arguments = pairs(parsed.flag("network_args"), parsed.value("network_args"))
    for argument, flag in _ARGUMENTS.items():
        if flag not in parsed.given:
            continue
        if facade is None or argument not in facade.known:
            raise Refused(f"{parsed.flag(flag)} is not for {name}; leave it out or choose networks.delta_r")
        arguments.setdefault(argument, str(parsed.value(flag)))
    if parsed.value("lora_layers"):
        if facade is None:
            raise Refused(f"--lora_layers is not for {name}; use its own arguments in --network_args")
        arguments.setdefault("target", ends_with(parsed.value("lora_layers")))
    network = dataclasses.replace(
        parsed.network,
        network_module=name,
        network_args=tuple(f"{key}={value}" for key, value in arguments.items()),
    )
    return dataclasses.replace(parsed, groups={**parsed.groups, "network": network})


def _with_lycoris(parsed: Parsed) -> Parsed:
    """The options with what --lycoris_config says. Raises `Refused` where flags say otherwise."""
    if not parsed.value("lycoris_config"):
        return parsed
    told, network = translate(parsed.value("lycoris_config")), parsed.network
    label = parsed.flag("lycoris_config")
    module = find_module(told.module)
    for flag, own in (
        ("network_module", told.module),
        ("network_dim", told.rank),
        ("network_alpha", told.alpha),
    ):
        given = parsed.value(flag)
        same = given == own or (flag == "network_module" and given and find_module(given) is module)
        if flag in parsed.given and not same:
            raise Refused(
                f"{parsed.flag(flag)} is {given}, and {told.path} of {label} means {own}; give one of them"
            )
    for flag in ("lora_init_method", "lora_layers", "dim_from_weights", "network_train_text_encoder_only"):
        if parsed.value(flag):
            raise Refused(
                f"{parsed.flag(flag)} and {label} both say what is adapted, and how; give one of them"
            )
    arguments = pairs(parsed.flag("network_args"), network.network_args)
    if "dropout" in told.arguments and network.network_dropout is not None:
        arguments.setdefault("dropout", f"{network.network_dropout:g}")
    for name, value in told.arguments.items():
        if arguments.setdefault(name, value) != value:
            raise Refused(
                f"--network_args {name}={arguments[name]}, and {told.path} of {label} means {name}={value}; "
                "give one of them"
            )
    notes = list(told.notes)
    alone = "train_text_encoder" not in parsed.given
    if alone and network.train_text_encoder:
        notes.append(f"{label} is for the denoiser alone; --train_text_encoder adapts the text encoders too")
    network = dataclasses.replace(
        network,
        network_module=told.module,
        network_dim=told.rank,
        network_alpha=told.alpha,
        network_args=tuple(f"{key}={value}" for key, value in arguments.items()),
        network_train_unet_only=network.network_train_unet_only or alone,
    )
    return dataclasses.replace(
        parsed, groups={**parsed.groups, "network": network}, notes=(*parsed.notes, *notes)
    )
