"""`network_null_lalora` with DoRA's row lengths (use_dora) and LoRA+'s faster up side.

loraplus_lr_ratio is 16 unless given where whole matrices are trained (basis_path=none), and 1 between given
directions, whose two sides do not differ in width. A free row length voids the null space's promise: it moves
what W itself writes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowrank.adapters.method import Method, structural
from lowrank.adapters.network_module import bind
from networks import dora, network_null_lalora

RATIO = 16.0
NOTE = "use_dora moves the length of each row of W, so the null space is no longer left alone"


@dataclass(frozen=True)
class Options(network_null_lalora.Options):
    use_dora: bool = structural(False)
    """free the length of each output row (DoRA)"""


def method(options: Options) -> Method:
    made = network_null_lalora.method(options)
    if "free_up" in made.require_factor().plus:
        made = dataclasses.replace(made, rates={"free_up": RATIO})
    if options.use_dora:
        made = dataclasses.replace(made | dora.LENGTHS, notes=(*made.notes, NOTE))
    return dataclasses.replace(made, name="network_null_lalora_plus")


create_network, create_network_from_weights = bind(method, Options)
