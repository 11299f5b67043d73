"""Several adapters at once: ΔW = Σ wᵢ·ΔWᵢ, exactly, without touching a base weight.

On a shared Q the sum is Q·(Σ wᵢ sᵢ ΔRᵢ) and keeps rank r. On different bases or ranks it is a concatenation,
[U₁ | U₂]·[w₁s₁D₁ ; w₂s₂D₂], exact as well, of rank r₁ + r₂.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.clock import uncompiled
from lowrank.adapters.method import Factor, Gate, Method
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import find, host_shape
from lowrank.errors import Refused
from lowrank.formats.names import (
    Thin,
    refuse_magnitudes,
    shares_basis,
    spelled,
    thin,
)
from lowrank.formats.read import Adapter, masked, refuse_masked
from lowrank.naming import keys
from lowrank.tensors import write_tensors

STATIC = Method("static", Factor(lambda *_: ({}, {}), trained=()))


class Mixture:
    """A weighted sum of adapters on one model, its weights free to change."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = list(adapters)
        for adapter in adapters:
            refuse_magnitudes(adapter.layers, str(adapter.path))
        bases = {adapter.fact("base_hash") for adapter in adapters} - {None}
        if len(bases) > 1:
            told = "; ".join(f"{a.path} on {a.fact('base_model') or a.fact('base_hash')}" for a in adapters)
            raise Refused(
                f"these adapters were trained on different base models ({told}); merge adapters of one base"
            )
        modules = {}
        for adapter in adapters:
            for module in adapter.layers:
                modules.setdefault(keys.flat(module), module)
        own = [{keys.flat(module): roles for module, roles in a.layers.items()} for a in adapters]
        if len(adapters) > 1 and not set.intersection(*(set(layers) for layers in own)):
            raise Refused(
                f"{adapters[0].path} and {adapters[1].path} have no layer in common, for example "
                f"{next(iter(adapters[0].layers))} and {next(iter(adapters[1].layers))}; "
                "are both for one model?"
            )
        self.modules = modules
        self._parts = {
            name: [(i, layers[name]) for i, layers in enumerate(own) if name in layers] for name in modules
        }
        self._thin: dict[str, list[tuple[int, Thin]]] = {
            name: [
                (i, thin(modules[name], roles, str(adapters[i].path), adapters[i].fact("method")))
                for i, roles in parts
            ]
            for name, parts in self._parts.items()
        }
        for name, parts in self._thin.items():
            shapes = {i: (pair.up.shape[0], pair.down.shape[1]) for i, pair in parts}
            if len(set(shapes.values())) > 1:
                told = " and ".join(f"{o}×{n} in {adapters[i].path}" for i, (o, n) in shapes.items())
                raise Refused(f"{modules[name]} is {told}; merge adapters of one base")
        self.shared = {
            name
            for name, parts in self._parts.items()
            if all(shares_basis(parts[0][1], other) for _, other in parts) and "delta_r" in parts[0][1]
        }

    @property
    def adapts_text(self) -> bool:
        """Whether a text encoder has layers in the sum."""
        return any(map(keys.is_text_encoder, self.modules.values()))

    def up(self, name: str) -> Tensor:
        """(O, R'), the same for all weights."""
        parts = [pair.up for _, pair in self._thin[name]]
        return parts[0] if name in self.shared else torch.cat([up.float() for up in parts], 1)

    def down(self, name: str, weights: Sequence[float]) -> Tensor:
        """(R', I) in fp32, with weights and scales folded in."""
        parts = [weights[i] * pair.scale * pair.down.float() for i, pair in self._thin[name]]
        return torch.stack(parts).sum(0) if name in self.shared else torch.cat(parts)

    def describe(self) -> str:
        """One sentence: how the sum is held."""
        joined = len(self.modules) - len(self.shared)
        if not joined:
            return f"{len(self.modules)} layers share one basis: ΔR are added, the rank stays"
        ranks = sorted(
            {
                self.down(name, [0.0] * len(self.adapters)).shape[0]
                for name in self.modules
                if name not in self.shared
            }
        )
        return (
            f"{joined} of {len(self.modules)} layers have different bases, ranks or kinds: they are "
            f"concatenated, exactly, to rank {', '.join(map(str, ranks))}"
        )

    def attach(
        self, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = (), dtype: torch.dtype | None = None
    ) -> AttachedMixture | AttachedParts:
        """Put the sum beside the model's layers, at weights 0. Raises `Refused` when a layer does not fit.

        A T-LoRA among others is attached by itself, for its ranks open and close.
        """
        if len(self.adapters) == 1 or not masked(self.adapters):
            return AttachedMixture(self, denoiser, text_encoders, dtype)
        return AttachedParts(self, denoiser, text_encoders, dtype)

    def save(self, path: str | Path, weights: Sequence[float], metadata: dict[str, str]) -> None:
        """Write the sum as one adapter: a ΔR file where every layer shares its Q, else a plain LoRA file.

        Raises `Refused` for a T-LoRA that is not baked at one timestep.
        """
        refuse_masked(self.adapters)
        together = len(self.shared) == len(self.modules)
        state = {}
        for name, module in self.modules.items():
            first = self._parts[name][0][1]
            down = self.down(name, weights)
            roles = {"q": self.up(name), "delta_r": down} if together else {"up": self.up(name), "down": down}
            if together and "base_r" in first:
                roles["base_r"] = first["base_r"].float() * self._thin[name][0][1].scale
            roles["alpha"] = torch.tensor(float(down.shape[0]))
            state |= spelled(module, roles, first)
        kept = {
            f"lowrank.{fact}": value
            for fact in ("base_hash", "base_model", *(["basis_hash"] if together else []))
            if (value := self.adapters[0].fact(fact))
        }
        methods = {adapter.fact("method") or "delta_r" for adapter in self.adapters}
        method = (methods.pop() if len(methods) == 1 else "delta_r") if together else "lora"
        merged = ", ".join(
            f"{a.path.parent.name}/{a.path.name} × {w:g}" for a, w in zip(self.adapters, weights, strict=True)
        )
        write_tensors(
            path, state, {"lowrank.method": method, "lowrank.merged_from": merged, **kept, **metadata}
        )


class AttachedMixture:
    """A mixture beside a model; `set(weights)` changes thin factors only."""

    def __init__(
        self,
        mixture: Mixture,
        denoiser: nn.Module,
        text_encoders: Sequence[nn.Module],
        dtype: torch.dtype | None,
    ) -> None:
        self.mixture = mixture
        roots = [
            ("unet", uncompiled(denoiser)),
            *((f"te{i + 1}", encoder) for i, encoder in enumerate(text_encoders)),
        ]
        wanted = {part: [m for m in mixture.modules.values() if _part(m) == part] for part, _ in roots}
        hosts = {
            spelled: t
            for part, root in roots
            if wanted[part]
            for t in find(part, root, target=".")
            for spelled in t.spellings
        }
        lost = [module for name, module in mixture.modules.items() if name not in hosts]
        if lost:
            models = " or ".join(type(root).__name__ for _, root in roots)
            raise Refused(
                f"{len(lost)} of {len(mixture.modules)} adapter layers are not in {models}, for example "
                f"{lost[0]}; the adapter is for another model"
            )
        self._names = {hosts[name].name: name for name in mixture.modules}
        nothing = [0.0] * len(mixture.adapters)
        for name, module in mixture.modules.items():
            have = (mixture.up(name).shape[0], mixture.down(name, nothing).shape[1])
            want = host_shape(hosts[name].module)
            if have != want:
                raise Refused(
                    f"{module} is {have[0]}×{have[1]} in the adapter and {want[0]}×{want[1]} in the model; "
                    "the adapter is for another base"
                )
        ranks = {t: mixture.up(name).shape[1] for t, name in self._names.items()}
        chosen = [hosts[name] for name in mixture.modules]
        method = dataclasses.replace(STATIC, gate=_gate(mixture.adapters[0]))
        self.network = AdapterNetwork(method, chosen, lambda t: (ranks[t.name], float(ranks[t.name])))
        for layer in self.network.layers():
            up = mixture.up(self._names[layer.name])
            shapes = {role: layer.get_buffer(role).shape for role in ("up", "down")}
            layer.load({"up": up.reshape(shapes["up"]), "down": torch.zeros(shapes["down"])}, "the mixture")
        if dtype is not None:
            self.network.cast_frozen(dtype)
        self.network.to(next(denoiser.parameters()).device)
        self.network.apply_to(list(text_encoders), denoiser, True, True)

    def set(self, weights: Sequence[float]) -> None:
        """Make ΔW = Σ weights[i]·ΔWᵢ; all zero is the base, bit for bit."""
        for layer in self.network.layers():
            down = self.mixture.down(self._names[layer.name], weights)
            own = layer.get_buffer("down")
            own.copy_(down.reshape(own.shape))

    @property
    def networks(self) -> list[AdapterNetwork]:
        return [self.network]

    def restore(self) -> None:
        """Take the mixture off its model."""
        self.network.restore()


class AttachedParts:
    """A mixture with T-LoRAs beside a model: each of them by itself, and the sum of the others."""

    def __init__(self, mixture: Mixture, *where: Any) -> None:
        index = range(len(mixture.adapters))
        alone = [(i,) for i in index if mixture.adapters[i].schedule is not None]
        others = tuple(i for i in index if mixture.adapters[i].schedule is None)
        self._groups = [*alone, others] if others else alone
        self._parts = [Mixture([mixture.adapters[i] for i in group]).attach(*where) for group in self._groups]

    @property
    def networks(self) -> list[AdapterNetwork]:
        return [network for part in self._parts for network in part.networks]

    def set(self, weights: Sequence[float]) -> None:
        """Make the change Σ weights[i]·ΔWᵢ(t); all zero is the base, bit for bit."""
        for group, part in zip(self._groups, self._parts, strict=True):
            part.set([weights[i] for i in group])

    def restore(self) -> None:
        """Take the parts off their model, the last first."""
        for part in reversed(self._parts):
            part.restore()


def _gate(adapter: Adapter) -> Gate | None:
    return None if adapter.schedule is None else Gate(adapter.schedule.open, adapter.schedule.metadata)


def _part(module: str) -> str:
    return keys.flat(module).partition("|")[0] if keys.is_text_encoder(module) else "unet"
