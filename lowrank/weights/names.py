"""Adapter files of any dialect, read into one shape: layers by module, tensors by role.

Roles: `up` (O×R), `down` (R×I), `q` (O×R, orthonormal basis), `base_r` and `delta_r` (R×I), `alpha` (0-d). ΔR
files hold q, base_r, delta_r; QR-LoRA files up and down with their initial copies q and base_r; plain LoRA
files up and down.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.adapters import keys
from lowrank.errors import Refused
from lowrank.tensors import read_tensors

Layers = dict[str, dict[str, Tensor]]


class Thin(NamedTuple):
    """ΔW = scale · up @ down, exactly; up (O, R'), down (R', I) with convolution kernels flattened into I."""

    up: Tensor
    down: Tensor
    scale: float


def read_layers(path: str | Path) -> tuple[Layers, dict[str, str]]:
    """({module: {role: tensor}}, metadata) of an adapter file; modules lose the `transformer.` prefix.

    Reads native, PEFT/diffusers, kohya and official QR-LoRA keys, the latter with or without the repeated
    `to_out.0`. Raises `Refused` when the file is not whole or holds no adapter.
    """
    state, metadata = read_tensors(path)
    layers: Layers = {}
    strange = []
    for key, value in state.items():
        found = keys.role_of(key)
        if found is None:
            strange.append(key)
        else:
            layers.setdefault(keys.module_path(found[0]), {})[found[1]] = value
    if not layers:
        raise Refused(
            f"{path} holds no adapter this program knows: its tensors are named like "
            f"{', '.join(strange[:3]) or 'nothing at all'}; give a LoRA, ΔR or QR-LoRA file"
        )
    for module, roles in layers.items():
        for role, value in roles.items():
            if not torch.isfinite(value).all():
                raise Refused(
                    f"{path} holds NaN or infinite values in {module}.{role}; use an earlier checkpoint"
                )
    return layers, metadata


def thin(module: str, roles: dict[str, Tensor], source: str = "the file") -> Thin:
    """One layer's ΔW as a thin pair in the dtype it is stored in.

    ΔR: [Q]·[ΔR]. QR-LoRA: [Q′ | Q₀]·[R′ ; −R₀], rank 2r. LoRA: [U]·[D]. The scale is alpha/r, and 1 without
    an alpha. Raises `Refused` when a factor is absent.
    """
    if "delta_r" in roles:
        pair = (roles.get("q"), roles["delta_r"])
    elif "q" in roles and "up" in roles:
        pair = (torch.cat([roles["up"], roles["q"]], 1), torch.cat([roles["down"], -roles["base_r"]]))
    else:
        pair = (roles.get("up"), roles.get("down"))
    up, down = pair
    if up is None or down is None:
        names = "q" if "delta_r" in roles else "up or down"
        raise Refused(
            f"{module} in {source} has no {names}, only {', '.join(sorted(roles))}; a file saved without its "
            "basis is completed by `--save_basis full` at training"
        )
    rank = roles["delta_r"].shape[0] if "delta_r" in roles else roles["down"].shape[0]
    scale = float(roles["alpha"]) / rank if "alpha" in roles else 1.0
    return Thin(up.flatten(1), down.flatten(1), scale)


def shares_basis(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two layers are ΔR adapters on one and the same Q, so that adding their ΔR adds them exactly."""
    return "delta_r" in a and "delta_r" in b and "q" in a and "q" in b and torch.equal(a["q"], b["q"])
