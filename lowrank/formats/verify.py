"""Whether a file that was written says what it should: it is loaded by the program it is for.

Without a model, each library loads the file onto hosts of the right names and sizes that take no memory (see
`delta.phantom`), and what each layer answers to one input is compared with ΔW. The libraries are those that
are installed; our own reader is the last resort.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import Refused
from lowrank.formats import formats
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.delta import Delta, distance, phantom, swapped
from lowrank.formats.formats import Choices
from lowrank.formats.probes import Checked, Tree, Unread, compared, host, hosts
from lowrank.formats.read import Adapter, read_adapter
from lowrank.naming import flux as flux_names
from lowrank.naming import places
from lowrank.naming.places import LayerPath

# What a half-precision file may differ by, and what fp32 may: a layer's answer, relative to the change in it.
LIMITS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
MANY = 4000  # layers: more than any model has, and more than other programs read in seconds
FULL_WIDTH = 3072  # diffusers' reader of kohya's FLUX files knows only the published width


def difference(adapter: Adapter, other: Adapter) -> float:
    """The largest ‖ΔW − ΔW′‖/‖ΔW‖ of a layer, lengths compared alike. `Unread` where layers differ."""
    for one, two in ((adapter, other), (other, adapter)):
        for place in one.layers.keys() - two.layers.keys():
            if one.layers[place].norm() or one.layers[place].magnitude is not None:
                raise Unread(f"{place.path} is only in one of {adapter.source} and {other.source}")
    worst = 0.0
    for place in [place for place in adapter.layers if place in other.layers]:
        layer = adapter.layers[place]
        theirs = other.layers[place]
        worst = max(worst, distance(layer, theirs) / max(layer.norm(), 1e-30))
        if layer.magnitude is not None and theirs.magnitude is not None:
            m = layer.magnitude.double()
            worst = max(worst, float((theirs.magnitude.double() - m).norm() / m.norm()))
        elif (layer.magnitude is None) != (theirs.magnitude is None):
            raise Unread(
                f"{place.path} has lengths (DoRA) in only one of {adapter.source} and {other.source}"
            )
    return worst


def limit(dtype: torch.dtype | None, adapter: Adapter) -> float:
    """What an export may differ by: rounding to the dtype it is written in."""
    own = {layer.up.dtype for layer in adapter.layers.values()} if dtype is None else {dtype}
    return max(LIMITS.get(one, LIMITS[torch.bfloat16]) for one in own)


def readers(to: str, adapter: Adapter, choices: Choices) -> dict[str, Callable[[Path], Checked]]:
    """Who can be asked about a file of a format here: name -> function of the file's path.

    Nobody of the others for more layers than any model has (`MANY`), which would take them minutes.
    """
    if len(adapter.layers) > MANY:
        return {}
    lengths_by_base = choices.dora_norm == "base"
    dora = any(layer.magnitude is not None for layer in adapter.layers.values())
    wide = {
        layer.up.shape[0] // (piece.stop - piece.start)
        for place, layer in adapter.layers.items()
        if (piece := flux_names.joined_rows(place.path)) and piece.module.endswith("linear1")
    }
    published = wide <= {FULL_WIDTH}
    found: dict[str, Callable[[Path], Checked]] = {}
    if to == "kohya" and installed("lycoris") and not lengths_by_base:
        found["lycoris.kohya"] = lambda path: _by_lycoris_kohya(path, adapter, choices.base)
    if to == "kohya" and installed("peft") and not dora and (adapter.family != "flux" or published):
        found["diffusers"] = lambda path: _by_diffusers(path, adapter)
    if to == "diffusers" and installed("peft"):
        found["diffusers"] = lambda path: _by_diffusers(path, adapter)
    if to == "peft" and installed("peft"):
        found["PEFT"] = lambda path: _by_peft(path, adapter, choices.flat_clip)
    if to == "lycoris" and installed("lycoris") and not lengths_by_base:
        found["LyCORIS"] = lambda path: _by_lycoris(path, adapter)
    return found


def installed(library: str) -> bool:
    """Whether a library that is not among our own requirements is here."""
    return importlib.util.find_spec(library) is not None


# ---------- the libraries


def load_by_peft(folder: Path, adapter: Adapter, model: Any, part: str = "unet") -> None:
    """Load one component of a PEFT folder into a model. `Unread` where keys are missing or unexpected."""
    from peft import PeftConfig, PeftModel

    component = str(folder / places.component_name(part, adapter.family))
    with _quiet():
        loaded = PeftModel(model, PeftConfig.from_pretrained(component))
        told = loaded.load_adapter(component, "default")
    lost = [key for key in told.missing_keys if ".lora_" in key]
    if lost or told.unexpected_keys:
        raise Unread(f"PEFT misses {len(lost)} tensors, and {len(told.unexpected_keys)} are unexpected")


def _by_peft(folder: Path, adapter: Adapter, flat_clip: bool) -> Checked:
    def name(place: LayerPath) -> str:
        return formats.own_path(place, flat_clip)

    pairs = []
    for part in _parts(adapter):
        tree = hosts(adapter.layers, part, name)
        load_by_peft(folder, adapter, tree, part)
        pairs += _pairs(adapter, part, tree, name)
    return compared(pairs, "PEFT")


def _diffusers_state(path: Path, adapter: Adapter) -> tuple[Any, Any, Any]:
    """The reading half of `pipe.load_lora_weights`."""
    from diffusers.loaders import (
        FluxLoraLoaderMixin,
        StableDiffusionLoraLoaderMixin,
        StableDiffusionXLLoraLoaderMixin,
    )

    mixins = {
        "flux": FluxLoraLoaderMixin,
        "sdxl": StableDiffusionXLLoraLoaderMixin,
        "sd15": StableDiffusionLoraLoaderMixin,
    }
    mixin: Any = mixins[adapter.family]
    flux = adapter.family == "flux"
    more: dict[str, Any] = {"return_alphas": True} if flux else {"unet_config": _TwoLayers}
    with _quiet():
        return mixin.lora_state_dict(str(path), return_lora_metadata=True, **more)


def load_by_diffusers(path: Path, adapter: Adapter, denoiser: Any) -> None:
    """The loading half, into a denoiser. `Unread` where diffusers says that it leaves something out."""
    state, alphas, metadata = _diffusers_state(path, adapter)
    component = places.component_name("unet", adapter.family)
    with _quiet() as said:
        denoiser.load_lora_adapter(state, prefix=component, network_alphas=alphas, metadata=metadata)
    if said:
        raise Unread(f"diffusers says of {path}: {said[0]}")


def _by_diffusers(path: Path, adapter: Adapter) -> Checked:
    from diffusers.loaders import PeftAdapterMixin

    pairs = []
    for part in _parts(adapter):
        if part == "unet":
            tree = hosts(adapter.layers, part)
            for name, beside in _beside(adapter):
                tree.put(name, beside)
            tree.__class__ = type("Tree", (Tree, PeftAdapterMixin), {})
            load_by_diffusers(path, adapter, tree)
            pairs += _pairs(adapter, part, tree)
        else:  # transformers loads these into its own models only
            component = places.component_name(part, adapter.family)
            _check_text(_diffusers_state(path, adapter)[0], component, adapter, part)
    return compared(pairs, "diffusers")


def _beside(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    """Hosts of FLUX's layers that are not adapted, and that kohya's files have as zeros in a joined layer."""
    for place, layer in adapter.layers.items():
        own = (
            flux_names.joined_rows(place.path) if adapter.family == "flux" and place.part == "unet" else None
        )
        for path, other in flux_names.modules(own.module) if own is not None and own.total > 1 else ():
            if own is not None and place._replace(path=path) not in adapter.layers:
                outs = layer.up.shape[0] // (own.stop - own.start) * (other.stop - other.start)
                yield path, phantom(outs, layer.down.shape[1], ())


class _TwoLayers:
    layers_per_block = 2  # of every SD model's U-Net


def _check_text(state: Mapping[str, Tensor], component: str, adapter: Adapter, part: str) -> None:
    """What diffusers made of a text encoder's keys holds each layer's two factors, and nothing else."""
    mine = [key for key in state if key.startswith(f"{component}.")]
    layers = [layer for place, layer in adapter.layers.items() if place.part == part]
    lengths = sum(layer.magnitude is not None for layer in layers)
    if len(mine) != 2 * len(layers) + lengths:
        raise Unread(f"diffusers reads {len(mine)} tensors of {component}, {len(layers)} layers were written")


def load_by_lycoris(path: Path, model: nn.Module) -> None:
    """Put a LyCORIS file on a model. `Unread` where layers of the file are not in it."""
    from lycoris import wrapper

    with _quiet():
        network, state = wrapper.create_lycoris_from_weights(1.0, str(path), model)
        network.apply_to()
    wanted = {key.split(".")[0] for key in state}
    if len(network.loras) != len(wanted):
        raise Unread(f"LyCORIS finds {len(network.loras)} of {len(wanted)} layers in {path}")


def _by_lycoris(path: Path, adapter: Adapter) -> Checked:
    tree = hosts(adapter.layers, "unet")
    load_by_lycoris(path, tree)
    return compared(_pairs(adapter, "unet", tree), "LyCORIS")


def _by_lycoris_kohya(path: Path, adapter: Adapter, base: BaseCheckpoint | None) -> Checked:
    """LyCORIS' kohya module, on hosts that are named and joined as in kohya's own models."""
    from lycoris import kohya

    joined = _as_kohya(adapter, base)
    roots = {part: Tree() for part in ("unet", "te1", "te2", "te3")}
    for name, layer in joined.items():
        part, dotted = places.part_and_path(name)
        roots[part].put(dotted, host(layer))
    encoders: Any = [root for part, root in roots.items() if part != "unet"]
    with _quiet():
        network, state = kohya.create_network_from_weights(
            1.0, str(path), None, encoders[0] if adapter.family == "sd15" else encoders, roots["unet"]
        )
        loaded = [*network.unet_loras, *network.text_encoder_loras]
        for one in loaded:
            one.apply_to()
    wanted = {key.split(".")[0] for key in state}
    if len(loaded) != len(wanted):
        raise Unread(f"lycoris.kohya finds {len(loaded)} of {len(wanted)} layers in {path}")
    pairs = []
    for name, layer in joined.items():
        part, dotted = places.part_and_path(name)
        pairs.append((LayerPath(part, dotted), layer, roots[part].get_submodule(dotted)))
    return compared(pairs, "lycoris.kohya")


def _as_kohya(adapter: Adapter, base: BaseCheckpoint | None) -> dict[str, Delta]:
    """The layers as kohya's model has them, from ΔW itself and not from the file: FLUX's joined ones with the
    rows of their parts."""
    groups: dict[str, list[tuple[LayerPath, Delta]]] = {}
    for place, layer in adapter.layers.items():
        groups.setdefault(places.kohya_layer(place, adapter.family), []).append((place, layer))
    found = {}
    for name, parts in groups.items():
        piece = flux_names.joined_rows(parts[0][0].path) if adapter.family == "flux" else None
        if piece is None or parts[0][0].part != "unet" or piece.total == 1:
            swap = piece is not None and piece.module == flux_names.SWAPPED
            found[name] = swapped(parts[0][1]) if swap else parts[0][1]
            continue
        share = next(
            layer.up.shape[0] // (own.stop - own.start)
            for place, layer in parts
            if (own := flux_names.joined_rows(place.path)) is not None
        )
        rank = sum(layer.rank for _, layer in parts)
        up, downs, at = torch.zeros(share * piece.total, rank), [], 0
        for place, layer in parts:
            own = flux_names.joined_rows(place.path)
            assert own is not None  # it was one above
            up[own.start * share : own.stop * share, at : at + layer.rank] = layer.scale * layer.up.float()
            downs.append(layer.down.float())
            at += layer.rank
        lengths = None
        if any(layer.magnitude is not None for _, layer in parts):
            lengths = torch.cat(
                [formats.joined_lengths(p, dict(parts).get(p), base) for p in _joined_places(piece.module)]
            )
        found[name] = Delta(up, torch.cat(downs), 1.0, lengths)
    return found


def _joined_places(module: str) -> list[LayerPath]:
    return [LayerPath("unet", path) for path, _ in flux_names.modules(module)]


def _parts(adapter: Adapter) -> list[str]:
    return list(dict.fromkeys(place.part for place in adapter.layers))


def _pairs(
    adapter: Adapter, part: str, root: nn.Module, name: Callable[[LayerPath], str] = lambda place: place.path
) -> list[tuple[LayerPath, Delta, nn.Module]]:
    return [
        (place, layer, root.get_submodule(name(place)))
        for place, layer in adapter.layers.items()
        if place.part == part
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """The libraries' own log lines, collected instead of shown: those that say what they could not use."""
    said: list[str] = []

    class _Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                said.append(record.getMessage())

    handler, before = _Keep(), []
    for name in ("diffusers", "peft", "LyCORIS", "transformers", "lowrank"):
        logger = logging.getLogger(name)
        before.append((logger, logger.handlers[:], logger.propagate, logger.level))
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def check_export(adapter: Adapter, to: str, path: Path, choices: Choices) -> list[Checked]:
    """Read an export back by everybody who is here; `Refused` when one of them disagrees with ΔW."""
    checked = []
    for name, ask in readers(to, adapter, choices).items():
        try:
            checked.append(ask(path))
        except Unread as error:
            raise Refused(f"the export to {path} is not what {name} reads: {error}") from error
    if not checked and path.is_file():
        wanted = formats.as_official(adapter) if to == "qrlora" else adapter
        with _quiet():
            told = difference(wanted, read_adapter(path, adapter.family))
        checked.append(Checked("our own reader", len(adapter.layers), told))
    allowed = limit(choices.dtype, adapter)
    for one in checked:
        if not one.worst <= allowed:
            raise Refused(
                f"the export to {path} differs from the adapter by {one.worst:.1e} of a layer's change as "
                f"{one.reader} reads it (limit {allowed:.0e}); give --dtype fp32, or tell us the file"
            )
    return checked
