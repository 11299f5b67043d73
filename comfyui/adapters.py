"""Adapter files on ComfyUI's models: one ΔW as weight patches, others beside the layers at each step.

Static adapters (LoRA, ΔR, QR-LoRA …) become ComfyUI's own LoRA patches, exactly; DoRA and layers that are no
pair of factors (LoKr, OFT …) a patch of their own.
The ΔW of T-LoRA and routed experts depends on the step or the input: `live` attaches them while the denoiser
runs. Layers are looked up in ComfyUI's key maps, which also have the rows of a fused layer (FLUX's qkv).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor, nn

from lowrank.adapters.method import Gate
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.network_module import network_named
from lowrank.adapters.targets import Layer, find, host_shape
from lowrank.combine.mixture import check_rule, chosen_blocks, read_for_merge
from lowrank.combine.pair_sum import PAIRS, PairSum
from lowrank.combine.rules import PLAIN, Merging
from lowrank.combine.selection import Choice, Selection, changeovers
from lowrank.errors import Refused
from lowrank.formats.delta import Delta, swapped
from lowrank.formats.foreign import ForeignLayer
from lowrank.formats.read import Adapter
from lowrank.naming import keys
from lowrank.naming.places import LayerPath

from .live import Beside, LayerRows
from .patches import Change, Sum

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """An adapter file, and a schedule {min_rank, alpha} that replaces the file's."""

    path: str
    adapter: Adapter
    config: Mapping[str, Any] | None = None

    @property
    def routed(self) -> bool:
        """Whether it has experts, whose ΔW depends on the input."""
        return any(keys.ROUTER in roles for roles in self.adapter.raw.values())

    @property
    def static(self) -> bool:
        """Whether it adds one low-rank ΔW: every adapter but T-LoRA, experts, DoRA and other kinds."""
        return not self.live and not self.adapter.has_magnitude() and not self.adapter.foreign

    @property
    def live(self) -> bool:
        """Whether its ΔW depends on the step or the input."""
        return self.routed or self.adapter.schedule is not None


class Hosts:
    """Where an adapter's layers are in a model: key, and (dimension, start, length) in a fused layer."""

    def __init__(self, patcher: Any, key_map: Mapping[str, Any]) -> None:
        self.patcher = patcher
        pairs = (
            (name, (to, None) if isinstance(to, str) else (to[0], to[1])) for name, to in key_map.items()
        )
        self._where = {keys.flat(name): where for name, where in pairs if where[0].endswith(".weight")}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def place(self, name: str) -> LayerRows:
        """The layer and the rows of its output that belong to a name as `keys.flat` spells it."""
        key, part = self._where[name]
        if part is not None and part[0] != 0:
            raise Refused(f"{name} is in columns of {key} here, which no adapter can be put beside")
        return LayerRows(key.removesuffix(".weight"), None if part is None else (part[1], part[2]))

    def patch_key(self, name: str) -> Any:
        """The key of `add_patches`."""
        key, part = self._where[name]
        return key if part is None else (key, part)

    def layer(self, name: str) -> Layer:
        return self.patcher.model.get_submodule(self.place(name).module)

    def stand_in(self, name: str) -> Layer:
        """A layer of the shape that the adapter was trained on, whose weight is one zero."""
        layer, rows = self.layer(name), self.place(name).rows
        if isinstance(layer, nn.Conv2d):
            facts = ("kernel_size", "stride", "padding", "dilation", "groups")
            options: Any = {fact: getattr(layer, fact) for fact in facts}
            host = nn.Conv2d(layer.in_channels, layer.out_channels, bias=False, device="meta", **options)
        else:
            outs = layer.out_features if rows is None else rows[1]
            host = nn.Linear(layer.in_features, outs, bias=False, device="meta")
        host.weight = nn.Parameter(torch.zeros(()).expand(host.weight.shape), requires_grad=False)
        return host

    def bias_key(self, name: str) -> str:
        """The key of a layer's bias. Raises `Refused` for a layer without one of its own."""
        key, part = self._where[name]
        key = f"{key.removesuffix('.weight')}.bias"
        if part is not None or key not in self.patcher.model.state_dict():
            raise Refused(
                f"the adapter changes the bias of {name}, which has none here; it is for another model"
            )
        return key

    def weight(self, name: str) -> Tensor:
        """W (O, I) in fp32, without the patches."""
        key, part = self._where[name]
        stored, convert = self.patcher.get_key_patches(key)[key][0]
        W = convert(stored.detach().to("cpu", copy=True), inplace=True).float()
        return (W if part is None else W.narrow(*part)).flatten(1)


def read_adapter(path: str, config: Mapping[str, Any] | None = None, strict: bool = False) -> File:
    """An adapter file; `config` is a schedule {min_rank, alpha} that replaces the file's.

    Logs what of the file is not used; with `strict`, raises `Refused` for it.
    """
    adapter = read_for_merge(path, schedule=config)
    if strict:
        adapter.refuse_unused()
    logger.log(logging.WARNING if adapter.not_understood else logging.INFO, "%s", adapter.usage)
    return File(path, adapter, config)


def apply_adapter(
    model: Any, clip: Any, file: File, strength: float, strength_clip: float = 1.0
) -> tuple[Any, Any]:
    """Clones of model and CLIP with an adapter; `clip` may be None. Raises `Refused` for another base's."""
    model, clip = model.clone(), None if clip is None else clip.clone()
    denoiser, encoders = _hosts(model, clip)
    if file.routed:
        _live(model, _routed(file, denoiser), strength)
        return model, clip
    adapter = file.adapter
    if adapter.schedule is not None:
        start = lambda module: denoiser.weight(keys.flat(module))  # noqa: E731
        adapter = read_for_merge(file.path, schedule=file.config, start=start)
    adapter.require_deltas()
    changes = _changes(adapter)
    text = [name for name in changes if keys.is_flat_text(name)]
    _check(file.path, [name for name in changes if name not in text], denoiser)
    if adapter.schedule is not None:
        part = {place: layer for place, layer in adapter.layers.items() if place.part == "unet"}
        _live(model, _masked(replace(adapter, layers=part), denoiser), strength)
        low_rank = {keys.flat(adapter.name(place)) for place in part}
        changes = {name: change for name, change in changes.items() if name not in low_rank}
    _patch(model, denoiser, {n: c for n, c in changes.items() if n not in text}, strength)
    _patch_text(clip, encoders, {n: c for n, c in changes.items() if n in text}, strength_clip)
    return model, clip


def _changes(adapter: Adapter, share: float = 1.0) -> dict[str, list[tuple[Change, float]]]:
    """What an adapter changes in each layer, by the layer's name as `keys.flat` spells it."""
    changes: dict[str, list[tuple[Change, float]]] = {}
    for place in adapter.layers:
        changes.setdefault(keys.flat(adapter.name(place)), []).append((_as_named(adapter, place), share))
    for place, layer in adapter.foreign.items():
        layer = replace(layer, swapped=False)  # ComfyUI's rows are in BFL's order, as the file's
        changes.setdefault(keys.flat(adapter.name(place)), []).append((layer, share))
    return changes


def _as_named(adapter: Adapter, place: LayerPath) -> Delta:
    """ΔW with its rows in the order of the layer that the file names; BFL's adaLN exchanges the halves."""
    layer = adapter.layers[place]
    return swapped(layer) if "adaLN" in adapter.modules[place] else layer


def merge_adapters(
    model: Any, clip: Any, files: Sequence[File], weights: Sequence[float], merging: Merging = PLAIN
) -> tuple[Any, Any]:
    """Clones with Σ weights·(W′ − W), or by a rule. Adapters on one basis keep their rank in a sum.

    Raises `Refused` for adapters of different bases, and for those that the rule cannot merge.
    """
    check_rule(merging.rule, [file.adapter for file in files])
    adapters = chosen_blocks(merging.rule, [file.adapter for file in files])
    if not all(file.static for file in files):
        return _merge_patches(model, clip, files, weights)
    if merging.rule.by_step:
        return _chosen_by_step(model, clip, adapters, weights, merging)
    sums = PairSum(adapters, merging)
    pairs = {name: [(Delta(*sums.factors(name, weights), 1.0), 1.0)] for name in sums.modules}
    return _patched(model, clip, pairs, files[0].path)


def _patched(model: Any, clip: Any, pairs: Mapping[str, Any], path: str) -> tuple[Any, Any]:
    """Clones with changes by layer as patches."""
    model, clip = model.clone(), None if clip is None else clip.clone()
    denoiser, encoders = _hosts(model, clip)
    text = [name for name in pairs if keys.is_flat_text(name)]
    _check(path, [name for name in pairs if name not in text], denoiser)
    _patch(model, denoiser, {n: p for n, p in pairs.items() if n not in text}, 1.0)
    _patch_text(clip, encoders, {n: p for n, p in pairs.items() if n in text}, 1.0)
    return model, clip


def _chosen_by_step(
    model: Any, clip: Any, adapters: Sequence[Adapter], weights: Sequence[float], merging: Merging
) -> tuple[Any, Any]:
    """Clones on which each layer of both adapters uses one of them at each step; others are patches."""
    style, content = sums = [PairSum([adapter]) for adapter in adapters]
    ends = {n: end for n, end in changeovers(style, content, merging.options).items() if _is_denoiser(n)}
    fixed: dict[str, list[tuple[Change, float]]] = {}
    for pairs, weight in zip(sums, weights, strict=True):
        for name in pairs.modules.keys() - ends.keys():
            change = Delta(pairs.up(name), pairs.down(name, [1.0]), 1.0)
            fixed.setdefault(name, []).append((change, weight))
    model, clip = _patched(model, clip, fixed, adapters[0].source)
    denoiser, _ = _hosts(model, clip)
    networks = [_pairs_network(pairs, list(ends), denoiser, None) for pairs in sums]
    selection = Selection(
        [
            Choice(position, layer, ends[keys.flat(layer.name)])
            for position, (network, _) in enumerate(networks)
            for layer in network.layers()
        ]
    )
    selection.weights = tuple(weights)
    for network, places in networks:
        Beside(network, places, 0.0, selection.set).install(model)
    return model, clip


def _is_denoiser(name: str) -> bool:
    return not keys.is_flat_text(name)


def _merge_patches(model: Any, clip: Any, files: Sequence[File], weights: Sequence[float]) -> tuple[Any, Any]:
    """Clones with Σ weights·(W′ − W), every W′ from the same W: one patch for each layer, in no order."""
    changes: dict[str, list[tuple[Change, float]]] = {}
    for file, weight in zip(files, weights, strict=True):
        if file.live:
            model, clip = apply_adapter(model, clip, file, weight, weight)
            continue
        file.adapter.require_deltas()
        for name, parts in _changes(file.adapter, weight).items():
            changes.setdefault(name, []).extend(parts)
    return _patched(model, clip, changes, files[0].path)


def _hosts(model: Any, clip: Any) -> tuple[Hosts, Hosts]:
    key_map = {} if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    patcher = None if clip is None else clip.patcher
    return Hosts(model, comfy.lora.model_lora_keys_unet(model.model, {})), Hosts(patcher, key_map)


def _check(path: str, names: Sequence[str], hosts: Hosts) -> None:
    missing = [name for name in names if name not in hosts]
    if missing:
        kind = type(hosts.patcher.model).__name__
        raise Refused(
            f"{len(missing)} of {len(names)} layers of {path} are not in this {kind}, for example "
            f"{missing[0]}; the adapter is for another model"
        )


# ---------- one ΔW: weight patches


def _patch(
    patcher: Any, hosts: Hosts, changes: Mapping[str, Sequence[tuple[Change, float]]], strength: float
) -> None:
    state, patches = {}, {}
    for name, parts in changes.items():
        for pair in (part for part, _ in parts if isinstance(part, Delta)):
            outs, ins = host_shape(hosts.stand_in(name))
            if (pair.up.shape[0], pair.down.shape[1]) != (outs, ins):
                raise Refused(
                    f"{name} is {pair.up.shape[0]}×{pair.down.shape[1]} in the adapter and {outs}×{ins} in "
                    "the model; the adapter is for another base"
                )
        for part, share in parts:
            bias = part.bias() if isinstance(part, ForeignLayer) else None
            if bias is not None:
                patcher.add_patches({hosts.bias_key(name): ("diff", (share * bias,))}, strength)
        weights = [(p, s) for p, s in parts if isinstance(p, Delta) or p.kind.change is not None]
        if len(weights) == 1 and isinstance(pair := weights[0][0], Delta) and pair.magnitude is None:
            alpha = torch.tensor(weights[0][1] * pair.scale * pair.rank)
            roles = {"up": pair.up, "down": pair.down, "alpha": alpha}
            state |= {f"{name}.{keys.KOHYA[role]}": value for role, value in roles.items()}
        elif weights:
            patches[hosts.patch_key(name)] = Sum(weights)
    names = {name: hosts.patch_key(name) for name in changes if f"{name}.{keys.KOHYA['up']}" in state}
    patches |= comfy.lora.load_lora(state, names)
    if patches:
        patcher.add_patches(patches, strength)


def _patch_text(clip: Any, hosts: Hosts, pairs: Mapping[str, Any], strength: float) -> None:
    if pairs and clip is None:
        logger.warning("%d layers of text encoders are left out; connect a CLIP to use them", len(pairs))
    elif pairs:
        _check("the adapter", list(pairs), hosts)
        _patch(clip, hosts, pairs, strength)


# ---------- a ΔW that depends on the step or input: beside the layers


def _live(model: Any, layers: tuple[AdapterNetwork, dict[str, LayerRows]], strength: float) -> None:
    network, places = layers
    Beside(network, places, strength).install(model)


def _masked(adapter: Adapter, hosts: Hosts) -> tuple[AdapterNetwork, dict[str, LayerRows]]:
    """A T-LoRA as pairs of factors whose leading ranks open by the timestep."""
    assert adapter.schedule is not None  # checked by the caller
    pairs = PairSum([adapter])
    gate = Gate(adapter.schedule.open, adapter.schedule.metadata)
    return _pairs_network(pairs, list(pairs.modules), hosts, gate)


def _pairs_network(
    pairs: PairSum, names: Sequence[str], hosts: Hosts, gate: Gate | None
) -> tuple[AdapterNetwork, dict[str, LayerRows]]:
    """Layers of one adapter as a network beside the model's layers."""
    _check(pairs.adapters[0].source, names, hosts)
    targets = {keys.flat(t.name): t for t in find("unet", _tree(names, hosts), target=".")}
    chosen = [targets[name] for name in names]
    ranks = {targets[name].name: pairs.up(name).shape[1] for name in names}
    size = {name: (rank, float(rank)) for name, rank in ranks.items()}
    network = AdapterNetwork(replace(PAIRS, gate=gate), chosen, lambda t: size[t.name])
    for layer in network.layers():
        name = keys.flat(layer.name)
        values = {"up": pairs.up(name), "down": pairs.down(name, [1.0])}
        shaped = {role: value.reshape(layer.get_buffer(role).shape) for role, value in values.items()}
        layer.load(shaped, pairs.adapters[0].source)
    return network, {layer.name: hosts.place(keys.flat(layer.name)) for layer in network.layers()}


def _routed(file: File, hosts: Hosts) -> tuple[AdapterNetwork, dict[str, LayerRows]]:
    """A network of routed experts, of the method that its file names."""
    adapter, path = file.adapter, file.path
    module = network_named(adapter.metadata.get("lowrank.method", ""))
    if module is None or adapter.method is None:
        raise Refused(
            f"{path} has experts and does not name a network of this program that made it; use the file as "
            "it was saved"
        )
    experts = [place for place, roles in adapter.raw.items() if keys.ROUTER in roles]
    if text := [place for place in experts if place.part != "unet"]:
        raise Refused(
            f"{path} has experts in text encoders ({text[0].path}), which are not offered in ComfyUI"
        )
    others = sorted(p for p in adapter.raw if p.part == "unet" and p not in experts)
    names = [keys.flat(adapter.name(place)) for place in (*experts, *others)]
    _check(path, names, hosts)
    network, _ = module.create_network_from_weights(1.0, path, None, [], _tree(names, hosts))
    if network.method.magnitude is not None:
        raise Refused(f"{path} has lengths beside experts, which are not offered in ComfyUI")
    present = {role for roles in adapter.raw.values() for role in roles}
    if absent := [role for role in adapter.method.file_roles() if role in network.factor.frozen - present]:
        raise Refused(f"{path} leaves out {', '.join(absent)}; train with --save_basis full to keep it")
    network.load_weights(path)
    return network, {layer.name: hosts.place(keys.flat(layer.name)) for layer in network.layers()}


def _tree(names: Sequence[str], hosts: Hosts) -> nn.Module:
    """A model of stand-ins for the adapter's layers, under the paths of the model it was trained on."""
    paths = _paths(hosts.patcher.model)
    root = nn.Module()
    for name in names:
        *above, last = paths.get(name, name).split(".")
        place = root
        for part in above:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, hosts.stand_in(name))
    return root


def _paths(model: Any) -> dict[str, str]:
    """diffusers' dotted paths by flat names, from ComfyUI's own tables."""
    config = model.model_config.unet_config
    names = {**comfy.utils.unet_to_diffusers(config), **comfy.utils.flux_to_diffusers(config)}
    paths = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    return {path.replace(".", "_"): path for path in paths}
