"""A collection of LoRA files: which they are, and one file's layers as thin updates in one spelling.

kohya's, diffusers' and PEFT's keys are read, and our own files; ΔW = alpha/rank · up · down. Layers of other
kinds (DoRA, LoHa, LoKr, Tucker …) have no such pair: they are left out and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lowrank.adapter_file import BIAS, AdapterFile, read_adapter_file
from lowrank.combine.compare import unscaled
from lowrank.errors import Refused
from lowrank.files import sha256
from lowrank.formats.delta import Delta, delta_of, method_for, missing_roles
from lowrank.naming import keys
from lowrank.naming import unet as unet_names
from lowrank.tensors import existing_file

NO_ADAPTER = "files without an adapter"
DUPLICATE = "copies of another file"
_MANY = re.compile(r"(?:down|up)_blocks_.*_transformer_blocks_[1-9]")  # SD 1 and 2 have one in each


class Lora(NamedTuple):
    """One file: its updates by layer (`keys.flat`, SDXL's with original block names), what else it holds."""

    updates: dict[str, Delta]
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


def read_updates(path: str | Path) -> Lora:
    """The updates of one file in float64. A file without any adapter has none, and is counted as such.

    Raises `Refused`, naming the file, where it is not whole, where factors do not fit, and for NaN.
    """
    file = read_adapter_file(path)
    kinds = {one.module: one.kind for one in file.not_understood if one.kind != BIAS and one.certain}
    for one in file.not_understood:  # what no adapter has counts only beside factors, which it then changes
        if not one.certain and one.module in file.layers:
            kinds.setdefault(one.module, one.kind)
    kinds |= {module: kind for module in file.layers if (kind := _other_kind(file, module))}
    other = Counter(kinds.values())
    other["bias, read without it"] += sum(one.kind == BIAS for one in file.not_understood)
    updates: dict[str, Delta] = {}
    for module, roles in file.layers.items():
        if module in kinds:
            continue
        method = method_for(roles, None)
        factor, absent = method.require_factor(), missing_roles(roles, method)
        if absent and factor.copy is None and set(absent) <= factor.frozen:
            other["ΔR without its basis"] += 1
            continue
        if absent:
            raise Refused(f"{path}: {module} has no {', '.join(absent)}; the file is not whole, use another")
        updates[keys.flat(module)] = unscaled(delta_of(module, roles, str(path), precision=torch.float64))
    if any(map(_MANY.match, updates)):
        updates = {unet_names.flat_sdxl_name(name): delta for name, delta in updates.items()}
    if not updates and not +other:
        other[NO_ADAPTER] += 1
    return Lora(updates, +other, file.metadata)


def _other_kind(file: AdapterFile, module: str) -> str | None:
    """What a layer is that is read elsewhere, but is no plain pair of up and down."""
    roles = file.layers[module]
    if "magnitude" in roles:
        return "DoRA"
    if keys.ROUTER in roles:
        return "experts"
    if keys.MIDDLE in file.keys[module]:
        return "Tucker"
    return method.name if (method := method_for(roles, None)).gate is not None else None
