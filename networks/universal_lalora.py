"""Universal LoRA whose core is held where source data would notice: universal_lora with LaLoRA's penalty."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowrank.adapters.method import Method
from lowrank.adapters.network_module import bind
from networks import lalora, universal_lora


@dataclass(frozen=True)
class Options(universal_lora.Options, lalora.Options):
    """Those of both."""


def method(options: Options) -> Method:
    made = universal_lora.method(options) | lalora.penalty(options)
    return dataclasses.replace(made, name="universal_lalora")


create_network, create_network_from_weights = bind(method, Options)
