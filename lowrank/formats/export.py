"""Adapters for other programs: as a plain LoRA, ΔR at rank r, QR-LoRA at rank 2r, both exact; T-LoRA with its
schedule in the metadata, or as it is at one timestep; T-LoRA as LyCORIS' `tlora`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.formats.names import Layers, read_layers, refuse_magnitudes, spelled, thin
from lowrank.formats.read import Adapter
from lowrank.formats.static import Static, distance
from lowrank.formats.tlora import lycoris_name, to_lycoris, write_sidecar
from lowrank.naming import keys
from lowrank.tensors import write_tensors


def to_lora(layers: Layers, source: str = "the file", method: str | None = None) -> dict[str, Tensor]:
    """A plain LoRA's tensors, under PEFT's keys (`transformer.<module>.lora_A.weight`, …) or, where the file
    has kohya's names, kohya's; the scale is alpha/rank.
    """
    refuse_magnitudes(layers, source)
    state = {}
    for module, roles in layers.items():
        up, down, scale = thin(module, roles, source, method)
        plain = {"down": down, "up": up, "alpha": torch.tensor(scale * down.shape[0])}
        state |= spelled(module, plain, roles)
    return state


def export_lora(source: str | Path, target: str | Path, at: float | None = None) -> dict[str, Tensor]:
    """Write `source` as a plain LoRA to `target`; returns what was written.

    A T-LoRA keeps its schedule in the metadata, for readers that mask it, and is all open for others; `at`,
    in 0..1000, bakes it at that timestep.
    """
    adapter = Adapter(source, at=at)
    metadata, schedule = adapter.metadata, adapter.schedule
    if at is not None and not adapter.baked:
        raise Refused(f"{source} is no T-LoRA, and the same at every timestep; leave --at-timestep out")
    state = to_lora(adapter.layers, str(source), metadata.get("lowrank.method"))
    ranks = ranks_of(state)
    kept = {
        key: value for key, value in metadata.items() if key.startswith(("ss_", "modelspec.", "lowrank.base"))
    }
    rank = str(ranks.pop()) if len(ranks) == 1 else "None"
    facts = {
        "lowrank.method": "lora" if schedule is None else "tlora",
        "lowrank.rank": rank,
        "lowrank.exported_from": metadata.get("lowrank.method", "unknown"),
    }
    if schedule is not None:
        facts |= schedule.metadata(None if rank == "None" else int(rank))
        if schedule.group == 1 and "lowrank.options" in metadata:
            facts["lowrank.options"] = metadata["lowrank.options"]
    if at is not None:
        facts["tlora_baked_at"] = f"{at:g}"
    write_tensors(target, state, {**kept, **facts})
    return state


def export_lycoris(source: str | Path, target: str | Path) -> dict[str, Tensor]:
    """Write an orthogonal T-LoRA as LyCORIS' `tlora`, `lycoris_config.json` beside it; returns its tensors.

    Raises `Refused` where LyCORIS would load it wrongly.
    """
    layers, metadata = read_layers(source)
    state, config = to_lycoris(layers, metadata, str(source))
    kept = {k: v for k, v in metadata.items() if k.startswith(("ss_", "modelspec.", "lowrank.", "tlora_"))}
    write_sidecar(Path(target).parent, config)
    write_tensors(target, state, {**kept, "lycoris_config": json.dumps(config)})
    return state


def ranks_of(state: Mapping[str, Tensor]) -> set[int]:
    """The ranks in an exported state dict."""
    downs = (keys.KOHYA["down"], keys.PEFT["down"], f".{keys.KOHYA['q_layer']}")
    return {value.shape[0] for key, value in state.items() if key.endswith(downs)}


def worst_difference(source: str | Path, target: str | Path, at: float | None = None) -> float:
    """The largest ‖ΔW_target − ΔW_source‖/‖ΔW_source‖ of a layer, read from both files, in thin factors; at a
    timestep `at`, or with all ranks open."""
    ours, theirs = Adapter(source, at=at).layers, read_layers(target)[0]
    worst = 0.0
    for module, roles in ours.items():
        told = module if module in theirs else lycoris_name(module)
        one = Static(*thin(module, roles, str(source)))
        other = Static(*thin(module, theirs[told], str(target)))
        worst = max(worst, distance(one, other) / max(one.norm(), 1e-30))
    return worst
