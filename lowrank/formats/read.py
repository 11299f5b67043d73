"""An adapter file for merging and comparing: layers as pairs of up and down, metadata, schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.formats.names import (
    Layers,
    baked,
    read_layers,
)
from lowrank.formats.static import made_by, static
from lowrank.formats.tlora import schedule_of, with_copies, without_dead
from lowrank.naming import keys


class Adapter:
    """An adapter file: its layers, its metadata, the schedule of its ranks if it is a T-LoRA, its path.

    `at`, in 0..1000, bakes a T-LoRA at one timestep; `config` is SimpleTuner's `_tlora_config`;
    `weight(module)`, W (O, I) of the base, is asked where a T-LoRA of LyCORIS leaves out its start.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        at: float | None = None,
        config: Mapping[str, Any] | None = None,
        weight: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.path = Path(path)
        layers, self.metadata = read_layers(path)
        _check_once(layers, str(path))
        self.layers = _folded(without_dead(layers), self.metadata, str(path))
        self.schedule = schedule_of(path, self.layers, self.metadata, config)
        if weight is not None:
            self.layers = with_copies(self.layers, weight, self.metadata, str(path))
        self.baked = at is not None and self.schedule is not None
        if at is not None and self.schedule is not None:
            self.layers, self.schedule = baked(self.layers, self.schedule, at, str(path)), None

    def fact(self, name: str) -> str | None:
        """A fact the file states about itself, or None (official files state none)."""
        value = self.metadata.get(f"lowrank.{name}")
        return None if value in (None, "None") else value


def _check_once(layers: Layers, source: str) -> None:
    """Raise `Refused` for a layer that a file has in two dialects."""
    seen: dict[str, str] = {}
    for module in layers:
        if (other := seen.setdefault(keys.flat(module), module)) != module:
            raise Refused(
                f"{source} names one layer twice, as {other} and as {module}; it holds two adapters at once, "
                "take one of them out"
            )


def _folded(layers: Layers, metadata: Mapping[str, str], source: str) -> Layers:
    """Layers of a method with cores or frozen halves as one pair of up and down; routed ones as they are."""
    roles = {role for one in layers.values() for role in one}
    if not roles & set(keys.PLAIN) or "router" in roles:
        return layers
    method = made_by(metadata, source)
    if method is None:
        name = f"networks.{metadata.get('lowrank.method')}"
        raise Refused(f"{source} was made by {name}, which is not here; use the release that made it")
    found = {}
    for module, own in layers.items():
        one = static(module, own, source, method=method)
        found[module] = {
            "up": one.up.reshape(*one.up.shape, *(1,) * len(one.kernel)),
            "down": one.down.reshape(one.rank, -1, *one.kernel),
            "alpha": torch.tensor(one.scale * one.rank),
            **({} if one.magnitude is None else {"magnitude": own["magnitude"]}),
        }
    return found


def masked(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The T-LoRAs among the adapters that are not baked at one timestep."""
    return [adapter for adapter in adapters if adapter.schedule is not None]


def refuse_masked(adapters: Sequence[Adapter]) -> None:
    """Raise `Refused` for a T-LoRA that is not baked at one timestep: it has no one ΔW."""
    if gated := masked(adapters):
        raise Refused(
            f"{gated[0].path} is a T-LoRA, another change at every timestep, and a merged file has one; "
            "name a timestep with --at_timestep"
        )
