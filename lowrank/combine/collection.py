"""A collection of LoRA files: which they are, and one file's layers as thin updates in one spelling.

kohya's, diffusers' and PEFT's keys are read, and our own files; ΔW = alpha/rank · up · down. Layers of other
kinds (DoRA, LoHa, LoKr, Tucker …) have no such pair: they are left out and counted.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.combine.compare import Update, update
from lowrank.errors import Refused
from lowrank.files import sha256
from lowrank.formats.names import missing, number, sizes
from lowrank.naming import keys
from lowrank.naming import unet as unet_names
from lowrank.tensors import existing_file, read_tensors

ROLES = ("down", "up", "alpha", "q", "base_r", "delta_r")  # a plain pair, ours or anybody's
NO_ADAPTER = "files without an adapter"
DUPLICATE = "copies of another file"
_BIAS = "bias"  # beside ΔW, which is whole without it
_KINDS = {  # what a suffix says about the layer that has it; LyCORIS' names, PEFT's, ours
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"oft_\w+": "OFT",
    r"on_input": "IA3",
    r"[ab][12]\.weight": "GLoRA",
    r"diff": "full difference",
    r"(diff_b|lora_B\.bias|lora_up\.bias)": _BIAS,
    r"[wb]_norm": "norm",
    r"scalar": "LoRA with a scalar",
    r"lora_embedding_[AB]": "embedding",
}
_OURS = {
    "magnitude": "DoRA",
    "router": "experts",
    "mid": "Tucker",
}  # by role; others that no plain pair has are cores
_MANY = re.compile(r"(?:down|up)_blocks_.*_transformer_blocks_[1-9]")  # SD 1 and 2 have one in each


class Lora(NamedTuple):
    """One file: its updates by layer (`keys.flat`, SDXL's with original block names), what else it holds."""

    updates: dict[str, Update]
    other: Counter[str]  # layers left out, by kind
    metadata: Mapping[str, str]


def gather(given: Sequence[str | Path]) -> tuple[list[Path], Counter[str]]:
    """The files to read, in the order of their bytes' hash, and how many were left out as copies.

    Folders give every `.safetensors` below them, files themselves. The order depends neither on names nor on
    the file system. Raises `Refused` for a path that is absent and for folders without such a file.
    """
    found: list[Path] = []
    for path in map(Path, given):
        inside = sorted(p for p in path.rglob("*.safetensors") if p.is_file()) if path.is_dir() else []
        found += inside or ([] if path.is_dir() else [existing_file(path)])
    if not found:
        told = ", ".join(map(str, given)) or "nothing"
        raise Refused(f"no .safetensors file below {told}; name the folder that holds the LoRA files")
    by_hash: dict[str, Path] = {}
    for path in found:
        by_hash.setdefault(sha256(path), path)
    return [by_hash[key] for key in sorted(by_hash)], Counter({DUPLICATE: len(found) - len(by_hash)})


def read_lora(path: str | Path) -> Lora:
    """The updates of one file in float64. A file without any adapter has none, and is counted as such.

    Raises `Refused`, naming the file, where it is not whole, where factors do not fit, and for NaN.
    """
    state, metadata = read_tensors(path)
    modules: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, str] = {}
    other: Counter[str] = Counter()
    for key, value in state.items():
        module, role = keys.role_of(key) or _other(key)
        if role == _BIAS:
            other["bias, read without it"] += 1
        elif role in ROLES:
            modules.setdefault(module, {})[role] = value
        else:
            kinds[module] = kinds.get(module) or _OURS.get(role, "core" if role in keys.PLAIN else role)
    # what no adapter has counts only where it stands beside factors, which it then changes
    kinds = {module: kind for module, kind in kinds.items() if kind[0] != "." or module in modules}
    other.update(kind.removeprefix(".") for kind in kinds.values())
    updates: dict[str, Update] = {}
    alphas = _Alphas(Path(path), metadata)
    for module, roles in modules.items():
        if module in kinds:
            continue
        roles = {role: number(value, f"{module}.{role}", path) for role, value in roles.items()}
        rank = sizes(module, roles, str(path)).get("rank", 1)
        if "alpha" not in roles and (alpha := alphas.of(module, rank)) is not None:
            roles["alpha"] = torch.tensor(alpha)
        if absent := missing(roles, metadata.get("lowrank.method")):
            if "delta_r" not in roles:
                raise Refused(
                    f"{path}: {module} has no {', '.join(absent)}; the file is not whole, use another"
                )
            other["ΔR without its basis"] += 1
            continue
        found = update(module, roles)
        assert found is not None, module
        updates[keys.flat(module)] = found
    if any(map(_MANY.match, updates)):
        updates = {unet_names.flat_sdxl_name(name): found for name, found in updates.items()}
    if not updates and not other:
        other[NO_ADAPTER] += 1
    return Lora(updates, other, metadata)


def _other(key: str) -> tuple[str, str]:
    """(module, kind) of a key that is none of a plain LoRA's; a leading dot where it need be no adapter's."""
    for pattern, kind in _KINDS.items():
        if found := re.search(rf"\.{pattern}$", key):
            return key[: found.start()], kind
    if "lora" in key:
        module = key.partition("." if key.startswith("lora_") else ".lora")[0]
        return module, f"unknown ({key[len(module) + 1 :]})"
    module, _, suffix = key.rpartition(".")
    return module, f".unknown ({suffix})"


class _Alphas:
    """The alphas that PEFT keeps beside its tensors: in adapter_config.json, or in diffusers' metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._configs: dict[str, Any] = {}
        beside = path.with_name("adapter_config.json")
        try:
            if path.stem == "adapter_model" and beside.is_file():
                told = json.loads(beside.read_text(encoding="utf-8"))
                self._configs = {"": told}
            elif "lora_adapter_metadata" in metadata:
                for key, value in json.loads(metadata["lora_adapter_metadata"]).items():
                    part, _, name = key.partition(".")
                    self._configs.setdefault(part, {})[name] = value
        except (ValueError, AttributeError) as error:
            raise Refused(
                f"the alpha of {path} cannot be read: its PEFT configuration is no JSON object ({error}); "
                "save the adapter again"
            ) from error

    def of(self, module: str, rank: int) -> float | None:
        """What alpha stands for in `alpha / rank`, or None where nothing is told."""
        part, _, path = module.removeprefix("base_model.model.").partition(".")
        told, path = (self._configs[part], path) if part in self._configs else (self._configs.get(""), module)
        if not told or "lora_alpha" not in told:
            return None
        pattern = told.get("alpha_pattern") or {}
        alpha = next((v for k, v in pattern.items() if re.search(rf"(?:^|\.){k}$", path)), told["lora_alpha"])
        return float(alpha) * (math.sqrt(rank) if told.get("use_rslora") else 1.0)
