"""Trained files of the fork that the user's network names come from, turned into plain LoRAs.

Format (owner: a-ru2016/sd-scripts): `<layer>.alpha_up` and `.alpha_down` (h, h), `.s` (2h,) or `.m` (O,),
`.null_up` (O, h) and `.null_down` (h, I), in older files the two
swapped. The basis is not inside: its file has `<layer>.lora_up.weight.basis` (O, K),
`.lora_down.weight.basis` (I, K) and their `.mean`s. Its forward was

    ΔW = (L·α_up + μ_up·1ᵀ)·diag(s₁)·V_N + U_N·diag(s₂)·(α_down·R + 1·μ_downᵀ)      or m ⊙ the same without s

with the basis cut to h directions and no alpha, which is a plain LoRA of rank 2h.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.naming import keys


def is_legacy(names: Iterable[str]) -> bool:
    """Whether the tensors of these names are a trained file of that layout."""
    return any(name.endswith(".alpha_up") for name in names)


def plain_lora(
    state: Mapping[str, Tensor], basis: Mapping[str, Tensor], source: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """(U (O, 2h), D (2h, I)) with scale 1 by layer, named as `keys.flat` names them.

    Raises `Refused` for routed files, which have no one ΔW, and for a basis without one of the layers.
    """
    if any(".gate." in key or key == "shared_alpha_down" for key in state):
        raise Refused(
            f"{source} is a routed file (gate, shared_alpha_down), which has another ΔW for each input; "
            "no program reads it; train it again with networks.network_null_lalora_plus_Effi_ABM"
        )
    dotted = {_flat(key.split(".lora_")[0]): key.split(".lora_")[0] for key in basis if ".lora_" in key}
    found = {}
    for name in sorted(key.removesuffix(".alpha_up") for key in state if key.endswith(".alpha_up")):
        if _flat(name) not in dotted:
            raise Refused(
                f"the basis has no layer {name} of {source}; give the basis file it was trained with"
            )
        own = {
            role: state[f"{name}.{role}"].double()
            for role in ("alpha_up", "alpha_down", "null_up", "null_down")
        }
        found[_flat(name)] = _pair(name, own, state, basis, dotted[_flat(name)])
    return found


def _pair(
    name: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor], basis: Mapping[str, Tensor], at: str
) -> tuple[Tensor, Tensor]:
    h = len(own["alpha_up"])
    sides = {}
    for side in ("up", "down"):
        columns, mean = (basis[f"{at}.lora_{side}.weight.{part}"].double() for part in ("basis", "mean"))
        if columns.dim() != 2 or columns.shape[1] < h:
            raise Refused(
                f"{name} needs {h} directions and its {side} basis is {tuple(columns.shape)}; it is another"
            )
        sides[side] = (columns[:, :h], mean)
    (L, mean_up), (R, mean_down) = sides["up"], sides["down"]
    U_N, V_N = own["null_up"].flatten(1), own["null_down"].flatten(1)
    if U_N.shape[0] == h != len(L):  # the older meaning of the two names
        U_N, V_N = V_N, U_N
    if (U_N.shape, V_N.shape) != ((len(L), h), (h, len(R))):
        raise Refused(
            f"{name} has null factors {tuple(U_N.shape)} and {tuple(V_N.shape)} where its basis has {len(L)} "
            f"outputs and {len(R)} inputs; give the basis file it was trained with"
        )
    s = state.get(f"{name}.s", torch.ones(2 * h)).double()
    m = state.get(f"{name}.m", torch.ones(len(L))).double()
    W_up = L @ own["alpha_up"] + mean_up[:, None]  # (O, h)
    W_down = own["alpha_down"] @ R.mT + mean_down  # (h, I)
    up = torch.cat([W_up * s[:h], U_N * s[h:]], dim=1) * m[:, None]
    return up.float(), torch.cat([V_N, W_down]).float()


def _flat(name: str) -> str:
    """`unet.down.blocks.0…`, `unet_down_blocks_0…` and `te1_text_model…` as `keys.flat` spells them."""
    return keys.flat("lora_" + name.replace(".", "_").removeprefix("lora_"))
