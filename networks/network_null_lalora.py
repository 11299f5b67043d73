"""network_null_lalora: Null-LoRA whose free factors lie in a given basis, with LaLoRA's penalty.

    y = W x + s·(L·C₁·diag(n₁)·V_N + U_N·diag(n₂)·C₂·R) x        loss + LaLoRA's penalty on ΔW

These are null_lora's B = L·C₁ and A = C₂·R. L (O×h) and R (h×I) are given, the cores C₁ and C₂ (h×h) are
trained. L and R: the basis of universal_lora (basis_path); basis_path=none trains B and A as null_lora does.
V_N, U_N and the trained scales n₁, n₂: see null_lora. Penalty: see lalora.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowrank.adapters.method import Method
from lowrank.adapters.network_module import bind
from networks import lalora, null_lora, universal_lora


@dataclass(frozen=True)
class Options(null_lora.Options, universal_lora.Options, lalora.Options):
    """The options of null_lora, universal_lora and lalora."""

    def __post_init__(self) -> None:
        for network in (null_lora, universal_lora):
            network.Options.__post_init__(self)


def method(options: Options) -> Method:
    if options.basis_path == universal_lora.NONE or (options.null_strict and not options.basis_path):
        null = Method("null", null_lora.factor(options))
    else:
        directions = universal_lora.Directions(options)
        factor = null_lora.factor(options, directions)
        stages = directions.stages(("core_up", "core_down"), 2)
        null = Method("null", factor, warmup=stages, options=directions.options)
    return dataclasses.replace(null | lalora.penalty(options), name="network_null_lalora")


create_network, create_network_from_weights = bind(method, Options)
