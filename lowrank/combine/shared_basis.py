"""The directions that a collection of LoRAs shares in each layer: two modes of the HOSVD of the stacked ΔW.

ΔW_n = B_n A_n (O, I) is never formed. F_n = A_nᵀ (B_nᵀB_n)^½ (I, r) has F_nF_nᵀ = ΔW_nᵀΔW_n, so the principal
directions of [F_1 … F_N] are the right mode, and the left mode follows in the same way from the transposes;
neither depends on how ΔW_n is split into factors. Columns are collected file by file and, once there are too
many, replaced by their principal ones. Uncentred: a common mean is then simply one of the directions.

Source: the truncated HOSVD of arXiv 2512.05117, Algorithm 1; uncentred by default here, on updates instead
of the factors, with energies and a leave-one-out test, which the paper does not have.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank.adapter_file import AdapterFile, read_adapter_file
from lowrank.adapters.factor import concat, resize_pair
from lowrank.bases.basis_file import Pair, Values, random_columns
from lowrank.combine.compare import energy, rows, unscaled
from lowrank.combine.sketch import Side, Sketch, without
from lowrank.errors import Refused
from lowrank.files import sha256
from lowrank.formats.delta import Delta, delta_of, method_for, missing_roles
from lowrank.naming import keys
from lowrank.naming import unet as unet_names
from lowrank.naming.families import layers_per_block
from lowrank.tensors import existing_file
from lowrank.unused_keys import BIAS

LEAST = 3  # LoRAs: what fewer share cannot be distinguished from chance
_SDXL = re.compile(r"(?:down|up)_blocks_.*_transformer_blocks_[1-9]")  # SD 1 and 2 have one in each


# ---------- files


class Lora(NamedTuple):
    """One file: its updates by layer (`keys.flat`, SDXL's with original block names), and others."""

    updates: dict[str, Delta]
    other: Counter[str]  # layers left out, by kind
    metadata: Mapping[str, str]


def find_files(paths: Sequence[str | Path]) -> tuple[list[Path], Counter[str]]:
    """The files to read, in the order of their bytes' hash, and how many were left out as copies.

    A folder stands for every `.safetensors` file below it. The order depends neither on names nor on the file
    system. Raises `Refused` for a path that does not exist and for folders without such a file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*.safetensors") if file.is_file())
        else:
            files.append(existing_file(path))
    if not files:
        names = ", ".join(map(str, paths)) or "nothing"
        raise Refused(f"no .safetensors file below {names}; name the folder that has the LoRA files")
    by_hash: dict[str, Path] = {}
    for path in files:
        by_hash.setdefault(sha256(path), path)
    copies = Counter({"copies of another file": len(files) - len(by_hash)})
    return [by_hash[digest] for digest in sorted(by_hash)], copies


def read_updates(path: str | Path) -> Lora:
    """The updates ΔW = alpha/rank · up · down of one file in float64; other kinds of layers are counted.

    Reads keys of kohya, diffusers, PEFT and lowrank. Raises `Refused`, naming the file, for absent factors,
    for factors that do not fit, and for NaN.
    """
    file = read_adapter_file(path)
    kinds = {key.module: key.kind for key in file.not_understood if key.kind != BIAS and key.certain}
    for key in file.not_understood:  # an uncertain key counts only beside factors, whose layer it changes
        if not key.certain and key.module in file.layers:
            kinds.setdefault(key.module, key.kind)
    kinds |= {module: kind for module in file.layers if (kind := _other_kind(file, module))}
    other = Counter(kinds.values())
    other["bias, read without it"] += sum(key.kind == BIAS for key in file.not_understood)
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
    if any(map(_SDXL.match, updates)):
        per_block = layers_per_block(file.layers, file.metadata)
        updates = {unet_names.flat_sdxl_name(name, per_block): delta for name, delta in updates.items()}
    if not updates and not +other:
        other["files without an adapter"] += 1
    return Lora(updates, +other, file.metadata)


def _other_kind(file: AdapterFile, module: str) -> str | None:
    """The kind of a layer that lowrank can read, but that is no plain pair of up and down; else None."""
    roles = file.layers[module]
    if "magnitude" in roles:
        return "DoRA"
    if keys.ROUTER in roles:
        return "experts"
    if keys.MIDDLE in file.keys[module]:
        return "Tucker"
    return method.name if (method := method_for(roles, None)).gate is not None else None


# ---------- one layer


class _Layer:
    """The columns of one layer that are collected file by file."""

    def __init__(self, shape: tuple[int, int], source: Path, size: int) -> None:
        self.shape, self.source, self.size, self.loras = shape, source, size, 0
        self.left, self.right = Sketch(size), Sketch(size)
        self.sum: Delta | None = None  # of all ΔW, where they are centred

    def add(self, delta: Delta) -> None:
        self.right.add(rows(delta).mT)
        self.left.add(rows(_transposed(delta)).mT)

    def add_to_sum(self, delta: Delta) -> None:
        """Add ΔW to the sum, which is exact up to rank 2·size and truncated above."""
        up, down = concat([(1.0, pair.up, pair.down) for pair in (self.sum, delta) if pair is not None])
        if up.shape[1] > 2 * self.size:
            up, down, _ = resize_pair(up, down, min(self.size, *self.shape))
        self.sum = Delta(up, down, 1.0)

    def centred(self, delta: Delta) -> Delta:
        """ΔW minus the mean, where a sum was made."""
        if self.sum is None:
            return delta
        parts = [(1.0, delta.up, delta.down), (-1.0 / self.loras, self.sum.up, self.sum.down)]
        return Delta(*concat(parts), 1.0)


class _LayerBasis:
    """The basis of one layer, and the shares of the LoRAs' energy in it."""

    def __init__(self, name: str, layer: _Layer, extraction: Extraction) -> None:
        self.layer, self.left, self.right = layer, layer.left.side(), layer.right.side()
        enough = [int((side.shares() < extraction.tau - 1e-9).sum()) + 1 for side in (self.left, self.right)]
        self.count = min(max(enough), extraction.rank, *layer.shape)
        self.pair = Pair(
            self._filled(f"{name}.left", self.left), self._filled(f"{name}.right", self.right).mT
        )
        self.share = layer.loras / (layer.loras - 1) if extraction.center else 1.0
        self.both: list[float] = []
        self.held_out: list[float] = []

    def _filled(self, label: str, side: Side) -> Tensor:
        """(n, K): where the collection has fewer directions on this side, random ones of value 0 follow."""
        kept = side.vectors[:, : self.count]
        more = self.count - kept.shape[1]
        return torch.cat([kept, random_columns(label, len(kept), more, beside=kept)], 1) if more else kept

    def values(self) -> Values:
        padded = [torch.zeros(self.count, dtype=torch.float64) for _ in range(2)]
        for values, side in zip(padded, (self.left, self.right), strict=True):
            kept = side.values[: self.count]
            values[: len(kept)] = kept
        return Values(*padded)

    def measure(self, delta: Delta) -> None:
        """Record the share of a LoRA's energy in the basis, and in the basis made without that LoRA."""
        left, right = self.left.vectors, self.right.vectors
        core = (left.mT @ delta.up) @ (delta.down @ right)  # (m, m')
        less_left = without(self.left, rows(_transposed(delta)) @ left, self.share, self.count)
        less_right = without(self.right, rows(delta) @ right, self.share, self.count)
        whole = energy(delta)
        self.both.append(core[: self.count, : self.count].square().sum().item() / whole)
        self.held_out.append((less_left.mT @ core @ less_right).square().sum().item() / whole)

    def row(self) -> Row:
        (outputs, inputs), count = self.layer.shape, self.count
        return Row(
            outputs=outputs,
            inputs=inputs,
            loras=self.layer.loras,
            directions=count,
            right=float(self.right.shares()[:count][-1]),
            left=float(self.left.shares()[:count][-1]),
            both=fmean(self.both),
            held_out=fmean(self.held_out),
            least_held_out=min(self.held_out),
            random=count * count / (outputs * inputs),
            exact=self.layer.left.exact and self.layer.right.exact,
        )


def _transposed(delta: Delta) -> Delta:
    return Delta(delta.down.mT, delta.up.mT, 1.0)


class Row(NamedTuple):
    """One layer of the report; shares of energy between 0 and 1.

    `both` is the share of a LoRA in L and R together, ‖LᵀΔWRᵀ‖²/‖ΔW‖², on average over the LoRAs; `held_out`
    is that share for bases made without that LoRA; `random` its mean for random directions, K²/(O·I).
    """

    outputs: int
    inputs: int
    loras: int
    directions: int
    right: float
    left: float
    both: float
    held_out: float
    least_held_out: float
    random: float
    exact: bool


# ---------- a collection


class Extraction(NamedTuple):
    """Options of an extraction. `sketch` columns are kept per layer and side, in float64."""

    rank: int = 16
    tau: float = 0.9
    center: bool = False
    normalize: bool = False
    sketch: int = 64


class Extracted(NamedTuple):
    """A basis, and the numbers of its report."""

    layers: dict[str, Pair]
    values: dict[str, Values]
    table: dict[str, Row]
    loras: int  # files with a plain LoRA layer that is not zero
    other: Counter[str]  # layers and files left out, by kind
    few: dict[str, int]  # layers left out because fewer than LEAST LoRAs have them, and how many do
    facts: dict[str, str]  # of the base model, where all files agree


def extract(files: Sequence[Path], extraction: Extraction, *, progress: bool = True) -> Extracted:
    """The basis of a collection, one file in memory at a time, read twice (three times to centre).

    The result depends on the order of `files` only by rounding, and not at all for one order. Raises
    `Refused` for fewer than `LEAST` LoRAs, where no layer is in as many, for a layer of two shapes, and for
    files that cannot be read.
    """
    other: Counter[str] = Counter()
    metadata: list[Mapping[str, str]] = []
    layers: dict[str, _Layer] = {}

    def pass_over(label: str) -> Iterator[tuple[Path, Lora]]:
        for path in tqdm(files, desc=label, unit="file", file=sys.stderr, disable=not progress):
            yield path, read_updates(path)

    for path, lora in pass_over("mean" if extraction.center else "directions"):
        other.update(lora.other)
        usable = list(_usable(lora, extraction))
        other.update({"layers that are zero": len(lora.updates) - len(usable)})
        metadata += [lora.metadata] if usable else []
        for name, delta in usable:
            shape = (delta.up.shape[0], delta.down.shape[1])
            layer = layers.setdefault(name, _Layer(shape, path, extraction.sketch))
            if layer.shape != shape:
                raise Refused(
                    f"{name} is {shape[0]}×{shape[1]} in {path} and {layer.shape[0]}×{layer.shape[1]} in "
                    f"{layer.source}; they are for different base models, keep them in separate folders"
                )
            layer.loras += 1
            (layer.add_to_sum if extraction.center else layer.add)(delta)
    few = {name: layer.loras for name, layer in layers.items() if layer.loras < LEAST}
    layers = {name: layer for name, layer in sorted(layers.items()) if name not in few}
    _refuse_small(len(metadata), layers, other)
    if extraction.center:
        for _, lora in pass_over("directions"):
            for name, delta in _usable(lora, extraction):
                if name in layers and energy(delta := layers[name].centred(delta)) > 0:
                    layers[name].add(delta)
        alike = [name for name, layer in layers.items() if layer.right.energy == 0]
        layers = {name: layer for name, layer in layers.items() if name not in alike}
        other["layers that are alike in every LoRA"] = len(alike)
        _refuse_small(len(metadata), layers, other)
    bases = {name: _LayerBasis(name, layer, extraction) for name, layer in layers.items()}
    for _, lora in pass_over("leave-one-out"):
        for name, delta in _usable(lora, extraction):
            if name in bases and energy(delta := layers[name].centred(delta)) > 0:
                bases[name].measure(delta)
    return Extracted(
        {name: basis.pair for name, basis in bases.items()},
        {name: basis.values() for name, basis in bases.items()},
        {name: basis.row() for name, basis in bases.items()},
        len(metadata),
        +other,
        few,
        _common_facts(metadata),
    )


def _usable(lora: Lora, extraction: Extraction) -> Iterator[tuple[str, Delta]]:
    """The updates that are not zero, scaled to norm 1 with `normalize`."""
    for name, delta in lora.updates.items():
        if (whole := energy(delta)) > 0:
            if extraction.normalize:
                delta = Delta(delta.up, delta.down / math.sqrt(whole), 1.0)
            yield name, delta


def _refuse_small(loras: int, layers: Mapping[str, _Layer], other: Counter[str]) -> None:
    if layers and loras >= LEAST:
        return
    skipped = ", ".join(f"{count} {kind}" for kind, count in sorted((+other).items())) or "nothing"
    why = f"no usable layer is in {LEAST} of the {loras} LoRAs" if loras >= LEAST else f"{loras} usable LoRAs"
    raise Refused(
        f"{why}, and {LEAST} are the fewest that can share anything (left out: {skipped}); "
        "give more LoRAs of one base model, or train with basis_path=auto:grad, which needs none"
    )


def _common_facts(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The metadata of the base model that all LoRAs have with one value."""
    names = {
        "base_hash": "lowrank.base_hash",
        "base_model": "lowrank.base_model",
        "sd_model_hash": "ss_new_sd_model_hash",
        "base_model_version": "ss_base_model_version",
    }
    facts = {fact: {file.get(key) for file in metadata} - {"None"} for fact, key in names.items()}
    return {fact: value for fact, values in facts.items() if len(values) == 1 and (value := values.pop())}
