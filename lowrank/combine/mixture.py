"""Several adapters of one base at once, without changing a base weight: a sum, and networks beside it.

Adapters with one ΔW are added (`pair_sum`). DoRA's ΔW depends on the base, a routed mixture's on the input:
such adapters run beside the sum, as the networks that made them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.network_module import network_named
from lowrank.adapters.targets import as_passed
from lowrank.combine.columns import Call, learn_columns
from lowrank.combine.pair_sum import AttachedPairs, PairSum
from lowrank.combine.rules import PLAIN, SUM, Merging, Rule
from lowrank.combine.selection import AttachedSelection
from lowrank.combine.whole_layers import WholeLayers
from lowrank.errors import Refused
from lowrank.formats.delta import LORA, refuse_input_lengths
from lowrank.formats.foreign import refuse_foreign
from lowrank.formats.read import Adapter, masked, read_adapter, refuse_masked
from lowrank.naming import keys
from lowrank.naming.places import LayerPath


class Share(NamedTuple):
    """The strength of the layers whose names match a pattern."""

    pattern: re.Pattern
    strength: float


def shares(text: str | None) -> tuple[Share, ...]:
    """Parse `PATTERN -> 0.5; PATTERN -> 0`; the first rule that matches a layer's name applies.

    Raises `Refused`, quoting the rule that cannot be parsed.
    """
    rules = []
    for rule in filter(None, (piece.strip() for piece in re.split(r"[;\n]", text or ""))):
        pattern, arrow, strength = (piece.strip() for piece in rule.rpartition("->"))
        try:
            share = Share(re.compile(pattern), float(strength)) if arrow and pattern else None
        except (re.error, ValueError):
            share = None
        if share is None or not math.isfinite(share.strength):
            raise Refused(f"{rule!r} is not of the form PATTERN -> 0.5, a regular expression and a number")
        rules.append(share)
    return tuple(rules)


def share_of(rules: Sequence[Share], name: str) -> float:
    """The strength of a layer by its name in the file; 1 where no rule matches it."""
    return next((rule.strength for rule in rules if rule.pattern.search(name)), 1.0)


class Entry(NamedTuple):
    """One adapter file and the strengths of its layers."""

    path: Path
    rules: tuple[Share, ...] = ()


def read_mixture(
    entries: Sequence[Entry | str | Path],
    at: float | None = None,
    start: Callable[[str], Tensor] | None = None,
    base: Collection[LayerPath] = (),
    merging: Merging = PLAIN,
) -> Mixture:
    """The adapters of some files together; `at`, `start` and `base` as for `read_adapter`."""
    adapters, rules = [], []
    for entry in entries:
        entry = entry if isinstance(entry, Entry) else Entry(Path(entry))
        adapters.append(read_for_merge(entry.path, at=at, start=start, base=base))
        rules.append(entry.rules)
    return Mixture(adapters, rules, merging)


def read_for_merge(path: str | Path, **options) -> Adapter:
    """Read an adapter for a sum: products in fp32, layers of all kinds, none without a ΔW refused yet."""
    return read_adapter(path, precision=torch.float32, strict=False, foreign=True, **options)


class Mixture:
    """Adapters of one base, their weights free to change: a sum of pairs, and networks that run beside it.

    `rules` are the strengths of the layers of each adapter, `merging` is how their changes are added. Raises
    `Refused` for adapters of two bases, and for one that the rule cannot use.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        rules: Sequence[Sequence[Share]] = (),
        merging: Merging = PLAIN,
    ) -> None:
        self.merging, self.rule = merging, merging.rule
        check_rule(self.rule, adapters)
        self.adapters = chosen_blocks(self.rule, adapters)
        self.rules = [tuple(shares) for shares in rules] or [()] * len(self.adapters)
        live = [i for i, adapter in enumerate(self.adapters) if _runs_as_network(adapter)]
        self.live = sorted(live, key=lambda i: not self.adapters[i].has_magnitude())  # next to the base first
        sums = (i for i in range(len(self.adapters)) if i not in live)
        self.still = [i for i in sums if self.adapters[i].layers or not self.adapters[i].foreign]
        for i, shares in enumerate(self.rules):
            _check_rules(self.adapters[i], shares)
            if shares and i in self.still:
                self.adapters[i] = _weighed(self.adapters[i], shares)
        self.pairs = PairSum([self.adapters[i] for i in self.still], merging) if self.still else None

    @property
    def adapts_text(self) -> bool:
        """Whether a text encoder has layers in one of the adapters."""
        return any(place.part != "unet" for adapter in self.adapters for place in adapter.modules)

    def describe(self) -> str:
        """How the adapters are computed: a line for the sum, and one for each network."""
        lines = [] if self.pairs is None else [self.pairs.describe()]
        lines += [f"{self.adapters[i].source} runs as {_method(self.adapters[i])}" for i in self.live]
        for adapter in self.adapters:
            if kinds := Counter(layer.kind.name for layer in adapter.foreign.values()):
                counts = ", ".join(f"{name} × {count}" for name, count in kinds.items())
                lines.append(f"{adapter.source}: {counts} run beside the layers, as whole matrices")
        return "\n".join(lines)

    def usage(self) -> str:
        """One line for each file: how many of its tensors are used, and what is left out."""
        return "\n".join(dict.fromkeys(adapter.usage for adapter in self.adapters))

    def attach(
        self, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = (), dtype: torch.dtype | None = None
    ) -> AttachedMixture:
        """Attach all to the model's layers, at weights 0. Raises `Refused` when one does not fit."""
        return AttachedMixture(self, denoiser, text_encoders, dtype)

    def save(self, path: str | Path, weights: Sequence[float], metadata: dict[str, str]) -> None:
        """Write the sum as one adapter. Raises `Refused` where an adapter is no low-rank pair."""
        refuse_masked(self.adapters)
        if self.rule.by_step:
            raise Refused(
                f"--merge {self.rule.name} chooses an adapter at each step, which no merged adapter can do; "
                "draw without --save_merged"
            )
        for adapter in self.adapters:
            if adapter.foreign:
                refuse_foreign(adapter.foreign.values(), adapter.source)
        if self.live or self.pairs is None:
            adapter = self.adapters[self.live[0]]
            raise Refused(
                f"{adapter.source} was made by {_method(adapter)}, whose change is no pair of low-rank "
                "factors, so a merged adapter cannot contain it; draw without --save_merged"
            )
        self.pairs.save(path, weights, metadata)


class AttachedMixture:
    """A mixture beside a model; `set(weights)` changes strengths only.

    A T-LoRA among others is attached by itself, because its open ranks change with the timestep.
    """

    def __init__(
        self,
        mixture: Mixture,
        denoiser: nn.Module,
        text_encoders: Sequence[nn.Module],
        dtype: torch.dtype | None,
    ) -> None:
        self._mixture, self._undo = mixture, []
        doras = [
            adapter for adapter in (mixture.adapters[i] for i in mixture.live) if adapter.has_magnitude()
        ]
        if len(doras) > 1:
            raise Refused(
                f"{doras[0].source} and {doras[1].source} both set the lengths of the base's rows (DoRA), "
                "which cannot be added; use one of them"
            )
        self._selection: AttachedSelection | None = None
        self._live: dict[int, AdapterNetwork] = {}
        self._sums: list[tuple[tuple[int, ...], AttachedPairs]] = []
        self._whole: dict[int, WholeLayers] = {}
        try:
            for i, adapter in enumerate(mixture.adapters):
                if adapter.foreign:  # first, so that they see the base's own weights
                    share = functools.partial(_share_of_place, adapter, mixture.rules[i])
                    self._whole[i] = WholeLayers(adapter, denoiser, text_encoders, dtype, share)
                    self._undo.append(self._whole[i].restore)
            for i in mixture.live:
                self._live[i] = _network(mixture.adapters[i], denoiser, text_encoders)
                self._undo.append(self._live[i].restore)
            for group, pairs in _groups(mixture):
                attached = AttachedPairs(pairs, denoiser, text_encoders, dtype)
                self._sums.append((group, attached))
                self._undo.append(attached.network.restore)
            if mixture.rule.by_step:
                (_, style), (_, content) = self._sums
                self._selection = AttachedSelection(style, content, denoiser, mixture.merging.options)
                self._undo.append(self._selection.restore)
        except BaseException:
            self.restore()
            raise
        self.set([0.0] * len(mixture.adapters))

    @property
    def networks(self) -> list[AdapterNetwork]:
        """All networks, in the order in which they were attached."""
        return [*self._live.values(), *(attached.network for _, attached in self._sums)]

    def set(self, weights: Sequence[float]) -> None:
        """Make the change Σ weights[i]·(adapter i), or by the rule; all zero is the base, bit for bit."""
        if self._selection is not None:
            self._selection.weigh(weights)
            return
        for group, attached in self._sums:
            attached.set([weights[i] for i in group])
        for i, layers in self._whole.items():
            layers.set(weights[i])
        for i, network in self._live.items():
            for layer in network.layers():
                name = network.targets[layer.name].native or layer.name
                layer.multiplier = weights[i] * share_of(self._mixture.rules[i], name)

    def learn(self, denoiser: nn.Module, calls: Sequence[Sequence[Call]]) -> list[float]:
        """Train the coefficients of a rule that learns them, see `columns`; returns the losses."""
        ((_, attached),) = self._sums
        return learn_columns(attached, denoiser, calls, self._mixture.merging.options)

    def restore(self) -> None:
        """Detach everything, the last first."""
        while self._undo:
            self._undo.pop()()


def _share_of_place(adapter: Adapter, rules: Sequence[Share], place: LayerPath) -> float:
    return share_of(rules, adapter.name(place))


def _groups(mixture: Mixture) -> list[tuple[tuple[int, ...], PairSum]]:
    """The sums to attach, with the positions of their adapters: one, or each T-LoRA by itself."""
    if mixture.pairs is None:
        return []
    adapters = mixture.adapters
    if mixture.rule.by_step:
        return [((i,), PairSum([adapters[i]])) for i in mixture.still]
    if len(mixture.still) == 1 or not masked(mixture.pairs.adapters):
        return [(tuple(mixture.still), mixture.pairs)]
    alone = [(i,) for i in mixture.still if adapters[i].schedule is not None]
    others = tuple(i for i in mixture.still if adapters[i].schedule is None)
    return [(group, PairSum([adapters[i] for i in group])) for group in (*alone, others) if group]


def check_rule(rule: Rule, adapters: Sequence[Adapter]) -> None:
    """Raise `Refused` for adapters that a rule cannot merge: other than two, or without one low-rank ΔW."""
    if rule is SUM:
        return
    if rule.two and len(adapters) != 2:
        raise Refused(
            f"--merge {rule.name} merges a style and a content adapter, not {len(adapters)} adapters; leave "
            "--more_loras out"
        )
    for adapter in adapters:
        reasons = {
            f"is {_method(adapter)}, which has no low-rank ΔW": _runs_as_network(adapter),
            "has layers that are no low-rank pair": bool(adapter.foreign),
            "opens its ranks by the timestep (--at-timestep of tools/export_lora.py bakes one)": (
                adapter.schedule is not None
            ),
        }
        for reason, applies in reasons.items():
            if applies:
                raise Refused(f"{adapter.source} {reason}, so only --merge sum can use it; leave --merge out")


def chosen_blocks(rule: Rule, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with only the layers that the rule takes from each of them.

    Raises `Refused` for another family than SDXL, and for an adapter without such a layer.
    """
    if rule.blocks is None:
        return list(adapters)
    made = []
    for adapter, block in zip(adapters, rule.blocks, strict=True):
        if adapter.family != "sdxl":
            raise Refused(
                f"--merge {rule.name} is known for SDXL's blocks, and {adapter.source} is for "
                f"{adapter.family or 'another model'}; choose layers with --style_blocks, --content_blocks"
            )
        layers = {place: layer for place, layer in adapter.layers.items() if place.path.startswith(block)}
        if not layers:
            raise Refused(
                f"{adapter.source} has no layer in {block.rstrip('.')}, which --merge {rule.name} takes from "
                "it; choose layers with --style_blocks and --content_blocks"
            )
        kept = {place: module for place, module in adapter.modules.items() if place in layers}
        made.append(dataclasses.replace(adapter, layers=layers, modules=kept))
    return made


def _runs_as_network(adapter: Adapter) -> bool:
    routed = any(keys.ROUTER in roles for roles in adapter.raw.values())
    return routed or adapter.has_magnitude()


def _method(adapter: Adapter) -> str:
    return adapter.fact("method") or (keys.DORA if adapter.has_magnitude() else LORA.name)


def _check_rules(adapter: Adapter, rules: Sequence[Share]) -> None:
    names = [adapter.name(place) for place in adapter.modules]
    unused = [rule for rule in rules if not any(map(rule.pattern.search, names))]
    if unused:
        raise Refused(
            f"no layer of {adapter.source} has {unused[0].pattern.pattern!r} in its name; names are like "
            f"{', '.join(names[:2])}"
        )


def _weighed(adapter: Adapter, rules: Sequence[Share]) -> Adapter:
    """The adapter with the strengths of its layers in their scales."""
    layers = {}
    for place, layer in adapter.layers.items():
        alpha = layer.rank * layer.scale * share_of(rules, adapter.name(place))
        layers[place] = layer._replace(scale=float(torch.tensor(alpha)) / layer.rank)  # as a file holds it
    return dataclasses.replace(adapter, layers=layers)


def _network(adapter: Adapter, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> AdapterNetwork:
    """The adapter as a network of its method, attached at strength 0."""
    refuse_input_lengths(adapter.layers, adapter.source)
    name = _method(adapter)
    module = network_named(name)
    if module is None:
        raise Refused(
            f"{adapter.source} was made by {name}, and there is no networks/{name}.py; use its release"
        )
    encoders = as_passed(text_encoders, denoiser) if text_encoders else []
    network, _ = module.create_network_from_weights(
        0.0, adapter.source, None, encoders, denoiser, for_inference=True
    )
    network.apply_to(encoders, denoiser, bool(text_encoders), True)
    network.load_weights(adapter.source)
    return network.to(next(denoiser.parameters()).device).requires_grad_(False).eval()
