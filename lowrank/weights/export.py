"""Any static adapter as a plain LoRA for other programs: ΔR at rank r, QR-LoRA at rank 2r, both exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowrank.adapters import keys
from lowrank.tensors import write_tensors
from lowrank.weights.names import Layers, read_layers, refuse_magnitudes, spelled, thin


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


def export_lora(source: str | Path, target: str | Path) -> dict[str, Tensor]:
    """Write `source` as a plain LoRA to `target`; returns what was written."""
    layers, metadata = read_layers(source)
    state = to_lora(layers, str(source), metadata.get("lowrank.method"))
    ranks = ranks_of(state)
    kept = {
        key: value for key, value in metadata.items() if key.startswith(("ss_", "modelspec.", "lowrank.base"))
    }
    rank = str(ranks.pop()) if len(ranks) == 1 else "None"
    facts = {
        "lowrank.method": "lora",
        "lowrank.rank": rank,
        "lowrank.exported_from": metadata.get("lowrank.method", "unknown"),
    }
    write_tensors(target, state, {**kept, **facts})
    return state


def ranks_of(state: Mapping[str, Tensor]) -> set[int]:
    """The ranks in an exported state dict."""
    downs = (keys.KOHYA["down"], keys.PEFT["down"])
    return {value.shape[0] for key, value in state.items() if key.endswith(downs)}


def worst_difference(source: str | Path, target: str | Path) -> float:
    """The largest ‖ΔW_target − ΔW_source‖/‖ΔW_source‖ of a layer, read from both files, in thin factors."""
    ours, theirs = read_layers(source)[0], read_layers(target)[0]
    worst = 0.0
    for module, roles in ours.items():
        up, down, scale = thin(module, roles, str(source))
        other_up, other_down, other_scale = thin(module, theirs[module], str(target))
        U = torch.cat([up.double(), other_up.double()], 1)
        D = torch.cat([scale * down.double(), -other_scale * other_down.double()])
        difference = ((U.T @ U) * (D @ D.T).T).sum().clamp_min(0).sqrt()
        size = ((up.double().T @ up.double()) * (down.double() @ down.double().T).T).sum().clamp_min(0).sqrt()
        worst = max(worst, float(difference / (abs(scale) * size).clamp_min(1e-30)))
    return worst
