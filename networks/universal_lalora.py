"""universal_lalora: universal_lora with LaLoRA's penalty on ΔW = s·L·C·R."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowrank.adapters.method import Method
from lowrank.adapters.network_module import bind
from networks import lalora, universal_lora


@dataclass(frozen=True)
class Options(universal_lora.Options, lalora.Options):
    """The options of universal_lora and lalora."""


def method(options: Options) -> Method:
    combined = universal_lora.method(options) | lalora.penalty(options)
    return dataclasses.replace(combined, name="universal_lalora")


create_network, create_network_from_weights = bind(method, Options)
