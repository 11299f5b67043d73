"""Adapters of other programs as this program's own files, of a method that computes the same ΔW.

A plain LoRA stays one, and a DoRA too; official ΔR files become `delta_r`. A LoRA becomes ΔR by projection
onto the basis of a given base: ΔR = Qᵀ·ΔW is the nearest, and what lies outside of Q is lost. An official QR
file, which holds Q and R without their start, gets the start back from the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.adapters.method import Chain
from lowrank.adapters.network_module import network_named
from lowrank.bases.qr_basis import start_basis
from lowrank.errors import Refused
from lowrank.formats import tlora
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.delta import LORA, Delta, check_shapes, distance, is_orthogonal, method_for
from lowrank.formats.read import Adapter, baked
from lowrank.naming import keys
from lowrank.naming.flux_join import strength
from lowrank.naming.places import LayerPath, native_layer, places

TIMES = (0, 250, 500, 750, 999)  # where two T-LoRAs are compared


class Native(NamedTuple):
    """A native file: tensors under their keys, metadata, and what the conversion lost."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    loss: float = 0.0  # ‖ΔW − ΔW of the file‖/‖ΔW‖ over all layers
    worst: tuple[float, str] = (0.0, "")  # loss of the worst layer, and its path
    start_of_base: bool = False  # the initial copy that is subtracted was computed from the base


def method_of(adapter: Adapter) -> str:
    """The method whose files can have the adapter's layers unchanged."""
    names = {method_for(adapter.raw.get(place, {}), None).name for place in adapter.layers}
    if len(names) == 1 and names != {LORA.name}:
        return names.pop()
    dora = any(layer.magnitude is not None for layer in adapter.layers.values())
    return keys.DORA if dora else LORA.name


def to_native(
    adapter: Adapter,
    method: str,
    base: BaseCheckpoint | None = None,
    rank: int | None = None,
    precision: torch.dtype | None = None,
    cache: str | None = None,
) -> Native:
    """The adapter as a file of `method`.

    `base` is needed for a basis, of `rank` (the adapter's own when None), which depends on the `precision`
    that the base is loaded in for training. Raises `Refused` for layers that the method cannot represent.
    """
    plain = method in (LORA.name, keys.DORA)
    if not plain and method_of(adapter) == method and rank is None:
        layers = {place: dict(adapter.raw[place]) for place in adapter.layers}
        for place, roles in layers.items():
            roles["alpha"] = torch.tensor(adapter.layers[place].scale * _width(place, roles))
        return Native(*_file(adapter, method, layers))
    if plain:
        return Native(
            *_file(adapter, method, {p: _pair(p, layer, method, base) for p, layer in adapter.layers.items()})
        )
    return _projected(adapter, method, base, rank, precision, cache)


def _width(place: LayerPath, roles: Mapping[str, Tensor]) -> int:
    return check_shapes(place.path, roles, "the file")["rank"]


def _pair(place: LayerPath, layer: Delta, method: str, base: BaseCheckpoint | None) -> dict[str, Tensor]:
    roles = {
        "down": layer.joined_kernel(layer.down, rows=True),
        "up": layer.joined_kernel(layer.up, rows=False),
        "alpha": torch.tensor(layer.scale * layer.rank),
    }
    if method == LORA.name:
        if layer.magnitude is not None:
            raise Refused(
                f"{place.path} has a DoRA magnitude, which a plain LoRA cannot have; give --method dora"
            )
        return roles
    m = layer.magnitude
    if m is None:
        if base is None:
            raise Refused(
                f"{place.path} has no magnitude, and every layer of a DoRA has one; give the base with "
                "--model to compute it, or --method lora"
            )
        m = torch.linalg.vector_norm(base.weight(place) + layer.delta(), dim=1)
    return {**roles, "magnitude": m.reshape(-1, *(1,) * (len(layer.kernel) + 1))}


def _file(
    adapter: Adapter,
    method: str,
    layers: Mapping[LayerPath, Mapping[str, Tensor]],
    facts: Mapping[str, str] = {},
) -> tuple[dict[str, Tensor], dict[str, str]]:
    state: dict[str, Tensor] = {}
    for place, roles in layers.items():
        module, table = native_layer(place, adapter.family)
        changed = keys.SUBTRACTED if keys.QR_BASIS[0] in roles else {}  # `down` and `up` beside their start
        for role, value in roles.items():
            if role == "magnitude" and table is keys.PEFT:
                value = value.flatten() if value.dim() == 2 else value.reshape(1, -1, 1, 1)
            state[f"{module}.{changed.get(role) or table[role]}"] = value
    sizes = {(_width(place, roles), float(roles["alpha"])) for place, roles in layers.items()}
    rank, alpha = sizes.pop() if len(sizes) == 1 else (None, None)
    kept = {k: v for k, v in adapter.metadata.items() if not k.startswith(("lowrank.", "sshs_"))}
    base_facts = {k: v for k, v in adapter.metadata.items() if k.startswith("lowrank.base")}
    described = {
        "lowrank.method": method,
        "lowrank.options": "{}",
        "lowrank.rank": str(rank),
        "lowrank.alpha": str(alpha),
        "lowrank.layers": str(len(layers)),
        **facts,
    }
    return state, {**kept, **base_facts, **described}


def _projected(
    adapter: Adapter,
    method: str,
    base: BaseCheckpoint | None,
    rank: int | None,
    precision: torch.dtype | None,
    cache: str | None,
) -> Native:
    if base is None:
        raise Refused(f"--method {method} works in a basis of the base model; give it with --model")
    base.check(adapter.layers)
    dora = next((p.path for p, layer in adapter.layers.items() if layer.magnitude is not None), None)
    if dora:
        raise Refused(f"{dora} has a DoRA magnitude, which {method} cannot have; give --method dora")
    names = {native_name(place, adapter.family): place for place in adapter.layers}
    ranks = {name: rank or adapter.layers[place].rank for name, place in names.items()}
    module = network_named(method)
    assert module is not None  # one of `keys.IMPORTED`
    factor = module.made({}).require_factor()
    bases, facts = start_basis(_Weights(base, names, precision), ranks, cache)
    layers, lost, total, worst = {}, 0.0, 0.0, (0.0, "")
    for name, place in names.items():
        layer, (Q, R) = adapter.layers[place], bases[name]
        if factor.copy is not None:
            roles, error = _restarted(place, layer, factor.copy, Q, R), 0.0
        else:
            chain = factor.chains[0]
            wanted = layer.scale * (Q.T @ layer.up.float()) @ layer.down.float()  # Qᵀ ΔW (R, I)
            constrain = factor.constrain.get(chain.down[-1])
            kept = wanted if constrain is None else constrain(wanted)
            whole = layer.norm() ** 2
            inside = float(kept.double().square().sum())
            error, total = max(0.0, whole - inside), total + whole
            roles = {chain.up[0]: Q, **dict.fromkeys(factor.saved_only, R), chain.down[-1]: kept}
            share = math.sqrt(error / whole) if whole else 0.0
            worst = max(worst, (share, place.path))
        lost += error
        sides = factor.sides()
        shaped = {
            role: layer.joined_kernel(value, rows=sides[role][0] == "rank") for role, value in roles.items()
        }
        layers[place] = {**shaped, "alpha": torch.tensor(float(Q.shape[1]))}
    file = _file(adapter, method, layers, {f"lowrank.{key}": value for key, value in facts.items()})
    return Native(*file, math.sqrt(lost / total) if total else 0.0, worst, factor.copy is not None)


def _restarted(place: LayerPath, layer: Delta, start: Chain, Q: Tensor, R: Tensor) -> dict[str, Tensor]:
    """An official QR pair with the start Q₀·R₀ that the official code subtracted from W.

    The product does not depend on the signs of the factors.
    """
    if layer.rank != Q.shape[1]:
        raise Refused(
            f"{place.path} has rank {layer.rank}, and --rank {Q.shape[1]} would give its start another rank; "
            "leave --rank out"
        )
    pair = {"up": layer.up.float(), "down": layer.scale * layer.down.float()}
    return {**pair, start.up[0]: Q, start.down[-1]: R}


def native_name(place: LayerPath, family: str) -> str:
    """The name of a layer in a network, which basis hashes are computed over."""
    name = native_layer(place, family)[0]
    if name.startswith("lora_"):
        return name
    return ("lora_unet_" if place.part == "unet" else f"lora_{place.part}_") + place.path.replace(".", "_")


class _Weights(Mapping[str, Tensor]):
    """W (O, I) of each layer in the dtype of training, read from disk at each lookup."""

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


# ---------- T-LoRA


def to_native_tlora(adapter: Adapter, start_left_out: bool) -> Native:
    """The file of `networks.tlora` with an adapter's layers, whose initial copies are present.

    Raises `Refused` for layers of two kinds, for pairs that open together, for FLUX's joined layers, whose
    parts share their ranks, and for factors that do not fit.
    """
    source, schedule = adapter.source, adapter.schedule
    assert schedule is not None  # checked by the caller
    orthogonal = any(map(is_orthogonal, adapter.raw.values()))
    if not orthogonal and schedule.group == 2:
        raise Refused(
            f"{source} is an export as a plain LoRA whose ranks open in pairs; use the original file"
        )
    state: dict[str, Tensor] = {}
    sizes: set[tuple[int, float]] = set()
    for place, roles in adapter.raw.items():
        module = adapter.modules[place]
        if places(module) != [(place, None)]:
            raise Refused(
                f"{module} in {source} is several layers of FLUX in one, whose ranks open together; import "
                "it from a file with diffusers' names"
            )
        method = method_for(roles, adapter.method)
        rank = check_shapes(module, roles, source, method).get("rank", 1)
        sides = method.require_factor().sides()
        if roles.keys() - {"alpha"} != sides.keys() or is_orthogonal(roles) != orthogonal:
            wanted = sides if is_orthogonal(roles) == orthogonal else ("one kind of factors",)
            raise Refused(
                f"{module} in {source} has {', '.join(sorted(roles))} and a T-LoRA of this kind has "
                f"{', '.join(wanted)}; the file is not whole, or of two methods"
            )
        alpha = rank * strength(roles, rank)
        sizes.add((rank, alpha))
        name, table = native_layer(place, adapter.family)
        for role, inherited in sides.items():
            state[f"{name}.{table[role]}"] = roles[role].flatten() if len(inherited) == 1 else roles[role]
        state[f"{name}.{table['alpha']}"] = torch.tensor(alpha)
    rank, alpha = sizes.pop() if len(sizes) == 1 else (None, None)
    known = orthogonal and (start_left_out or "lowrank.options" in adapter.metadata)
    options = {
        "orthogonal": orthogonal,
        "sig_type": tlora.start_of(adapter.metadata, source) if known else "last",
        "use_data_init": start_left_out,
        "tlora_min_rank": schedule.min_rank,
        "tlora_alpha": schedule.alpha,
    }
    kept = {k: v for k, v in adapter.metadata.items() if k.startswith(("ss_", "modelspec.", "lowrank.base"))}
    facts = {
        "lowrank.method": tlora.METHOD,
        "lowrank.options": json.dumps(options, sort_keys=True),
        "lowrank.rank": str(rank),
        "lowrank.alpha": str(alpha),
        "lowrank.layers": str(len(adapter.raw)),
        **replace(schedule, group=1).metadata(rank),
    }
    return Native(state, {**kept, **facts})


def largest_difference(adapter: Adapter, other: Adapter) -> float:
    """The largest ‖ΔW − ΔW′‖/‖ΔW‖ of a layer of two T-LoRAs at one of `TIMES`."""
    worst = 0.0
    for t in TIMES:
        ours, theirs = baked(adapter, t).layers, baked(other, t).layers
        for place, layer in ours.items():
            worst = max(worst, distance(layer, theirs[place]) / max(layer.norm(), 1e-30))
    return worst
