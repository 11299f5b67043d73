"""What every trainer's command line is turned into: the records of objective and family."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowrank.adapters.targets import ends_with
from lowrank.errors import Refused
from lowrank.options import Parsed, pairs
from lowrank.surfaces.checks import adapter_module
from lowrank.train.module import facade_of, find_module

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

    Where no module is named it is `unnamed`.
    """
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
