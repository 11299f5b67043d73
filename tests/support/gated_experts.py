"""`--network_module gated_experts`: EffiLoRA's routed experts with T-LoRA's gate on their ranks."""

from __future__ import annotations

import dataclasses

from lowrank.adapters.gate import Schedule
from lowrank.adapters.method import Method
from lowrank.adapters.network_module import bind
from networks import effilora, tlora


def method(options: effilora.Options) -> Method:
    gate = Method("tlora", gate=tlora.gate(Schedule(1, 1.0)))
    return dataclasses.replace(effilora.method(options) | gate, name="gated_experts")


create_network, create_network_from_weights = bind(method, effilora.Options)
