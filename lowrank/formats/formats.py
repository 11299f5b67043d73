"""File formats of other programs: one row each, from a place's ΔW to the tensors and names that they read.

A writer gives the files of a format; nothing here knows a method. Owners: kohya sd-scripts
(`networks/lora.py`, `networks/lora_flux.py`), diffusers, PEFT, LyCORIS, QR-LoRA's official code.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.delta import Delta, method_for, swapped
from lowrank.formats.metadata import kept_facts, kohya_facts
from lowrank.formats.read import Adapter
from lowrank.naming import flux as flux_names
from lowrank.naming import keys, places
from lowrank.naming.places import LayerPath


@dataclass(frozen=True)
class Choices:
    """What is asked of an export besides its format."""

    dtype: torch.dtype | None = None
    """of the tensors written; None: as they are"""
    dora_norm: str = "merged"
    """DoRA's lengths for programs that divide by ‖W + ΔW‖ ("merged") or by ‖W‖ ("base", ComfyUI)"""
    base: BaseCheckpoint | None = None
    """base weights, where a format needs them"""
    flat_clip: bool = False
    """transformers 5's CLIPTextModel, whose paths lack text_model, for PEFT, which knows only a model's
    own"""


class Written(NamedTuple):
    """A file to write: where under the target ("" is the target itself), tensors, metadata, a JSON file
    beside it."""

    name: str
    state: dict[str, Tensor]
    metadata: dict[str, str]
    beside: tuple[str, dict] | None = None


class Format(NamedTuple):
    """A format: its writer, and what it is for."""

    write: Callable[[Adapter, Choices], list[Written]]
    folder: bool  # the target is a folder
    readers: str  # which programs read it


def write_kohya(adapter: Adapter, choices: Choices) -> list[Written]:
    """kohya's keys: `lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`, `.dora_scale`."""
    joined: dict[str, list[tuple[LayerPath, Delta]]] = {}
    for place, layer in adapter.layers.items():
        joined.setdefault(places.kohya_layer(place, adapter.family), []).append((place, layer))
    state: dict[str, Tensor] = {}
    for name, parts in joined.items():
        piece = (
            flux_names.joined_rows(parts[0][0].path)
            if adapter.family == "flux" and parts[0][0].part == "unet"
            else None
        )
        if piece is not None and piece.module == flux_names.SWAPPED:
            layer = swapped(_lengths(parts[0][0], parts[0][1], choices))
        elif piece is not None and piece.total > 1:
            layer = _fused(piece.module, dict(parts), choices)
        else:
            layer = _lengths(*parts[0], choices)
        state |= _spelled(name, layer, keys.KOHYA)
    return [Written("", state, kohya_facts(adapter, state))]


def _fused(module: str, parts: Mapping[LayerPath, Delta], choices: Choices) -> Delta:
    """One layer whose rows are several: ups block diagonal over stacked downs, or one down that all share.

    Layers that are not adapted are rows of zeros; with DoRA their length is that of the base's rows.
    """
    held = [(LayerPath("unet", path), piece) for path, piece in flux_names.modules(module)]
    present = [(parts[place], piece) for place, piece in held if place in parts]
    share = present[0][0].up.shape[0] // (present[0][1].stop - present[0][1].start)
    for layer, piece in present:
        if layer.up.shape[0] != share * (piece.stop - piece.start):
            raise Refused(
                f"the layers of {module} have {', '.join(str(one.up.shape[0]) for one, _ in present)} "
                "outputs, which is not FLUX's; export to diffusers instead"
            )
    first = present[0][0]
    same = all(one.scale == first.scale and torch.equal(one.down, first.down) for one, _ in present)
    scale = first.scale if all(one.scale == first.scale for one, _ in present) else 1.0
    downs = [one.down if scale == one.scale else one.scale * one.down.float() for one, _ in present]
    total = share * present[0][1].total
    width = first.rank if same else sum(one.rank for one, _ in present)
    up, at = torch.zeros(total, width, dtype=_widest(one.up for one, _ in present)), 0
    for layer, piece in present:
        columns = slice(None) if same else slice(at, at + layer.rank)
        up[piece.start * share : piece.stop * share, columns] = layer.up
        at += layer.rank
    magnitude = None
    if any(one.magnitude is not None for one, _ in present):
        magnitude = torch.cat([_fused_lengths(place, parts.get(place), choices) for place, _ in held])
    wide = _widest(downs)
    down = first.down if same else torch.cat([one.to(wide) for one in downs])
    return Delta(up, down, first.scale if same else scale, magnitude)


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (one.dtype for one in tensors))


def joined_lengths(place: LayerPath, layer: Delta | None, base: BaseCheckpoint | None) -> Tensor:
    """The rows' lengths (O,) in a joined layer that has lengths: of a part without, those it has by
    itself."""
    if layer is not None and layer.magnitude is not None:
        return layer.magnitude.float()
    if base is None:
        raise Refused(
            f"{place.path} has no length of its own, and FLUX's joined layer needs one for every row; give "
            "the base model with --model"
        )
    W = base.weight(place)
    return torch.linalg.vector_norm(W if layer is None else W + layer.delta(), dim=1)


def _fused_lengths(place: LayerPath, layer: Delta | None, choices: Choices) -> Tensor:
    told = joined_lengths(place, layer, choices.base)
    if layer is None:  # ‖W‖ in both conventions
        return told
    made = _lengths(place, layer._replace(magnitude=told), choices).magnitude
    assert made is not None  # it was given
    return made.float()


def _lengths(place: LayerPath, layer: Delta, choices: Choices) -> Delta:
    """The layer with its lengths in the convention asked for.

    A reader that divides by ‖W‖ gets m·‖W‖/‖W + ΔW‖, so that both compute m·(W + ΔW)/‖W + ΔW‖.
    """
    if layer.magnitude is None or choices.dora_norm == "merged":
        return layer
    if choices.base is None:
        raise Refused(
            "lengths for readers that divide by the base's norm need the base; give it with --model, or "
            "leave --dora_norm at merged"
        )
    W = choices.base.weight(place)
    whole = torch.linalg.vector_norm(W + layer.delta(), dim=1)
    told = layer.magnitude.float() * torch.linalg.vector_norm(W, dim=1) / whole.masked_fill(whole == 0, 1)
    return layer._replace(magnitude=told)


def _spelled(name: str, layer: Delta, table: Mapping[str, str], alpha: bool = True) -> dict[str, Tensor]:
    state = {
        f"{name}.{table['down']}": layer.joined_kernel(layer.down, rows=True),
        f"{name}.{table['up']}": layer.joined_kernel(layer.up, rows=False),
    }
    if alpha:
        state[f"{name}.{table['alpha']}"] = torch.tensor(layer.scale * layer.rank)
    if layer.magnitude is not None:
        shape = (-1, *(1,) * (len(layer.kernel) + 1))
        if table is keys.PEFT:
            shape = (1, -1, *(1,) * len(layer.kernel)) if layer.kernel else (-1,)
        state[f"{name}.{table['magnitude']}"] = layer.magnitude.reshape(shape)
    return state


def write_diffusers(adapter: Adapter, choices: Choices) -> list[Written]:
    """diffusers' keys: `unet.….lora_A.weight`, `transformer.…`, `text_encoder.…`; the scale is in the down.

    Without an alpha every reader takes the scale for 1. A file of several ranks says so in metadata, because
    diffusers before 0.36 gives all layers the alpha of the first.
    """
    folded = {place: _folded(layer) for place, layer in adapter.layers.items()}
    state: dict[str, Tensor] = {}
    for place, layer in folded.items():
        state |= _spelled(places.diffusers_layer(place, adapter.family), layer, keys.PEFT, alpha=False)
    metadata = kept_facts(adapter)
    if len({layer.rank for layer in folded.values()}) > 1:
        configs = _configs(folded, adapter.family)
        told = {f"{part}.{key}": value for part, config in configs.items() for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(told, sort_keys=True)
    return [Written("", state, {**metadata, "format": "pt"})]


def _folded(layer: Delta) -> Delta:
    """The same ΔW at scale 1."""
    if layer.scale == 1.0:
        return layer
    wide = torch.promote_types(layer.down.dtype, torch.float32)
    return layer._replace(down=layer.scale * layer.down.to(wide), scale=1.0)


def own_path(place: LayerPath, flat_clip: bool) -> str:
    """A place's path in the model that is loaded."""
    return place.path.removeprefix("text_model.") if flat_clip and place.part == "te1" else place.path


def _configs(layers: Mapping[LayerPath, Delta], family: str, flat_clip: bool = False) -> dict[str, dict]:
    """PEFT's LoraConfig of each component: ranks and alphas by module, the common ones as defaults."""
    found: dict[str, dict[str, Delta]] = {}
    for place, layer in layers.items():
        found.setdefault(places.component_name(place.part, family), {})[own_path(place, flat_clip)] = layer
    configs = {}
    for part, own in found.items():
        rank = Counter(layer.rank for layer in own.values()).most_common(1)[0][0]
        alpha = Counter(layer.scale * layer.rank for layer in own.values()).most_common(1)[0][0]
        configs[part] = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{path}": one.rank for path, one in own.items() if one.rank != rank},
            "alpha_pattern": {
                f"^{path}": one.scale * one.rank for path, one in own.items() if one.scale * one.rank != alpha
            },
            "target_modules": sorted(own),
            "use_dora": any(one.magnitude is not None for one in own.values()),
        }
    return configs


def peft(adapter: Adapter, choices: Choices) -> list[Written]:
    """PEFT's folders, one for each model: `unet/adapter_config.json`, `unet/adapter_model.safetensors`."""
    configs = _configs(adapter.layers, adapter.family, choices.flat_clip)
    files = []
    for part, config in configs.items():
        own = {
            p: one
            for p, one in adapter.layers.items()
            if places.component_name(p.part, adapter.family) == part
        }
        mixed = {one.magnitude is None for one in own.values()}
        if len(mixed) > 1:
            raise Refused(
                f"some layers of {part} have lengths (DoRA) and some have none, and PEFT's use_dora is for "
                "all; export to kohya instead"
            )
        state: dict[str, Tensor] = {}
        for place, layer in own.items():
            name = own_path(place, choices.flat_clip)
            state |= _spelled(f"base_model.model.{name}", layer, keys.PEFT, alpha=False)
        told = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none"}
        files.append(
            Written(
                f"{part}/adapter_model.safetensors",
                state,
                {**kept_facts(adapter), "format": "pt"},
                (f"{part}/adapter_config.json", {**told, **config}),
            )
        )
    return files


def write_lycoris(adapter: Adapter, choices: Choices) -> list[Written]:
    """LyCORIS' keys for a model wrapped whole (also SimpleTuner's): `lycoris_….lora_down.weight`, …"""
    text = [place.path for place in adapter.layers if place.part != "unet"]
    if text:
        raise Refused(
            f"{adapter.source} has {len(text)} layers of text encoders, and LyCORIS' wrapper files are of "
            f"one "
            "model; --to kohya is read by lycoris.kohya and holds them too, or leave them out with --parts "
            "unet"
        )
    state: dict[str, Tensor] = {}
    for place, layer in adapter.layers.items():
        state |= _spelled(places.lycoris_layer(place), _lengths(place, layer, choices), keys.KOHYA)
    config = {
        "algo": keys.LORA,
        "dora_wd": any(layer.magnitude is not None for layer in adapter.layers.values()),
    }
    return [Written("", state, {**kept_facts(adapter), "lycoris_config": json.dumps(config)})]


def qrlora(adapter: Adapter, choices: Choices) -> list[Written]:
    """The official QR-LoRA code's keys (FLUX): `transformer.….lora.delta_r.weight`, `.lora.q.weight`, …

    Its scale is 1, so alpha/r is folded into R and ΔR. A trained QR pair is written as it is; it needs the
    residual of the same base there, whose file save_flux_residual.py writes.
    """
    if adapter.family != "flux":
        raise Refused(f"the official QR-LoRA code is for FLUX, and {adapter.source} is for {adapter.family}")
    state: dict[str, Tensor] = {}
    q, r = keys.QR_BASIS
    for place, layer in adapter.layers.items():
        roles = adapter.raw.get(place, {})
        if layer.magnitude is not None or place.part != "unet" or q not in roles:
            raise Refused(
                f"{place.path} in {adapter.source} is no ΔR or QR-LoRA layer of the transformer, and the "
                "official format holds nothing else; project a LoRA onto a basis first: tools/import_lora.py "
                "--method delta_r --model BASE"
            )
        if r not in roles:
            raise Refused(
                f"{place.path} in {adapter.source} was saved without R, which the official format holds; "
                "give the base with --model"
            )
        module = places.diffusers_layer(place, "flux")
        if "up" not in roles:
            state[f"{module}.{keys.PEFT[q]}"] = roles[q]
            for role in (r, *method_for(roles, None).require_factor().trained):
                state[f"{module}.{keys.PEFT[role]}"] = layer.scale * roles[role].float()
        else:
            last = ".to_out.0" if module.endswith(".to_out.0") else ""  # official files repeat it
            state[f"{module}{last}.{keys.OLD_UP}"] = roles["up"]
            state[f"{module}{last}.lora.down.weight"] = layer.scale * roles["down"].float()
    return [Written("", state, {})]


def as_official(adapter: Adapter) -> Adapter:
    """What an official QR-LoRA file holds: of a QR pair Q·R itself, without the initial copy."""
    layers = {
        place: layer
        if "up" not in (roles := adapter.raw[place])
        else layer._replace(up=roles["up"].flatten(1), down=roles["down"].flatten(1))
        for place, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


FORMATS: Mapping[str, Format] = {
    "kohya": Format(write_kohya, False, "kohya sd-scripts, ComfyUI, A1111, Forge, Civitai, diffusers"),
    "diffusers": Format(write_diffusers, False, "diffusers, ComfyUI (FLUX)"),
    "peft": Format(peft, True, "PEFT"),
    "lycoris": Format(write_lycoris, False, "LyCORIS, SimpleTuner, ComfyUI"),
    "qrlora": Format(qrlora, False, "the official QR-LoRA code"),
}


def prepared(files: Sequence[Written], dtype: torch.dtype | None) -> list[Written]:
    """The files with their tensors in `dtype`; alphas stay exact. Raises `Refused` where a value
    overflows."""
    made = []
    for file in files:
        state = {}
        for key, value in file.state.items():
            own = value if dtype is None or value.dim() == 0 else value.to(dtype)
            if not torch.isfinite(own).all():
                raise Refused(
                    f"{key} is not finite in {str(own.dtype).removeprefix('torch.')}; export in bf16 or fp32 "
                    "(--dtype)"
                )
            state[key] = own
        made.append(file._replace(state=state))
    return made
