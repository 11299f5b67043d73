"""The directions that a collection of LoRAs shares in each layer: two modes of the HOSVD of the stacked ΔW.

ΔW_n = B_n A_n (O, I) is never formed. F_n = A_nᵀ (B_nᵀB_n)^½ (I, r) has F_nF_nᵀ = ΔW_nᵀΔW_n, so the principal
directions of [F_1 … F_N] are the right mode, and likewise on the left; neither depends on how ΔW_n is split
into factors. Columns are collected file by file and, once there are too many, replaced by their principal
ones. Uncentred: a common mean is then simply one of the directions.

Source: the truncated HOSVD of arXiv 2512.05117, Algorithm 1; here uncentred unless asked, on the updates
instead of the factors, with energies and a leave-one-out test, which the paper has not.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank.adapters.factor import concat, resize_pair
from lowrank.bases.basis_file import Pair, Values, random_columns
from lowrank.combine.collection import Lora, read_updates
from lowrank.combine.compare import energy, rows
from lowrank.combine.sketch import Side, Sketch, without
from lowrank.errors import Refused
from lowrank.formats.delta import Delta

LEAST = 3  # LoRAs: fewer share nothing that one could tell from chance


# ------------------------------------------------------------------ one layer


class _Layer:
    """What is known of a layer while files go by."""

    def __init__(self, shape: tuple[int, int], source: Path, size: int) -> None:
        self.shape, self.source, self.size, self.loras = shape, source, size, 0
        self.left, self.right = Sketch(size), Sketch(size)
        self.sum: Delta | None = None  # of all ΔW, where they are centred

    def add(self, one: Delta) -> None:
        self.right.add(rows(one).mT)
        self.left.add(rows(_transposed(one)).mT)

    def add_to_sum(self, one: Delta) -> None:
        """Of rank 2·size at most: exact up to there."""
        up, down = concat([(1.0, pair.up, pair.down) for pair in (self.sum, one) if pair is not None])
        if up.shape[1] > 2 * self.size:
            up, down, _ = resize_pair(up, down, min(self.size, *self.shape))
        self.sum = Delta(up, down, 1.0)

    def centred(self, one: Delta) -> Delta:
        """ΔW minus the mean, where a sum was made."""
        if self.sum is None:
            return one
        parts = [(1.0, one.up, one.down), (-1.0 / self.loras, self.sum.up, self.sum.down)]
        return Delta(*concat(parts), 1.0)


class _Found:
    """A layer's directions, and what the LoRAs have in them."""

    def __init__(self, name: str, layer: _Layer, how: Extraction) -> None:
        self.layer, self.left, self.right = layer, layer.left.side(), layer.right.side()
        enough = [int((side.shares() < how.tau - 1e-9).sum()) + 1 for side in (self.left, self.right)]
        self.count = min(max(enough), how.rank, *layer.shape)
        self.pair = Pair(
            self._filled(f"{name}.left", self.left), self._filled(f"{name}.right", self.right).mT
        )
        self.share = layer.loras / (layer.loras - 1) if how.center else 1.0
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
            own = side.values[: self.count]
            values[: len(own)] = own
        return Values(*padded)

    def measure(self, one: Delta) -> None:
        """Take down how much of a LoRA lies in the basis, and in the one made without it."""
        left, right = self.left.vectors, self.right.vectors
        core = (left.mT @ one.up) @ (one.down @ right)  # (m, m')
        less_left = without(self.left, rows(_transposed(one)) @ left, self.share, self.count)
        less_right = without(self.right, rows(one) @ right, self.share, self.count)
        whole = energy(one)
        self.both.append(core[: self.count, : self.count].square().sum().item() / whole)
        self.held_out.append((less_left.mT @ core @ less_right).square().sum().item() / whole)

    def row(self) -> Row:
        (outputs, inputs), count = self.layer.shape, self.count
        right, left = (float(side.shares()[:count][-1]) for side in (self.right, self.left))
        return Row(
            outputs,
            inputs,
            self.layer.loras,
            count,
            right,
            left,
            fmean(self.both),
            fmean(self.held_out),
            min(self.held_out),
            count * count / (outputs * inputs),
            self.layer.left.exact and self.layer.right.exact,
        )


def _transposed(one: Delta) -> Delta:
    return Delta(one.down.mT, one.up.mT, 1.0)


class Row(NamedTuple):
    """One layer of the report; shares of energy between 0 and 1.

    `both` is what L and R together hold of a LoRA, ‖LᵀΔWRᵀ‖²/‖ΔW‖², on average over the LoRAs; `held_out` the
    same for bases made without that LoRA; `random` what random directions hold on average, K²/(O·I).
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


# ------------------------------------------------------------------ a collection


class Extraction(NamedTuple):
    """How a basis is made. `sketch` columns are kept per layer and side, in float64."""

    rank: int = 16
    tau: float = 0.9
    center: bool = False
    normalize: bool = False
    sketch: int = 64


class Extracted(NamedTuple):
    """A basis and what is to be said about it."""

    layers: dict[str, Pair]
    values: dict[str, Values]
    table: dict[str, Row]
    loras: int  # files with a plain LoRA layer that is not zero
    other: Counter[str]  # layers and files left out, by kind
    few: dict[str, int]  # layers left out because fewer than LEAST LoRAs have them, and how many do
    facts: dict[str, str]  # of the base model, where all files agree


def extract(files: Sequence[Path], how: Extraction, *, progress: bool = True) -> Extracted:
    """The basis of a collection, one file in memory at a time, read twice (three times to centre).

    The result depends on the order of `files` only by rounding, and not at all for the same order. Raises
    `Refused` for fewer than `LEAST` LoRAs, where no layer is in as many, for a layer of two shapes, and for
    files that cannot be read.
    """
    other: Counter[str] = Counter()
    told: list[Mapping[str, str]] = []
    layers: dict[str, _Layer] = {}

    def pass_over(what: str) -> Iterator[tuple[Path, Lora]]:
        for path in tqdm(files, desc=what, unit="file", file=sys.stderr, disable=not progress):
            yield path, read_updates(path)

    for path, lora in pass_over("mean" if how.center else "directions"):
        other.update(lora.other)
        usable = list(_usable(lora, how))
        other.update({"layers that are zero": len(lora.updates) - len(usable)})
        told += [lora.metadata] if usable else []
        for name, one in usable:
            shape = (one.up.shape[0], one.down.shape[1])
            layer = layers.setdefault(name, _Layer(shape, path, how.sketch))
            if layer.shape != shape:
                raise Refused(
                    f"{name} is {shape[0]}×{shape[1]} in {path} and {layer.shape[0]}×{layer.shape[1]} in "
                    f"{layer.source}; they are for different base models, keep them in separate folders"
                )
            layer.loras += 1
            (layer.add_to_sum if how.center else layer.add)(one)
    few = {name: layer.loras for name, layer in layers.items() if layer.loras < LEAST}
    layers = {name: layer for name, layer in sorted(layers.items()) if name not in few}
    _refuse_small(len(told), layers, other)
    if how.center:
        for _, lora in pass_over("directions"):
            for name, one in _usable(lora, how):
                if name in layers and energy(one := layers[name].centred(one)) > 0:
                    layers[name].add(one)
        alike = [name for name, layer in layers.items() if layer.right.energy == 0]
        layers = {name: layer for name, layer in layers.items() if name not in alike}
        other["layers that are alike in every LoRA"] = len(alike)
        _refuse_small(len(told), layers, other)
    found = {name: _Found(name, layer, how) for name, layer in layers.items()}
    for _, lora in pass_over("leave-one-out"):
        for name, one in _usable(lora, how):
            if name in found and energy(one := layers[name].centred(one)) > 0:
                found[name].measure(one)
    return Extracted(
        {name: one.pair for name, one in found.items()},
        {name: one.values() for name, one in found.items()},
        {name: one.row() for name, one in found.items()},
        len(told),
        +other,
        few,
        _agreed(told),
    )


def _usable(lora: Lora, how: Extraction) -> Iterator[tuple[str, Delta]]:
    """The updates that are not zero, of length 1 where that is asked for."""
    for name, one in lora.updates.items():
        if (whole := energy(one)) > 0:
            yield name, Delta(one.up, one.down / math.sqrt(whole), 1.0) if how.normalize else one


def _refuse_small(loras: int, layers: Mapping[str, _Layer], other: Counter[str]) -> None:
    if layers and loras >= LEAST:
        return
    rest = ", ".join(f"{count} {kind}" for kind, count in sorted((+other).items()))
    why = f"no usable layer is in {LEAST} of the {loras} LoRAs" if loras >= LEAST else f"{loras} usable LoRAs"
    raise Refused(
        f"{why}, and {LEAST} are the fewest that can share anything (left out: {rest or 'nothing'}); "
        "give more LoRAs of one base model, or train with basis_path=auto:grad, which needs none"
    )


def _agreed(told: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What every LoRA says alike about its base model."""
    asked = {
        "base_hash": "lowrank.base_hash",
        "base_model": "lowrank.base_model",
        "sd_model_hash": "ss_new_sd_model_hash",
        "base_model_version": "ss_base_model_version",
    }
    found = {fact: {metadata.get(key) for metadata in told} - {"None"} for fact, key in asked.items()}
    return {fact: one for fact, values in found.items() if len(values) == 1 and (one := values.pop())}
