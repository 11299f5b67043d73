"""Bases that an adapter's core lives in: files of a left L (O, K) and a right R (K, I) for each layer.

With them a method trains only a core: ΔW = s · L · C · R. Where they come from: a collection of LoRAs
(`combine.shared_basis`), the layer's own weight, or chance; the last two are made here and need no data.

Our file is safetensors: `<layer>.left` (O, K) and `<layer>.right` (K, I), orthonormal, most important
direction first, with `<layer>.left_values` and `<layer>.right_values` (K,), their singular values. The
metadata say what it is; `lowrank.basis_hash` is that of all tensors. Layers have kohya's form of name.

The older ROW layout is read too: `<layer>.lora_down.weight.basis` (I, K) and `.mean` (I,), `….lora_up.…`
(O, K) and (O,), names with a dot for every `_`. A mean is no offset here, because ΔW would not be 0 at the
start: it becomes the first direction. The FLAT-JOINT layout, which has the same keys and whole r × I matrices
as vectors, holds no directions of a layer and is refused.
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
from lowrank.tensors import read_tensors, stream_tensors

TENSORS = ("left", "right", "left_values", "right_values")
DEPENDENT = 1e-5  # of a column's length: what is left of it is rounding of fp32 or fp16
_ROW = re.compile(r"^(.*)\.lora_(down|up)\.weight\.(basis|mean)$")
_DOTTED_TEXT = re.compile(r"^te(\d?)\.")
_MADE_BY = "make it with tools/extract_universal_basis.py"

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """What a core stands between: L · C · R."""

    left: Tensor  # (O, K) orthonormal columns, most important first
    right: Tensor  # (K, I) orthonormal rows, most important first


class Values(NamedTuple):
    """How much of the collection lies in each direction: singular values of the stacked ΔW."""

    left: Tensor  # (K,)
    right: Tensor  # (K,)


@dataclass(frozen=True)
class BasisFile:
    """A basis file: pairs by layer, spelled as `keys.flat` spells them.

    `facts`: `hash` of the tensors, `layout` ("native" or "row"), `kind`, and for our files what their
    metadata say. `values` is empty where a file tells none.
    """

    source: str
    layers: Mapping[str, Pair]
    values: Mapping[str, Values]
    facts: Mapping[str, str]


class Matched(NamedTuple):
    """A basis laid over a model: pairs by the model's names, and what found no partner."""

    pairs: dict[str, Pair]
    missing: tuple[str, ...]  # layers of the model that the basis has not
    unused: tuple[str, ...]  # layers of the basis that the model has not


# ------------------------------------------------------------------ files


def write_basis(
    path: str | Path,
    layers: Mapping[str, Pair],
    values: Mapping[str, Values],
    kind: str,
    facts: Mapping[str, str],
) -> str:
    """Write a basis in fp32 under sorted names and return its hash; equal bases give equal bytes.

    `layers` are named as `keys.flat` names them; `facts` become metadata `lowrank.<fact>`.
    """
    tensors: dict[str, Tensor] = {}
    for name in sorted(layers):
        all_four = (*layers[name], *values[name])
        tensors |= {
            f"{_kohya(name)}.{key}": x.float().cpu() for key, x in zip(TENSORS, all_four, strict=True)
        }
    found = _hash(tensors)
    told = {"kind": "basis", "version": __version__, "basis_kind": kind, "basis_hash": found, **facts}
    metadata = {f"lowrank.{key}": told[key] for key in sorted(told)}
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    stream_tensors(path, shapes, torch.float32, lambda key: tensors[key], metadata)
    return found


def read_basis(path: str | Path) -> BasisFile:
    """A basis file of our format or of the row layout, which is orthonormalised, in fp32 on the CPU.

    Raises `Refused` for a file that is not whole, holds something else, or values that are no finite numbers.
    """
    state, metadata = read_tensors(path)
    for key, value in state.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise Refused(f"{key} in {path} has NaN, infinite or whole-number values; {_MADE_BY} again")
    if metadata.get("lowrank.kind") == "basis":
        return _native(state, metadata, str(path))
    if any(_ROW.match(key) for key in state):
        return _row(state, str(path))
    raise Refused(
        f"{path} is no basis: its tensors are named like {', '.join(list(state)[:2]) or 'nothing at all'}; "
        f"{_MADE_BY} from a folder of LoRA files"
    )


def _native(state: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> BasisFile:
    facts = {key.removeprefix("lowrank."): value for key, value in metadata.items()}
    if _hash(state) != facts.get("basis_hash"):
        raise Refused(f"{source} is damaged: its tensors are not those it was written with; {_MADE_BY} again")
    layers, values = {}, {}
    for name in sorted({key.rpartition(".")[0] for key in state}):
        left, right, *both = (state[f"{name}.{key}"] for key in TENSORS)
        layers[keys.flat(name)], values[keys.flat(name)] = Pair(left, right), Values(*both)
    facts |= {"hash": facts["basis_hash"], "kind": facts["basis_kind"], "layout": "native"}
    return BasisFile(source, layers, values, facts)


def _row(state: Mapping[str, Tensor], source: str) -> BasisFile:
    """The older layout; a layer with one side only, as its extractor leaves when memory ends, is left out."""
    sides: dict[str, dict[tuple[str, str], Tensor]] = {}
    for key, value in state.items():
        if found := _ROW.match(key):
            sides.setdefault(found[1], {})[found[2], found[3]] = value
    layers, halves = {}, []
    for name, parts in sorted(sides.items()):
        if not {("down", "basis"), ("up", "basis")} <= parts.keys():
            halves.append(name)
            continue
        turned = [_folded(name, side, parts, source) for side in ("up", "down")]
        rank = min(x.shape[1] for x in turned)
        if rank:
            layers[keys.flat(_from_dots(name))] = Pair(
                turned[0][:, :rank], turned[1][:, :rank].mT.contiguous()
            )
    if halves:
        logger.warning(
            "%s: %d layers have only one of down and up and are left out: %s", source, len(halves), halves[0]
        )
    if not layers:
        raise Refused(f"{source} has no layer with both a down and an up basis; {_MADE_BY}")
    tensors = {f"{name}.{key}": x for name, pair in layers.items() for key, x in pair._asdict().items()}
    return BasisFile(source, layers, {}, {"hash": _hash(tensors), "kind": "universal", "layout": "row"})


def _folded(name: str, side: str, parts: Mapping[tuple[str, str], Tensor], source: str) -> Tensor:
    """(n, K') orthonormal columns that span the mean, first, and the basis of one side of a layer."""
    columns = parts[side, "basis"].double()
    mean = parts.get((side, "mean"), columns.new_zeros(len(columns))).double()
    if columns.dim() != 2 or mean.shape != columns.shape[:1]:
        raise Refused(
            f"{source}: {name} has a {side} basis of shape {tuple(columns.shape)} and a mean of "
            f"{tuple(mean.shape)}, and must have (n, K) and (n,); {_MADE_BY} again"
        )
    return orthonormal(torch.cat([mean[:, None], columns], dim=1)).float()


def orthonormal(columns: Tensor) -> Tensor:
    """(n, K') from (n, c) in float64: the same span column by column, without those that depend on others."""
    made: list[Tensor] = []
    for column in columns.mT:
        rest = column
        for _ in range(2):  # twice is enough
            rest = rest - sum((v * (v @ rest) for v in made), torch.zeros_like(rest))
        if len(made) < len(columns) and rest.norm() > DEPENDENT * column.norm():
            made.append(rest / rest.norm())
    return torch.stack(made, dim=1) if made else columns[:, :0]


def _from_dots(name: str) -> str:
    """`te1.text.model…` and `te.text.model…` as kohya's `lora_te1_…`; the U-Net's names need nothing."""
    text = _DOTTED_TEXT.match(name)
    return f"lora_te{text[1]}_" + name[text.end() :].replace(".", "_") if text else name


def _kohya(name: str) -> str:
    """The file's name of what `keys.flat` calls `name`, which reads it back."""
    return "lora_" + (name.replace("|", "_") if keys.is_flat_text(name) else f"unet_{name}")


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(json.dumps([key, list(tensors[key].shape)]).encode())
        digest.update(tensors[key].contiguous().numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------ laid over a model


def for_layers(
    basis: BasisFile,
    shapes: Mapping[str, tuple[int, int]],
    spellings: Mapping[str, Collection[str]] | None = None,
) -> Matched:
    """The basis of each layer of a model, by the model's names, from shapes (O, I·k·k) by name.

    `spellings` are the names that files give each layer (`Target.spellings`); without them a layer is found
    under its own name in any dialect. Raises `Refused` where a shape differs, which is another model or the
    flat-joint layout, and where nothing matches.
    """
    told = spellings or {}
    pairs: dict[str, Pair] = {}
    used = set()
    for name, (outputs, inputs) in shapes.items():
        found = {keys.flat(name), *told.get(name, ())} & basis.layers.keys()
        if found:
            spelled = min(found)
            used.add(spelled)
            pairs[name] = pair = basis.layers[spelled]
            if (len(pair.left), pair.right.shape[1]) != (outputs, inputs):
                _refuse_shape(basis, name, pair, (outputs, inputs))
    missing = tuple(name for name in shapes if name not in pairs)
    unused = tuple(name for name in basis.layers if name not in used)
    if not pairs:
        raise Refused(
            f"{basis.source} has no layer of this model: it holds {', '.join(unused[:2])} and the model "
            f"{', '.join(missing[:2])}; it was made from adapters of another model"
        )
    return Matched(pairs, missing, unused)


def _refuse_shape(basis: BasisFile, name: str, pair: Pair, shape: tuple[int, int]) -> None:
    have = (len(pair.left), pair.right.shape[1])
    ranks = {a // b if a % b == 0 else 0 for a, b in zip(have, shape, strict=True)}
    if basis.facts["layout"] == "row" and len(ranks) == 1 and 0 not in ranks:
        raise Refused(
            f"{basis.source} has vectors of {have[1]} and {have[0]} numbers for {name}: matrices of rank "
            f"{ranks.pop()} (the flat-joint layout) or directions of another model, none of its {shape[1]} "
            f"inputs and {shape[0]} outputs; {_MADE_BY} from the LoRA files themselves"
        )
    raise Refused(
        f"{name} is {shape[0]}×{shape[1]} in this model and {have[0]}×{have[1]} in {basis.source}; it was "
        "made from adapters of another model"
    )


# ------------------------------------------------------------------ bases that need no data


def weight_basis(weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Pair]:
    """`auto:weight`: the top-K singular directions of each W (O, I), in fp32 where W is.

    Raises `Refused` for a rank over min(O, I) and for a weight with NaN or infinite values.
    """
    found = {}
    for name in weights:
        u, _, vh, _ = top_subspace(weights[name], ranks[name], name=name)
        found[name] = Pair(u.float(), vh.float())
    return found


def random_basis(weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Pair]:
    """`auto:random`: uniformly random orthonormal directions that depend on the layer's name alone, the
    control that every other basis must beat. Raises `Refused` for a rank over min(O, I).
    """
    found = {}
    for name in weights:
        weight, rank = weights[name], ranks[name]
        check_rank(weight, rank, name)
        sides = zip(("left", "right"), weight.shape, strict=True)
        left, right = (random_columns(f"{keys.flat(name)}.{side}", n, rank).float() for side, n in sides)
        found[name] = Pair(left.to(weight.device), right.mT.contiguous().to(weight.device))
    return found


def random_columns(label: str, n: int, count: int, beside: Tensor | None = None) -> Tensor:
    """(n, count) random orthonormal columns from a label, orthogonal to those of `beside` (n, m); float64."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little") >> 1
    drawn = torch.randn(n, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given = drawn[:, :0] if beside is None else beside
    q, r = torch.linalg.qr(torch.cat([given, drawn], dim=1))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0))[:, given.shape[1] :]
