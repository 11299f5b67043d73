"""Any adapters together: those that are one ΔW as a sum, the others live, as the networks that made them.

DoRA's ΔW depends on the base, a routed mixture's on the input: they are no thin pair that could be added to
others', and run beside them. Nothing is written into the base either way.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import as_passed
from lowrank.combine.mixture import Mixture
from lowrank.errors import Refused
from lowrank.formats.read import Adapter, refuse_masked
from lowrank.formats.static import made_by
from lowrank.formats.tlora import ROLES
from lowrank.naming import keys
from lowrank.naming.flux_join import strength

# roles of a ΔW that is a thin pair, also of one whose ranks open by the timestep
THIN = frozenset({"up", "down", "q", "base_r", "delta_r", "alpha", *ROLES})


class Share(NamedTuple):
    """How strong the layers are that the pattern is found in."""

    pattern: re.Pattern
    strength: float


def shares(text: str | None) -> tuple[Share, ...]:
    """`PATTERN -> 0.5; PATTERN -> 0` as rules; the first that is found in a layer's name holds for it.

    Raises `Refused`, quoting the rule that cannot be read.
    """
    found = []
    for rule in filter(None, (piece.strip() for piece in re.split(r"[;\n]", text or ""))):
        pattern, arrow, strength = (piece.strip() for piece in rule.rpartition("->"))
        try:
            made = Share(re.compile(pattern), float(strength)) if arrow and pattern else None
        except (re.error, ValueError):
            made = None
        if made is None or not math.isfinite(made.strength):
            raise Refused(f"{rule!r} is not of the form PATTERN -> 0.5, a regular expression and a number")
        found.append(made)
    return tuple(found)


def share_of(rules: Sequence[Share], name: str) -> float:
    """The strength of a layer by its name in the file; 1 where no rule is found in it."""
    return next((rule.strength for rule in rules if rule.pattern.search(name)), 1.0)


class Part(NamedTuple):
    """One adapter file and the strengths of its layers."""

    path: Path
    rules: tuple[Share, ...] = ()


class Ensemble:
    """Adapters of one base, their weights free to change. Raises `Refused` for what cannot go together.

    `at`, in 0..1000, bakes T-LoRAs at one timestep; `weight` as for `Adapter`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        at: float | None = None,
        weight: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.parts = list(parts)
        self.adapters = [Adapter(part.path, at=at, weight=weight) for part in parts]
        self._live = [i for i, adapter in enumerate(self.adapters) if _runs(adapter)]
        self._still = [i for i in range(len(parts)) if i not in self._live]
        for i, part in enumerate(self.parts):
            unused = [
                rule for rule in part.rules if not any(map(rule.pattern.search, self.adapters[i].layers))
            ]
            if unused:
                raise Refused(
                    f"no layer of {part.path} has {unused[0].pattern.pattern!r} in its name; they are like "
                    f"{', '.join(list(self.adapters[i].layers)[:2])}"
                )
            if part.rules and i in self._still:
                _fold(self.adapters[i], part.rules)
        self.mixture = Mixture([self.adapters[i] for i in self._still]) if self._still else None

    @property
    def adapts_text(self) -> bool:
        """Whether a text encoder has layers in one of the adapters."""
        still = self.mixture is not None and self.mixture.adapts_text
        return still or any(
            keys.is_text_encoder(name) for i in self._live for name in self.adapters[i].layers
        )

    def describe(self) -> str:
        """How the adapters are held, a sentence for each way."""
        told = [] if self.mixture is None else [self.mixture.describe()]
        told += [f"{self.adapters[i].path} runs as {_method(self.adapters[i])}" for i in self._live]
        return "\n".join(told)

    def attach(
        self, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = (), dtype: torch.dtype | None = None
    ) -> Attached:
        """Put all beside the model's layers, at weights 0. Raises `Refused` when one does not fit."""
        return Attached(self, denoiser, text_encoders, dtype)

    def save(self, path: str | Path, weights: Sequence[float], metadata: dict[str, str]) -> None:
        """Write the sum as one adapter. Raises `Refused` where an adapter is no thin pair."""
        refuse_masked(self.adapters)
        if self._live or self.mixture is None:
            adapter = self.adapters[self._live[0]]
            raise Refused(
                f"{adapter.path} was made by {_method(adapter)}, whose change is no pair of thin matrices, "
                "so a merged adapter cannot hold it; draw without --save_merged"
            )
        self.mixture.save(path, weights, metadata)

    @property
    def live(self) -> list[int]:
        """The positions of the adapters that run as networks; those with lengths first, next to the base."""
        return sorted(self._live, key=lambda i: not _has(self.adapters[i], "magnitude"))

    @property
    def still(self) -> list[int]:
        """The positions of the adapters in the sum."""
        return self._still


class Attached:
    """An ensemble beside a model; `set(weights)` changes strengths only."""

    def __init__(
        self,
        ensemble: Ensemble,
        denoiser: nn.Module,
        text_encoders: Sequence[nn.Module],
        dtype: torch.dtype | None,
    ) -> None:
        self._ensemble, self._undo = ensemble, []
        stretched = [ensemble.adapters[i] for i in ensemble.live if _has(ensemble.adapters[i], "magnitude")]
        if len(stretched) > 1:
            raise Refused(
                f"{stretched[0].path} and {stretched[1].path} both set the lengths of the base's rows, which "
                "cannot be added; use one of them"
            )
        self._networks: dict[int, AdapterNetwork] = {}
        try:
            for i in ensemble.live:
                network = _network(ensemble.adapters[i], denoiser, text_encoders)
                self._undo.append(network.restore)
                self._networks[i] = network
            self._still = None
            if ensemble.mixture is not None:
                self._still = ensemble.mixture.attach(denoiser, text_encoders, dtype)
                self._undo.append(self._still.restore)
        except BaseException:
            self.restore()
            raise
        self.set([0.0] * len(ensemble.parts))

    def set(self, weights: Sequence[float]) -> None:
        """Make the change Σ weights[i]·(adapter i); all zero is the base, bit for bit."""
        if self._still is not None:
            self._still.set([weights[i] for i in self._ensemble.still])
        for i, network in self._networks.items():
            rules = self._ensemble.parts[i].rules
            for layer in network.layers():
                name = network.targets[layer.name].native or layer.name
                layer.multiplier = weights[i] * share_of(rules, name)

    def restore(self) -> None:
        """Take everything off the model, the last first."""
        while self._undo:
            self._undo.pop()()


def _has(adapter: Adapter, role: str) -> bool:
    return any(role in roles for roles in adapter.layers.values())


def _runs(adapter: Adapter) -> bool:
    return any(roles.keys() - THIN for roles in adapter.layers.values())


def _method(adapter: Adapter) -> str:
    return adapter.fact("method") or ("dora" if _has(adapter, "magnitude") else "lora")


def _fold(adapter: Adapter, rules: Sequence[Share]) -> None:
    """Multiply the alphas by the strengths of their layers."""
    for name, roles in adapter.layers.items():
        down = next(roles[role] for role in ("delta_r", "down", "q_layer") if role in roles)
        alpha = len(down) * strength(roles, len(down)) * share_of(rules, name)
        adapter.layers[name] = {**roles, "alpha": torch.tensor(alpha)}


def _network(adapter: Adapter, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> AdapterNetwork:
    """The adapter as the network that made it, on its layers, at strength 0."""
    name = _method(adapter)
    if made_by({"lowrank.method": name}, str(adapter.path)) is None:
        raise Refused(
            f"{adapter.path} was made by {name}, and there is no networks/{name}.py; use its release"
        )
    module: Any = importlib.import_module(f"networks.{name}")
    encoders = as_passed(text_encoders, denoiser) if text_encoders else []
    made, _ = module.create_network_from_weights(
        0.0, str(adapter.path), None, encoders, denoiser, for_inference=True
    )
    made.apply_to(encoders, denoiser, bool(text_encoders), True)
    made.load_weights(str(adapter.path))
    return made.to(next(denoiser.parameters()).device).requires_grad_(False).eval()
