"""The facts of an adapter file of any origin, also a damaged one: metadata, ranks, norms, problems.

An incomplete layer, a NaN or an unknown key is listed as a problem and does not stop the report. Pickles are
read as tensors only (`tensors.read_tensors`), and nothing in a file is run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank import peft_folder
from lowrank.adapter_file import AdapterFile, open_adapter_file, read_adapter_file
from lowrank.adapters.method import Method
from lowrank.errors import Refused
from lowrank.files import parse_json, sha256
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.delta import LORA, Delta, delta_of, distance, method_for
from lowrank.formats.foreign import ForeignLayer, split
from lowrank.formats.read import sizes_of
from lowrank.naming import keys
from lowrank.naming.families import layers_per_block, model_of
from lowrank.naming.places import LayerPath, places
from lowrank.unused_keys import usage

TRAINING = (  # facts of kohya's metadata, in the order they are shown
    *("output_name", "training_started_at", "steps", "epoch", "num_epochs", "num_train_images"),
    *("num_reg_images", "batch_size_per_device", "total_batch_size", "gradient_accumulation_steps"),
    *("resolution", "learning_rate", "unet_lr", "text_encoder_lr", "optimizer", "lr_scheduler"),
    *("mixed_precision", "seed", "clip_skip", "noise_offset", "min_snr_gamma", "timestep_sampling"),
    *("network_module", "network_args", "training_comment"),
)
BASE = ("base_model_version", "sd_model_name", "sd_model_hash", "new_sd_model_hash", "vae_name")
_OWN = ("version", "method", "options", "command", "base_model", "base_hash", "basis_hash", "exported_from")
_NONE = (None, "", "None", "null")


def report(
    path: str | Path, method: Method | None = None, base: BaseCheckpoint | None = None
) -> dict[str, Any]:
    """The report of a file, ready for JSON; `base` measures layers whose ΔW depends on it.

    Raises `Refused` for a file without tensors.
    """
    raw = open_adapter_file(path)
    files = _files(Path(path))
    contents = read_adapter_file(raw, method.file_roles() if method else (), strict=False)
    per_block = layers_per_block(contents.layers, raw.metadata)
    if base is not None:
        per_block = base.per_block
    whole = split(contents, raw.state, broken := {}, per_block)
    contents = replace(contents, layers=whole.pairs)
    problems = list(broken.values())
    layers = [_layer(module, contents, method, per_block) for module in contents.layers]
    problems += [f"{layer['module']}: {layer['problem']}" for layer in layers if layer["problem"]]
    shown = {layer.module: place for place, layer in reversed(whole.foreign.items())}  # FLUX joins layers
    layers += [_foreign_layer(place, whole.foreign[place], problems, base) for place in shown.values()]
    other, metadata = whole.not_understood, raw.metadata
    kinds = Counter(layer.kind.name for layer in {id(v.tensors): v for v in whole.foreign.values()}.values())
    families = {**contents.layers, **dict.fromkeys(whole.modules.values())}
    return {
        "file": str(path),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": sha256(files[0]) if len(files) == 1 else None,
        "files": [sha256(file) for file in files],
        "tensors": len(raw.state),
        "model": _family(families, sizes_of(contents.layers), metadata, problems),
        "method": metadata.get("lowrank.method") or _kind(contents.layers, kinds),
        "ranks": _counted(layer["rank"] for layer in layers),
        "alphas": _counted(layer["alpha"] for layer in layers),
        "alpha_places": _counted(contents.alphas.values()),
        "dtypes": _counted(str(v.dtype).removeprefix("torch.") for v in raw.state.values() if v.dim()),
        "parts": _counted(layer["part"] for layer in layers),
        "targets": _counted(_target(layer["path"]) for layer in layers),
        "experts": max((layer["experts"] for layer in layers), default=1),
        "norm": math.sqrt(sum((layer["norm"] or 0.0) ** 2 for layer in layers)),
        "without_norm": sum(layer["norm"] is None and not layer["problem"] for layer in layers),
        "base": _facts(metadata, BASE) | _lowrank(metadata, ("base_model", "base_hash")),
        "basis_hash": metadata.get("lowrank.basis_hash"),
        "training": _facts(metadata, TRAINING),
        "schedule": _schedule(metadata),
        "command": metadata.get("lowrank.command"),
        "made": _lowrank(metadata, ("version", "exported_from", "imported_from", "merged_from")),
        "options": _json(metadata.get("lowrank.options")),
        "other_keys": {
            "count": len(other),
            "kinds": _counted(
                kind for _, kind in {(k.module, k.kind) for k in other} if "unknown" not in kind
            ),
            "examples": sorted(key.key for key in other)[:5],
        },
        "usage": usage(str(path), len(raw.state), other),
        "problems": problems,
        "layers": layers,
        "metadata": metadata,
    }


def _files(path: Path) -> list[Path]:
    """The file, or the tensors and configurations in a folder of PEFT."""
    if not path.is_dir():
        return [path]
    names = (peft_folder.CONFIG, peft_folder.FILE, str(Path(peft_folder.FILE).with_suffix(".bin")))
    folders = (path, *(path / name for name in peft_folder.COMPONENTS))
    return [folder / name for folder in folders for name in names if (folder / name).is_file()]


def _layer(module: str, contents: AdapterFile, method: Method | None, per_block: int) -> dict[str, Any]:
    owners, roles = places(module, per_block), contents.layers[module]
    facts: dict[str, Any] = {
        "module": module,
        "part": owners[0][0].part,
        "path": owners[0][0].path if owners[0][1] is None else module,
        "rank": None,
        "alpha": float(roles["alpha"]) if "alpha" in roles and roles["alpha"].numel() == 1 else None,
        "outputs": None,
        "inputs": None,
        "norm": None,
        "experts": 1,
        "lengths": "magnitude" in roles,
        "problem": None,
    }
    problem = contents.problems.get(module)
    router = roles.get(keys.ROUTER, torch.empty(0))
    if problem is None and router.dim() == 2 and len(router) > 1:  # ΔW depends on the input and has no norm
        factor = method.require_factor() if method else None
        ranks = (factor.rank_in(role, value.shape) if factor else None for role, value in roles.items())
        return facts | {"rank": next((rank for rank in ranks if rank), None), "experts": len(router)}
    try:
        if problem is not None:
            raise Refused(problem)
        layer = delta_of(module, roles, contents.source, method, torch.float32)
    except Refused as refused:
        return facts | {"problem": str(refused).removeprefix(f"{contents.source}: ")}
    return facts | {
        "rank": layer.rank,
        "outputs": layer.up.shape[0],
        "inputs": layer.down.shape[1],
        "norm": layer.norm(),
        "problem": None
        if layer.scale
        else "alpha is 0: it adds nothing here, and kohya's trainer reads it as alpha = rank",
    }


def _foreign_layer(
    place: LayerPath, layer: ForeignLayer, problems: list[str], base: BaseCheckpoint | None
) -> dict[str, Any]:
    """The facts of a layer that is no pair of factors; its norm may need the base."""
    alpha = layer.tensors.get("alpha")
    facts: dict[str, Any] = {
        "module": layer.module,
        "part": place.part,
        "path": place.path if layer.piece is None else layer.module,
        "kind": layer.kind.name,
        "rank": layer.rank(),
        "alpha": float(alpha) if alpha is not None and alpha.numel() == 1 else None,
        "outputs": None,
        "inputs": None,
        "norm": None,
        "experts": 1,
        "lengths": "magnitude" in layer.tensors,
        "problem": None,
    }
    try:
        if layer.needs_base and base is not None:
            change = layer.change(base.original(place))
            assert change is not None  # kinds that need the base change a weight
            facts["norm"] = float(change.double().norm())
        else:
            facts["norm"] = replace(layer, piece=None).norm()
    except Refused as refused:
        facts["problem"] = str(refused)
        problems.append(str(refused))
    return facts


def _family(
    layers: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    metadata: Mapping[str, str],
    problems: list[str],
) -> str | None:
    if not layers:
        return None
    try:
        return model_of(layers, metadata, "the file", sizes=sizes).family
    except Refused as refused:
        problems.append(str(refused))
        return None


def _kind(layers: Mapping[str, Mapping[str, Tensor]], others: Counter) -> str:
    foreign = sorted(others)
    if not layers:
        return " + ".join(foreign) or "unknown"
    kinds = {method_for(roles, None).name for roles in layers.values()} - {LORA.name}
    dora = any("magnitude" in roles for roles in layers.values())
    return " + ".join(["+".join(sorted(kinds)) or (keys.DORA if dora else LORA.name), *foreign])


def _target(path: str) -> str:
    """The words of a path without numbers: `attn1.to_q` of every block is one target."""
    words = [word for word in path.split(".") if not word.isdigit()]
    return ".".join(words[-2:])


def _counted(values: Any) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    return {_number(value): count for value, count in Counter(values).most_common()}


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _facts(metadata: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    facts = {name: metadata.get(f"ss_{name}") for name in names}
    return {name: value for name, value in facts.items() if value not in _NONE and value is not None}


def _lowrank(metadata: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {
        name: metadata[f"lowrank.{name}"] for name in names if metadata.get(f"lowrank.{name}") not in _NONE
    }


def _schedule(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The schedule of a T-LoRA: metadata of our files and of LyCORIS'."""
    schedule: dict[str, Any] = {k: v for k, v in metadata.items() if k.startswith("tlora_")}
    for source in (_json(metadata.get("lowrank.options")), _json(metadata.get("lycoris_config"))):
        if isinstance(source, dict):
            schedule |= {k: v for k, v in source.items() if "min_rank" in k or k.startswith("tlora_")}
    return schedule


def _json(text: str | None) -> Any:
    try:
        return parse_json(text, "metadata") if text else None
    except Refused:
        return text


# ---------- two files


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The differences of two reports: facts, layers that only one file has, ranks."""
    names = (
        "model",
        "method",
        "ranks",
        "alphas",
        "dtypes",
        "parts",
        "base",
        "basis_hash",
        "schedule",
        "options",
    )
    facts = {name: [first[name], second[name]] for name in names if first[name] != second[name]}
    for name in sorted(first["training"].keys() | second["training"].keys()):
        values = [report["training"].get(name) for report in (first, second)]
        if values[0] != values[1]:
            facts[f"training.{name}"] = values
    mine, theirs = ({_key(layer): layer for layer in report["layers"]} for report in (first, second))
    both = [name for name in mine if name in theirs]
    return {
        "same_bytes": first["files"] == second["files"],
        "facts": facts,
        "only_first": [name for name in mine if name not in theirs],
        "only_second": [name for name in theirs if name not in mine],
        "ranks": {
            name: [mine[name]["rank"], theirs[name]["rank"]]
            for name in both
            if mine[name]["rank"] != theirs[name]["rank"]
        },
        "changes": {},
    }


def _key(layer: Mapping[str, Any]) -> str:
    return f"{layer['part']}.{layer['path']}"


def compared(first: Mapping[Any, Delta], second: Mapping[Any, Delta]) -> dict[str, dict[str, float]]:
    """‖ΔW₁ − ΔW₂‖/‖ΔW₁‖ and the cosine of each layer of one size in both."""
    changes = {}
    for place, layer in first.items():
        theirs = second.get(place)
        sizes = theirs and (theirs.up.shape[0], theirs.down.shape[1])
        if theirs is None or sizes != (layer.up.shape[0], layer.down.shape[1]):
            continue
        mine, size = layer.norm(), theirs.norm()
        apart = distance(layer, theirs)
        inner = (mine**2 + size**2 - apart**2) / 2
        changes[f"{place.part}.{place.path}"] = {
            "distance": apart / mine if mine else (0.0 if not size else math.inf),
            "cosine": inner / (mine * size) if mine and size else math.nan,
        }
    return changes
