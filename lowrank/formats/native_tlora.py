"""T-LoRA of LyCORIS, SimpleTuner and its authors as this program's own files: the same ΔW at every timestep.

Tensors keep their names and values. What LyCORIS leaves out, the start that is subtracted, is computed from
the base as LyCORIS does when it loads the file; what the authors leave out, the schedule, the user gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowrank.adapters.gate import Schedule
from lowrank.errors import Refused
from lowrank.formats import static
from lowrank.formats.names import Layers, baked, missing, sizes
from lowrank.formats.native import Native
from lowrank.formats.tlora import ROLES, start_of
from lowrank.naming.flux_join import strength
from lowrank.naming.places import LayerPath, native_layer, places

TIMES = (0, 250, 500, 750, 999)  # where two files are compared


def is_masked(layers: Layers, metadata: Mapping[str, str]) -> bool:
    """Whether a file can be nothing but a T-LoRA: by its tensors, or because it says a schedule."""
    return "tlora_T" in metadata or any("q_layer" in roles for roles in layers.values())


def to_native_tlora(
    layers: Layers, metadata: Mapping[str, str], schedule: Schedule, family: str, source: str, left_out: bool
) -> Native:
    """The file of `networks.tlora` with these layers, which have their start; `left_out`: not by themselves.

    Raises `Refused` for layers of two kinds, for pairs that open together, for FLUX's joined layers, whose
    parts have no ranks of their own, and for factors that do not fit.
    """
    orthogonal = any("q_layer" in roles for roles in layers.values())
    if not orthogonal and schedule.group == 2:
        raise Refused(
            f"{source} is an export as a plain LoRA whose ranks open in pairs; use the original file"
        )
    wanted = ROLES if orthogonal else ("down", "up")
    state: dict[str, Tensor] = {}
    found: set[tuple[int, float]] = set()
    for module, roles in layers.items():
        (place, piece), *more = places(module)
        if more or piece is not None:
            raise Refused(
                f"{module} in {source} is several layers of FLUX in one, whose ranks open together; import "
                "it from a file with diffusers' names"
            )
        rank = sizes(module, roles, source).get("rank", 1)
        absent = missing(roles) if orthogonal else [role for role in wanted if role not in roles]
        if absent or roles.keys() - {*wanted, "alpha"}:
            raise Refused(
                f"{module} in {source} has {', '.join(sorted(roles))} and a T-LoRA of this kind has "
                f"{', '.join(wanted)}; the file is not whole, or of two methods"
            )
        alpha = rank * strength(roles, rank)
        found.add((rank, alpha))
        name, table = native_layer(place, family)
        for role in wanted:
            value = roles[role].flatten() if "lambda" in role else roles[role]
            state[f"{name}.{table[role]}"] = value
        state[f"{name}.{table['alpha']}"] = torch.tensor(alpha)
    rank, alpha = found.pop() if len(found) == 1 else (None, None)
    part = (
        start_of(metadata, source) if orthogonal and (left_out or "lowrank.options" in metadata) else "last"
    )
    options = {
        "orthogonal": orthogonal,
        "sig_type": part,
        "use_data_init": left_out,
        "tlora_min_rank": schedule.min_rank,
        "tlora_alpha": schedule.alpha,
    }
    kept = {k: v for k, v in metadata.items() if k.startswith(("ss_", "modelspec.", "lowrank.base"))}
    told = {
        "lowrank.method": "tlora",
        "lowrank.options": json.dumps(options, sort_keys=True),
        "lowrank.rank": str(rank),
        "lowrank.alpha": str(alpha),
        "lowrank.layers": str(len(layers)),
        **replace(schedule, group=1).metadata(rank),
    }
    return Native(state, {**kept, **told})


def apart(one: Layers, first: Schedule, other: Layers, second: Schedule) -> float:
    """The largest ‖ΔW − ΔW′‖/‖ΔW‖ of a layer at one of `TIMES`."""
    worst = 0.0
    for t in TIMES:
        ours, theirs = (_at(layers, schedule, t) for layers, schedule in ((one, first), (other, second)))
        for place, layer in ours.items():
            worst = max(worst, static.distance(layer, theirs[place]) / max(layer.norm(), 1e-30))
    return worst


def _at(layers: Layers, schedule: Schedule, t: int) -> dict[LayerPath, static.Static]:
    plain = baked(layers, schedule, t, "the file")
    return {places(module)[0][0]: static.static(module, roles, "the file") for module, roles in plain.items()}
