"""Writers of other programs' adapter files: from ΔW by layer to the tensors, names and metadata they read.

`formats.write` has the table of formats. Owners of the formats: kohya sd-scripts (`networks/lora.py`,
`networks/lora_flux.py`), diffusers, PEFT, LyCORIS, QR-LoRA's official code.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.delta import Delta, method_for, swapped
from lowrank.formats.read import Adapter
from lowrank.naming import flux as flux_names
from lowrank.naming import keys, places
from lowrank.naming.places import LayerPath

# By family: ss_base_model_version, modelspec.architecture, modelspec.implementation
_MODEL_METADATA = {
    "sd15": ("sd_v1", "stable-diffusion-v1", "https://github.com/Stability-AI/generative-models"),
    "sdxl": (
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base",
        "https://github.com/Stability-AI/generative-models",
    ),
    "flux": ("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux"),
}
# Metadata of the training that every export keeps
_KEPT = ("ss_", "modelspec.", "tlora_", "lowrank.base", "lowrank.command", "lowrank.unrouted")


@dataclass(frozen=True)
class Choices:
    """Options of an export besides its format."""

    dtype: torch.dtype | None = None
    """dtype of the tensors written; None keeps the adapter's"""
    dora_norm: str = "merged"
    """DoRA magnitudes for programs that divide by ‖W + ΔW‖ ("merged") or by ‖W‖ ("base", ComfyUI)"""
    base: BaseCheckpoint | None = None
    """base weights, where a format needs them"""
    flat_clip: bool = False
    """write paths of CLIP without `text_model`, as transformers 5 has them; PEFT reads a model's own paths"""


class Written(NamedTuple):
    """A file to write: its path below the target ("" is the target itself), and a JSON file beside it."""

    name: str
    state: dict[str, Tensor]
    metadata: dict[str, str]
    beside: tuple[str, dict] | None = None


def _named_tensors(
    name: str, layer: Delta, table: Mapping[str, str], alpha: bool = True
) -> dict[str, Tensor]:
    """The tensors of one layer under the suffixes of a program's table."""
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


def _with_scale(layer: Delta, scale: float) -> Delta:
    """The layer with another scale and an equal ΔW: the down takes the difference, in fp32 or wider."""
    if layer.scale == scale:
        return layer
    wide = torch.promote_types(layer.down.dtype, torch.float32)
    return layer._replace(down=layer.scale / scale * layer.down.to(wide), scale=scale)


def _kept_metadata(adapter: Adapter) -> dict[str, str]:
    """The training's own metadata, and the method that the file was exported from."""
    kept = {key: value for key, value in adapter.metadata.items() if key.startswith(_KEPT)}
    if gated := adapter.fact("gated_by"):  # a loader must not take the file for a LoRA
        kept["lowrank.method"] = gated
    exported_from = adapter.fact("exported_from") or adapter.fact("method") or keys.LORA
    return {**kept, "lowrank.exported_from": exported_from}


# ---------- kohya


def write_kohya(adapter: Adapter, choices: Choices) -> list[Written]:
    """kohya's keys: `lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`, `.dora_scale`."""
    flux = adapter.family == "flux"
    layers = adapter.layers if flux else _with_common_alpha(adapter.layers)
    joined: dict[str, list[tuple[LayerPath, Delta]]] = {}
    for place, layer in layers.items():
        joined.setdefault(places.kohya_layer(place, adapter.family), []).append((place, layer))
    state: dict[str, Tensor] = {}
    for name, parts in joined.items():
        place, layer = parts[0]
        piece = flux_names.joined_rows(place.path) if flux and place.part == "unet" else None
        if piece is not None and piece.total > 1:
            layer = _fused(piece.module, dict(parts), choices)
        else:
            layer = _with_dora_norm(place, layer, choices)
            if piece is not None and piece.module == flux_names.SWAPPED:
                layer = swapped(layer)
        state |= _named_tensors(name, layer, keys.KOHYA)
    return [Written("", state, _kohya_metadata(adapter, state))]


def _with_common_alpha(layers: Mapping[LayerPath, Delta]) -> Mapping[LayerPath, Delta]:
    """The layers with one alpha over the U-Net if an attention layer has another than most layers have.

    diffusers gives all attention layers of a kohya file the most common alpha: its `alpha_pattern` names them
    `….processor.to_q_lora.down.weight`, which PEFT does not match (diffusers 0.36, `_get_alpha_name`).
    """
    alphas = {place: layer.scale * layer.rank for place, layer in layers.items() if place.part == "unet"}
    attention = {alpha for place, alpha in alphas.items() if ".attn" in place.path}
    ranking = Counter(alphas.values()).most_common(2)
    tie = len(ranking) == 2 and ranking[0][1] == ranking[1][1]
    if not attention or (attention == {ranking[0][0]} and not tie):
        return layers
    common = ranking[0][0]
    return {
        place: _with_scale(layer, common / layer.rank) if place in alphas else layer
        for place, layer in layers.items()
    }


def _fused(module: str, parts: Mapping[LayerPath, Delta], choices: Choices) -> Delta:
    """A joined layer of FLUX: ups block diagonal over stacked downs, or one down that all parts share.

    Parts that are not adapted are rows of zeros; with DoRA their magnitudes are the row norms of the base.
    """
    owners = [(LayerPath("unet", path), piece) for path, piece in flux_names.modules(module)]
    present = [(parts[place], piece) for place, piece in owners if place in parts]
    first, first_piece = present[0]
    share = first.up.shape[0] // (first_piece.stop - first_piece.start)
    for layer, piece in present:
        if layer.up.shape[0] != share * (piece.stop - piece.start):
            raise Refused(
                f"the layers of {module} have {', '.join(str(part.up.shape[0]) for part, _ in present)} "
                "outputs, which is not FLUX's; export to diffusers instead"
            )
    same_scale = all(layer.scale == first.scale for layer, _ in present)
    shared = same_scale and all(torch.equal(layer.down, first.down) for layer, _ in present)
    scale = first.scale if same_scale else 1.0
    width = first.rank if shared else sum(layer.rank for layer, _ in present)
    up = torch.zeros(share * first_piece.total, width, dtype=_widest(layer.up for layer, _ in present))
    column = 0
    for layer, piece in present:
        columns = slice(None) if shared else slice(column, column + layer.rank)
        up[piece.start * share : piece.stop * share, columns] = layer.up
        column += layer.rank
    magnitude = None
    if any(layer.magnitude is not None for layer, _ in present):
        magnitude = torch.cat([_fused_magnitude(place, parts.get(place), choices) for place, _ in owners])
    if shared:
        return Delta(up, first.down, scale, magnitude)
    downs = [layer.down if scale == layer.scale else layer.scale * layer.down.float() for layer, _ in present]
    return Delta(up, torch.cat([down.to(_widest(downs)) for down in downs]), scale, magnitude)


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def joined_magnitude(place: LayerPath, layer: Delta | None, base: BaseCheckpoint | None) -> Tensor:
    """The magnitudes (O,) of a part of a joined DoRA layer; others have the row norms of W + ΔW."""
    if layer is not None and layer.magnitude is not None:
        return layer.magnitude.float()
    if base is None:
        raise Refused(
            f"{place.path} has no DoRA magnitude, and FLUX's joined layer needs one for every row; give the "
            "base model with --model"
        )
    W = base.weight(place)
    return torch.linalg.vector_norm(W if layer is None else W + layer.delta(), dim=1)


def _fused_magnitude(place: LayerPath, layer: Delta | None, choices: Choices) -> Tensor:
    magnitude = joined_magnitude(place, layer, choices.base)
    if layer is None:  # ‖W‖ in both conventions
        return magnitude
    converted = _with_dora_norm(place, layer._replace(magnitude=magnitude), choices).magnitude
    assert converted is not None  # it was given
    return converted.float()


def _with_dora_norm(place: LayerPath, layer: Delta, choices: Choices) -> Delta:
    """The layer with its DoRA magnitudes in the convention of `choices.dora_norm`.

    A reader that divides by ‖W‖ gets m·‖W‖/‖W + ΔW‖, so that both compute m·(W + ΔW)/‖W + ΔW‖.
    """
    if layer.magnitude is None or choices.dora_norm == "merged":
        return layer
    if choices.base is None:
        raise Refused(
            "--dora_norm base needs the row norms of the base; give it with --model, or leave --dora_norm at "
            "merged"
        )
    W = choices.base.weight(place)
    whole = torch.linalg.vector_norm(W + layer.delta(), dim=1)
    m = layer.magnitude.float() * torch.linalg.vector_norm(W, dim=1) / whole.masked_fill(whole == 0, 1)
    return layer._replace(magnitude=m)


def _kohya_metadata(adapter: Adapter, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata of a LoRA that A1111, Forge, ComfyUI and Civitai read: kohya's ss_* and Stability's modelspec.

    Metadata of the training stay; the network module is the one that reads the file.
    """
    kept = _kept_metadata(adapter)
    version, architecture, implementation = _MODEL_METADATA[adapter.family]
    ranks = Counter(v.shape[0] for k, v in state.items() if k.endswith(keys.KOHYA["down"]))
    alphas = Counter(float(v) for k, v in state.items() if k.endswith(".alpha"))
    module = "networks.lora_flux" if adapter.family == "flux" else "networks.lora"
    dora = any(layer.magnitude is not None for layer in adapter.layers.values())
    kept.setdefault("ss_base_model_version", version)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": adapter.metadata.get("ss_output_name", "LoRA"),
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        **kept,
        "ss_v2": kept.get("ss_v2", "False"),
        "ss_network_module": "lycoris.kohya" if dora else module,
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": str(alphas.most_common(1)[0][0]),
        "ss_network_args": json.dumps({"algo": keys.LORA, "dora_wd": "True"} if dora else {}),
    }


# ---------- diffusers and PEFT


def write_diffusers(adapter: Adapter, choices: Choices) -> list[Written]:
    """diffusers' keys: `unet.….lora_A.weight`, `transformer.…`, `text_encoder.…`; the down has the scale.

    Every reader takes the scale for 1 where there is no alpha. The metadata of a file of several ranks list
    them, because diffusers before 0.36 gives all layers the alpha of the first.
    """
    layers = {place: _with_scale(layer, 1.0) for place, layer in adapter.layers.items()}
    state: dict[str, Tensor] = {}
    for place, layer in layers.items():
        state |= _named_tensors(places.diffusers_layer(place, adapter.family), layer, keys.PEFT, alpha=False)
    metadata = _kept_metadata(adapter)
    if len({layer.rank for layer in layers.values()}) > 1:
        configs = _peft_configs(layers, adapter.family, any_clip=True)
        header = {f"{part}.{key}": value for part, config in configs.items() for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(header, sort_keys=True)
    return [Written("", state, {**metadata, "format": "pt"})]


def peft_path(place: LayerPath, flat_clip: bool) -> str:
    """A layer's path in the model that PEFT loads."""
    return place.path.removeprefix("text_model.") if flat_clip and place.part == "te1" else place.path


def _peft_configs(
    layers: Mapping[LayerPath, Delta], family: str, flat_clip: bool = False, any_clip: bool = False
) -> dict[str, dict]:
    """PEFT's LoraConfig of each component: the common rank and alpha, others by the layer's path.

    With `any_clip` paths of text encoders are without `text_model` and match at their end, so that they fit
    the CLIP of every transformers.
    """
    components: dict[str, dict[str, Delta]] = {}
    for place, layer in layers.items():
        component = components.setdefault(places.component_name(place.part, family), {})
        path = place.path.removeprefix("text_model.") if any_clip else peft_path(place, flat_clip)
        component[path] = layer
    configs = {}
    for name, component in components.items():
        ranks = {path: layer.rank for path, layer in component.items()}
        alphas = {path: layer.scale * layer.rank for path, layer in component.items()}
        start = "" if any_clip and name.startswith("text_encoder") else "^"
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        configs[name] = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"{start}{path}": value for path, value in ranks.items() if value != rank},
            "alpha_pattern": {f"{start}{path}": value for path, value in alphas.items() if value != alpha},
            "target_modules": sorted(component),
            "use_dora": any(layer.magnitude is not None for layer in component.values()),
        }
    return configs


def write_peft(adapter: Adapter, choices: Choices) -> list[Written]:
    """PEFT's folders, one for each model: `unet/adapter_config.json`, `unet/adapter_model.safetensors`."""
    files = []
    for part, config in _peft_configs(adapter.layers, adapter.family, choices.flat_clip).items():
        layers = {
            place: layer
            for place, layer in adapter.layers.items()
            if places.component_name(place.part, adapter.family) == part
        }
        if len({layer.magnitude is None for layer in layers.values()}) > 1:
            raise Refused(
                f"some layers of {part} have DoRA magnitudes and some have none, and PEFT's use_dora is for "
                "all; export to kohya instead"
            )
        state: dict[str, Tensor] = {}
        for place, layer in layers.items():
            name = f"base_model.model.{peft_path(place, choices.flat_clip)}"
            state |= _named_tensors(name, layer, keys.PEFT, alpha=False)
        fixed = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none"}
        metadata = {**_kept_metadata(adapter), "format": "pt"}
        beside = (f"{part}/adapter_config.json", {**fixed, **config})
        files.append(Written(f"{part}/adapter_model.safetensors", state, metadata, beside))
    return files


# ---------- LyCORIS and QR-LoRA


def write_lycoris(adapter: Adapter, choices: Choices) -> list[Written]:
    """LyCORIS' keys for a whole wrapped model (also SimpleTuner's): `lycoris_….lora_down.weight`, …"""
    text = [place.path for place in adapter.layers if place.part != "unet"]
    if text:
        raise Refused(
            f"{adapter.source} has {len(text)} layers of text encoders, and LyCORIS' wrapper files are of "
            "one model; --to kohya is read by lycoris.kohya and has them too, or leave them out with --parts "
            "unet"
        )
    state: dict[str, Tensor] = {}
    for place, layer in adapter.layers.items():
        layer = _with_dora_norm(place, layer, choices)
        state |= _named_tensors(places.lycoris_layer(place), layer, keys.KOHYA)
    config = {
        "algo": keys.LORA,
        "dora_wd": any(layer.magnitude is not None for layer in adapter.layers.values()),
    }
    return [Written("", state, {**_kept_metadata(adapter), "lycoris_config": json.dumps(config)})]


def write_qrlora(adapter: Adapter, choices: Choices) -> list[Written]:
    """The official QR-LoRA code's keys (FLUX): `transformer.….lora.delta_r.weight`, `.lora.q.weight`, …

    That code's scale is 1, so alpha/r is folded into R and ΔR. A trained QR pair is written as it is; it
    needs the residual of its base, which save_flux_residual.py writes.
    """
    if adapter.family != "flux":
        raise Refused(
            f"--to qrlora writes for the official QR-LoRA code, which is for FLUX, and {adapter.source} is "
            f"for {adapter.family}; use --to kohya"
        )
    state: dict[str, Tensor] = {}
    q, r = keys.QR_BASIS
    for place, layer in adapter.layers.items():
        roles = adapter.raw.get(place, {})
        if layer.magnitude is not None or place.part != "unet" or q not in roles:
            raise Refused(
                f"{place.path} in {adapter.source} is no ΔR or QR-LoRA layer of the transformer, and the "
                "official format has nothing else; project a LoRA onto a basis first: tools/import_lora.py "
                "--method delta_r --model BASE"
            )
        if r not in roles:
            raise Refused(
                f"{place.path} in {adapter.source} was saved without R, which the official format needs; "
                "give the base with --model"
            )
        module = places.diffusers_layer(place, "flux")
        if "up" in roles:
            last = ".to_out.0" if module.endswith(".to_out.0") else ""  # official files repeat it
            state[f"{module}{last}.{keys.OLD_UP}"] = roles["up"]
            state[f"{module}{last}.lora.down.weight"] = layer.scale * roles["down"].float()
        else:
            state[f"{module}.{keys.PEFT[q]}"] = roles[q]
            for role in (r, *method_for(roles, None).require_factor().trained):
                state[f"{module}.{keys.PEFT[role]}"] = layer.scale * roles[role].float()
    return [Written("", state, {})]
