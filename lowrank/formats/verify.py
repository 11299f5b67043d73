"""Verify a written file: the program that the format is for loads it, and its layers' outputs equal ΔW·x.

No model is needed: each library loads the file onto hosts, layers of the right names and sizes that take no
memory (`delta.weightless_host`). Installed libraries are used; the last resort is lowrank's own reader.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings as python_warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.clip_hosts import clip_hosts, text_by_diffusers
from lowrank.formats.delta import Delta, distance, swapped, weightless_host
from lowrank.formats.hosts import Checked, Tree, Unread, compared, host, hosts
from lowrank.formats.read import Adapter, read_adapter
from lowrank.formats.writers import Choices, joined_magnitude, peft_path
from lowrank.naming import flux as flux_names
from lowrank.naming import places
from lowrank.naming.places import LayerPath

# Limits of the relative difference of a layer's output: the rounding of the file's dtype, with a margin
LIMITS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
MANY = 4000  # layers: more than any model has, and more than other programs read in seconds
FULL_WIDTH = 3072  # diffusers' reader of kohya's FLUX files works for the published width only


def check_export(adapter: Adapter, to: str, path: Path, choices: Choices) -> list[Checked]:
    """Read an export back with every installed program. Raises `Refused` where a result differs from ΔW."""
    checked = []
    for name, load in readers(to, adapter, choices).items():
        try:
            checked.append(load(path))
        except Unread as error:
            raise Refused(f"the export to {path} is not what {name} reads: {error}") from error
    if not checked and path.is_file():
        wanted = _as_official(adapter) if to == "qrlora" else adapter
        with _quiet():
            worst = difference(wanted, read_adapter(path, adapter.family))
        checked.append(Checked("our own reader", len(adapter.layers), worst))
    dtypes = (
        {layer.up.dtype for layer in adapter.layers.values()} if choices.dtype is None else {choices.dtype}
    )
    limit = max(LIMITS.get(dtype, LIMITS[torch.bfloat16]) for dtype in dtypes)
    for result in checked:
        if not result.worst <= limit:
            raise Refused(
                f"the export to {path} differs from the adapter by {result.worst:.1e} of a layer's change as "
                f"{result.reader} reads it (limit {limit:.0e}); export with --dtype fp32, or to another "
                "format with --to"
            )
    return checked


def difference(adapter: Adapter, other: Adapter) -> float:
    """The largest ‖ΔW − ΔW′‖/‖ΔW‖ of a layer, or of its magnitudes. Raises `Unread` where layers differ."""
    for first, second in ((adapter, other), (other, adapter)):
        for place in first.layers.keys() - second.layers.keys():
            if first.layers[place].norm() or first.layers[place].magnitude is not None:
                raise Unread(f"{place.path} is only in one of {adapter.source} and {other.source}")
    worst = 0.0
    for place, layer in adapter.layers.items():
        if place not in other.layers:
            continue
        theirs = other.layers[place]
        worst = max(worst, distance(layer, theirs) / max(layer.norm(), 1e-30))
        if layer.magnitude is not None and theirs.magnitude is not None:
            m = layer.magnitude.double()
            worst = max(worst, float((theirs.magnitude.double() - m).norm() / m.norm()))
        elif (layer.magnitude is None) != (theirs.magnitude is None):
            raise Unread(
                f"{place.path} has a DoRA magnitude in only one of {adapter.source} and {other.source}"
            )
    return worst


def _as_official(adapter: Adapter) -> Adapter:
    """What an official QR-LoRA file has: Q·R of a QR pair itself, without the initial copy."""
    layers = {
        place: layer
        if "up" not in (roles := adapter.raw[place])
        else layer._replace(up=roles["up"].flatten(1), down=roles["down"].flatten(1))
        for place, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def readers(to: str, adapter: Adapter, choices: Choices) -> dict[str, Callable[[Path], Checked]]:
    """The installed programs that read a format: name -> function of the file's path.

    Empty for more layers than any model has (`MANY`), which would take the programs minutes.
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
    programs: dict[str, Callable[[Path], Checked]] = {}
    if to == "kohya" and installed("lycoris") and not lengths_by_base:
        programs["lycoris.kohya"] = lambda path: _by_lycoris_kohya(path, adapter, choices.base)
    denoiser, text = ("unet" in _parts(adapter)), any(part != "unet" for part in _parts(adapter))
    if to == "kohya" and installed("peft") and not dora and (adapter.family != "flux" or published):
        if denoiser:
            programs["diffusers"] = lambda path: _by_diffusers(path, adapter)
        if text:
            programs["diffusers, text encoders"] = lambda path: _kohya_text_by_diffusers(path, adapter)
    if to == "diffusers" and installed("peft"):
        if denoiser:
            programs["diffusers"] = lambda path: _by_diffusers(path, adapter)
        if text:
            programs["diffusers, text encoders"] = lambda path: _text_by_diffusers(path, adapter)
    if to == "peft" and installed("peft"):
        programs["PEFT"] = lambda path: _by_peft(path, adapter, choices.flat_clip)
    if to == "lycoris" and installed("lycoris") and not lengths_by_base:
        programs["LyCORIS"] = lambda path: _by_lycoris(path, adapter)
    return programs


def installed(library: str) -> bool:
    """Whether an optional library is installed."""
    return importlib.util.find_spec(library) is not None


# ---------- the libraries


def load_by_peft(folder: Path, adapter: Adapter, model: Any, part: str = "unet") -> None:
    """Load one component of a PEFT folder into a model. `Unread` where keys are missing or unexpected."""
    from peft import PeftConfig, PeftModel

    component = str(folder / places.component_name(part, adapter.family))
    with _quiet(), python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore", FutureWarning)  # of transformers, about PEFT's own code
        loaded = PeftModel(model, PeftConfig.from_pretrained(component))
        result = loaded.load_adapter(component, "default")
    missing = [key for key in result.missing_keys if ".lora_" in key]
    if missing or result.unexpected_keys:
        raise Unread(f"PEFT misses {len(missing)} tensors, and {len(result.unexpected_keys)} are unexpected")


def _by_peft(folder: Path, adapter: Adapter, flat_clip: bool) -> Checked:
    def name(place: LayerPath) -> str:
        return peft_path(place, flat_clip)

    pairs = []
    for part in _parts(adapter):
        clip = clip_hosts(adapter.layers, part)
        tree, names = clip or (hosts(adapter.layers, part, name), {})
        load_by_peft(folder, adapter, tree, part)
        pairs += _pairs(adapter, part, tree, lambda place, names=names: names.get(place) or name(place))
    return compared(pairs, "PEFT")


class _TwoLayers:
    layers_per_block = 2  # of every SD model's U-Net


def _mixin(adapter: Adapter) -> Any:
    """The class of diffusers that loads adapters of a family."""
    from diffusers import loaders

    mixins = {
        "flux": loaders.FluxLoraLoaderMixin,
        "sdxl": loaders.StableDiffusionXLLoraLoaderMixin,
        "sd15": loaders.StableDiffusionLoraLoaderMixin,
    }
    return mixins[adapter.family]


def _diffusers_state(path: Path, adapter: Adapter) -> tuple[Any, Any, Any]:
    """(state, alphas, metadata) of a file, as the reading half of `pipe.load_lora_weights` returns them."""
    options: dict[str, Any] = (
        {"return_alphas": True} if adapter.family == "flux" else {"unet_config": _TwoLayers}
    )
    with _quiet():
        # the file's name by itself: offline, diffusers before 0.36 refuses a path without one
        where = {"pretrained_model_name_or_path_or_dict": str(path.parent), "weight_name": path.name}
        return _mixin(adapter).lora_state_dict(**where, return_lora_metadata=True, **options)


def load_by_diffusers(path: Path, adapter: Adapter, denoiser: Any) -> None:
    """Load a file into a denoiser as `pipe.load_lora_weights` does. `Unread` where diffusers warns."""
    state, alphas, metadata = _diffusers_state(path, adapter)
    component = places.component_name("unet", adapter.family)
    with _quiet() as warnings:
        denoiser.load_lora_adapter(state, prefix=component, network_alphas=alphas, metadata=metadata)
    if warnings:
        raise Unread(f"diffusers warns about {path}: {warnings[0]}")


def _by_diffusers(path: Path, adapter: Adapter) -> Checked:
    from diffusers.loaders import PeftAdapterMixin

    tree = hosts(adapter.layers, "unet")
    for name, beside in _beside(adapter):
        tree.put(name, beside)
    tree.__class__ = type("Tree", (Tree, PeftAdapterMixin), {})
    load_by_diffusers(path, adapter, tree)
    return compared(_pairs(adapter, "unet", tree), "diffusers")


def _text_by_diffusers(path: Path, adapter: Adapter) -> Checked:
    with _quiet():
        return text_by_diffusers(adapter, _mixin(adapter), _diffusers_state(path, adapter))


def _kohya_text_by_diffusers(path: Path, adapter: Adapter) -> Checked:
    """`_text_by_diffusers` for kohya's keys, which diffusers does not read right with every transformers."""
    with contextlib.suppress(Unread):
        checked = _text_by_diffusers(path, adapter)
        if checked.worst <= LIMITS[torch.bfloat16]:
            return checked
    note = (
        "diffusers: the installed version does not read the text encoders of kohya's files right with this "
        "transformers; for pipe.load_lora_weights use --to diffusers"
    )
    return Checked("diffusers, text encoders", 0, 0.0, note)


def _beside(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    """Hosts of FLUX's layers without an adapter, which are zeros in a joined layer of kohya's files."""
    for place, layer in adapter.layers.items():
        joined = _joined(place, adapter)
        for path, other in (
            flux_names.modules(joined.module) if joined is not None and joined.total > 1 else ()
        ):
            if joined is not None and place._replace(path=path) not in adapter.layers:
                outs = layer.up.shape[0] // (joined.stop - joined.start) * (other.stop - other.start)
                yield path, weightless_host(outs, layer.down.shape[1], ())


def load_by_lycoris(path: Path, model: nn.Module) -> None:
    """Attach a LyCORIS file to a model. `Unread` where layers of the file are not in the model."""
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

    layers = _as_kohya(adapter, base)
    roots = {part: Tree() for part in ("unet", "te1", "te2", "te3")}
    for place, layer in layers.items():
        roots[place.part].put(place.path, host(layer))
    encoders: Any = [root for part, root in roots.items() if part != "unet"]
    with _quiet():
        network, state = kohya.create_network_from_weights(
            1.0, str(path), None, encoders[0] if adapter.family == "sd15" else encoders, roots["unet"]
        )
        loaded = [*network.unet_loras, *network.text_encoder_loras]
        for layer in loaded:
            layer.apply_to()
    wanted = {key.split(".")[0] for key in state}
    if len(loaded) != len(wanted):
        raise Unread(f"lycoris.kohya finds {len(loaded)} of {len(wanted)} layers in {path}")
    pairs = [(place, layer, roots[place.part].get_submodule(place.path)) for place, layer in layers.items()]
    return compared(pairs, "lycoris.kohya")


def _as_kohya(adapter: Adapter, base: BaseCheckpoint | None) -> dict[LayerPath, Delta]:
    """The layers of kohya's model, computed from ΔW and not from the written file: FLUX's joined ones have
    the rows of their parts."""
    groups: dict[str, dict[LayerPath, Delta]] = {}
    for place, layer in adapter.layers.items():
        groups.setdefault(places.kohya_layer(place, adapter.family), {})[place] = layer
    layers = {}
    for name, parts in groups.items():
        (place, layer), *_ = parts.items()
        piece = _joined(place, adapter)
        if piece is not None and piece.module == flux_names.SWAPPED:
            layer = swapped(layer)
        elif piece is not None and piece.total > 1:
            layer = _joined_delta(piece, parts, base)
        layers[LayerPath(*places.part_and_path(name))] = layer
    return layers


def _joined_delta(
    joined: flux_names.Piece, parts: Mapping[LayerPath, Delta], base: BaseCheckpoint | None
) -> Delta:
    """ΔW of a joined layer of FLUX: each part's rows at their positions, the other rows zero."""
    owners = [(LayerPath("unet", path), piece) for path, piece in flux_names.modules(joined.module)]
    place, piece = next((place, piece) for place, piece in owners if place in parts)
    share = parts[place].up.shape[0] // (piece.stop - piece.start)
    ups = []
    for place, piece in owners:
        if place in parts:
            up = torch.zeros(share * joined.total, parts[place].rank)
            up[piece.start * share : piece.stop * share] = parts[place].scale * parts[place].up.float()
            ups.append(up)
    downs = [parts[place].down.float() for place, _ in owners if place in parts]
    magnitude = None
    if any(layer.magnitude is not None for layer in parts.values()):
        magnitude = torch.cat([joined_magnitude(place, parts.get(place), base) for place, _ in owners])
    return Delta(torch.cat(ups, 1), torch.cat(downs), 1.0, magnitude)


def _joined(place: LayerPath, adapter: Adapter) -> flux_names.Piece | None:
    """The rows of a FLUX layer in the joined layer of kohya's model, or None."""
    flux = adapter.family == "flux" and place.part == "unet"
    return flux_names.joined_rows(place.path) if flux else None


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
    """Collect the warnings that the libraries log, and show none of their log lines."""
    warnings: list[str] = []

    class _Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                warnings.append(record.getMessage())

    handler, before = _Keep(), []
    for name in ("diffusers", "peft", "LyCORIS", "transformers", "lowrank"):
        logger = logging.getLogger(name)
        before.append((logger, logger.handlers[:], logger.propagate, logger.level))
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
    try:
        yield warnings
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
