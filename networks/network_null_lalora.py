"""Null-LoRA in a given basis with LaLoRA's penalty: the user's `network_null_lalora`.

    y = W x + s·(L·C₁·diag(n₁)·V_N + U_N·diag(n₂)·C₂·R) x        + (λ/2)·tr(Uᵀ G U · D S Dᵀ)/c in the loss

See null_lora, universal_lora (basis_path; `none` is Null-LoRA itself) and lalora for the three parts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowrank.adapters.method import Method
from lowrank.adapters.network_module import bind
from networks import lalora, null_lora, universal_lora


@dataclass(frozen=True)
class Options(null_lora.Options, universal_lora.Options, lalora.Options):
    """Those of all three."""

    def __post_init__(self) -> None:
        for part in (null_lora, universal_lora):
            part.Options.__post_init__(self)


def method(options: Options) -> Method:
    if options.basis_path == universal_lora.NONE or (options.null_strict and not options.basis_path):
        made = Method("null", null_lora.factor(options))
    else:
        directions = universal_lora.Directions(options)
        factor = null_lora.factor(options, directions)
        stages = directions.stages(("core_up", "core_down"), 2)
        made = Method("null", factor, warmup=stages, options=directions.options)
    return dataclasses.replace(made | lalora.penalty(options), name="network_null_lalora")


create_network, create_network_from_weights = bind(method, Options)
