"""network_null_lalora_plus_Effi_ABM: network_null_lalora_plus with EffiLoRA's experts and the ABM warm-up.

enable_effilora=True gives each layer num_experts copies of its trained up, mixed by a router for each token
or pixel. Without it each layer has one up and num_experts has no effect. The trainer's --abm_enabled runs the
ABM stage before step 0. With experts ΔW depends on the input, so the adapter cannot be merged;
`tools/export_lora.py --calibrate` writes the nearest LoRA.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowrank.adapters.method import Method, structural
from lowrank.adapters.network_module import bind
from lowrank.errors import Refused
from networks import effilora, network_null_lalora_plus


@dataclass(frozen=True)
class Options(network_null_lalora_plus.Options, effilora.Options):
    enable_effilora: bool = structural(False)
    """train num_experts up matrices per layer, mixed by a router (EffiLoRA)"""
    abm_batch_size: int | None = None
    """batch size in the ABM stage (default: the whole batch); --abm_batch_size overrides it"""

    def __post_init__(self) -> None:
        network_null_lalora_plus.Options.__post_init__(self)
        effilora.Options.__post_init__(self)
        if self.abm_batch_size is not None and self.abm_batch_size < 1:
            raise Refused(f"network argument abm_batch_size={self.abm_batch_size} is below 1; give 1 or more")


def method(options: Options) -> Method:
    combined = network_null_lalora_plus.method(options)
    if not options.enable_effilora:
        if options.num_experts != effilora.Options.num_experts:
            note = f"num_experts={options.num_experts} has no effect without enable_effilora=True; 1 is used"
            combined = dataclasses.replace(combined, notes=(*combined.notes, note))
        combined = dataclasses.replace(combined, options={**combined.options, "num_experts": 1})
    elif options.num_experts > 1:
        combined = combined | effilora.experts(options, combined.require_factor())
    return dataclasses.replace(combined, name="network_null_lalora_plus_Effi_ABM")


create_network, create_network_from_weights = bind(method, Options)
