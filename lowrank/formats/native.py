"""Adapters of other programs as this program's own files, of a method that computes the same ΔW.

A plain LoRA stays one, and a DoRA too; official ΔR files become `delta_r`. A LoRA becomes ΔR by projection
onto the basis of a given base: ΔR = Qᵀ·ΔW is the nearest, and what lies outside of Q is lost. An official QR
file, which holds Q and R without their start, gets the start back from the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.bases.qr_basis import start_basis
from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.static import Plain, Static
from lowrank.naming import keys
from lowrank.naming.places import LayerPath, native_layer

METHODS = ("lora", "dora", "delta_r", "delta_r_triu", "qrlora")


class Native(NamedTuple):
    """A native file: tensors under their keys, and what the file says."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    loss: float = 0.0  # ‖ΔW − what the file says‖/‖ΔW‖ over all layers
    worst: tuple[float, str] = (0.0, "")  # the same of the worst layer, and which


def method_of(adapter: Plain) -> str:
    """The method that holds the file's layers as they are."""
    if all("delta_r" in adapter.raw.get(place, {}) for place in adapter.layers):
        return "delta_r"
    if all({"q", "base_r", "up"} <= adapter.raw.get(place, {}).keys() for place in adapter.layers):
        return "qrlora"
    lengths = any(layer.magnitude is not None for layer in adapter.layers.values())
    return "dora" if lengths else "lora"


def to_native(
    adapter: Plain,
    method: str,
    base: BaseCheckpoint | None = None,
    rank: int | None = None,
    precision: torch.dtype | None = None,
    cache: str | None = None,
) -> Native:
    """The adapter as a file of `method`.

    `base` is needed for a basis, of `rank` (the adapter's own when None), which depends on the `precision`
    that the base is loaded in for training. Raises `Refused` for what the method cannot hold.
    """
    if method in ("delta_r", "qrlora") and method_of(adapter) == method and rank is None:
        layers = {place: dict(adapter.raw[place]) for place in adapter.layers}
        for place, roles in layers.items():
            roles["alpha"] = torch.tensor(adapter.layers[place].scale * _width(roles))
        return Native(*_file(adapter, method, layers))
    if method in ("lora", "dora"):
        return Native(
            *_file(adapter, method, {p: _pair(p, one, method, base) for p, one in adapter.layers.items()})
        )
    return _projected(adapter, method, base, rank, precision, cache)


def _width(roles: Mapping[str, Tensor]) -> int:
    return next(len(roles[role]) for role in ("delta_r", "down") if role in roles)


def _pair(place: LayerPath, layer: Static, method: str, base: BaseCheckpoint | None) -> dict[str, Tensor]:
    roles = {
        "down": layer.joined_kernel(layer.down, rows=True),
        "up": layer.joined_kernel(layer.up, rows=False),
        "alpha": torch.tensor(layer.scale * layer.rank),
    }
    if method == "lora":
        if layer.magnitude is not None:
            raise Refused(
                f"{place.path} has lengths (DoRA), which a plain LoRA cannot hold; give --method dora"
            )
        return roles
    m = layer.magnitude
    if m is None:
        if base is None:
            raise Refused(
                f"{place.path} has no lengths, and every layer of a DoRA has; give the base with --model, "
                "whose own they are, or --method lora"
            )
        m = torch.linalg.vector_norm(base.weight(place) + layer.delta(), dim=1)
    return {**roles, "magnitude": m.reshape(-1, *(1,) * (len(layer.kernel) + 1))}


def _file(
    adapter: Plain,
    method: str,
    layers: Mapping[LayerPath, Mapping[str, Tensor]],
    facts: Mapping[str, str] = {},
) -> tuple[dict[str, Tensor], dict[str, str]]:
    state: dict[str, Tensor] = {}
    for place, roles in layers.items():
        module, table = native_layer(place, adapter.family)
        for role, value in roles.items():
            if role == "magnitude" and table is keys.PEFT:
                value = value.flatten() if value.dim() == 2 else value.reshape(1, -1, 1, 1)
            state[f"{module}.{table[role]}"] = value
    sizes = {(_width(roles), float(roles["alpha"])) for roles in layers.values()}
    one = sizes.pop() if len(sizes) == 1 else (None, None)
    kept = {k: v for k, v in adapter.metadata.items() if not k.startswith(("lowrank.", "sshs_"))}
    base_facts = {k: v for k, v in adapter.metadata.items() if k.startswith("lowrank.base")}
    told = {
        "lowrank.method": method,
        "lowrank.options": "{}",
        "lowrank.rank": str(one[0]),
        "lowrank.alpha": str(one[1]),
        "lowrank.layers": str(len(layers)),
        **facts,
    }
    return state, {**kept, **base_facts, **told}


def _projected(
    adapter: Plain,
    method: str,
    base: BaseCheckpoint | None,
    rank: int | None,
    precision: torch.dtype | None,
    cache: str | None,
) -> Native:
    if base is None:
        raise Refused(f"--method {method} works in a basis of the base model; give it with --model")
    base.check(adapter.layers)
    lengths = next((p.path for p, layer in adapter.layers.items() if layer.magnitude is not None), None)
    if lengths:
        raise Refused(f"{lengths} has lengths (DoRA), which {method} cannot hold; give --method dora")
    names = {native_name(place, adapter.family): place for place in adapter.layers}
    ranks = {name: rank or adapter.layers[place].rank for name, place in names.items()}
    bases, facts = start_basis(_Weights(base, names, precision), ranks, cache)
    layers, lost, total, worst = {}, 0.0, 0.0, (0.0, "")
    for name, place in names.items():
        layer, (Q, R) = adapter.layers[place], bases[name]
        if method == "qrlora":
            roles, error = _restarted(place, layer, Q, R), 0.0
        else:
            wanted = layer.scale * (Q.T @ layer.up.float()) @ layer.down.float()  # Qᵀ ΔW (R, I)
            kept = torch.triu(wanted) if method == "delta_r_triu" else wanted
            whole = layer.norm() ** 2
            inside = float(kept.double().square().sum())
            error, total = max(0.0, whole - inside), total + whole
            roles = {"q": Q, "base_r": R, "delta_r": kept}
            share = math.sqrt(error / whole) if whole else 0.0
            worst = max(worst, (share, place.path))
        lost += error
        shaped = {
            role: layer.joined_kernel(value, rows=role not in ("q", "up")) for role, value in roles.items()
        }
        layers[place] = {**shaped, "alpha": torch.tensor(float(Q.shape[1]))}
    file = _file(adapter, method, layers, {f"lowrank.{key}": value for key, value in facts.items()})
    return Native(*file, math.sqrt(lost / total) if total else 0.0, worst)


def _restarted(place: LayerPath, layer: Static, Q: Tensor, R: Tensor) -> dict[str, Tensor]:
    """An official QR pair with the start that the official code took out of W: Q₀·R₀ is one product, whatever
    signs the factors have."""
    if layer.rank != Q.shape[1]:
        raise Refused(
            f"{place.path} has rank {layer.rank} and its start was asked for at rank {Q.shape[1]}; leave "
            f"--rank out"
        )
    return {"up": layer.up.float(), "down": layer.scale * layer.down.float(), "q": Q, "base_r": R}


def native_name(place: LayerPath, family: str) -> str:
    """The name that a network gives the layer: basis hashes are over these."""
    name = native_layer(place, family)[0]
    if name.startswith("lora_"):
        return name
    return ("lora_unet_" if place.part == "unet" else f"lora_{place.part}_") + place.path.replace(".", "_")


class _Weights(Mapping[str, Tensor]):
    """W (O, I) of each layer as training would have it, read only when asked for."""

    def __init__(
        self, base: BaseCheckpoint, names: Mapping[str, LayerPath], precision: torch.dtype | None
    ) -> None:
        self._base, self._names, self._precision = base, names, precision

    def __getitem__(self, name: str) -> Tensor:
        return self._base.stored(self._names[name], self._precision)

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
