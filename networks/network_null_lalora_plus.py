"""network_null_lalora_plus: network_null_lalora with DoRA's row lengths (use_dora) and LoRA+.

With whole trained matrices (basis_path=none) the default of loraplus_lr_ratio is 16. With a basis it is 1:
LoRA+ compensates for unequal widths, and here both cores are h×h. Trained row lengths change what W itself
outputs, so use_dora gives up Null-LoRA's guarantee; a warning is logged.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowrank.adapters.method import Method, structural
from lowrank.adapters.network_module import bind
from networks import dora, network_null_lalora

RATIO = 16.0
NOTE = "use_dora changes the length of each row of W, so ΔW is no longer restricted to the null space"


@dataclass(frozen=True)
class Options(network_null_lalora.Options):
    use_dora: bool = structural(False)
    """train the length of each row of W + ΔW (DoRA)"""


def method(options: Options) -> Method:
    combined = network_null_lalora.method(options)
    if "free_up" in combined.require_factor().loraplus:
        combined = dataclasses.replace(combined, rates={"free_up": RATIO})
    if options.use_dora:
        combined = dataclasses.replace(combined | dora.LENGTHS, notes=(*combined.notes, NOTE))
    return dataclasses.replace(combined, name="network_null_lalora_plus")


create_network, create_network_from_weights = bind(method, Options)
