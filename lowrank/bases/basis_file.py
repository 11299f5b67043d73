"""Basis files: for each layer a left basis L (O, K) and a right basis R (K, I).

A method that uses a basis trains only the core C: ΔW = s · L · C · R. A basis comes from a collection of
LoRAs (`combine.shared_basis`), from the layer's own weight, or from random numbers; the last two are computed
here.

Our format is safetensors: `<layer>.left` (O, K) and `<layer>.right` (K, I), orthonormal, most important
direction first, and `<layer>.left_values` and `<layer>.right_values` (K,), their singular values. The
metadata describe the basis; `lowrank.basis_hash` is a hash of all tensors. Layer names are kohya's.

The older "row" layout is read too: `<layer>.lora_down.weight.basis` (I, K) and `.mean` (I,), `….lora_up.…`
(O, K) and (O,), layer names with a dot for every `_`. The mean becomes the first direction. As an offset it
would make ΔW ≠ 0 at the start. The "flat-joint" layout has equal keys, but each of its vectors is a whole
flattened matrix, r × I or O × r. It has no directions of single layers and is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank import __version__
from lowrank.bases.krylov import check_rank, top_subspace
from lowrank.errors import Refused
from lowrank.naming import keys
from lowrank.tensors import is_plain, read_tensors, stream_tensors

TENSORS = ("left", "right", "left_values", "right_values")
DEPENDENT = 1e-5  # a remainder below this fraction of a column's length is rounding of fp32 or fp16
_ROW = re.compile(r"^(.*)\.lora_(down|up)\.weight\.(basis|mean)$")
_DOTTED_TEXT = re.compile(r"^te(\d?)\.")
_MADE_BY = "make it with tools/extract_universal_basis.py"

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """The basis of one layer: the L and R of L · C · R."""

    left: Tensor  # (O, K) orthonormal columns, most important first
    right: Tensor  # (K, I) orthonormal rows, most important first


class Values(NamedTuple):
    """Weight of each direction in the collection: singular values of its stacked ΔW."""

    left: Tensor  # (K,)
    right: Tensor  # (K,)


@dataclass(frozen=True)
class BasisFile:
    """The content of a basis file, by layer name in the spelling of `keys.flat`.

    `facts`: `hash` of the tensors, `layout` ("native" or "row"), `kind`, and for our format the file's
    metadata. `values` is empty for the row layout, which has none.
    """

    source: str
    layers: Mapping[str, Pair]
    values: Mapping[str, Values]
    facts: Mapping[str, str]


class Matched(NamedTuple):
    """The layers of a basis file matched with those of a model, by the model's names."""

    pairs: dict[str, Pair]
    missing: tuple[str, ...]  # layers of the model that are not in the basis
    unused: tuple[str, ...]  # layers of the basis that are not in the model


# ------------------------------------------------------------------ files


def write_basis(
    path: str | Path,
    layers: Mapping[str, Pair],
    values: Mapping[str, Values],
    kind: str,
    facts: Mapping[str, str],
) -> str:
    """Write a basis file in fp32 with sorted keys and return its hash; equal bases give equal bytes.

    Names of `layers` are in the spelling of `keys.flat`; `facts` become metadata `lowrank.<fact>`.
    """
    tensors: dict[str, Tensor] = {}
    for name in sorted(layers):
        layer_tensors = (*layers[name], *values[name])
        tensors |= {
            f"{_kohya(name)}.{key}": x.float().cpu() for key, x in zip(TENSORS, layer_tensors, strict=True)
        }
    basis_hash = _hash(tensors)
    facts = {"kind": "basis", "version": __version__, "basis_kind": kind, "basis_hash": basis_hash, **facts}
    metadata = {f"lowrank.{key}": facts[key] for key in sorted(facts)}
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    stream_tensors(path, shapes, torch.float32, lambda key: tensors[key], metadata)
    return basis_hash


def read_basis(path: str | Path) -> BasisFile:
    """Read a basis file of our format or the row layout, in fp32 on the CPU; row layouts are orthonormalised.

    Raises `Refused` for a truncated file, a file of another kind, and values that are not finite.
    """
    state, metadata = read_tensors(path)
    for key, value in state.items():
        if not is_plain(value):
            raise Refused(f"{key} in {path} has NaN, infinite or whole-number values; {_MADE_BY} again")
    if metadata.get("lowrank.kind") == "basis":
        return _native(state, metadata, str(path))
    if any(_ROW.match(key) for key in state):
        return _row(state, str(path))
    raise Refused(
        f"{path} is no basis file: its tensors are {', '.join(list(state)[:2]) or 'none'}; "
        f"{_MADE_BY} from a folder of LoRA files"
    )


def _native(state: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> BasisFile:
    facts = {key.removeprefix("lowrank."): value for key, value in metadata.items()}
    if _hash(state) != facts.get("basis_hash"):
        raise Refused(
            f"{source} is damaged: its tensors do not match the hash in its metadata; {_MADE_BY} again"
        )
    layers, values = {}, {}
    for name in sorted({key.rpartition(".")[0] for key in state}):
        left, right, *singular = (state.get(f"{name}.{key}", torch.empty(())) for key in TENSORS)
        axes = [part.dim() for part in (left, right, *singular)]
        if axes != [2, 2, 1, 1] or not left.shape[1] == len(right) == len(singular[0]) == len(singular[1]):
            raise Refused(
                f"{source} has no whole basis of {name}, which is {', '.join(TENSORS)}; {_MADE_BY} again"
            )
        layers[keys.flat(name)], values[keys.flat(name)] = Pair(left, right), Values(*singular)
    facts |= {"hash": facts["basis_hash"], "kind": facts.get("basis_kind", ""), "layout": "native"}
    return BasisFile(source, layers, values, facts)


def _row(state: Mapping[str, Tensor], source: str) -> BasisFile:
    """Read the row layout; a layer with only one side is skipped with a warning."""
    sides: dict[str, dict[tuple[str, str], Tensor]] = {}
    for key, value in state.items():
        if match := _ROW.match(key):
            sides.setdefault(match[1], {})[match[2], match[3]] = value
    layers, incomplete = {}, []
    for name, parts in sorted(sides.items()):
        if not {("down", "basis"), ("up", "basis")} <= parts.keys():
            incomplete.append(name)
            continue
        up, down = (_with_mean(name, side, parts, source) for side in ("up", "down"))
        rank = min(up.shape[1], down.shape[1])
        if rank:
            layers[keys.flat(_from_dots(name))] = Pair(up[:, :rank], down[:, :rank].mT.contiguous())
    if incomplete:
        logger.warning(
            "%s: %d layers have only one of down and up and are ignored, for example %s",
            *(source, len(incomplete), incomplete[0]),
        )
    if not layers:
        raise Refused(f"{source} has no layer with both a down and an up basis; {_MADE_BY}")
    tensors = {f"{name}.{key}": x for name, pair in layers.items() for key, x in pair._asdict().items()}
    return BasisFile(source, layers, {}, {"hash": _hash(tensors), "kind": "universal", "layout": "row"})


def _with_mean(name: str, side: str, parts: Mapping[tuple[str, str], Tensor], source: str) -> Tensor:
    """Return (n, K') orthonormal columns that span the mean (first) and the basis of one side of a layer."""
    columns = parts[side, "basis"].double()
    mean = parts.get((side, "mean"), columns.new_zeros(columns.shape[:1])).double()
    if columns.dim() != 2 or mean.shape != columns.shape[:1]:
        raise Refused(
            f"{source}: {name} has a {side} basis of shape {tuple(columns.shape)} and a mean of shape "
            f"{tuple(mean.shape)}, which must be (n, K) and (n,); {_MADE_BY} again"
        )
    return orthonormal(torch.cat([mean[:, None], columns], dim=1)).float()


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormalise (n, c) to (n, K'), dropping columns that depend on earlier ones; float64."""
    vectors: list[Tensor] = []
    for column in columns.mT:
        remainder = column
        for _ in range(2):  # a second pass removes the rounding of the first
            remainder = remainder - sum((v * (v @ remainder) for v in vectors), torch.zeros_like(remainder))
        if len(vectors) < len(columns) and remainder.norm() > DEPENDENT * column.norm():
            vectors.append(remainder / remainder.norm())
    return torch.stack(vectors, dim=1) if vectors else columns[:, :0]


def _from_dots(name: str) -> str:
    """Return `te1.text.model…` or `te.text.model…` as kohya's `lora_te1_…`; U-Net names are unchanged."""
    text = _DOTTED_TEXT.match(name)
    return f"lora_te{text[1]}_" + name[text.end() :].replace(".", "_") if text else name


def _kohya(name: str) -> str:
    """Return the key in a file of a layer that `keys.flat` names `name`; inverse of `keys.flat`."""
    return "lora_" + (name.replace("|", "_") if keys.is_flat_text(name) else f"unet_{name}")


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(json.dumps([key, list(tensors[key].shape)]).encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()


# ------------------------------------------------------------------ matching with a model


def for_layers(
    basis: BasisFile,
    shapes: Mapping[str, tuple[int, int]],
    spellings: Mapping[str, Collection[str]] | None = None,
) -> Matched:
    """Find the basis of each layer of a model, given the layers' shapes (O, I·k·k) by name.

    `spellings` are the names of each layer in files (`Target.spellings`); without them a layer is looked up
    under its own name. Raises `Refused` if a shape differs (another model, or the flat-joint layout), and if
    no layer matches.
    """
    spellings = spellings or {}
    pairs: dict[str, Pair] = {}
    used = set()
    for name, (outputs, inputs) in shapes.items():
        matches = {keys.flat(name), *spellings.get(name, ())} & basis.layers.keys()
        if matches:
            key = min(matches)
            used.add(key)
            pairs[name] = pair = basis.layers[key]
            if (len(pair.left), pair.right.shape[1]) != (outputs, inputs):
                _refuse_shape(basis, name, pair, (outputs, inputs))
    missing = tuple(name for name in shapes if name not in pairs)
    unused = tuple(name for name in basis.layers if name not in used)
    if not pairs:
        raise Refused(
            f"{basis.source} has no layer of this model: the file has {', '.join(unused[:2])}, the model "
            f"{', '.join(missing[:2])}; use a basis made from adapters of this model"
        )
    return Matched(pairs, missing, unused)


def _refuse_shape(basis: BasisFile, name: str, pair: Pair, shape: tuple[int, int]) -> None:
    file_shape = (len(pair.left), pair.right.shape[1])
    ranks = {a // b if a % b == 0 else 0 for a, b in zip(file_shape, shape, strict=True)}
    if basis.facts["layout"] == "row" and len(ranks) == 1 and 0 not in ranks:
        raise Refused(
            f"{basis.source} has vectors of {file_shape[1]} and {file_shape[0]} numbers for {name} with "
            f"{shape[1]} inputs and {shape[0]} outputs: they are matrices of rank {ranks.pop()} (the "
            f"flat-joint layout) or of another model; {_MADE_BY} from the LoRA files"
        )
    raise Refused(
        f"{name} is {shape[0]}×{shape[1]} in this model and {file_shape[0]}×{file_shape[1]} in "
        f"{basis.source}; use a basis made from adapters of this model"
    )


# ------------------------------------------------------------------ bases that need no data


def weight_basis(weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Pair]:
    """Return the top-K singular directions of each W (O, I), in fp32 on the device of W (`auto:weight`).

    Raises `Refused` for a rank over min(O, I) and for a weight with NaN or infinite values.
    """
    bases = {}
    for name in weights:
        u, _, vh, _ = top_subspace(weights[name], ranks[name], name=name)
        bases[name] = Pair(u.float(), vh.float())
    return bases


def random_basis(weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Pair]:
    """Return random orthonormal directions for each layer, seeded by its name (`auto:random`, a control).

    Raises `Refused` for a rank over min(O, I).
    """
    bases = {}
    for name in weights:
        weight, rank = weights[name], ranks[name]
        check_rank(weight, rank, name)
        sides = zip(("left", "right"), weight.shape, strict=True)
        left, right = (random_columns(f"{keys.flat(name)}.{side}", n, rank).float() for side, n in sides)
        bases[name] = Pair(left.to(weight.device), right.mT.contiguous().to(weight.device))
    return bases


def random_columns(label: str, n: int, count: int, beside: Tensor | None = None) -> Tensor:
    """Return random orthonormal columns (n, count) seeded by `label`, orthogonal to `beside` (n, m)."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little") >> 1
    drawn = torch.randn(n, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = drawn[:, :0] if beside is None else beside
    q, r = torch.linalg.qr(torch.cat([first, drawn], dim=1))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0))[:, first.shape[1] :]
