"""What an adapter file says and holds: anyone's file, also a damaged one, as plain facts.

Nothing is refused that can be told: a layer that is not whole, a NaN, keys of another kind become problems in
a list. Pickles are read as tensors only (`tensors.read_tensors`), and nothing in a file is run.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.adapters.method import Method
from lowrank.errors import Refused
from lowrank.files import sha256
from lowrank.formats import static
from lowrank.formats.static import Static
from lowrank.naming import keys
from lowrank.naming.places import adapter_family, places
from lowrank.tensors import existing_file, read_tensors

# What the last words of keys say about files of other kinds (owner: LyCORIS, kohya sd-scripts)
_KINDS = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "lambda_layer": "T-LoRA",
    "oft_blocks": "OFT",
    "oft_R.weight": "OFT",
    "diff": "full difference",
    "diff_b": "bias difference",
    "w_norm": "norm layers",
    "b1.weight": "GLoRA",
    "on_input": "IA3",
}
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


def report(path: str | Path, method: Method | None = None) -> dict[str, Any]:
    """Everything that is shown of a file, ready for JSON. Raises `Refused` for no file of tensors."""
    file = existing_file(path)
    state, metadata = read_tensors(file)
    own = () if method is None else static.roles_of(method)
    layers: dict[str, dict[str, Tensor]] = {}
    odd: list[str] = []
    for key, value in state.items():
        module, _, last = key.rpartition(".")
        found = keys.role_of(key) or ((module, last) if module and last in own else None)
        if found is None:
            odd.append(key)
        else:
            layers.setdefault(keys.module_path(found[0]), {})[found[1]] = value
    told, problems = [], []
    for module, roles in layers.items():
        one = _layer(module, roles, str(file), metadata, method)
        told.append(one)
        if one["problem"]:
            problems.append(f"{module}: {one['problem']}")
    kinds = Counter(kind for key in odd for last, kind in _KINDS.items() if key.endswith(f".{last}"))
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "tensors": len(state),
        "model": _family(layers, metadata, problems),
        "method": metadata.get("lowrank.method") or _kind(layers, kinds),
        "ranks": _counted(one["rank"] for one in told),
        "alphas": _counted(one["alpha"] for one in told),
        "dtypes": _counted(str(v.dtype).removeprefix("torch.") for v in state.values() if v.dim()),
        "parts": _counted(one["part"] for one in told),
        "targets": _counted(_target(one["path"]) for one in told),
        "experts": max((one["experts"] for one in told), default=1),
        "norm": math.sqrt(sum((one["norm"] or 0.0) ** 2 for one in told)),
        "base": _facts(metadata, BASE) | _lowrank(metadata, ("base_model", "base_hash")),
        "basis_hash": metadata.get("lowrank.basis_hash"),
        "training": _facts(metadata, TRAINING),
        "schedule": _schedule(metadata),
        "command": metadata.get("lowrank.command"),
        "made": _lowrank(metadata, ("version", "exported_from", "imported_from", "merged_from")),
        "options": _json(metadata.get("lowrank.options")),
        "other_keys": {"count": len(odd), "kinds": dict(kinds), "examples": sorted(odd)[:5]},
        "problems": problems,
        "layers": told,
        "metadata": metadata,
    }


def _layer(
    module: str, roles: dict[str, Tensor], source: str, metadata: Mapping[str, str], method: Method | None
) -> dict[str, Any]:
    held = places(module)
    one: dict[str, Any] = {
        "module": module,
        "part": held[0][0].part,
        "path": held[0][0].path if held[0][1] is None else module,
        "rank": None,
        "alpha": float(roles["alpha"]) if "alpha" in roles and roles["alpha"].numel() == 1 else None,
        "outputs": None,
        "inputs": None,
        "norm": None,
        "experts": 1,
        "lengths": "magnitude" in roles,
        "problem": None,
    }
    odd = [role for role, value in roles.items() if not value.is_floating_point() and role != "alpha"]
    if odd:
        return one | {"problem": f"{', '.join(odd)} of whole numbers, which are no weights"}
    odd = [role for role, value in roles.items() if not _finite(value)]
    if odd:
        return one | {"problem": f"NaN or infinite values in {', '.join(odd)}"}
    experts = roles["router"].shape[0] if roles.get("router", torch.empty(0)).dim() == 2 else 1
    if experts > 1:  # its ΔW depends on the input and has no norm
        ranks = (
            (method.require_factor().rank_in(role, value.shape) for role, value in roles.items())
            if method
            else ()
        )
        return one | {"rank": next((rank for rank in ranks if rank), None), "experts": experts}
    try:
        layer = _static(module, roles, source, metadata, method)
    except Refused as refused:
        return one | {"problem": str(refused).removeprefix(f"{source}: ")}
    return one | {
        "rank": layer.rank,
        "outputs": layer.up.shape[0],
        "inputs": layer.down.shape[1],
        "norm": layer.norm(),
        "problem": None if layer.scale else "alpha is 0: it adds nothing here, and its rank's worth in kohya",
    }


def _static(
    module: str, roles: Mapping[str, Tensor], source: str, metadata: Mapping[str, str], method: Method | None
) -> Static:
    usable = {role: value.float() for role, value in roles.items() if role != "mid"}
    if "mid" in roles:
        raise Refused("it has LyCORIS' middle convolution; tools/import_lora.py folds it into a plain LoRA")
    return static.static(module, usable, source, metadata.get("lowrank.method"), method)


def _finite(value: Tensor) -> bool:
    """Whether all values are; float8, which has no arithmetic, is asked in fp32."""
    wide = value.float() if value.is_floating_point() and value.dtype.itemsize == 1 else value
    return bool(torch.isfinite(wide).all())


def _family(layers: Mapping[str, Any], metadata: Mapping[str, str], problems: list[str]) -> str | None:
    if not layers:
        return None
    try:
        return adapter_family(layers, metadata, "the file")
    except Refused as refused:
        problems.append(str(refused))
        return None


def _kind(layers: Mapping[str, Mapping[str, Tensor]], others: Counter) -> str:
    roles = {role for own in layers.values() for role in own}
    if "delta_r" in roles:
        return "delta_r"
    if layers:
        return "dora" if "magnitude" in roles else "lora"
    return " + ".join(sorted(others)) or "unknown"


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
    told = {name: metadata.get(f"ss_{name}") for name in names}
    return {name: value for name, value in told.items() if value not in _NONE and value is not None}


def _lowrank(metadata: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {
        name: metadata[f"lowrank.{name}"] for name in names if metadata.get(f"lowrank.{name}") not in _NONE
    }


def _schedule(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Which ranks are open when: T-LoRA's facts, of our files and of LyCORIS'."""
    told: dict[str, Any] = {k: v for k, v in metadata.items() if k.startswith("tlora_")}
    for source in (_json(metadata.get("lowrank.options")), _json(metadata.get("lycoris_config"))):
        if isinstance(source, dict):
            told |= {k: v for k, v in source.items() if "min_rank" in k or k.startswith("tlora_")}
    return told


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except (json.JSONDecodeError, RecursionError):
        return text


# ---------- two files


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What differs between two files: facts, layers that only one has, ranks, sizes of the changes."""
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
    facts = {name: [one[name], other[name]] for name in names if one[name] != other[name]}
    for name in sorted(one["training"].keys() | other["training"].keys()):
        values = [told["training"].get(name) for told in (one, other)]
        if values[0] != values[1]:
            facts[f"training.{name}"] = values
    first, second = ({_key(layer): layer for layer in told["layers"]} for told in (one, other))
    both = [name for name in first if name in second]
    return {
        "same_bytes": one["sha256"] == other["sha256"],
        "facts": facts,
        "only_first": [name for name in first if name not in second],
        "only_second": [name for name in second if name not in first],
        "ranks": {
            name: [first[name]["rank"], second[name]["rank"]]
            for name in both
            if first[name]["rank"] != second[name]["rank"]
        },
        "changes": {},
    }


def _key(layer: Mapping[str, Any]) -> str:
    return f"{layer['part']}.{layer['path']}"


def compared(one: Mapping[Any, Static], other: Mapping[Any, Static]) -> dict[str, dict[str, float]]:
    """‖ΔW₁ − ΔW₂‖/‖ΔW₁‖ and the cosine of each layer that both have and that fits."""
    found = {}
    for place, layer in one.items():
        theirs = other.get(place)
        sizes = theirs and (theirs.up.shape[0], theirs.down.shape[1])
        if theirs is None or sizes != (layer.up.shape[0], layer.down.shape[1]):
            continue
        mine, size = layer.norm(), theirs.norm()
        apart = static.distance(layer, theirs)
        inner = (mine**2 + size**2 - apart**2) / 2
        found[f"{place.part}.{place.path}"] = {
            "distance": apart / mine if mine else (0.0 if not size else math.inf),
            "cosine": inner / (mine * size) if mine and size else math.nan,
        }
    return found
