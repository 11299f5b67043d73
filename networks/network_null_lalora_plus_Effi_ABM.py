"""Everything at once, the user's recommended network: `network_null_lalora_plus` with EffiLoRA's experts.

enable_effilora=True gives each layer num_experts of its trained up side, mixed per position by a router;
without it there is one, whatever num_experts says. The trainer's --abm_enabled adds the ABM stage before
step 0. A routed adapter has no one ΔW and cannot be merged; tools/export_lora.py --calibrate writes the
nearest that has.
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
    """several experts of the up side, mixed by a router"""
    abm_batch_size: int | None = None
    """samples of a batch that the ABM stage uses; --abm_batch_size comes first"""

    def __post_init__(self) -> None:
        network_null_lalora_plus.Options.__post_init__(self)
        effilora.Options.__post_init__(self)
        if self.abm_batch_size is not None and self.abm_batch_size < 1:
            raise Refused(f"network argument abm_batch_size={self.abm_batch_size} is below 1; give 1 or more")


def method(options: Options) -> Method:
    made = network_null_lalora_plus.method(options)
    if not options.enable_effilora:
        if options.num_experts != effilora.Options.num_experts:
            told = f"num_experts={options.num_experts} has no effect without enable_effilora=True: it is 1"
            made = dataclasses.replace(made, notes=(*made.notes, told))
        made = dataclasses.replace(made, options={**made.options, "num_experts": 1})
    elif options.num_experts > 1:
        made = made | effilora.experts(options, made.require_factor())
    return dataclasses.replace(made, name="network_null_lalora_plus_Effi_ABM")


create_network, create_network_from_weights = bind(method, Options)
