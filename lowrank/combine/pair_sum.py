"""The exact sum of adapters that have one ΔW each: ΔW = Σ wᵢ·ΔWᵢ, in thin factors.

On a shared Q the sum is Q·(Σ wᵢ sᵢ ΔRᵢ) and keeps rank r. On different bases or ranks it is a concatenation,
[U₁ | U₂]·[w₁s₁D₁ ; w₂s₂D₂], exact as well, of rank r₁ + r₂. Another rule of `rules` may take its place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.adapters.clock import uncompiled
from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.method import Factor, Gate, Method
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import find, host_shape
from lowrank.combine.rules import PLAIN, SUM, Merging, Part
from lowrank.errors import Refused
from lowrank.formats.delta import LORA, Delta, method_for
from lowrank.formats.read import Adapter, refuse_masked
from lowrank.naming import keys
from lowrank.naming.families import model_of
from lowrank.naming.places import LayerPath
from lowrank.tensors import write_tensors

PAIRS = Method("static", Factor(lambda *_: ({}, {}), trained=()))  # frozen pairs of factors
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")


class PairSum:
    """A weighted sum of adapters with one ΔW each, on one model, its weights free to change.

    `parts` has by layer the pairs of each adapter that has the layer, with the adapter's position. `merging`
    may add them in another way. `columns` has by layer a coefficient for each column of each part's ΔW.
    """

    def __init__(self, adapters: Sequence[Adapter], merging: Merging = PLAIN) -> None:
        self.adapters, (self.rule, self.options) = list(adapters), merging
        self.columns: dict[str, list[Tensor]] = {}
        for adapter in adapters:
            _refuse_magnitudes(adapter)
            adapter.require_deltas()
        _check_one_base(adapters)
        _check_one_family(adapters)
        self.modules: dict[str, str] = {}
        self.parts: dict[str, list[tuple[int, Delta]]] = {}
        owners: dict[str, list[tuple[Adapter, LayerPath]]] = {}
        for i, adapter in enumerate(adapters):
            for place, delta in adapter.layers.items():
                module = adapter.name(place)
                name = keys.flat(module)
                self.modules.setdefault(name, module)
                self.parts.setdefault(name, []).append((i, delta))
                owners.setdefault(name, []).append((adapter, place))
        for name, parts in self.parts.items():
            shapes = {i: (pair.up.shape[0], pair.down.shape[1]) for i, pair in parts}
            if len(set(shapes.values())) > 1:
                sizes = " and ".join(f"{o}×{n} in {adapters[i].source}" for i, (o, n) in shapes.items())
                raise Refused(f"{self.modules[name]} is {sizes}; merge adapters of one base")
        frozen = {
            name: [_frozen_up(*owner) for owner in layer_owners] for name, layer_owners in owners.items()
        }
        self.shared = {name for name, ups in frozen.items() if _equal(ups) and self.rule.pair is None}
        if self.rule.same_basis and (apart := [name for name in self.parts if name not in self.shared]):
            raise Refused(
                f"{self.modules[apart[0]]} has another basis in each adapter, and --merge {self.rule.name} "
                "adds ΔR on one basis; leave --merge out, which concatenates such layers"
            )
        self._first = {name: layer_owners[0] for name, layer_owners in owners.items()}

    @property
    def adapts_text(self) -> bool:
        """Whether a text encoder has layers in the sum."""
        return any(map(keys.is_text_encoder, self.modules.values()))

    def up(self, name: str) -> Tensor:
        """(O, R'), the same for all weights."""
        ups = [pair.up for _, pair in self.parts[name]]
        return ups[0] if name in self.shared else torch.cat([up.float() for up in ups], 1)

    def down(self, name: str, weights: Sequence[float]) -> Tensor:
        """(R', I) in fp32, with weights and scales folded in."""
        downs = [weights[i] * pair.scale * pair.down.float() for i, pair in self.parts[name]]
        return torch.stack(downs).sum(0) if name in self.shared else torch.cat(downs)

    def factors(self, name: str, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Up (O, R') and down (R', I) of the sum, by its rule."""
        if self.rule.pair is None:
            return self.up(name), self.down(name, weights)
        columns = self.columns.get(name)
        parts = [
            Part(weights[i], pair if columns is None else pair._replace(down=pair.down.float() * columns[k]))
            for k, (i, pair) in enumerate(self.parts[name])
        ]
        return self.rule.pair(parts, self.options, name)

    def describe(self) -> str:
        """One sentence: how the sum is held."""
        if self.rule.pair is not None:
            together = sum(len(parts) > 1 for parts in self.parts.values())
            return (
                f"{len(self.modules)} layers, {together} of them in several adapters, are merged by "
                f"{self.rule.name}"
            )
        several = [name for name, parts in self.parts.items() if len(parts) > 1 or len(self.adapters) == 1]
        joined = [name for name in several if name not in self.shared]
        sentences = []
        if alone := len(self.modules) - len(several):
            sentences.append(
                f"{alone} of {len(self.modules)} layers are in one adapter only and stay as they are"
            )
        if several and not joined:
            sentences.append(f"{len(several)} layers share one basis: ΔR are added, the rank stays")
        elif joined:
            ranks = sorted({sum(pair.rank for _, pair in self.parts[name]) for name in joined})
            sentences.append(
                f"{len(joined)} of {len(self.modules)} layers have different bases, ranks or kinds: they are "
                f"concatenated, exactly, to rank {', '.join(map(str, ranks))}"
            )
        return "; ".join(sentences)

    def save(self, path: str | Path, weights: Sequence[float], metadata: dict[str, str]) -> None:
        """Write the sum as one adapter: a ΔR file where every layer shares its Q, else a plain LoRA file.

        Raises `Refused` for a T-LoRA that is not baked at one timestep.
        """
        refuse_masked(self.adapters)
        together = len(self.shared) == len(self.modules)
        state = {}
        for name, module in self.modules.items():
            (adapter, place), (up, down) = self._first[name], self.factors(name, weights)
            first = adapter.raw.get(place, {})
            method = method_for(first, adapter.method) if together else LORA
            factor, kernel = method.require_factor(), adapter.layers[place].kernel
            chain = factor.chains[0]
            roles = {chain.up[0]: up, chain.down[-1]: down}
            for role in factor.saved_only:
                if role in first:
                    roles[role] = first[role].float() * adapter.layers[place].scale
            sides = factor.sides()
            roles = {role: _with_kernel(value, sides[role], kernel) for role, value in roles.items()}
            roles["alpha"] = torch.tensor(float(down.shape[0]))
            state |= _named_like(module, roles)
        kept = {
            f"lowrank.{fact}": value
            for fact in ("base_hash", "base_model", "layers_per_block", *(["basis_hash"] if together else []))
            if (value := self.adapters[0].fact(fact))
        }
        merged = ", ".join(
            f"{a.path.parent.name}/{a.path.name} × {w:g}" for a, w in zip(self.adapters, weights, strict=True)
        )
        facts = {
            "lowrank.method": self._method_name() if together else LORA.name,
            "lowrank.merged_from": merged,
            **({} if self.rule is SUM else {"lowrank.merged_by": self.rule.name}),
        }
        write_tensors(path, state, {**facts, **kept, **metadata})

    def _method_name(self) -> str:
        """The method of a sum on shared bases: that of all adapters, else the one of their tensors."""
        adapter, place = next(iter(self._first.values()))
        plain = method_for(adapter.raw[place], None).name
        methods = {adapter.fact("method") or plain for adapter in self.adapters}
        return methods.pop() if len(methods) == 1 else plain


def _refuse_magnitudes(adapter: Adapter) -> None:
    """Raise `Refused` for DoRA layers: their ΔW is no thin pair, and without the magnitude another one."""
    for place, layer in adapter.layers.items():
        if layer.magnitude is not None:
            raise Refused(
                f"{adapter.name(place)} in {adapter.source} has a DoRA magnitude, which a sum of low-rank "
                "pairs cannot hold; use the adapter alone, where it was made"
            )


def _check_one_base(adapters: Sequence[Adapter]) -> None:
    if len({adapter.fact("base_hash") for adapter in adapters} - {None}) > 1:
        bases = "; ".join(f"{a.source} on {a.fact('base_model') or a.fact('base_hash')}" for a in adapters)
        raise Refused(
            f"these adapters were trained on different base models ({bases}); merge adapters of one base"
        )


def _check_one_family(adapters: Sequence[Adapter]) -> None:
    """Raise `Refused` for adapters of two families. Adapters of one family need no layer in common."""
    families: dict[str, str] = {}  # by family the first file of it
    for adapter in adapters:
        families.setdefault(_family(adapter), adapter.source)
    families.pop("", None)
    if len(families) > 1:
        (first, file), (second, other) = list(families.items())[:2]
        raise Refused(f"{file} is for {first} and {other} is for {second}; merge adapters of one model")


def _family(adapter: Adapter) -> str:
    """The family of the model that an adapter is for; empty where its names fit several."""
    try:
        return (
            adapter.family
            or model_of(list(adapter.modules.values()), adapter.metadata, adapter.source).family
        )
    except Refused:
        return ""


def _frozen_up(adapter: Adapter, place: LayerPath) -> Tensor | None:
    """The up of a layer that trains its down alone, as ΔR does, so that downs on equal ups can be added."""
    roles = adapter.raw.get(place, {})
    factor = method_for(roles, adapter.method).require_factor()
    chain = factor.chains[0]
    alone = len(factor.chains) == len(chain.up) == len(chain.down) == 1 and factor.copy is None
    return roles.get(chain.up[0]) if alone and factor.trained == chain.down else None


def _equal(tensors: Sequence[Tensor | None]) -> bool:
    first = tensors[0]
    return first is not None and all(tensor is not None and torch.equal(first, tensor) for tensor in tensors)


def _with_kernel(value: Tensor, sides: Sequence[str], kernel: Sequence[int]) -> Tensor:
    if not kernel:
        return value
    return value.reshape(len(value), -1, *(kernel if sides[0] == "rank" else [1] * len(kernel)))


def _named_like(module: str, roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer's tensors under file keys, in the dialect that `module`'s name is of.

    kohya's names keep kohya's suffixes, dotted paths get PEFT's and the prefix of their model.
    """
    table, prefix = keys.PEFT, module
    if module.startswith("lora_"):
        table = keys.KOHYA
    elif not keys.is_text_encoder(module):
        prefix = f"{'unet' if _UNET.match(module) else 'transformer'}.{module}"
    return {f"{prefix}.{table[role]}": value for role, value in roles.items()}


class AttachedPairs:
    """A sum of pairs beside a model; `set(weights)` changes thin factors only."""

    def __init__(
        self,
        pairs: PairSum,
        denoiser: nn.Module,
        text_encoders: Sequence[nn.Module],
        dtype: torch.dtype | None,
    ) -> None:
        self.pairs = pairs
        hosts = _hosts(pairs, denoiser, text_encoders)
        self._names = {hosts[name].name: name for name in pairs.modules}
        once = [1.0] * len(pairs.adapters)
        first = {name: pairs.factors(name, once) for name in pairs.modules}
        for name, module in pairs.modules.items():
            have = (first[name][0].shape[0], first[name][1].shape[1])
            want = host_shape(hosts[name].module)
            if have != want:
                raise Refused(
                    f"{module} is {have[0]}×{have[1]} in the adapter and {want[0]}×{want[1]} in the model; "
                    "the adapter is for another base"
                )
        ranks = {t: first[name][0].shape[1] for t, name in self._names.items()}
        chosen = [hosts[name] for name in pairs.modules]
        method = dataclasses.replace(PAIRS, gate=_gate(pairs.adapters[0]))
        self.network = AdapterNetwork(method, chosen, lambda t: (ranks[t.name], float(ranks[t.name])))
        for layer in self.network.layers():
            up = first[self._names[layer.name]][0]
            shapes = {role: layer.get_buffer(role).shape for role in ("up", "down")}
            layer.load({"up": up.reshape(shapes["up"]), "down": torch.zeros(shapes["down"])}, "the mixture")
        if dtype is not None:
            self.network.cast_frozen(dtype)
        self.network.to(next(denoiser.parameters()).device)
        self.network.apply_to(list(text_encoders), denoiser, True, True)

    def set(self, weights: Sequence[float]) -> None:
        """Set the factors of these weights; all 0 is the base, bit for bit."""
        for layer in self.network.layers():
            if not any(weights):
                layer.get_buffer("down").zero_()
                continue
            up, down = self.pairs.factors(self._names[layer.name], weights)
            for role, value in (("up", up), ("down", down)):
                buffer = layer.get_buffer(role)
                buffer.copy_(value.reshape(buffer.shape))

    def layers(self) -> Iterator[tuple[str, AdaptedLayer]]:
        """Each layer with its name in the sum."""
        return ((self._names[layer.name], layer) for layer in self.network.layers())


def _hosts(pairs: PairSum, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> dict:
    """The model's layers by the names of the sum's. Raises `Refused` where one is not there."""
    roots = [
        ("unet", uncompiled(denoiser)),
        *((f"te{i + 1}", encoder) for i, encoder in enumerate(text_encoders)),
    ]
    parts = {_part(module) for module in pairs.modules.values()}
    hosts = {
        spelled: target
        for part, root in roots
        if part in parts
        for target in find(part, root, target=".")
        for spelled in target.spellings
    }
    lost = [module for name, module in pairs.modules.items() if name not in hosts]
    if lost:
        models = " or ".join(type(root).__name__ for _, root in roots)
        raise Refused(
            f"{len(lost)} of {len(pairs.modules)} adapter layers are not in {models}, for example "
            f"{lost[0]}; the adapter is for another model"
        )
    return hosts


def _gate(adapter: Adapter) -> Gate | None:
    return None if adapter.schedule is None else Gate(adapter.schedule.open, adapter.schedule.metadata)


def _part(module: str) -> str:
    return keys.flat(module).partition("|")[0] if keys.is_text_encoder(module) else "unet"
